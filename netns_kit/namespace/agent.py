"""The process inside: holds a namespace, opens things there and passes the descriptors out.

It is a program: `python -S -E -I -c BOOT CONTROL OWNER START PACKAGE`, with one end of a SOCK_SEQPACKET socketpair,
a pidfd of the owner, a JSON object saying which namespace, and where this file is found.  It enters the
namespace, says so with one record on the control socket, and then serves requests until its owner is gone.

Words.  A *request* is one record on the control socket: JSON and descriptors.  The first descriptor is the
far end of a fresh socketpair, the *conversation*, on which the answer goes; so requests need no numbers, no
lock and no order, and whoever loses interest just closes his end.  A request of more than 32 KiB is the
single byte `@` and its text is in a memfd, the last descriptor.  A *command* is a child made by `spawn`; its
conversation stays open: the first record out says that it runs, the last how it ended.  If the client
closes or shuts down its end in between, the command and its descendants are killed.  A record in is one byte:
the number of a signal that the client has received and passes on, or 0, and then a record goes out
each time that the command has been stopped.

Signals.  The agent is in its client's process group, as a command is unless it has gone to another, and reads the
signals that come to it from a signalfd.  Such a one was sent to the group, by a terminal or by kill(2): the command
has it already, and when the client passes it on it is not sent a second time.

Hostile commands.  A command may be root of the user namespace, and have the owner's own uid outside, so the agent
counts on nothing that such a program could reach.  It is not dumpable (prctl(2)), from before the first command or
the first step into somebody else's namespace: who wants its memory, environment or descriptors needs CAP_SYS_PTRACE
in the user namespace it was executed in, which nobody inside has.  Commands live in a PID namespace where the agent
has no number, so that no signal reaches it either, and are in sessions of their own, as the holder is, without the
owner's process group and terminal.  What is forked for a command enters the mounts of commands before it has let go
of what is the agent's, so it loads nothing from there (`load_nothing`).

    parent                what the owner has executed, and waits for: it does nothing but end with one of the two
      agent               process 1 of a PID namespace: what this file is about
        holder            process 1 of a PID namespace below that, and of the mount namespace with its /proc
        command, ...      in the holder's PID namespace and mount namespace

The agent has PR_SET_PDEATHSIG, so it is killed with its parent however that dies; and the kernel kills everything in
a PID namespace, and in those below it, with its process 1.  No command can see either, so none can keep this from
happening.  The holder owns nothing and is open to all: it is the process by which others find the namespaces
(`nsenter --target`), it inherits orphans, and as process 1 it takes no signal from a command.

With `pids` "host" there is no PID namespace and no parent: the holder is a child of the agent beside the commands.
They have PR_SET_PDEATHSIG, which a command can take back; and a command with the agent's uid can stop or kill the
agent.

Death.  Two things end the agent: end of file on the control socket, and the owner's pidfd (a fork of the
owner may hold a copy of the socket).  PR_SET_PDEATHSIG would not do, it follows the thread that started us; but its
signal is SIGCONT, so that who was stopped wakes up to find the owner gone.  As a child subreaper an agent that is not
process 1 inherits every orphan below it, so killing its children until there are none leaves nothing.

Law of this file: the standard library only, cheap imports only, one poll loop, one thread.  A bad request or
a failing operation is answered with its errno; it never ends the agent.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

# <linux/sched.h>, <linux/prctl.h>, <linux/mount.h>, <linux/nsfs.h>
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CAP_SYS_ADMIN = 21
PF_EXITING = 4  # among the flags that proc_pid_stat(5) shows
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 0x1000, 0x4000, 0x40000, 0x80000
MNT_DETACH = 2
OPEN_TREE, MOVE_MOUNT = 428, 429  # system calls, alike on all machines
AT_FDCWD, AT_EMPTY_PATH, OPEN_TREE_CLONE = -100, 0x1000, 1
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_SYMLINKS = 4, 0x10
KEYCTL_JOIN_SESSION_KEYRING = 1
KEYCTL = {
    "x86_64": 250,
    "i686": 288,
    "armv6l": 311,
    "armv7l": 311,
    "ppc64": 271,
    "ppc64le": 271,
    "s390x": 280,
}
KEYCTL_ELSEWHERE = 219  # asm-generic/unistd.h
RLIMIT_NOFILE = 7  # asm-generic/resource.h; `resource` would take longer to import than to use
NS_GET_USERNS = 0xB701
NS_GET_NSTYPE = 0xB703
NS_GET_OWNER_UID = 0xB704

# <linux/sockios.h>, <linux/if.h>, <linux/route.h>, <linux/if_tun.h>
SIOCADDRT = 0x890B
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
SIOCSIFADDR, SIOCSIFNETMASK = 0x8916, 0x891C
SIOCGIFINDEX = 0x8933
SIOCSIFMTU = 0x8922
SIOCSIFHWADDR = 0x8924
TUNSETIFF = 0x400454CA
TUNGETIFF = 0x800454D2
IFF_UP = 1
RTF_UP, RTF_GATEWAY = 1, 2
ARPHRD_ETHER = 1
RTM_SETLINK, IFLA_TXQLEN = 19, 13
RTM_NEWADDR, IFA_ADDRESS, IFA_F_NODAD = 20, 1, 0x02
RTM_NEWNEIGH, NDA_DST, NDA_LLADDR, NUD_PERMANENT = 28, 1, 2, 0x80
RTM_NEWROUTE, RTA_OIF, RTA_GATEWAY = 24, 4, 5
RT_TABLE_MAIN, RTPROT_BOOT, RTN_UNICAST = 254, 3, 1
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 1, 4, 0x100, 0x200, 0x400

# <sys/inotify.h>
IN_MOVED, IN_CREATE, IN_DELETE = 0xC0, 0x100, 0x200

RECORD_MAX = 65536
FDS_MAX = 253  # SCM_MAX_FD
READY = b"{}"  # what the holder says
PENDING_MAX = 64  # of one signal, that nobody passes on
SCRATCH = "/tmp"
SHELL = b"/bin/sh"
ELSEWHERE = {  # execvp(3) goes on to the next directory of PATH
    *(errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT),
}
OF_PATHS = {errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
PT_INTERP = 3  # <elf.h>
BLOCKED = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
STOPPING = {
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
}  # who has stopped passes them on when it is continued
PASSED_ON_WITHIN = 2.0  # seconds in which a client passes on what came to the group
SIGINFO = 128  # bytes, signalfd(2)
ECHO = (
    -signal.SIGCONT
)  # what comes back from a client whom we have continued, for a command with a group of its own
FOLLOW_STOPS = 0  # what is no signal: the client wants to know when its command has been stopped

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, filename: str | None = None) -> None:
    """Turn a libc failure into the OSError it is."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), filename)


def to_bytes(text: str) -> bytes:
    """Back to the bytes the client had, whatever the locales of the two are."""
    return text.encode("utf-8", "surrogateescape")


def failure(exc: BaseException, op: str) -> dict[str, object]:
    """The record that says what went wrong."""
    if isinstance(exc, OSError):
        filename = exc.filename
        if isinstance(filename, bytes):
            filename = filename.decode("utf-8", "surrogateescape")
        return {
            "errno": exc.errno or errno.EIO,
            "op": op,
            "message": exc.strerror or str(exc),
            "filename": filename,
        }
    return {"errno": errno.EINVAL, "op": op, "message": f"{type(exc).__name__}: {exc}", "filename": None}


# Entering the namespace


def write_file(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def read_file(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def create(ids: str, control: socket.socket) -> None:
    """Make a user and a network namespace.  The steps are named, for the error to name the cause."""
    uid, gid = os.geteuid(), os.getegid()
    step = "unshare user"
    try:
        check(libc.unshare(CLONE_NEWUSER))
        step = "map"
        if ids == "subids":  # it takes privilege outside to map other ids than one's own
            leave_keys()
            control.send(b'{"state": "map"}')
            if not control.recv(RECORD_MAX):
                os._exit(0)
        else:
            write_file("/proc/self/setgroups", "deny")
            write_file("/proc/self/uid_map", f"{uid if ids == 'same' else 0} {uid} 1")
            write_file("/proc/self/gid_map", f"{gid if ids == 'same' else 0} {gid} 1")
        hide()  # not before: the maps of who is not dumpable are root's to write
        step = "unshare net"
        check(libc.unshare(CLONE_NEWNET))
        step = "loopback"
        raise_link("lo")
    except OSError as exc:
        fail(control, exc, step, filtered=is_filtered(step))


def is_filtered(step: str) -> bool:
    """Whether a seccomp filter denies that.  Flags that cannot be are EINVAL to the kernel, before it asks who we
    are; a filter answers first.
    """
    flag = {
        "unshare user": CLONE_NEWUSER,
        "unshare net": CLONE_NEWNET,
        "unshare pids": CLONE_NEWPID,
        "unshare mounts": CLONE_NEWNS,
    }.get(step)
    return flag is not None and libc.unshare(flag | 1) < 0 and ctypes.get_errno() != errno.EINVAL


def hide() -> None:
    """Keep our memory, environment and descriptors from everybody who is not privileged outside the namespace."""
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))


def leave_keys() -> None:
    """Have a session keyring of our own, with nothing in it: keys in the caller's are for whoever has inherited it,
    whatever its uid is (session-keyring(7)).
    """
    if libc.syscall(KEYCTL.get(os.uname().machine, KEYCTL_ELSEWHERE), KEYCTL_JOIN_SESSION_KEYRING, None) < 0:
        number = ctypes.get_errno()
        if number not in {
            errno.ENOSYS,
            errno.EPERM,
        }:  # no keys in this kernel, or a filter for us and commands
            raise OSError(number, os.strerror(number), "session keyring")


def attach(fd: int, control: socket.socket) -> bool:
    """Join a network namespace, and before it the user namespace that owns it if that is not ours.  Return whether
    that is somebody else's.
    """
    step = "inspect"
    stranger = False
    try:
        hide()  # programs of that namespace may be waiting for us
        if fcntl.ioctl(fd, NS_GET_NSTYPE) != CLONE_NEWNET:
            raise OSError(errno.EINVAL, "not a network namespace")
        step = "owner"
        owner = fcntl.ioctl(fd, NS_GET_USERNS)
        ours, theirs = os.stat("/proc/self/ns/user"), os.fstat(owner)
        if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
            step = "setns user"
            stranger = join_user(owner)
        os.close(owner)
        step = "setns net"
        check(libc.setns(fd, CLONE_NEWNET))
        os.close(fd)
    except OSError as exc:
        fail(control, exc, "identity" if isinstance(exc, Unmapped) else step)
    return stranger


class Unmapped(OSError):
    """A user namespace that gives a caller who is not its owner no identity."""


def join_user(fd: int) -> bool:
    """Join a user namespace and be its owner there: uid, gid and no group of the caller's.  Return whether the caller
    was somebody else.

    The caller may be somebody else, root above all, whose ids mean more outside than the owner's.  Whoever is not the
    owner becomes the owner, completely, or root of the namespace where the owner has no id in it.  Raises `Unmapped`
    where that cannot be, and OSError.  The owner stays what it is, in the namespace's ids.
    """
    stranger = set(os.getresuid()) != {owner_of(fd)}
    groups = os.getgroups() if stranger else []
    if stranger:
        leave_keys()
    if groups:
        with suppress(PermissionError):  # without CAP_SETGID here, there may be a chance inside
            os.setgroups([])
            groups = []
    check(libc.setns(fd, CLONE_NEWUSER))
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
    """The uid that made a user namespace, in the ids of the caller's."""
    (uid,) = struct.unpack("I", fcntl.ioctl(fd, NS_GET_OWNER_UID, bytes(4)))
    return int(uid)


def mapped(kind: str) -> list[range]:
    """The uids or gids that there are in the caller's user namespace."""
    lines = [line.split() for line in read_file(f"/proc/self/{kind}_map").splitlines()]
    return [range(int(first), int(first) + int(count)) for first, _, count in lines]


def fail(control: socket.socket, exc: OSError, step: str, *, filtered: bool = False) -> NoReturn:
    control.send(failed(exc, step, filtered=filtered))
    os._exit(1)


def failed(exc: OSError, step: str, *, filtered: bool = False) -> bytes:
    return json.dumps({"state": "failed", "filtered": filtered, **failure(exc, step)}).encode()


# Where commands live


class Quarters:
    """What commands are started in.

    `holder` is the process by which others find the namespaces: the namespace ends with it.  `mounts` is a descriptor
    of its mount namespace, if that is not ours; then `parent` is a pipe to our parent, which is asked to continue the
    owner by it.  `of_stranger` is whether commands are somebody else than the owner, `limits` how many descriptors
    they may have: the soft limit and the hard one.
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

        As process 1 of a PID namespace it takes the others there along, and waits until they have been collected."""
        with open(f"/proc/{self.holder}/stat", "rb") as file:
            flags = int(file.read().rpartition(b")")[2].split()[6])
        return flags & PF_EXITING != 0

    def enter(self, here: int | None) -> None:
        """Join the mount namespace, with the directory `here` of another one as the current directory: by its name
        if that leads there, so that the directory has a name here, and to the root directory if we may not enter it.
        """
        name = None if here is None else os.readlink(f"/proc/self/fd/{here}")
        if self.mounts is not None:
            check(libc.setns(self.mounts, CLONE_NEWNS))  # from the root directory on
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
    """Start the holder and tell the owner that we are ready: with `pids` "own" by the parent that we then have."""
    step = "unshare pids"
    try:
        if pids == "own":
            check(libc.unshare(CLONE_NEWPID))
            told, telling = os.pipe2(os.O_CLOEXEC)
            asked, asking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            agent = os.fork()
            if agent == 0:
                os.close(told)
                os.close(asked)
                return become_agent(telling, asking)
            os.close(telling)
            hear(told, control.send)
            (holder,) = children_of(agent)
            tell_ready(control, agent, holder)
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
    except BrokenPipeError:  # the owner has given up already
        os._exit(1)


def hear(told: int, pass_on: Callable[[bytes], object]) -> None:
    """Wait for a child's report.  One that is not `READY` is passed on, and is our end."""
    with open(told, "rb") as file:
        said = file.read().lstrip()
    if said != READY:
        pass_on(said or failed(OSError(errno.EPERM, "killed"), "unshare pids"))
        os._exit(1)


def become_parent(agent: int, owner: int, asked: int) -> NoReturn:
    """Be there until the agent or the owner is not.  When asked, continue the owner for the agent."""
    poll = select.poll()
    ended = os.pidfd_open(agent)
    let_go({owner, ended, asked})
    for fd in (owner, ended, asked):
        poll.register(fd, select.POLLIN)
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0))
    while not {owner, ended} & dict(poll.poll()).keys():
        if os.read(asked, RECORD_MAX):
            signal.pidfd_send_signal(owner, signal.SIGCONT)
        else:  # it is about to end, and everything in its PID namespace before it
            poll.unregister(asked)
    os._exit(0)


def become_agent(report: int, parent: int) -> Quarters:
    """Be process 1 of a PID namespace that ends with our parent, and have the holder be process 1 of one below."""
    step = "unshare mounts"
    try:
        die_with_parent(report)
        mount_proc()
        step = "unshare pids"
        check(libc.unshare(CLONE_NEWPID))
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
    """Be the process by which others find the namespaces.  It has nothing that is not everybody's inside."""
    step = "unshare mounts"
    try:
        if own:
            mount_proc()
        else:
            die_with_parent(report)
        os.setsid()  # who traces us could signal our group, which is the owner's, and use our terminal
        os.chdir("/")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans that end are gone
        let_go({report})
        check(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0))
        os.write(report, READY)
        os.close(report)
        while True:
            signal.pause()
    except OSError as exc:
        os.write(report, failed(exc, exc.filename or step, filtered=is_filtered(step)))
    finally:
        os._exit(1)


def mount_proc() -> None:
    """Have /proc show our PID namespace, in a mount namespace of our own.  What is mounted outside later is seen
    inside, and not the other way round.
    """
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(None, b"/", None, MS_REC | MS_SLAVE, None))
    check(libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None), "mount proc")


def die_with_parent(report: int) -> None:
    """Be killed when the parent ends.  It may have ended before: then nobody reads `report`."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    os.write(report, b" ")


def let_go(kept: set[int]) -> None:
    """Close every descriptor but these."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in kept:
            with suppress(OSError):  # that of the directory was closed already
                os.close(fd)


# Links, by hand, mostly ioctls: importing a netlink library costs ten times our start


def on_link(request: int, name: str, data: bytes = b"") -> bytes:
    """One ioctl on `struct ifreq`: what the union holds afterwards."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            return fcntl.ioctl(sock, request, struct.pack("16s24s", interface_name(name), data))[16:]
        except OSError as exc:
            exc.filename = name
            raise


def interface_name(name: str) -> bytes:
    packed = to_bytes(name)
    if not 0 < len(packed) < 16:
        raise OSError(errno.EINVAL, "interface names have 1 to 15 bytes", name)
    return packed


def raise_link(name: str) -> None:
    (flags,) = struct.unpack_from("H", on_link(SIOCGIFFLAGS, name))
    if not flags & IFF_UP:
        on_link(SIOCSIFFLAGS, name, struct.pack("H", flags | IFF_UP))


def index_of(name: str) -> int:
    (index,) = struct.unpack_from("i", on_link(SIOCGIFINDEX, name))
    return int(index)


def rtnetlink(name: str, kind: int, flags: int, message: bytes, attributes: dict[int, bytes]) -> None:
    """One message of rtnetlink(7) about the link `name`."""
    for number, value in attributes.items():
        message += struct.pack("=HH", 4 + len(value), number) + value  # all of ours are aligned, or the last
    header = struct.pack("=IHHII", 16 + len(message), kind, flags | NLM_F_REQUEST | NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.send(header + message)
        (result,) = struct.unpack_from("=i", sock.recv(4096), 16)  # struct nlmsgerr
    if result:
        raise OSError(-result, os.strerror(-result), name)


def set_queue_length(name: str, packets: int) -> None:
    """The ioctl for it asks for privilege over the whole machine."""
    change = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index_of(name), 0, 0)  # struct ifinfomsg
    rtnetlink(name, RTM_SETLINK, 0, change, {IFLA_TXQLEN: struct.pack("=I", packets)})


def configure_ipv6(name: str, address: str, prefix: int, gateway: str) -> str | None:
    """The address is usable at once: that nobody else has it need not be found out, and the ioctl for addresses
    cannot be told so.  Why there is no IPv6, or None.
    """
    index = index_of(name)
    with suppress(OSError):  # else the router's advertisements add another address
        write_file(f"/proc/sys/net/ipv6/conf/{name}/accept_ra", "0")
    try:
        new = struct.pack("=BBBBi", socket.AF_INET6, prefix, IFA_F_NODAD, 0, index)  # struct ifaddrmsg
        packed = {IFA_ADDRESS: socket.inet_pton(socket.AF_INET6, address)}
        rtnetlink(name, RTM_NEWADDR, NLM_F_CREATE, new, packed)
    except OSError as exc:
        if exc.errno == errno.EACCES:
            return f"net.ipv6.conf.{name}.disable_ipv6 is 1"
        if exc.errno in {errno.EOPNOTSUPP, errno.EAFNOSUPPORT}:
            return "the kernel has none"
        if exc.errno != errno.EEXIST:
            raise
    route = struct.pack(  # struct rtmsg
        "=BBBBBBBBI", socket.AF_INET6, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0
    )
    way = {
        RTA_GATEWAY: socket.inet_pton(socket.AF_INET6, gateway),
        RTA_OIF: struct.pack("=i", index),
    }
    try:
        rtnetlink(name, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, route, way)
    except OSError as exc:
        if exc.errno != errno.EEXIST:
            raise
    return None


def set_neighbour(name: str, address: str, mac: str) -> None:
    """Have the kernel know whose `address` is, for good: what is sent there waits for no answer."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    new = struct.pack("=BxxxiHBB", family, index_of(name), NUD_PERMANENT, 0, 0)  # struct ndmsg
    known = {NDA_DST: socket.inet_pton(family, address), NDA_LLADDR: bytes.fromhex(mac)}
    rtnetlink(name, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, new, known)


def sockaddr_in(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def add_default_route(name: str, gateway: str) -> None:
    device = ctypes.create_string_buffer(interface_name(name))
    anywhere = sockaddr_in("0.0.0.0")
    route = struct.pack(  # struct rtentry
        "@L16s16s16sHhLPhPLLH",
        *(0, anywhere, sockaddr_in(gateway), anywhere, RTF_UP | RTF_GATEWAY, 0, 0, 0, 0),
        *(ctypes.addressof(device), 0, 0, 0),
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, SIOCADDRT, route)
        except OSError as exc:
            if exc.errno != errno.EEXIST:
                exc.filename = name
                raise


# Operations that answer at once: request -> (answer, descriptors to pass out)


def op_socket(request: dict[str, Any]) -> tuple[dict[str, object], list[int]]:
    sock = socket.socket(request["family"], request["type"], request["proto"])
    return {}, [sock.detach()]


def op_open_tap(request: dict[str, Any]) -> tuple[dict[str, object], list[int]]:
    """Open so many queues of a tap, with the first of the flag words that the kernel takes; a persistent one that
    exists is joined.
    """
    name = interface_name(request["name"])
    try:
        on_link(SIOCGIFINDEX, request["name"])
        existed = True
    except OSError:
        existed = False
    words = request["flags"]
    fds: list[int] = []
    try:
        while len(fds) < request["queues"]:
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            for flags in words:
                try:
                    fcntl.ioctl(fds[-1], TUNSETIFF, struct.pack("16sH22x", name, flags & 0xFFFF))
                    break
                except OSError as exc:
                    if exc.errno != errno.EINVAL or flags == words[-1]:
                        exc.filename = request["name"]
                        raise
            words = [flags]  # all alike
        actual, flags = struct.unpack("16sH22x", fcntl.ioctl(fds[0], TUNGETIFF, bytes(40)))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return {"name": actual.rstrip(b"\0").decode(), "flags": flags, "existed": existed}, fds


def op_configure_link(request: dict[str, Any]) -> tuple[dict[str, object], list[int]]:
    name = request["name"]
    if request["mac"] is not None:
        on_link(SIOCSIFHWADDR, name, struct.pack("H6s", ARPHRD_ETHER, bytes.fromhex(request["mac"])))
    if request["mtu"] is not None:
        on_link(SIOCSIFMTU, name, struct.pack("i", request["mtu"]))
    if request["queue"] is not None:
        set_queue_length(name, request["queue"])
    raise_link("lo")
    if request["address"] is not None:
        on_link(SIOCSIFADDR, name, sockaddr_in(request["address"]))  # the kernel leaves an equal one alone
        on_link(SIOCSIFNETMASK, name, sockaddr_in(request["netmask"]))
    raise_link(name)
    if request["gateway"] is not None:
        add_default_route(name, request["gateway"])
    without = None
    if request["ipv6"] is not None:
        without = configure_ipv6(name, *request["ipv6"])
    for address, mac in request["neighbours"].items():
        if ":" not in address or without is None:
            set_neighbour(name, address, mac)
    return {"without_ipv6": without}, []


def op_sysctl_get(request: dict[str, Any]) -> tuple[dict[str, object], list[int]]:
    with open("/proc/sys/" + request["path"], "rb") as file:
        return {"value": file.read().decode("utf-8", "surrogateescape").removesuffix("\n")}, []


def op_sysctl_set(request: dict[str, Any]) -> tuple[dict[str, object], list[int]]:
    write_file("/proc/sys/" + request["path"], request["value"] + "\n")
    return {}, []


OPERATIONS: dict[str, Callable[[dict[str, Any]], tuple[dict[str, object], list[int]]]] = {
    "socket": op_socket,
    "open_tap": op_open_tap,
    "configure_link": op_configure_link,
    "sysctl_get": op_sysctl_get,
    "sysctl_set": op_sysctl_set,
}


# Commands


# Files.  A mount needs a name to be on, and belongs to that name: where somebody outside removes the name, or renames
# another file over it, as programs do that replace resolv.conf, the kernel takes the mount off (detach_mounts).  So
# the agent watches the names and mounts again.  A name that is not there is made, an empty file, for as long as a
# command needs it: no mount can add a name to a directory and leave all else of it as it is, for what is new on a
# tmpfs or in an overlayfs is not in the directory.  Where we may not write that loses nothing, so there it is done.


def show_files(files: dict[str, str]) -> dict[str, int]:
    """In a mount namespace of our own, let each path read as the text given for it.  Return a mount more for each, to
    be put there again; none before Linux 5.2, where there are no such mounts.

    The texts lie on a tmpfs that covers `SCRATCH` only while we work.  The targets are held by descriptor
    from before, so a target may itself be below `SCRATCH`.
    """
    copies: dict[str, int] = {}
    if not files:
        return copies
    check(libc.unshare(CLONE_NEWNS), SCRATCH)
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "/")
    for path in files:
        if not os.path.exists(path):
            make_room(path)
    targets = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in files}
    for path, fd in targets.items():
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    where, quiet = SCRATCH.encode(), MS_NOSUID | MS_NODEV | MS_NOEXEC
    check(libc.mount(b"tmpfs", where, b"tmpfs", quiet, b"mode=0755"), SCRATCH)
    for number, text in enumerate(files.values()):
        with open(f"{SCRATCH}/{number}", "wb") as file:
            file.write(to_bytes(text))
            os.fchmod(file.fileno(), 0o644)
    # Fact: a bind mount copies the flags of the mount it is made from, so this makes all of them read-only.
    check(libc.mount(None, where, None, MS_REMOUNT | MS_BIND | MS_RDONLY | quiet, None), SCRATCH)
    for number, (path, fd) in enumerate(targets.items()):
        source, target = f"{SCRATCH}/{number}".encode(), f"/proc/self/fd/{fd}".encode()
        check(libc.mount(source, target, None, MS_BIND, None), path)
        copy: int = libc.syscall(OPEN_TREE, AT_FDCWD, source, OPEN_TREE_CLONE | os.O_CLOEXEC)
        if copy >= 0 or ctypes.get_errno() != errno.ENOSYS:
            check(copy, path)
            copies[path] = copy
    check(libc.umount2(where, MNT_DETACH), SCRATCH)
    return copies


def has_places(directory: str) -> bool:
    """Not where everything is, nor where nothing is a file."""
    return directory != "/" and directory.split("/")[1] not in {"proc", "sys", "dev"}


def make_place(path: str) -> tuple[str, tuple[int, int]] | None:
    """Make an empty file where there is none, or where a link leads to nowhere, if we may: its own path, and which
    it is.
    """
    target = os.path.realpath(path)
    if not has_places(os.path.dirname(target)):
        return None
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError:  # it is there; or we may not, and `make_room` does it
        return None
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return target, (status.st_dev, status.st_ino)


def remove_place(target: str, identity: tuple[int, int]) -> None:
    """What `make_place` has made, unless it has become somebody's file."""
    with suppress(OSError):  # it is gone, or not ours to remove any more
        status = os.lstat(target)
        if (status.st_dev, status.st_ino) == identity and status.st_size == 0:
            os.unlink(target)


def hand_over(out: socket.socket, copies: dict[str, int], fds: Sequence[int] = ()) -> None:
    """Pass the agent a mount for each of these paths, in the place of those that it has used."""
    socket.send_fds(out, [json.dumps({"shown": list(copies)}).encode()], [*fds, *copies.values()])


def show_again(out: socket.socket, namespace: int, shown: dict[str, int]) -> NoReturn:
    """In the mount namespace of a command, mount again what does not lead to its text any more.  A child of the
    agent's.
    """
    try:
        load_nothing()
        check(libc.setns(namespace, CLONE_NEWNS))
        copies = {}
        for path, fd in shown.items():
            with suppress(FileNotFoundError):  # until it is there again
                if not os.path.samestat(os.stat(path), os.fstat(fd)):
                    copy = copy_of(fd)  # Linux before 6.15 does not copy what is mounted nowhere
                    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_SYMLINKS
                    check(libc.syscall(MOVE_MOUNT, fd, b"", AT_FDCWD, to_bytes(path), flags), path)
                    if copy < 0:  # it is mounted now, unless the host has replaced the file again
                        check(copy := copy_of(fd), path)
                    copies[path] = copy
        hand_over(out, copies)
    finally:
        os._exit(0)


def copy_of(mount: int) -> int:
    """Return a mount like the one that this is a descriptor of, mounted nowhere; -1 if there can be none."""
    fd: int = libc.syscall(OPEN_TREE, mount, b"", OPEN_TREE_CLONE | AT_EMPTY_PATH | os.O_CLOEXEC)
    return fd


def make_room(path: str) -> None:
    """Let there be a file at `path`, where there is none or a link to nowhere: its directory becomes a read-only
    tmpfs that has everything else of the old one, by links and bind mounts.
    """
    directory, name = os.path.split(os.path.abspath(path))
    if not has_places(directory):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    try:
        old = f"/proc/self/fd/{os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)}"
    except OSError as exc:
        exc.filename = path
        raise
    entries = [entry for entry in os.scandir(old) if entry.name != name]
    where, quiet = to_bytes(directory), MS_NOSUID | MS_NODEV
    check(libc.mount(b"tmpfs", where, b"tmpfs", quiet, b"mode=0755"), directory)
    for entry in entries:
        new = f"{directory}/{entry.name}"
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), new)
            continue
        if entry.is_dir():
            os.mkdir(new)
        else:
            os.mknod(new)
        check(libc.mount(to_bytes(entry.path), to_bytes(new), None, MS_BIND | MS_REC, None), new)
    os.mknod(path)
    check(libc.mount(None, where, None, MS_REMOUNT | MS_BIND | MS_RDONLY | quiet, None), directory)


def raise_descriptor_limit() -> ctypes.Array[ctypes.c_ulong]:
    """Let the agent itself have as many descriptors as the hard limit allows: each command takes some.  Return the
    limits as they were, which are for commands.
    """
    before = (ctypes.c_ulong * 2)()
    check(libc.getrlimit(RLIMIT_NOFILE, before))
    check(libc.setrlimit(RLIMIT_NOFILE, (ctypes.c_ulong * 2)(before[1], before[1])))
    return before


def load_nothing() -> None:
    """Import nothing any more, codecs included: we enter a mount namespace where commands may have mounted modules of
    theirs, and still have all that is the agent's.
    """
    sys.meta_path.clear()


def is_capable(capability: int) -> bool:
    with open("/proc/self/status", "rb") as file:
        effective = next(line.split()[1] for line in file if line.startswith(b"CapEff:"))
    return bool(int(effective, 16) >> capability & 1)


def execute(argv: Sequence[str], env: dict[str, str]) -> NoReturn:
    """Execute a program as execvp(3) does: searched in PATH, and given to the shell if it is a script that names no
    interpreter.

    Raises:
        OSError: The program cannot be executed.  Its `filename` is the interpreter, if it is that which is lacking.
    """
    program = argv[0]
    places = [""] if "/" in program else env.get("PATH", os.defpath).split(":")
    arguments = [to_bytes(word) for word in argv]
    environment = {to_bytes(name): to_bytes(value) for name, value in env.items()}
    number, lacking = errno.ENOENT, None
    for place in places if program else []:
        path = to_bytes(os.path.join(place, program))
        try:
            try:
                os.execve(path, arguments, environment)
            except OSError as exc:
                if exc.errno != errno.ENOEXEC or not is_text(path):
                    raise
            os.execve(SHELL, [SHELL, path, *arguments[1:]], environment)
        except OSError as exc:
            interpreter = lacking_interpreter(path, exc.errno)
            if exc.errno not in ELSEWHERE:
                raise OSError(exc.errno, exc.strerror, interpreter) from exc
            if number != errno.EACCES:
                number = exc.errno
            lacking = lacking or interpreter
    raise OSError(number, os.strerror(number), lacking)


def lacking_interpreter(path: bytes, number: int | None) -> str | None:
    """Return the interpreter that a script or a binary names, if that is why its execution failed with `number`."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:  # the program itself is lacking, or not for us
        return None
    if number not in OF_PATHS or not os.access(path, os.X_OK):
        return None
    name = b""
    if head.startswith(b"#!"):
        name = head[2:].split(b"\n")[0].strip(b" \t").replace(b"\t", b" ").split(b" ")[0]
    elif head.startswith(b"\x7fELF\2") and len(head) >= 64:  # elf(5), of 64 bits
        (table,) = struct.unpack_from("=Q", head, 32)
        size, count = struct.unpack_from("=HH", head, 54)
        for at in range(table, min(table + size * count, len(head) - 55), size or 1):
            kind, start, length = struct.unpack_from("=I4xQ16xQ", head, at)
            if kind == PT_INTERP:
                name = head[start : start + length].rstrip(b"\0")
    return name.decode("utf-8", "surrogateescape") or None


def is_text(path: bytes) -> bool:
    """Whether the first line of a file has no zero byte.  An executable of another machine's has."""
    with open(path, "rb") as file:
        return b"\0" not in file.readline(256)


def become_command(
    request: dict[str, Any],
    fds: list[int],
    report: socket.socket,
    quarters: Quarters,
    restore: dict[signal.Signals, Any],
) -> NoReturn:
    """The child's side of `spawn`.  It ends in exec, or reports why not on `report`."""
    step = "spawn"
    try:
        if quarters.mounts is None:  # else the kernel sees to it
            agent = os.getppid()
            check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
            if os.getppid() != agent:
                os._exit(127)
        if request["start_new_session"] or (quarters.mounts is not None and not request["at_terminal"]):
            # Fact: kill(0, ...) reaches the members of the group that are outside the PID namespace too, and
            # /dev/tty is the terminal of the session, whatever the standard streams are.
            os.setsid()
        load_nothing()
        quarters.enter(None if request["here"] is None else fds[request["here"]])
        if request["cwd"] is not None:
            os.chdir(to_bytes(request["cwd"]))
        elif quarters.of_stranger:  # to whom no directory above the caller's may be open
            os.chdir("/")
        step = "mount"
        if copies := show_files(request["files"]):
            with suppress(OSError):  # too many are on their way: then they are not shown again
                hand_over(report, copies, [os.open("/proc/self/ns/mnt", os.O_RDONLY)])
        step = "spawn"
        numbers = {int(number): fds[index] for number, index in request["fds"].items()}
        above = max([2, *numbers]) + 1
        report = socket.socket(fileno=fcntl.fcntl(report.fileno(), fcntl.F_DUPFD_CLOEXEC, above))
        moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for number, fd in numbers.items()}
        os.closerange(0, 3)
        for number, fd in moved.items():
            os.dup2(fd, number)
        if request["foreground"]:
            take_terminal()
        check(libc.setrlimit(RLIMIT_NOFILE, quarters.limits))
        env = request["env"]
        if request["pid_variable"] is not None:
            env[request["pid_variable"]] = str(os.getpid())
        for number, action in restore.items():
            signal.signal(number, action)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # what has come meanwhile, the command has
        step = "exec"
        execute(request["argv"], env)
    except BaseException as exc:
        if step == "exec" and isinstance(exc, OSError):
            problem: dict[str, object] = {"unexecuted": exc.errno, "interpreter": exc.filename}
        else:
            os.closerange(0, 3)  # it may be that there are too many to look at anything
            problem = failure(exc, step if is_capable(CAP_SYS_ADMIN) else "spawn")
        record = json.dumps(problem).encode()
        report.send(
            record if len(record) < RECORD_MAX else json.dumps({**problem, "filename": None}).encode()
        )
    finally:
        os._exit(127)


def take_terminal() -> None:
    """Have a process group of our own, and the terminal, our standard input, for it.

    The owner's group has no number in a PID namespace of commands, and a shell that ends gives the terminal back to
    the group that it has found there.
    """
    with suppress(OSError):  # a session's leader has both; the terminal may have hung up
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpgrp())


def children_of(pid: int) -> list[int]:
    """Direct children, zombies included; none for a process that is gone."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    except OSError:
        pass
    return found


def kill_tree(root: int) -> bool:
    """SIGKILL a child of ours and everything below it: true unless we may not.

    Each is stopped before its children are listed, so that it makes no more.
    """
    tree = [root]
    for pid in tree:
        try:
            os.kill(pid, signal.SIGSTOP)
        except OSError:
            continue
        tree += children_of(pid)
    killed = False
    for pid in tree:
        try:
            os.kill(pid, signal.SIGKILL)
            killed = True
        except OSError:
            pass
    return killed


class Command:
    """A child and the conversation about it.

    Until its exec has happened or failed there are `report`, a socket whose other end exec closes, and a pidfd to
    hand out.  `had` are the signals that came to our group, which it had if that is its group, and when.  `leads` is
    whether it was given a group of its own, to which all goes that comes to ours.  `files` are the paths that it is
    shown, `shown` a mount for each to use when it has to be shown again, `mounts` its mount namespace.
    """

    __slots__ = (
        *(
            "conversation",
            "files",
            "follows",
            "had",
            "is_being_shown",
            "leads",
            "looks_again",
            "mounts",
            "pid",
            "pidfd",
        ),
        *("report", "shown", "stop", "told"),
    )

    def __init__(
        self,
        pid: int,
        conversation: socket.socket,
        report: socket.socket,
        files: Sequence[str],
        *,
        leads: bool,
    ) -> None:
        self.pid = pid
        self.leads = leads
        self.pidfd = os.pidfd_open(pid)
        self.conversation = conversation
        self.report: socket.socket | None = report
        self.files = files
        self.shown: dict[str, int] = {}
        self.is_being_shown = self.looks_again = (
            False  # a child sees to it; it is to look once more after that
        )
        self.mounts = -1
        self.had: dict[int, list[float]] = {}
        self.stop = 0  # the signal that has stopped it, 0 while it runs
        self.follows = False  # the client wants to know
        self.told = False  # and has been told, and not been heard since: it has stopped itself

    def take(self, paths: Sequence[str], fds: list[int]) -> None:
        """Own the descriptors that `hand_over` has passed for these paths: at first with the namespace.

        If we had no room for all of them, they are closed, and the files are not shown again.
        """
        if len(fds) != len(paths) + (self.mounts < 0):
            for fd in fds:
                os.close(fd)
            return
        if self.mounts < 0:
            self.mounts = fds.pop(0)
        for path, fd in zip(paths, fds, strict=True):
            if path in self.shown:
                os.close(self.shown[path])
            self.shown[path] = fd

    def close(self) -> None:
        self.conversation.close()
        for fd in (self.mounts, *self.shown.values()):
            if fd >= 0:
                os.close(fd)

    def note(self, number: int) -> None:
        """A signal has come to our group."""
        if self.has_own_group or os.getpgid(self.pid) == os.getpgrp():
            times = self.had.setdefault(number, [])
            times.append(time.monotonic())
            del times[:-PENDING_MAX]

    @property
    def has_own_group(self) -> bool:
        """Whether it is still in the group that it was given."""
        return self.leads and os.getpgid(self.pid) == self.pid

    def pass_on(self, number: int) -> None:
        """Send it a signal that the client has received, if it did not come to it with our group; or send it to its
        own group, if it came to ours.
        """
        had = self.has_had(number)
        with suppress(OSError):  # not ours to signal any more, or no signal
            if not self.has_own_group:
                if not had:
                    os.kill(self.pid, number)
            elif number != signal.SIGCONT:
                (os.killpg if had else os.kill)(self.pid, number)
            elif not self.has_had(ECHO):
                self.told = False  # the client goes on already
                os.killpg(self.pid, number)  # a terminal has stopped all of the group

    def has_had(self, number: int) -> bool:
        """Whether a signal that is passed on came to it with its group; true once for each that did."""
        times = self.had.get(number, [])
        if number not in STOPPING:
            now = time.monotonic()
            times[:] = [since for since in times if now - since < PASSED_ON_WITHIN]
        return bool(times and times.pop(0))


class Agent:
    """The poll loop.  Handlers tolerate being called for nothing, as a descriptor's number may be reused."""

    def __init__(
        self, control: socket.socket, owner: int, quarters: Quarters, restore: dict[signal.Signals, Any]
    ) -> None:
        self.control = control
        self.owner = owner
        self.quarters = quarters
        self.restore = restore
        self.commands: dict[int, Command] = {}
        self.places: dict[str, tuple[int, int]] = {}  # made by us, for commands to be shown files at
        self.changes = -1  # an inotify descriptor, once there are files
        self.handlers: dict[int, Callable[[], None]] = {}
        self.poll = select.poll()
        blocked = sum(1 << (number - 1) for number in BLOCKED).to_bytes(128, sys.byteorder)  # sigset_t
        self.signals: int = libc.signalfd(-1, blocked, os.O_CLOEXEC | os.O_NONBLOCK)
        check(self.signals)
        self.watch(control.fileno(), self.serve)
        self.watch(owner, self.end)
        self.watch(self.signals, self.on_signal)

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        self.handlers[fd] = handler
        self.poll.register(fd, select.POLLIN)

    def forget(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.poll.unregister(fd)

    def run(self) -> NoReturn:
        while True:
            for fd, _ in self.poll.poll():
                if handler := self.handlers.get(fd):
                    handler()

    def end(self) -> NoReturn:
        """Kill everything below us and leave: by leaving, if we are process 1.  Else what we may not kill (setuid, no
        namespace of ours) stays.
        """
        for target, identity in self.places.items():
            remove_place(target, identity)
        if self.quarters.mounts is not None:
            os._exit(0)
        while children := children_of(os.getpid()):
            if not sum(kill_tree(pid) for pid in children):
                break
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        os._exit(0)

    def serve(self) -> None:
        """One request."""
        space = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
        try:
            data, ancillary, flags, _ = self.control.recvmsg(RECORD_MAX, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except ConnectionError:
            self.end()
        if not data:
            self.end()
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        try:
            if fds:
                conversation = socket.socket(fileno=fds[0])
                del fds[0]
                complete = not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
                self.answer(conversation, data, fds.tolist(), complete=complete)
        except OSError:
            pass  # not a socket: nobody to answer to
        finally:
            for fd in fds:
                os.close(fd)

    def answer(self, conversation: socket.socket, data: bytes, fds: list[int], *, complete: bool) -> None:
        """Do what is asked; the descriptors are closed by the caller.  Not `complete`: there was no room for all."""
        op = "request"
        conversation.setblocking(False)
        try:
            if not complete:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if data == b"@":
                data = os.pread(fds[-1], os.fstat(fds[-1]).st_size, 0)
            request = json.loads(data)
            op = request["op"]
            if op == "spawn":
                self.spawn(conversation, request, fds)
                return
            reply, out = OPERATIONS[op](request)
        except Exception as exc:
            reply, out = failure(exc, str(op)), []
        try:
            if untold := tell(conversation, reply, out):
                tell(conversation, failure(untold, op))
        finally:
            conversation.close()
            for fd in out:
                os.close(fd)

    def spawn(self, conversation: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
        done, report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        done.setblocking(False)
        files = list(request["files"])
        self.make_places(files)
        self.on_signal()  # what has come until now, the new command has not had
        try:
            pid = os.fork()
            if pid == 0:
                become_command(request, fds, report, self.quarters, self.restore)
            try:
                command = self.commands[pid] = Command(
                    pid, conversation, done, files, leads=request["foreground"]
                )
            except OSError:  # out of descriptors
                os.kill(pid, signal.SIGKILL)
                raise
        except BaseException:
            if self.quarters.is_ending:  # then nothing is forked any more
                self.end()
            done.close()
            self.remove_places()
            raise
        finally:
            report.close()
        self.watch_files(files)
        self.watch(done.fileno(), lambda: self.started(command))
        self.watch(conversation.fileno(), lambda: self.hear(command))

    def started(self, command: Command) -> None:
        """The command's exec has happened, or failed."""
        if command.report is None:
            return
        try:
            said, fds, _, _ = socket.recv_fds(command.report, RECORD_MAX, FDS_MAX)
            if said and "shown" in (record := json.loads(said)):
                command.take(record["shown"], fds)
                said = command.report.recv(RECORD_MAX)
        except BlockingIOError:
            return
        except ConnectionError:
            said = b""
        self.forget(command.report.fileno())
        command.report.close()
        command.report = None
        if said:
            self.drop(command, json.loads(said))
        elif untold := tell(command.conversation, {"pid": command.pid}, [command.pidfd]):
            kill_tree(command.pid)
            self.drop(command, failure(untold, "answer"))
        os.close(command.pidfd)

    def hear(self, command: Command) -> None:
        """A signal to pass on.  Or the client is not interested any more, or wants the command killed; it may still
        wait for the status.
        """
        self.on_signal()
        if command.pid not in self.commands:
            return
        try:
            said = command.conversation.recv(1)
        except BlockingIOError:
            return
        except ConnectionError:
            said = b""
        if not said:
            self.forget(command.conversation.fileno())
            kill_tree(command.pid)
        elif said[0] == FOLLOW_STOPS:
            command.told, command.follows = False, True
            self.tell_stop(command)
        else:
            command.pass_on(said[0])

    def tell_stop(self, command: Command) -> None:
        if command.follows and command.stop:
            tell(command.conversation, {"stopped": command.stop})
            command.told = True

    def stopped(self, command: Command, number: int) -> None:
        command.stop = number
        if command.report is None:
            self.tell_stop(command)
        else:  # before its exec, for which the client waits
            os.kill(command.pid, signal.SIGCONT)

    def continued(self, command: Command) -> None:
        """A client that has stopped itself with the command goes on with it, whoever has continued that."""
        command.stop = 0
        if command.told:
            with suppress(OSError):  # not ours to signal
                if self.quarters.parent is None:
                    signal.pidfd_send_signal(self.owner, signal.SIGCONT)
                else:
                    os.write(self.quarters.parent, b" ")
                command.note(ECHO if command.has_own_group else signal.SIGCONT)
        command.told = False

    def on_signal(self) -> None:
        """Note what has come to our group, or that something has become of our children."""
        child = False
        with suppress(BlockingIOError):
            while data := os.read(self.signals, SIGINFO * 32):
                for number, _, code in struct.iter_unpack(f"=Iii{SIGINFO - 12}x", data):
                    child = child or number == signal.SIGCHLD
                    for command in self.commands.values() if code <= 0 or number != signal.SIGCHLD else ():
                        command.note(number)
        if child:
            self.reap()

    def reap(self) -> None:
        """Collect every child that has ended: our commands, and orphans that fell to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.quarters.holder and not os.WIFSTOPPED(status) and not os.WIFCONTINUED(status):
                self.end()
            if command := self.commands.get(pid):
                self.started(command)  # if it was quick: its start is told before its end
                if os.WIFSTOPPED(status):
                    self.stopped(command, os.WSTOPSIG(status))
                elif os.WIFCONTINUED(status):
                    self.continued(command)
                elif pid in self.commands:
                    if os.WIFSIGNALED(status) and self.quarters.is_ending:
                        self.end()
                    self.drop(command, {"status": status})

    def drop(self, command: Command, last: dict[str, object]) -> None:
        del self.commands[command.pid]
        self.remove_places()
        self.forget(command.conversation.fileno())
        tell(command.conversation, last)
        command.close()

    def make_places(self, files: Sequence[str]) -> None:
        for path in files:
            if not os.path.exists(path) and (made := make_place(path)):
                self.places[made[0]] = made[1]

    def remove_places(self) -> None:
        """Those that no command needs any more."""
        needed = {os.path.realpath(path) for command in self.commands.values() for path in command.files}
        for target in self.places.keys() - needed:
            remove_place(target, self.places.pop(target))

    def watch_files(self, files: Sequence[str]) -> None:
        if not files:
            return
        if self.changes < 0:
            self.changes = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
            if self.changes < 0:  # the user has too many: then files are not shown again
                return
            self.watch(self.changes, self.on_change)
        for path in files:
            for name in (path, os.path.realpath(path)):
                directory = to_bytes(os.path.dirname(name))
                libc.inotify_add_watch(self.changes, directory, IN_MOVED | IN_CREATE | IN_DELETE)

    def on_change(self) -> None:
        """Something has happened beside a file that is shown, or to it."""
        names = set()
        with suppress(BlockingIOError):
            while data := os.read(self.changes, RECORD_MAX):
                while data:
                    _, _, _, size = struct.unpack_from("=iIII", data)
                    names.add(data[16 : 16 + size].rstrip(b"\0").decode("utf-8", "surrogateescape"))
                    data = data[16 + size :]
        for command in list(self.commands.values()):
            concerned = {
                os.path.basename(name) for path in command.files for name in (path, os.path.realpath(path))
            }
            if command.shown and names & concerned:
                self.show_again(command)

    def show_again(self, command: Command) -> None:
        """Have what the command does not see any more be shown again.

        One child at a time sees to that, for each mount can be used once: else it looks once more after this one.
        """
        command.looks_again = command.is_being_shown
        if not command.is_being_shown:
            with suppress(OSError):  # out of descriptors or processes: it is not shown again
                self.begin_to_show(command)

    def begin_to_show(self, command: Command) -> None:
        self.make_places(command.files)
        self.watch_files(command.files)  # a link may lead elsewhere now
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                child = os.fork()
            except OSError:
                ours.close()
                raise
            if child == 0:
                show_again(theirs, command.mounts, command.shown)

        def shown() -> None:
            with suppress(BlockingIOError):
                data, fds, _, _ = socket.recv_fds(ours, RECORD_MAX, FDS_MAX)
                if self.commands.get(command.pid) is command and data:
                    command.take(json.loads(data)["shown"], fds)
                else:
                    for fd in fds:
                        os.close(fd)
                self.forget(ours.fileno())
                ours.close()
                command.is_being_shown = False
                if command.looks_again and self.commands.get(command.pid) is command:
                    self.show_again(command)

        command.is_being_shown = True
        self.watch(ours.fileno(), shown)


def tell(conversation: socket.socket, reply: dict[str, object], fds: Sequence[int] = ()) -> OSError | None:
    """Send one record; the error that has kept it, if any: the client may have gone, and the kernel may take no
    descriptors, if there are too many on their way already.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        conversation.sendmsg([json.dumps(reply).encode()], rights, socket.MSG_NOSIGNAL)
    except OSError as exc:
        return exc
    return None


def main() -> NoReturn:
    control = socket.socket(fileno=int(sys.argv[1]))
    owner = int(sys.argv[2])
    start = json.loads(sys.argv[3])
    for fd in (control.fileno(), owner):
        os.set_inheritable(fd, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, BLOCKED)
    # A command has the defaults, but what was ignored before us (nohup) stays ignored for it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    restore = {  # Python ignores two for itself, and we want to know of our children
        signal.SIGPIPE: signal.SIG_DFL,
        signal.SIGXFSZ: signal.SIG_DFL,
        signal.SIGCHLD: signal.signal(signal.SIGCHLD, signal.SIG_DFL),
    }
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    stranger = False
    if start["mode"] == "create":
        create(start["ids"], control)
    elif start["mode"] == "attach":
        os.set_inheritable(start["fd"], False)
        stranger = attach(start["fd"], control)
    else:
        hide()
    limits = raise_descriptor_limit()  # before anybody is told that we are ready, and may set another
    quarters = open_quarters(start["pids"], control, owner)
    quarters.of_stranger, quarters.limits = stranger, limits
    agent = Agent(control, owner, quarters, restore)
    if quarters.mounts is None:
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0))
    control.setblocking(False)
    agent.run()
