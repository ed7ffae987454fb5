"""The process inside: holds a namespace, opens things there and passes the descriptors out.

This file is executed, never imported: `python -S -E -I agent.py CONTROL OWNER START`, with one end of a
SOCK_SEQPACKET socketpair, a pidfd of the owner and a JSON object saying which namespace.  It enters the
namespace, says so with one record on the control socket, and then serves requests until its owner is gone.

Words.  A *request* is one record on the control socket: JSON and descriptors.  The first descriptor is the
far end of a fresh socketpair, the *conversation*, on which the answer goes; so requests need no numbers, no
lock and no order, and whoever loses interest just closes his end.  A request of more than 32 KiB is the
single byte `@` and its text is in a memfd, the last descriptor.  A *command* is a child made by `spawn`; its
conversation stays open: the first record out says that it runs, the second how it ended.  If the client
closes or shuts down its end in between, the command and its descendants are killed.

Death.  Two things end the agent: end of file on the control socket, and the owner's pidfd (a fork of the
owner may hold a copy of the socket).  PR_SET_PDEATHSIG would not do, it follows the thread that started us.
As a child subreaper the agent inherits every orphan below it, so killing its children until there are none
leaves nothing. Its commands do have PR_SET_PDEATHSIG: the agent has one thread, and so they die with it
however it dies.

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
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

# <linux/sched.h>, <linux/prctl.h>, <linux/mount.h>, <linux/nsfs.h>
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
CAP_SYS_ADMIN = 21
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
NS_GET_USERNS = 0xB701
NS_GET_NSTYPE = 0xB703

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

RECORD_MAX = 65536
FDS_MAX = 253  # SCM_MAX_FD
SCRATCH = "/tmp"
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)  # meant for commands

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


def create(ids: str, control: socket.socket) -> None:
    """Make a user and a network namespace.  The steps are named, for the error to name the cause."""
    uid, gid = os.geteuid(), os.getegid()
    step = "unshare user"
    try:
        check(libc.unshare(CLONE_NEWUSER))
        step = "map"
        if ids == "subids":  # it takes privilege outside to map other ids than one's own
            control.send(b'{"state": "map"}')
            if not control.recv(RECORD_MAX):
                os._exit(0)
        else:
            write_file("/proc/self/setgroups", "deny")
            write_file("/proc/self/uid_map", f"{uid if ids == 'same' else 0} {uid} 1")
            write_file("/proc/self/gid_map", f"{gid if ids == 'same' else 0} {gid} 1")
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
    flag = {"unshare user": CLONE_NEWUSER, "unshare net": CLONE_NEWNET}.get(step)
    return flag is not None and libc.unshare(flag | 1) < 0 and ctypes.get_errno() != errno.EINVAL


def attach(fd: int, control: socket.socket) -> None:
    """Join a network namespace, and before it the user namespace that owns it if that is not ours."""
    step = "inspect"
    try:
        if fcntl.ioctl(fd, NS_GET_NSTYPE) != CLONE_NEWNET:
            raise OSError(errno.EINVAL, "not a network namespace")
        step = "owner"
        owner = fcntl.ioctl(fd, NS_GET_USERNS)
        ours, theirs = os.stat("/proc/self/ns/user"), os.fstat(owner)
        if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
            step = "setns user"
            check(libc.setns(owner, CLONE_NEWUSER))
            become_known()
        os.close(owner)
        step = "setns net"
        check(libc.setns(fd, CLONE_NEWNET))
        os.close(fd)
    except OSError as exc:
        fail(control, exc, step)


def become_known() -> None:
    """Be root of the user namespace if our own ids mean nothing there."""
    with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
        if os.getuid() != int(file.read()):
            return
    changes: tuple[tuple[Callable[..., None], Any], ...] = (
        (os.setgroups, [[]]),
        (os.setresgid, [0] * 3),
        (os.setresuid, [0] * 3),
    )
    for change, to in changes:
        with suppress(OSError):  # nothing is mapped to 0, or setgroups is denied: then nobody it is
            change(*to)


def fail(control: socket.socket, exc: OSError, step: str, *, filtered: bool = False) -> NoReturn:
    control.send(json.dumps({"state": "failed", "filtered": filtered, **failure(exc, step)}).encode())
    os._exit(1)


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


def show_files(files: dict[str, str]) -> None:
    """In a mount namespace of our own, let each path read as the text given for it.

    The texts lie on a tmpfs that covers `SCRATCH` only while we work.  The targets are held by descriptor
    from before, so a target may itself be below `SCRATCH`.
    """
    if not files:
        return
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
    check(libc.umount2(where, MNT_DETACH), SCRATCH)


def make_room(path: str) -> None:
    """Let there be a file at `path`, where there is none or a link to nowhere: its directory becomes a read-only
    tmpfs that has everything else of the old one, by links and bind mounts.
    """
    directory, name = os.path.split(os.path.abspath(path))
    if directory == "/" or directory.split("/")[1] in {
        "proc",
        "sys",
        "dev",
    }:  # all is in those, or is no file
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


def is_capable(capability: int) -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next(line.split()[1] for line in file if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> capability & 1)


def execute(argv: Sequence[str], env: dict[str, str]) -> NoReturn:
    """exec, searching PATH and choosing among the errors as `subprocess` does."""
    program = argv[0]
    places = [""] if "/" in program else env.get("PATH", os.defpath).split(":")
    arguments = [to_bytes(word) for word in argv]
    environment = {to_bytes(name): to_bytes(value) for name, value in env.items()}
    telling = last = None
    for place in places:
        try:
            os.execve(to_bytes(os.path.join(place, program)), arguments, environment)
        except OSError as exc:
            last = exc.errno
            if last not in {errno.ENOENT, errno.ENOTDIR}:
                telling = telling or last
    number = telling or last or errno.ENOENT
    raise OSError(number, os.strerror(number), program)


def become_command(request: dict[str, Any], fds: list[int], report: int, restore: Sequence[int]) -> NoReturn:
    """The child's side of `spawn`.  It ends in exec, or reports why not on the pipe `report`."""
    step = "spawn"
    try:
        agent = os.getppid()
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        if os.getppid() != agent:
            os._exit(127)
        if request["start_new_session"]:
            os.setsid()
        if request["here"] is not None:
            os.fchdir(fds[request["here"]])
        if request["cwd"] is not None:
            os.chdir(to_bytes(request["cwd"]))
        step = "mount"
        show_files(request["files"])
        step = "spawn"
        numbers = {int(number): fds[index] for number, index in request["fds"].items()}
        above = max(2, *numbers) + 1
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, above)
        moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for number, fd in numbers.items()}
        os.closerange(0, 3)
        for number, fd in moved.items():
            os.dup2(fd, number)
        for number in restore:
            signal.signal(number, signal.SIG_DFL)
        execute(request["argv"], request["env"])
    except BaseException as exc:
        problem = failure(exc, step if is_capable(CAP_SYS_ADMIN) else "spawn")
        record = json.dumps(problem).encode()
        os.write(
            report, record if len(record) < RECORD_MAX else json.dumps({**problem, "filename": None}).encode()
        )
    finally:
        os._exit(127)


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

    Until its exec has happened or failed there are `report`, the pipe that exec closes, and a pidfd to hand
    out.
    """

    __slots__ = ("conversation", "pid", "pidfd", "report")

    def __init__(self, pid: int, conversation: socket.socket, report: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.conversation = conversation
        self.report: int | None = report


class Agent:
    """The poll loop.  Handlers tolerate being called for nothing, as a descriptor's number may be reused."""

    def __init__(self, control: socket.socket, owner: int, restore: Sequence[int]) -> None:
        self.control = control
        self.restore = restore
        self.commands: dict[int, Command] = {}
        self.handlers: dict[int, Callable[[], None]] = {}
        self.poll = select.poll()
        self.wakeup, signals = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(signals, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.watch(control.fileno(), self.serve)
        self.watch(owner, self.end)
        self.watch(self.wakeup, self.reap)

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
        """Kill everything below us and leave.  What we may not kill (setuid, no namespace of ours) stays."""
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
            if fds and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                conversation = socket.socket(fileno=fds[0])
                del fds[0]
                self.answer(conversation, data, fds.tolist())
        except OSError:
            pass  # not a socket: nobody to answer to
        finally:
            for fd in fds:
                os.close(fd)

    def answer(self, conversation: socket.socket, data: bytes, fds: list[int]) -> None:
        """Do what is asked; the descriptors are closed by the caller."""
        op = "request"
        conversation.setblocking(False)
        try:
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
            tell(conversation, reply, out)
        finally:
            conversation.close()
            for fd in out:
                os.close(fd)

    def spawn(self, conversation: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
        done, report = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            pid = os.fork()
            if pid == 0:
                become_command(request, fds, report, self.restore)
            command = self.commands[pid] = Command(pid, conversation, done)
        except BaseException:
            os.close(done)
            raise
        finally:
            os.close(report)
        self.watch(done, lambda: self.started(command))
        self.watch(conversation.fileno(), lambda: self.hang_up(command))

    def started(self, command: Command) -> None:
        """The command's exec has happened, or failed."""
        if command.report is None:
            return
        try:
            problem = os.read(command.report, RECORD_MAX)
        except BlockingIOError:
            return
        self.forget(command.report)
        os.close(command.report)
        command.report = None
        if problem:
            tell(command.conversation, json.loads(problem))
            self.drop(command)
        else:
            tell(command.conversation, {"pid": command.pid}, [command.pidfd])
        os.close(command.pidfd)

    def hang_up(self, command: Command) -> None:
        """The client is not interested any more, or wants it killed; it may still wait for the status."""
        if command.pid in self.commands:
            self.forget(command.conversation.fileno())
            kill_tree(command.pid)

    def reap(self) -> None:
        """Collect every child that has ended: our commands, and orphans that fell to us."""
        try:
            os.read(self.wakeup, 4096)
        except BlockingIOError:
            return
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if command := self.commands.get(pid):
                self.started(command)  # if it was quick: its start is told before its end
                if pid in self.commands:
                    tell(command.conversation, {"status": status})
                    self.drop(command)

    def drop(self, command: Command) -> None:
        del self.commands[command.pid]
        self.forget(command.conversation.fileno())
        command.conversation.close()


def tell(conversation: socket.socket, reply: dict[str, object], fds: Sequence[int] = ()) -> None:
    """Send one record; a client that has gone takes the descriptors with it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with suppress(OSError):
        conversation.sendmsg([json.dumps(reply).encode()], rights, socket.MSG_NOSIGNAL)


def main() -> NoReturn:
    control = socket.socket(fileno=int(sys.argv[1]))
    owner = int(sys.argv[2])
    start = json.loads(sys.argv[3])
    for fd in (control.fileno(), owner):
        os.set_inheritable(fd, False)
    # A command gets the defaults back, but what was ignored before us (nohup) stays ignored for it.
    restore = [number for number in IGNORED if signal.getsignal(number) is not signal.SIG_IGN]
    restore += [signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ]  # Python ignores the last two for itself
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    if start["mode"] == "create":
        create(start["ids"], control)
    elif start["mode"] == "attach":
        os.set_inheritable(start["fd"], False)
        attach(start["fd"], control)
    agent = Agent(control, owner, restore)
    try:
        control.send(b'{"state": "ready"}')
    except BrokenPipeError:  # the owner has given up already
        sys.exit(1)
    control.setblocking(False)
    agent.run()


if __name__ == "__main__":
    main()
