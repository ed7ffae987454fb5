"""What a worker gives up before it reads its first frame, so that a worker taken over has little to give.

Layers, in the order they are laid; none can be taken off again.

- core: no core dump, which would have everybody's bytes in it.
- root: a mount namespace in whose root are /etc and /run, to be read, what those need, and an empty /tmp: no other
  file has a name there (pivot_root(2)).  A process that may not make one makes a user namespace first, in which it
  may.  Workers go without it, for they have landlock.
- dumpable: other processes of the same user may not trace it or read its memory (PR_SET_DUMPABLE, prctl(2)).
- capabilities: all are dropped, from every set, but for those that an `Uplink` or a listener of a privileged
  caller uses: CAP_NET_BIND_SERVICE and CAP_NET_RAW, if they are there.
- no_new_privs: no program gives any back (prctl(2)).
- landlock: files can be read below /etc, the directories of those who write resolv.conf, and that of another file
  that an `Uplink` is told to follow (so that one should have a directory of its own), and no other be opened at all;
  with Linux 6.12 no process outside can be sent a signal, and no abstract socket connected to (landlock(7)).
  TCP is not restricted: the policy of an `Uplink` is what decides there.
- seccomp: a list of system calls, that of `ALLOWED` (seccomp(2)).  Without landlock no file can be opened, and a
  resolv.conf that has changed is not read.

Each layer is tried, looked at afterwards, and reported: "on", or why not.  What this kernel, or a container around
us, does not give is missing, and whoever cannot do without says so (`netns_kit.UserStack`).

What seccomp does with the rest.  Calls of `FATAL` are made by nobody here, nor by a policy that could mean well:
the process is killed at once, before it can try the next.  All others fail with EPERM: libc and CPython probe for
calls and have something else to fall back on, and a policy that oversteps raises, which refuses its flow.  A process
or a thread is not started, memory never becomes executable, and sockets are IPv4's and IPv6's alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Callable, Iterable, Mapping
from fcntl import F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_SETFD, F_SETFL
from typing import NamedTuple

ON = "on"
CAP_NET_BIND_SERVICE, CAP_NET_RAW = 10, 13
KEPT = 1 << CAP_NET_BIND_SERVICE | 1 << CAP_NET_RAW
_CAP_SYS_ADMIN = 21

# linux/prctl.h
_GET_DUMPABLE, _SET_DUMPABLE = 3, 4
_SET_NO_NEW_PRIVS, _GET_NO_NEW_PRIVS = 38, 39
_CAPBSET_READ, _CAPBSET_DROP = 23, 24
_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL = 47, 4

# linux/capability.h
_CAPABILITY_HEADER = struct.pack("Ii", 0x20080522, 0)
_CAPABILITIES = struct.Struct("6I")  # effective, permitted, inheritable: low words, then high

# linux/sched.h, linux/mount.h
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_READ_ONLY, _QUIET, _REMOUNT = 1, 2 | 4 | 8, 32  # nosuid, nodev, noexec
_BIND, _RECURSIVE, _SLAVE, _DETACH = 0x1000, 0x4000, 1 << 19, 2
_PIVOT_ROOT = {
    "x86_64": 155, "aarch64": 41, "riscv64": 41, "loongarch64": 41, "ppc64le": 203, "s390x": 217,
}  # fmt: skip
_NEW_ROOT = "/tmp"  # the place where it is made: one that every host has
_SHOWN = ("/etc", "/run")
_ROOT_SIZE = "mode=0755,size=64k,nr_inodes=256"

# linux/landlock.h: the same numbers on every architecture
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many there are, by ABI
_SCOPES = 0b11  # abstract sockets, signals: since ABI 6
_RULE = struct.Struct("=Qi")

# linux/seccomp.h, linux/audit.h, linux/bpf_common.h
_SET_MODE_FILTER, _SPEC_ALLOW = 1, 4  # a filter is not to slow down the branches of older kernels
_KILL, _ALLOW, _DENY = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM
_LOAD, _AND, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_INSTRUCTION = struct.Struct("=HBBI")
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # in struct seccomp_data
_X32 = 0x40000000
_PROT_EXEC = 4
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_TMPFILE & ~os.O_DIRECTORY

# where resolv.conf may come to be, by a new symbolic link
_WRITERS = ("systemd/resolve", "NetworkManager", "resolvconf", "connman", "netconfig")
_RESOLVERS = frozenset({"/etc", *(f"/run/{name}" for name in _WRITERS)})


class Machine(NamedTuple):
    """`column` is that of a machine in the tables below; `seccomp` and `getppid` are numbers of calls."""

    column: int
    architecture: int
    seccomp: int
    getppid: int  # which cannot fail, unless it is not let


MACHINES = {"x86_64": Machine(0, 0xC000003E, 317, 110), "aarch64": Machine(1, 0xC00000B7, 277, 173)}

ALLOWED: Mapping[str, tuple[int | None, int | None]] = {
    # for every frame and segment: they come first
    "recvfrom": (45, 207), "sendto": (44, 206), "readv": (19, 65), "writev": (20, 66),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "recvmsg": (47, 212), "sendmsg": (46, 211),
    "read": (0, 63), "write": (1, 64), "clock_gettime": (228, 113), "futex": (202, 98),
    "sched_yield": (24, 124), "getrusage": (98, 165),
    # for every flow
    "epoll_ctl": (233, 21), "close": (3, 57), "connect": (42, 203), "accept4": (288, 242), "bind": (49, 200),
    "listen": (50, 201), "shutdown": (48, 210), "getsockname": (51, 204), "getpeername": (52, 205),
    "getsockopt": (55, 209), "setsockopt": (54, 208), "poll": (7, None), "ppoll": (271, 73),
    # memory and time
    "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "gettimeofday": (96, 169), "sched_getaffinity": (204, 123), "time": (201, None), "getrandom": (318, 278),
    # resolv.conf
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80),
    "newfstatat": (262, 79), "statx": (332, 291), "lseek": (8, 62), "getrlimit": (97, 163),
    # the end
    "rt_sigreturn": (15, 139), "rt_sigprocmask": (14, 135), "rt_sigaction": (13, 134), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "getpid": (39, 172), "gettid": (186, 178),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
"""Numbers of the system calls that a worker makes, per machine; None: it has no such call.  Whoever has the engine,
a relay or the pump make a new one puts it here."""

WATCHING: Mapping[str, tuple[int | None, int | None]] = {"getdents64": (217, 61), "pidfd_open": (434, 434)}
"""The calls of who wants to know whether processes live in a namespace still, see `occupants`."""

_BOUNDED: Mapping[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "mmap": (9, 222), "mprotect": (10, 226), "ioctl": (16, 29), "prlimit64": (302, 261),
    "tgkill": (234, 131), "fcntl": (72, 25),
}  # fmt: skip

_OPENING: Mapping[str, tuple[int | None, int | None]] = {"open": (2, None), "openat": (257, 56)}
"""Only with Landlock, and only to read: without it any process of the same user could be read by /proc/PID/mem."""

FATAL: Mapping[str, tuple[int | None, int | None]] = {
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "setns": (308, 268), "unshare": (272, 97),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "move_mount": (429, 429),
    "open_tree": (428, 428), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225),
}  # fmt: skip
"""The calls that end the process that makes them."""


class Bound(NamedTuple):
    """Of one argument, by the offset of its lower or upper half: masked, it is one of the values."""

    offset: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


def _bounds() -> dict[str, tuple[Bound, ...]]:
    def low(argument: int) -> int:
        return _ARGUMENTS + 8 * argument

    tcgets, fionbio, fioclex, siocatmark, siocgifindex = 0x5401, 0x5421, 0x5451, 0x8905, 0x8933
    return {
        "mmap": (Bound(low(2), (0,), _PROT_EXEC),),
        "mprotect": (Bound(low(2), (0,), _PROT_EXEC),),
        "ioctl": (Bound(low(1), (siocatmark, fionbio, fioclex, tcgets, siocgifindex)),),
        "socket": (Bound(low(0), (2, 10)),),  # AF_INET, AF_INET6
        "prlimit64": (
            Bound(low(0), (0,)),
            Bound(low(2), (0,)),
            Bound(low(2) + 4, (0,)),
        ),  # its own, to be read
        "tgkill": (Bound(low(0), (os.getpid(),)),),  # abort(3)
        "open": (Bound(low(1), (0,), _WRITING),),
        "openat": (Bound(low(2), (0,), _WRITING),),
        # the kernel would send whom F_SETOWN names any signal that F_SETSIG does
        "fcntl": (Bound(low(1), (F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC)),),
    }


libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """Why a layer is not on."""


LAYERS = ("core", "dumpable", "capabilities", "no_new_privs", "landlock", "seccomp")


def enter(
    readable: Iterable[str] = (),
    layers: Iterable[str] = LAYERS,
    *,
    kept: int = KEPT,
    calls: Mapping[str, tuple[int | None, int | None]] = ALLOWED,
) -> dict[str, str]:
    """Lay every one of `layers` that can be laid; each one's name, with "on" or why it is not.  For the rest of
    this process.

    `readable` are the files that will be read, anew whenever they change; so what lies beside and below them can be
    read too.  `kept` is the set of capabilities that are not dropped, `calls` are the system calls that are allowed
    whatever their arguments.
    """
    report = dict.fromkeys(LAYERS, "not asked for")
    lay: dict[str, Callable[[], None]] = {
        "core": _no_core,
        "root": lambda: _bare_root(readable),
        "dumpable": _not_dumpable,
        "capabilities": lambda: _no_capabilities(kept),
        "no_new_privs": _no_new_privileges,
        "landlock": lambda: _few_files(readable),
        "seccomp": lambda: _few_calls(calls, files=ON in (report["landlock"], report.get("root"))),
    }
    for name in sorted(layers, key=list(lay).index):
        try:
            lay[name]()
            report[name] = ON
        except (Missing, OSError) as error:
            report[name] = str(error)
    return report


def _no_core() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _bare_root(readable: Iterable[str]) -> None:
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None or struct.calcsize("P") != 8:
        raise Missing("unsupported")
    shown = [path for path in sorted(_on_the_way(readable)) if os.path.isdir(path)]
    if _capabilities()[0] >> _CAP_SYS_ADMIN & 1:
        _check(libc.unshare(_CLONE_NEWNS))
    else:
        _in_user_namespace(_CLONE_NEWNS)
    _mount(None, "/", None, _SLAVE | _RECURSIVE)  # what the host unmounts goes here too
    sources = {path: os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in shown}
    _mount("tmpfs", _NEW_ROOT, "tmpfs", _QUIET, _ROOT_SIZE)
    for path, fd in sources.items():
        os.makedirs(_NEW_ROOT + path, exist_ok=True)
        _mount(f"/proc/self/fd/{fd}", _NEW_ROOT + path, None, _BIND | _RECURSIVE)
        os.close(fd)
    os.makedirs(f"{_NEW_ROOT}/tmp", exist_ok=True)
    for path in _mounts_below(_NEW_ROOT):  # one by one: a bind mount of a tree is changed at its top alone
        try:
            _mount(None, path, None, _REMOUNT | _BIND | _READ_ONLY | _QUIET)
        except FileNotFoundError:  # it is being unmounted
            continue
    os.chdir(_NEW_ROOT)
    _check(libc.syscall(number, b".", b"."))
    _check(libc.umount2(b".", _DETACH))
    os.chdir("/")
    if os.path.exists("/proc"):
        raise Missing("the host's files are still there")


def _on_the_way(files: Iterable[str]) -> set[str]:
    """The directories through which the names of these files lead, beside and outside of those that are shown."""
    found = set(_SHOWN)
    for path in files:
        for _ in range(40):  # as many links as the kernel follows
            directory = os.path.dirname(os.path.abspath(path))
            if not any(f"{directory}/".startswith(f"{each}/") for each in found):
                found.add(directory)
            try:
                path = os.path.join(directory, os.readlink(path))
            except OSError:  # it is no link
                break
    return found


def _in_user_namespace(flags: int) -> None:
    """Make one, with the same ids, and with it what `flags` say: in there we may."""
    uid, gid = os.geteuid(), os.getegid()
    _check(libc.unshare(_CLONE_NEWUSER | flags))
    for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _mounts_below(path: str) -> list[str]:
    with open("/proc/self/mountinfo", "rb") as file:
        escaped = [line.split()[4] for line in file]
    points = [os.fsdecode(each.decode("unicode_escape").encode("latin-1")) for each in escaped]
    return [point for point in points if f"{point}/".startswith(f"{path}/")]


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, options)]
    if libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def _not_dumpable() -> None:
    _prctl(_SET_DUMPABLE, 0)
    if _prctl(_GET_DUMPABLE):
        raise Missing("it is still dumpable")


def _no_capabilities(kept: int) -> None:
    """The bounding set too, where we may."""
    capability = 0
    while libc.prctl(_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        if not kept >> capability & 1:
            libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1
    libc.prctl(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    kept &= _capabilities()[1]
    wanted = (kept, kept, 0, 0, 0, 0)
    _check(libc.capset(_CAPABILITY_HEADER, _CAPABILITIES.pack(*wanted)))
    if _capabilities() != wanted:
        raise Missing("some are still there")


def _capabilities() -> tuple[int, ...]:
    sets = ctypes.create_string_buffer(_CAPABILITIES.size)
    _check(libc.capget(_CAPABILITY_HEADER, sets))
    return _CAPABILITIES.unpack(sets.raw)


def _no_new_privileges() -> None:
    _prctl(_SET_NO_NEW_PRIVS, 1)
    if _prctl(_GET_NO_NEW_PRIVS) != 1:
        raise Missing("it is still off")


def _few_files(readable: Iterable[str]) -> None:
    abi = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if abi < 1:
        number = ctypes.get_errno()
        raise Missing(
            {errno.ENOSYS: "unsupported", errno.EOPNOTSUPP: "disabled"}.get(number, os.strerror(number))
        )
    rights = (1 << _FILE_RIGHTS.get(abi, max(_FILE_RIGHTS.values()))) - 1
    words = (rights,) if abi < 4 else (rights, 0) if abi < 6 else (rights, 0, _SCOPES)
    wanted = struct.pack(f"={len(words)}Q", *words)
    ruleset = _check(libc.syscall(_CREATE_RULESET, wanted, ctypes.c_size_t(len(wanted)), 0))
    try:
        for directory in _readable(readable):
            _let_read(ruleset, directory)
        _check(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except PermissionError:
        return
    raise Missing("the root directory can still be read")


def _readable(files: Iterable[str]) -> set[str]:
    """The directories of those files, for a file that is replaced is found only where its directory is; and where a
    symbolic link may lead to some day."""
    paths = {path for each in files for path in (os.path.abspath(each), os.path.realpath(each))}
    return {os.path.dirname(path) for path in paths} | _RESOLVERS if paths else set()


def _let_read(ruleset: int, directory: str) -> None:
    try:
        opened = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # what is not there cannot be read
        return
    try:
        rule = _RULE.pack(_READ_FILE | _READ_DIR, opened)
        _check(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    finally:
        os.close(opened)


def _few_calls(calls: Mapping[str, tuple[int | None, int | None]], *, files: bool) -> None:
    machine = MACHINES.get(os.uname().machine)
    if machine is None or struct.calcsize("P") != 8:
        raise Missing("unsupported")
    filters = program(machine, calls, files=files)
    text = ctypes.create_string_buffer(filters, len(filters))
    fprog = struct.pack("HP", len(filters) // _INSTRUCTION.size, ctypes.addressof(text))
    _check(libc.syscall(machine.seccomp, _SET_MODE_FILTER, _SPEC_ALLOW, fprog))
    if libc.syscall(machine.getppid) != -1:
        raise Missing("a call that is not on the list still works")


def program(
    machine: Machine, calls: Mapping[str, tuple[int | None, int | None]] = ALLOWED, *, files: bool = True
) -> bytes:
    """The filter in classic BPF: the machine, then the number, then for some the arguments.  `calls` are allowed
    whatever theirs are.  `files`: whether any may be opened."""
    code = [
        _INSTRUCTION.pack(_LOAD, 0, 0, _ARCHITECTURE),
        _INSTRUCTION.pack(_IF_EQUAL, 1, 0, machine.architecture),
        _INSTRUCTION.pack(_RETURN, 0, 0, _KILL),
        _INSTRUCTION.pack(_LOAD, 0, 0, _NUMBER),
        _INSTRUCTION.pack(_IF_AT_LEAST, 0, 1, _X32),  # the same calls under other numbers
        _INSTRUCTION.pack(_RETURN, 0, 0, _KILL),
    ]

    def on(calls: Mapping[str, tuple[int | None, int | None]], body: Callable[[str], list[bytes]]) -> None:
        for name, numbers in calls.items():
            number = numbers[machine.column]
            if number is not None:
                then = body(name)
                code.append(_INSTRUCTION.pack(_IF_EQUAL, 0, len(then), number))
                code.extend(then)

    bounds = _bounds()
    on(calls, lambda _: [_INSTRUCTION.pack(_RETURN, 0, 0, _ALLOW)])
    bounded = {**_BOUNDED, **_OPENING} if files else _BOUNDED
    on(bounded, lambda name: [*_bounded(bounds[name]), _INSTRUCTION.pack(_RETURN, 0, 0, _ALLOW)])
    on(FATAL, lambda _: [_INSTRUCTION.pack(_RETURN, 0, 0, _KILL)])
    code.append(_INSTRUCTION.pack(_RETURN, 0, 0, _DENY))
    return b"".join(code)


def _bounded(bounds: tuple[Bound, ...]) -> list[bytes]:
    """Goes on behind itself if all bounds hold."""
    code = []
    for bound in bounds:
        code.append(_INSTRUCTION.pack(_LOAD, 0, 0, bound.offset))
        code.append(_INSTRUCTION.pack(_AND, 0, 0, bound.mask))
        for left, value in zip(range(len(bound.values), 0, -1), bound.values, strict=True):
            code.append(_INSTRUCTION.pack(_IF_EQUAL, left, 0, value))
        code.append(_INSTRUCTION.pack(_RETURN, 0, 0, _DENY))
    return code


def _prctl(option: int, argument: int = 0) -> int:
    return _check(libc.prctl(option, argument, 0, 0, 0))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
