"""The sandbox of a worker: what it gives up before its first frame, so that an attacker who takes it over gains
little.

These are its layers, in the order in which they are applied.  None can be removed again.

- core: there are no core dumps, which would contain everybody's bytes.
- root: a mount namespace whose root has only /etc and /run, read-only, what those need, and an empty /tmp.  No other
  file can be named (pivot_root(2)).  A process that may not make such a namespace makes a user namespace first, if it
  may.  Workers do not use this layer, since they have landlock.
- dumpable: other processes of the same user may not trace the process or read its memory (PR_SET_DUMPABLE, prctl(2)).
- capabilities: all are dropped, from every set, except for two that an `Uplink` or a listener of a privileged caller
  uses, if the process has them: CAP_NET_BIND_SERVICE and CAP_NET_RAW.
- no_new_privs: executing a program gives nothing back (prctl(2)).
- landlock: files can be read below /etc, in the directories of programs that write resolv.conf, and in the directory
  of another file that an `Uplink` follows (which should have a directory of its own).  No other file can be opened.
  From Linux 6.12 on, no signal can be sent to a process outside, and no abstract socket outside be connected to
  (landlock(7)).  TCP is not restricted, since the policy of an `Uplink` decides about it.
- seccomp: only the system calls in `ALLOWED` are allowed (seccomp(2)).  Without landlock no file can be opened, so
  that a changed resolv.conf is not read.

Each layer is tried, verified, and reported: "on", or the reason why not.  If this kernel or a container does not
allow a layer, it is missing; a caller that needs the layer must require it (`netns_kit.UserStack`).

Calls that are not on the list.  Neither this code nor an honest policy makes those of `FATAL`.  They kill the process
at once, before it can try others.  All other calls fail with EPERM: libc and CPython try such calls and can do
without them, and a policy that makes one raises, which refuses its flow.  No process or thread can be started, memory
never becomes executable, and sockets are those of IPv4 and IPv6.
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

from netns_kit.host import abi
from netns_kit.host.libc import check, libc

ON = "on"
KEPT = 1 << abi.CAP_NET_BIND_SERVICE | 1 << abi.CAP_NET_RAW

_CAPABILITY_HEADER = struct.pack("Ii", abi.CAPABILITY_VERSION_3, 0)
_CAPABILITIES = struct.Struct("6I")  # effective, permitted, inheritable: low words, then high

_QUIET = abi.MS_NOSUID | abi.MS_NODEV | abi.MS_NOEXEC
_NEW_ROOT = "/tmp"  # the place where it is made: one that every host has
_SHOWN = ("/etc", "/run")
_ROOT_SIZE = "mode=0755,size=64k,nr_inodes=256"

_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many there are, by Landlock's ABI
_READ = abi.LANDLOCK_ACCESS_FS_READ_FILE | abi.LANDLOCK_ACCESS_FS_READ_DIR
_SCOPES = abi.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | abi.LANDLOCK_SCOPE_SIGNAL  # since ABI 6
_RULE = struct.Struct("=Qi")

_DENY = abi.SECCOMP_RET_ERRNO | errno.EPERM
_INSTRUCTION = struct.Struct("=HBBI")
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # in struct seccomp_data
_X32 = 0x40000000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_TMPFILE & ~os.O_DIRECTORY

# where resolv.conf may come to be, by a new symbolic link
_WRITERS = ("systemd/resolve", "NetworkManager", "resolvconf", "connman", "netconfig")
_RESOLVERS = frozenset({"/etc", *(f"/run/{name}" for name in _WRITERS)})


class Machine(NamedTuple):
    """A kind of machine.  `column` is its column in the tables; `seccomp` and `getppid` are numbers of calls."""

    column: int
    architecture: int
    seccomp: int
    getppid: int  # which cannot fail, unless it is not let


MACHINES = {
    "x86_64": Machine(0, abi.AUDIT_ARCH_X86_64, 317, 110),
    "aarch64": Machine(1, abi.AUDIT_ARCH_AARCH64, 277, 173),
}

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
    "splice": (275, 76), "pipe2": (293, 59),
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
"""Numbers of the system calls that a worker makes, per machine; None: it has no such call.  A new one that engine,
relay or blocking loop makes has its place here."""

WATCHING: Mapping[str, tuple[int | None, int | None]] = {"getdents64": (217, 61), "pidfd_open": (434, 434)}
"""The calls by which processes of a namespace are found, as `occupants` does."""

_BOUNDED: Mapping[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "mmap": (9, 222), "mprotect": (10, 226), "ioctl": (16, 29), "prlimit64": (302, 261),
    "tgkill": (234, 131), "fcntl": (72, 25),
}  # fmt: skip

_OPENING: Mapping[str, tuple[int | None, int | None]] = {"open": (2, None), "openat": (257, 56)}
"""Allowed only with Landlock, and only to read: else /proc/PID/mem would open every process of the same user."""

FATAL: Mapping[str, tuple[int | None, int | None]] = {
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "setns": (308, 268), "unshare": (272, 97),
    "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_by_handle_at": (304, 265), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225),
    "open_tree": (abi.SYS_OPEN_TREE,) * 2, "move_mount": (abi.SYS_MOVE_MOUNT,) * 2,
    "pivot_root": (abi.SYS_PIVOT_ROOT["x86_64"], abi.SYS_PIVOT_ROOT["aarch64"]),
    "keyctl": (abi.SYS_KEYCTL["x86_64"], abi.SYS_KEYCTL_ELSEWHERE),
}  # fmt: skip
"""The calls that end the process that makes them."""


class Bound(NamedTuple):
    """A condition on one half of an argument, given by its offset: after masking it is one of the values."""

    offset: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


def _bounds() -> dict[str, tuple[Bound, ...]]:
    def low(argument: int) -> int:
        return _ARGUMENTS + 8 * argument

    ioctls = (abi.SIOCATMARK, abi.FIONBIO, abi.FIOCLEX, abi.TCGETS, abi.SIOCGIFINDEX)
    return {
        "mmap": (Bound(low(2), (0,), abi.PROT_EXEC),),
        "mprotect": (Bound(low(2), (0,), abi.PROT_EXEC),),
        "ioctl": (Bound(low(1), ioctls),),
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
        "fcntl": (Bound(low(1), (F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, abi.F_SETPIPE_SZ)),),
    }


class Missing(Exception):
    """An error that tells why a layer is not on."""


LAYERS = ("core", "dumpable", "capabilities", "no_new_privs", "landlock", "seccomp")


def enter(
    readable: Iterable[str] = (),
    layers: Iterable[str] = LAYERS,
    *,
    kept: int = KEPT,
    calls: Mapping[str, tuple[int | None, int | None]] = ALLOWED,
) -> dict[str, str]:
    """Apply those layers that can be applied, for the rest of this process.  Return "on" or the reason for each
    layer.

    Args:
        readable: Files that are read again whenever they change.  So their directories can be read too.
        layers: The names of the layers to apply.
        kept: The set of capabilities that are not dropped.
        calls: The system calls that are allowed with any arguments.
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
    number = abi.SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None or struct.calcsize("P") != 8:
        raise Missing("unsupported")
    shown = [path for path in sorted(_on_the_way(readable)) if os.path.isdir(path)]
    if _capabilities()[0] >> abi.CAP_SYS_ADMIN & 1:
        check(libc.unshare(abi.CLONE_NEWNS))
    else:
        _in_user_namespace(abi.CLONE_NEWNS)
    _mount(None, "/", None, abi.MS_SLAVE | abi.MS_REC)  # what the host unmounts goes here too
    sources = {path: os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in shown}
    _mount("tmpfs", _NEW_ROOT, "tmpfs", _QUIET, _ROOT_SIZE)
    for path, fd in sources.items():
        os.makedirs(_NEW_ROOT + path, exist_ok=True)
        _mount(f"/proc/self/fd/{fd}", _NEW_ROOT + path, None, abi.MS_BIND | abi.MS_REC)
        os.close(fd)
    os.makedirs(f"{_NEW_ROOT}/tmp", exist_ok=True)
    for path in _mounts_below(_NEW_ROOT):  # one by one: a bind mount of a tree is changed at its top alone
        try:
            _mount(None, path, None, abi.MS_REMOUNT | abi.MS_BIND | abi.MS_RDONLY | _QUIET)
        except FileNotFoundError:  # it is being unmounted
            continue
    os.chdir(_NEW_ROOT)
    check(libc.syscall(number, b".", b"."))
    check(libc.umount2(b".", abi.MNT_DETACH))
    os.chdir("/")
    if os.path.exists("/proc"):
        raise Missing("the host's files are still there")


def _on_the_way(files: Iterable[str]) -> set[str]:
    """Return the directories to show, and those outside of them that the names of `files` lead through."""
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
    """Make a user namespace with the same ids, and with it the namespaces of `flags`, which is allowed there."""
    uid, gid = os.geteuid(), os.getegid()
    check(libc.unshare(abi.CLONE_NEWUSER | flags))
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
    check(libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]), target)


def _not_dumpable() -> None:
    _prctl(abi.PR_SET_DUMPABLE, 0)
    if _prctl(abi.PR_GET_DUMPABLE):
        raise Missing("it is still dumpable")


def _no_capabilities(kept: int) -> None:
    """Drop all capabilities except those in `kept`; from the bounding set too, if that is permitted."""
    capability = 0
    while libc.prctl(abi.PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        if not kept >> capability & 1:
            libc.prctl(abi.PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1
    libc.prctl(abi.PR_CAP_AMBIENT, abi.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    kept &= _capabilities()[1]
    wanted = (kept, kept, 0, 0, 0, 0)
    check(libc.capset(_CAPABILITY_HEADER, _CAPABILITIES.pack(*wanted)))
    if _capabilities() != wanted:
        raise Missing("some are still there")


def _capabilities() -> tuple[int, ...]:
    sets = ctypes.create_string_buffer(_CAPABILITIES.size)
    check(libc.capget(_CAPABILITY_HEADER, sets))
    return _CAPABILITIES.unpack(sets.raw)


def _no_new_privileges() -> None:
    _prctl(abi.PR_SET_NO_NEW_PRIVS, 1)
    if _prctl(abi.PR_GET_NO_NEW_PRIVS) != 1:
        raise Missing("it is still off")


def _few_files(readable: Iterable[str]) -> None:
    version = libc.syscall(
        abi.SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), abi.LANDLOCK_CREATE_RULESET_VERSION
    )
    if version < 1:
        number = ctypes.get_errno()
        raise Missing(
            {errno.ENOSYS: "unsupported", errno.EOPNOTSUPP: "disabled"}.get(number, os.strerror(number))
        )
    rights = (1 << _FILE_RIGHTS.get(version, max(_FILE_RIGHTS.values()))) - 1
    words = (rights,) if version < 4 else (rights, 0) if version < 6 else (rights, 0, _SCOPES)
    wanted = struct.pack(f"={len(words)}Q", *words)
    ruleset = check(libc.syscall(abi.SYS_LANDLOCK_CREATE_RULESET, wanted, ctypes.c_size_t(len(wanted)), 0))
    try:
        for directory in _readable(readable):
            _let_read(ruleset, directory)
        check(libc.syscall(abi.SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except PermissionError:
        return
    raise Missing("the root directory can still be read")


def _readable(files: Iterable[str]) -> set[str]:
    """Return the directories of `files`, where replaced files are found, and those that links may lead to later."""
    paths = {path for each in files for path in (os.path.abspath(each), os.path.realpath(each))}
    return {os.path.dirname(path) for path in paths} | _RESOLVERS if paths else set()


def _let_read(ruleset: int, directory: str) -> None:
    try:
        opened = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # what is not there cannot be read
        return
    try:
        rule = _RULE.pack(_READ, opened)
        check(libc.syscall(abi.SYS_LANDLOCK_ADD_RULE, ruleset, abi.LANDLOCK_RULE_PATH_BENEATH, rule, 0))
    finally:
        os.close(opened)


def _few_calls(calls: Mapping[str, tuple[int | None, int | None]], *, files: bool) -> None:
    machine = MACHINES.get(os.uname().machine)
    if machine is None or struct.calcsize("P") != 8:
        raise Missing("unsupported")
    filters = program(machine, calls, files=files)
    text = ctypes.create_string_buffer(filters, len(filters))
    fprog = struct.pack("HP", len(filters) // _INSTRUCTION.size, ctypes.addressof(text))
    check(
        libc.syscall(machine.seccomp, abi.SECCOMP_SET_MODE_FILTER, abi.SECCOMP_FILTER_FLAG_SPEC_ALLOW, fprog)
    )
    if libc.syscall(machine.getppid) != -1:
        raise Missing("a call that is not on the list still works")


def program(
    machine: Machine, calls: Mapping[str, tuple[int | None, int | None]] = ALLOWED, *, files: bool = True
) -> bytes:
    """Return the filter in classic BPF.  It checks the machine, then the number, then for some calls the arguments.

    Args:
        machine: The kind of machine that it runs on.
        calls: The calls that are allowed with any arguments.
        files: Whether files may be opened for reading.
    """
    code = [
        _INSTRUCTION.pack(abi.BPF_LD_W_ABS, 0, 0, _ARCHITECTURE),
        _INSTRUCTION.pack(abi.BPF_JMP_JEQ_K, 1, 0, machine.architecture),
        _verdict(abi.SECCOMP_RET_KILL_PROCESS),
        _INSTRUCTION.pack(abi.BPF_LD_W_ABS, 0, 0, _NUMBER),
        _INSTRUCTION.pack(abi.BPF_JMP_JGE_K, 0, 1, _X32),  # the same calls under other numbers
        _verdict(abi.SECCOMP_RET_KILL_PROCESS),
    ]

    def on(calls: Mapping[str, tuple[int | None, int | None]], body: Callable[[str], list[bytes]]) -> None:
        for name, numbers in calls.items():
            number = numbers[machine.column]
            if number is not None:
                then = body(name)
                code.append(_INSTRUCTION.pack(abi.BPF_JMP_JEQ_K, 0, len(then), number))
                code.extend(then)

    bounds = _bounds()
    on(calls, lambda _: [_verdict(abi.SECCOMP_RET_ALLOW)])
    bounded = {**_BOUNDED, **_OPENING} if files else _BOUNDED
    on(bounded, lambda name: [*_bounded(bounds[name]), _verdict(abi.SECCOMP_RET_ALLOW)])
    on(FATAL, lambda _: [_verdict(abi.SECCOMP_RET_KILL_PROCESS)])
    code.append(_verdict(_DENY))
    return b"".join(code)


def _verdict(value: int) -> bytes:
    return _INSTRUCTION.pack(abi.BPF_RET_K, 0, 0, value)


def _bounded(bounds: tuple[Bound, ...]) -> list[bytes]:
    """Return instructions that deny the call unless all bounds hold; if they do, the next instructions follow."""
    code = []
    for bound in bounds:
        code.append(_INSTRUCTION.pack(abi.BPF_LD_W_ABS, 0, 0, bound.offset))
        code.append(_INSTRUCTION.pack(abi.BPF_ALU_AND_K, 0, 0, bound.mask))
        for left, value in zip(range(len(bound.values), 0, -1), bound.values, strict=True):
            code.append(_INSTRUCTION.pack(abi.BPF_JMP_JEQ_K, left, 0, value))
        code.append(_verdict(_DENY))
    return code


def _prctl(option: int, argument: int = 0) -> int:
    return check(libc.prctl(option, argument, 0, 0, 0))
