"""How the agent enters its namespaces, and where its commands live.

First the agent makes or joins a network namespace (`create`, `attach`); then it makes the PID and mount namespaces of
its commands, and starts the holder in them (`open_quarters`).  What fails is told to the owner with the step that
failed, and ends the agent.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
from contextlib import suppress

from netns_kit.host import abi
from netns_kit.host.libc import check, libc

from .agent_common import children_of, failure, read_file, write_file
from .links import raise_link

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer than all imports here

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

READY = b"{}"
"""What a child of the agent reports when it is where it is to be."""


def create(ids: str, control: socket.socket) -> None:
    """Make a user and a network namespace.  The steps have names, by which an error tells its cause."""
    uid, gid = os.geteuid(), os.getegid()
    step = "unshare user"
    try:
        check(libc.unshare(abi.CLONE_NEWUSER))
        step = "map"
        if ids == "subids":  # to map other ids than the own takes privilege outside
            leave_keys()
            control.send(b'{"state": "map"}')
            if not control.recv(1 << 10):
                os._exit(0)
        else:
            write_file("/proc/self/setgroups", "deny")
            write_file("/proc/self/uid_map", f"{uid if ids == 'same' else 0} {uid} 1")
            write_file("/proc/self/gid_map", f"{gid if ids == 'same' else 0} {gid} 1")
        hide()  # not before: the id maps of a process that is not dumpable are root's to write
        step = "unshare net"
        check(libc.unshare(abi.CLONE_NEWNET))
        with suppress(OSError):  # EROFS in some containers: low ports need a privilege then, as outside
            write_file("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")
        step = "loopback"
        raise_link("lo")
    except OSError as exc:
        fail(control, exc, step, filtered=is_filtered(step))


def is_filtered(step: str) -> bool:
    """Whether a seccomp filter denies the step.

    Impossible flags are EINVAL to the kernel, before it looks at privileges; but a filter answers first.
    """
    flag = {
        "unshare user": abi.CLONE_NEWUSER,
        "unshare net": abi.CLONE_NEWNET,
        "unshare pids": abi.CLONE_NEWPID,
        "unshare mounts": abi.CLONE_NEWNS,
    }.get(step)
    try:
        check(0 if flag is None else libc.unshare(flag | 1))
    except OSError as exc:
        return exc.errno != errno.EINVAL
    return False


def hide() -> None:
    """Keep the memory, environment and descriptors of this process from all without privilege outside."""
    check(libc.prctl(abi.PR_SET_DUMPABLE, 0, 0, 0, 0))


def leave_keys() -> None:
    """Take an empty session keyring.  Keys in the caller's are for every process that has inherited it, whatever
    its uid is (session-keyring(7)).
    """
    keyctl = abi.SYS_KEYCTL.get(os.uname().machine, abi.SYS_KEYCTL_ELSEWHERE)
    try:
        check(libc.syscall(keyctl, abi.KEYCTL_JOIN_SESSION_KEYRING, None), "session keyring")
    except OSError as exc:
        if exc.errno not in {errno.ENOSYS, errno.EPERM}:  # no keys in this kernel, or a filter, commands' too
            raise


def attach(fd: int, control: socket.socket) -> bool:
    """Join a network namespace, and before it the user namespace that owns it, if that is another.

    Return whether that is another user's.
    """
    step = "inspect"
    stranger = False
    try:
        hide()  # programs of that namespace may be waiting for it
        if fcntl.ioctl(fd, abi.NS_GET_NSTYPE) != abi.CLONE_NEWNET:
            raise OSError(errno.EINVAL, "not a network namespace")
        step = "owner"
        owner = fcntl.ioctl(fd, abi.NS_GET_USERNS)
        ours, theirs = os.stat("/proc/self/ns/user"), os.fstat(owner)
        if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
            step = "setns user"
            stranger = join_user(owner)
        os.close(owner)
        step = "setns net"
        check(libc.setns(fd, abi.CLONE_NEWNET))
        os.close(fd)
    except OSError as exc:
        fail(control, exc, "identity" if isinstance(exc, Unmapped) else step)
    return stranger


class Unmapped(OSError):
    """A user namespace that has no identity for a caller who is not its owner."""


def join_user(fd: int) -> bool:
    """Join a user namespace and be its owner there: uid, gid and no group of the caller's.

    Return whether the caller was another user.

    The caller may be another user, root above all, whose ids mean more outside than the owner's.  Such a caller
    becomes the owner completely, or root of the namespace if that has no id for its owner.  The owner keeps its ids,
    as the namespace counts them.

    Raises:
        Unmapped: There is no such identity, or a group of the caller's cannot be given up.
        OSError: The namespace cannot be joined.
    """
    stranger = set(os.getresuid()) != {owner_of(fd)}
    groups = os.getgroups() if stranger else []
    if stranger:
        leave_keys()
    if groups:
        with suppress(PermissionError):  # without CAP_SETGID here; inside it may be possible
            os.setgroups([])
            groups = []
    check(libc.setns(fd, abi.CLONE_NEWUSER))
    hide()  # Fact: other ids, or capabilities, make a process as dumpable as the sysctl fs.suid_dumpable has it
    uids, gids = mapped("uid"), mapped("gid")
    uid = owner_of(fd)
    if uid == int(read_file("/proc/sys/kernel/overflowuid")):  # the owner has no id here
        uid = 0
    elif not stranger:
        return False
    if not any(uid in each for each in uids) or not gids:
        if not stranger:  # nobody has an id here, and the owner needs none to be the owner
            return False
        raise Unmapped(errno.EINVAL, "the user namespace has no id for its owner, nor for root")
    if groups:
        try:
            os.setgroups([])
        except OSError as exc:
            raise Unmapped(exc.errno, "the caller's groups cannot be given up (setgroups is denied)") from exc
    gid = uid if any(uid in each for each in gids) else gids[0].start
    os.setresgid(gid, gid, gid)
    hide()
    os.setresuid(uid, uid, uid)
    hide()
    return stranger


def owner_of(fd: int) -> int:
    """Return the uid that made a user namespace, as the caller's namespace counts."""
    (uid,) = struct.unpack("I", fcntl.ioctl(fd, abi.NS_GET_OWNER_UID, bytes(4)))
    return int(uid)


def mapped(kind: str) -> list[range]:
    """Return the ids of a kind, "uid" or "gid", that the caller's user namespace has."""
    lines = [line.split() for line in read_file(f"/proc/self/{kind}_map").splitlines()]
    return [range(int(first), int(first) + int(count)) for first, _, count in lines]


def fail(control: socket.socket, exc: OSError, step: str, *, filtered: bool = False) -> NoReturn:
    control.send(failed(exc, step, filtered=filtered))
    os._exit(1)


def failed(exc: OSError, step: str, *, filtered: bool = False) -> bytes:
    return json.dumps({"state": "failed", "filtered": filtered, **failure(exc, step)}).encode()


# -- where commands live -------------------------------------------------------------------------------


class Quarters:
    """The namespaces that commands are started in.

    `holder` is the process by which others find them: the agent ends with it.  `mounts` is a descriptor of its mount
    namespace, if that is not the agent's; then `parent` is a pipe by which the agent asks its parent to continue the
    owner.  `of_stranger`: commands are another user than the owner.  `limits` are how many descriptors commands may
    have: the soft limit and the hard one.
    """

    __slots__ = ("holder", "limits", "mounts", "of_stranger", "parent")

    def __init__(self, holder: int, mounts: int | None = None, parent: int | None = None) -> None:
        self.holder = holder
        self.mounts = mounts
        self.parent = parent
        self.of_stranger = False
        self.limits = (ctypes.c_ulong * 2)()

    @property
    def is_ending(self) -> bool:
        """Whether the holder has begun to end.

        As process 1 of a PID namespace it kills the others there, and waits until they have been collected.
        """
        with open(f"/proc/{self.holder}/stat", "rb") as file:
            flags = int(file.read().rpartition(b")")[2].split()[6])
        return flags & abi.PF_EXITING != 0

    def enter(self, here: int | None) -> None:
        """Join the mount namespace, and enter the directory `here`, a descriptor of another one.

        It is entered by its name if that leads there, so that it has a name here; if it may not be entered, the root
        directory is the current one.
        """
        name = None if here is None else os.readlink(f"/proc/self/fd/{here}")
        if self.mounts is not None:
            check(libc.setns(self.mounts, abi.CLONE_NEWNS))  # from the root directory on
        if here is None or name is None:
            return
        with suppress(OSError):
            os.chdir(name)
            if os.path.samestat(os.stat("."), os.fstat(here)):
                return
        try:
            os.fchdir(here)
        except PermissionError:
            os.chdir("/")


def open_quarters(pids: str, control: socket.socket, owner: int) -> Quarters:
    """Start the holder and tell the owner that the agent is ready; with `pids` "own" its new parent tells that."""
    step = "unshare pids"
    try:
        if pids == "own":
            check(libc.unshare(abi.CLONE_NEWPID))
            told, telling = os.pipe2(os.O_CLOEXEC)
            asked, asking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            agent = os.fork()
            if agent == 0:
                os.close(told)
                os.close(asked)
                return become_agent(telling, asking)
            os.close(telling)
            hear(told, control.send)
            holders = children_of(agent)
            if not holders:  # the agent has ended: the owner has hung up
                os._exit(1)
            tell_ready(control, agent, holders[0])
            become_parent(agent, owner, asked)
        step = "holder"
        told, telling = os.pipe2(os.O_CLOEXEC)
        holder = os.fork()
        if holder == 0:
            os.close(told)
            become_holder(telling, own=False)
        os.close(telling)
        hear(told, control.send)
        tell_ready(control, os.getpid(), holder)
        return Quarters(holder)
    except OSError as exc:
        fail(control, exc, step, filtered=is_filtered(step))


def tell_ready(control: socket.socket, agent: int, holder: int) -> None:
    try:
        control.send(json.dumps({"state": "ready", "agent": agent, "holder": holder}).encode())
    except BrokenPipeError:  # the owner has hung up
        os._exit(1)


def hear(told: int, pass_on: Callable[[bytes], object]) -> None:
    """Wait for a child's report.  If it is not `READY`, pass it on and end."""
    with open(told, "rb") as file:
        said = file.read().lstrip()
    if said != READY:
        pass_on(said or failed(OSError(errno.EPERM, "killed"), "unshare pids"))
        os._exit(1)


def become_parent(agent: int, owner: int, asked: int) -> NoReturn:
    """Wait until the agent or the owner has ended, and end.  When asked, continue the owner for the agent."""
    poll = select.poll()
    ended = os.pidfd_open(agent)
    close_all_but({owner, ended, asked})
    for fd in (owner, ended, asked):
        poll.register(fd, select.POLLIN)
    check(libc.prctl(abi.PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0))
    while not {owner, ended} & dict(poll.poll()).keys():
        if os.read(asked, 4096):
            signal.pidfd_send_signal(owner, signal.SIGCONT)
        else:  # it is about to end, and everything in its PID namespace before it
            poll.unregister(asked)
    os._exit(0)


def become_agent(report: int, parent: int) -> Quarters:
    """Be process 1 of a PID namespace that ends with the parent; start the holder as process 1 of one below it."""
    step = "unshare mounts"
    try:
        die_with_parent(report)
        mount_proc()
        step = "unshare pids"
        check(libc.unshare(abi.CLONE_NEWPID))
        step = "holder"
        told, telling = os.pipe2(os.O_CLOEXEC)
        holder = os.fork()
        if holder == 0:
            os.close(told)
            os.close(report)
            become_holder(telling, own=True)
        os.close(telling)
        hear(told, lambda said: os.write(report, said))
        mounts = os.open(f"/proc/{holder}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        os.write(report, READY)
        os.close(report)
        return Quarters(holder, mounts, parent)
    except OSError as exc:
        os.write(report, failed(exc, exc.filename or step, filtered=is_filtered(step)))
        os._exit(1)


def become_holder(report: int, *, own: bool) -> NoReturn:
    """Be the process by which others find the namespaces.  It has nothing that commands may not have."""
    step = "unshare mounts"
    try:
        if own:
            mount_proc()
        else:
            die_with_parent(report)
        os.setsid()  # its tracer could signal its process group, the owner's, and use its terminal
        os.chdir("/")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans that end are gone
        close_all_but({report})
        check(libc.prctl(abi.PR_SET_DUMPABLE, 1, 0, 0, 0))
        os.write(report, READY)
        os.close(report)
        while True:
            signal.pause()
    except OSError as exc:
        os.write(report, failed(exc, exc.filename or step, filtered=is_filtered(step)))
    finally:
        os._exit(1)


def mount_proc() -> None:
    """Make a mount namespace in which /proc shows the caller's PID namespace.

    What is mounted outside later is seen inside, and not the other way round.
    """
    check(libc.unshare(abi.CLONE_NEWNS))
    check(libc.mount(None, b"/", None, abi.MS_REC | abi.MS_SLAVE, None))
    check(
        libc.mount(b"proc", b"/proc", b"proc", abi.MS_NOSUID | abi.MS_NODEV | abi.MS_NOEXEC, None),
        "mount proc",
    )


def die_with_parent(report: int) -> None:
    """Have the kernel kill this process when its parent ends.  If it has ended, writing to `report` fails."""
    check(libc.prctl(abi.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    os.write(report, b" ")


def close_all_but(kept: set[int]) -> None:
    """Close every descriptor but those of `kept`."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in kept:
            with suppress(OSError):  # that of the directory was closed already
                os.close(fd)
