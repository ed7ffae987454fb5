"""Why a host says no: from what failed, and what the host says of itself, to the exception that names the cause.

Whoever tries something and is refused makes the exception here: the library where it fails, and `doctor`, which tries
everything.  So both say the same.  An errno alone seldom tells: EPERM of unshare(2) may come of a sysctl, of a
security module, of a seccomp filter or of a chroot.  What is asked, in that order: is there such a thing at all; is
a bound reached; does a filter judge the call before the kernel does; is there a switch, and is it off; does a
security module confine us.  A knob is named only if it is set against the caller.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from netns_kit.errors import (
    FeatureUnavailable,
    IdMapError,
    PingNotPermitted,
    PrivilegedPortError,
    SandboxUnavailable,
    SysctlError,
    TunUnavailable,
    UserNamespaceDenied,
)

from . import sysctl

CLONE = "kernel.unprivileged_userns_clone"
APPARMOR = "kernel.apparmor_restrict_unprivileged_userns"
PORT_START = "net.ipv4.ip_unprivileged_port_start"
PING_GROUPS = "net.ipv4.ping_group_range"
TCP_RECEIVE, TCP_SEND = "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"
_BOUNDS = {
    "unshare user": "user.max_user_namespaces",
    "unshare net": "user.max_net_namespaces",
    "mount": "user.max_mnt_namespaces",
    "unshare pids": "user.max_pid_namespaces",
    "unshare mounts": "user.max_mnt_namespaces",
}
PID_STEPS = frozenset({"unshare pids", "unshare mounts", "mount proc"})
_IPV6_OFF = ("net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.lo.disable_ipv6")
KNOBS = (*_BOUNDS.values(), CLONE, APPARMOR, PORT_START, PING_GROUPS, TCP_RECEIVE, TCP_SEND, *_IPV6_OFF)
"""The sysctls that decide."""

TUN = "/dev/net/tun"
SECCOMP, LABEL = "Seccomp in /proc/self/status", "/proc/self/attr/current"
OVERFLOW = 65534  # user_namespaces(7), /proc/sys/kernel/overflowgid
DENIED = frozenset({errno.EPERM, errno.EACCES})
EXHAUSTED = frozenset({errno.ENOSPC, errno.EUSERS})
_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT})
_FREE = frozenset({"", "unconfined", "kernel"})


class Host(NamedTuple):
    """What a host says of itself, of the calling thread and of the namespaces that it is in.

    `settings` are the values of those of the `KNOBS` that the kernel has.  `release` is the kernel's.  `seccomp`:
    whether a filter judges our system calls.  `no_new_privs`: whether setuid programs are without effect (prctl(2)).
    `label` is how a security module confines us, "unconfined" or nothing if none does.  `chrooted`: whether our root
    directory is seen not to be that of the mount namespace.  `gid` is our effective group.
    """

    settings: Mapping[str, str] = MappingProxyType({})
    release: str = ""
    seccomp: bool = False
    no_new_privs: bool = False
    label: str = ""
    chrooted: bool = False
    gid: int = 0

    @classmethod
    def here(cls) -> Host:
        """This one, as the calling thread sees it."""
        settings = {}
        for name in KNOBS:
            try:
                settings[name] = sysctl.read(name)
            except SysctlError:
                continue
        status = _text("/proc/thread-self/status")
        mounts = _text("/proc/thread-self/mountinfo").splitlines()
        return cls(
            settings,
            os.uname().release,
            "\nSeccomp:\t2" in status,
            "\nNoNewPrivs:\t1" in status,
            _text("/proc/thread-self/attr/current").strip("\0\n "),
            bool(mounts) and all(line.split(" ")[4] != "/" for line in mounts),
            os.getegid(),
        )

    def number(self, name: str) -> int | None:
        """The value of a sysctl that is one number; None if there is none."""
        try:
            return int(self.settings[name])
        except (KeyError, ValueError):
            return None


def user_namespace(
    number: int, step: str, host: Host | None = None, *, filtered: bool | None = None
) -> UserNamespaceDenied:
    """Why `step` failed with the errno `number`: "unshare user", "map", "unshare net", "loopback", or "mount" in
    there.

    `filtered`: whether a seccomp filter is what denies it, if that is known.
    """
    host = host or Host.here()
    cause = f"{step}: {os.strerror(number)}"
    if number in EXHAUSTED:
        knob = _BOUNDS.get(step, _BOUNDS["unshare user"])
        fix = f"raise it here and in every user namespace above: sysctl -w {knob}=N"
        return UserNamespaceDenied(cause, knob, host.number(knob), fix, number)
    if number in {errno.EINVAL, errno.ENOSYS} and step.startswith("unshare") and not filtered:
        config = "CONFIG_NET_NS" if step == "unshare net" else "CONFIG_USER_NS"
        fix = f"a kernel built with {config}=y"
        return UserNamespaceDenied(cause, config, "not set", fix, number)
    if not filtered:
        if step == "unshare user" and host.number(CLONE) == 0:
            return UserNamespaceDenied(cause, CLONE, 0, f"sysctl -w {CLONE}=1", number)
        if value := host.number(APPARMOR):
            fix = f"give this Python an AppArmor profile that allows `userns,`, or sysctl -w {APPARMOR}=0"
            return UserNamespaceDenied(cause, APPARMOR, value, fix, number)
    return UserNamespaceDenied(cause, *_policy(host, _CALLS.get(step), filtered=filtered), number)


_CALLS = {
    "unshare user": "unshare with CLONE_NEWUSER",
    "unshare net": "unshare with CLONE_NEWNET",
    "mount": "unshare, mount and umount2",
}  # what a filter may stand in the way of; the other steps are plain files and ioctls


def pid_namespace(
    number: int, step: str, host: Host | None = None, *, filtered: bool = False
) -> FeatureUnavailable:
    """Why commands get no PID namespace of their own: `step`, one of `PID_STEPS`, failed with the errno `number`."""
    host = host or Host.here()
    cause = f"no PID namespace: {step}: {os.strerror(number)}"
    way_out = '; or do without it: pids="host"'
    if number in EXHAUSTED:
        knob = _BOUNDS[step]
        return FeatureUnavailable(cause, knob, host.number(knob), f"sysctl -w {knob}=N{way_out}", number)
    if step == "mount proc" and number in DENIED and not filtered:
        fix = "let the container do without masked paths: --security-opt unmask=ALL or systempaths=unconfined"
        return FeatureUnavailable(cause, "/proc", "masked", f"{fix}{way_out}", number)
    if number in {errno.EINVAL, errno.ENOSYS} and step == "unshare pids" and not filtered:
        fix = f"a kernel built with CONFIG_PID_NS=y{way_out}"
        return FeatureUnavailable(cause, "CONFIG_PID_NS", "not set", fix, number)
    calls = "unshare with CLONE_NEWPID and CLONE_NEWNS, and mount"
    against, found, remedy = _policy(host, calls, filtered=filtered)
    return FeatureUnavailable(cause, against, found, f"{remedy}{way_out}", number)


def _policy(host: Host, calls: str | None, *, filtered: bool | None = None) -> tuple[str | None, object, str]:
    """Knob, value and fix, where a permission was denied and no sysctl has done it."""
    by_filter = SECCOMP, 2, f"allow {calls} in the seccomp profile of the container or service"
    if filtered or (filtered is None and calls and host.seccomp):
        return by_filter
    if host.label.partition(" ")[0] not in _FREE:
        return LABEL, host.label, "allow it in that profile, or run under another"
    if host.chrooted:
        return "the root directory", "a chroot's", "leave the chroot, or make it with pivot_root(2)"
    if calls and host.seccomp:  # one that knows those very arguments
        return by_filter
    return None, None, "leave the chroot or container that forbids it, or let it allow it"


def id_ranges(program: str, said: str, place: str | None, host: Host | None = None) -> IdMapError:
    """Why `program`, newuidmap or newgidmap, found at `place`, has mapped nothing and `said` that."""
    host = host or Host.here()
    kind = program[3:6]
    if host.no_new_privs:
        fix = f"start without no_new_privs, which takes {program} its privilege (prctl(2))"
        return IdMapError(said, "NoNewPrivs in /proc/self/status", 1, fix)
    fix = f"{program} must be setuid root or have cap_set{kind}, on a file system without nosuid"
    if place is not None and (lack := _lacks(place)):
        return IdMapError(said, place, lack, fix)
    return IdMapError(said, fix=f"{fix}, and the ranges of /etc/sub{kind} its caller's alone")


def _lacks(program: str) -> str | None:
    """What is seen to be wrong with a program that is to have privileges."""
    try:
        status = os.stat(program)
        if os.statvfs(program).f_flag & os.ST_NOSUID:
            return "on a file system mounted nosuid"
        if status.st_uid == 0 and status.st_mode & stat.S_ISUID:
            return None
        if "security.capability" in os.listxattr(program):
            return None
        return f"uid {status.st_uid}'s, mode {stat.S_IMODE(status.st_mode):04o}"
    except OSError:
        return None


def tun(error: OSError, name: str) -> TunUnavailable:
    """What keeps the tap `name` from being opened: `error.filename` tells the node from the device."""
    number = error.errno or errno.ENODEV
    cause = f"tap {name}: {error.filename or TUN}: {error.strerror}"
    if number == errno.ENOTTY or (number in DENIED and _is_file(TUN)):
        fix = f"remove it, then modprobe tun or mknod {TUN} c 10 200; or bind the host's node there"
        return TunUnavailable(
            f"tap {name}: {TUN}: {os.strerror(errno.ENOTTY)}", TUN, "not the tun device", fix, errno.ENOTTY
        )
    if error.filename == TUN:
        if number in {errno.ENOENT, errno.ENOTDIR}:
            fix = f"modprobe tun, or give the container --device {TUN}"
            return TunUnavailable(cause, TUN, "missing", fix, number)
        if number in DENIED:
            return TunUnavailable(cause, *_closed_node(number), number)
        fix = "modprobe tun (after a kernel update: reboot)"
        return TunUnavailable(cause, TUN, "without a driver", fix, number)
    if number == errno.EBUSY:
        fix = "close the program that has it, or choose another name"
        return TunUnavailable(cause, name, "in use", fix, number)
    if number in DENIED:
        fix = "use a namespace made by create(), or CAP_NET_ADMIN in this one"
        return TunUnavailable(cause, "CAP_NET_ADMIN", "missing", fix, number)
    return TunUnavailable(cause, name, None, "choose the name of a tap, or one that does not exist", number)


def _closed_node(number: int) -> tuple[str, str, str]:
    """Knob, value and fix, where /dev/net/tun is there, but not for us."""
    mode = _mode(TUN)
    if number == errno.EPERM:
        return TUN, "denied", "allow the device in the container's cgroup: --device /dev/net/tun"
    if mode is None:
        return "/dev/net", "closed to this user", "chmod 0755 /dev/net"
    if os.statvfs(TUN).f_flag & os.ST_NODEV:
        return TUN, "on a file system mounted nodev", "mount it without nodev, or bind the host's node there"
    return TUN, f"mode {mode:04o}", "chmod 0666 /dev/net/tun, or be in its group"


def privileged_port(port: int, where: str, start: object) -> PrivilegedPortError:
    """Nobody but the privileged may listen on `port`; `start` is the first that others may."""
    return PrivilegedPortError(
        f"cannot listen on port {port} {where}",
        PORT_START,
        start,
        f"choose a port from {start} up, or lower it: sysctl {PORT_START}={port}, "
        "or give the interpreter CAP_NET_BIND_SERVICE: setcap cap_net_bind_service=ep PYTHON",
    )


def ping(number: int, host: Host | None = None) -> PingNotPermitted:
    """Why neither a ping socket nor a raw one could be opened."""
    host = host or Host.here()
    cause = f"ping is not permitted: {os.strerror(number)}"
    value = host.settings.get(PING_GROUPS)
    if value is not None and number in DENIED:
        low, high = map(int, value.split())
        if not low <= host.gid <= high:
            anybody = low <= high and low != OVERFLOW  # as which a group without a name here is shown
            ends = (min(low, host.gid), max(high, host.gid)) if anybody else (host.gid, host.gid)
            fix = f'sysctl -w {PING_GROUPS}="{ends[0]} {ends[1]}": the group is {host.gid}'
            return PingNotPermitted(cause, PING_GROUPS, value, fix, number)
    if number in DENIED:
        return PingNotPermitted(cause, *_policy(host, "socket with IPPROTO_ICMP"), number)
    return PingNotPermitted(cause, fix="a kernel that has ping sockets of this family", errno=number)


def ipv6(number: int, settings: Mapping[str, str]) -> FeatureUnavailable:
    """Why there is no socket of IPv6's, or no address; `settings` are those of the network namespace."""
    cause = f"no IPv6: {os.strerror(number)}"
    if number in _NO_IPV6:
        fix = "boot without ipv6.disable=1, with a kernel that has CONFIG_IPV6"
        return FeatureUnavailable(cause, "IPv6", "not in the kernel", fix, number)
    for knob in settings:
        if knob.endswith(".disable_ipv6") and settings[knob] == "1":
            return FeatureUnavailable(cause, knob, 1, f"sysctl -w {knob}=0", number)
    is_down = number == errno.EADDRNOTAVAIL
    return FeatureUnavailable(cause, fix="ip link set lo up" if is_down else None, errno=number)


def feature(
    what: str, error: OSError, since: str, calls: str | None = None, host: Host | None = None
) -> FeatureUnavailable:
    """Why `what` does not work: Linux has it from version `since` on, and `calls` are made for it."""
    host = host or Host.here()
    number = error.errno or errno.ENOSYS
    place = f": {error.filename}" if error.filename else ""
    cause = f"{what}{place}: {error.strerror or os.strerror(number)}"
    if number in DENIED:
        return FeatureUnavailable(cause, *_policy(host, calls), number)
    if number == errno.EROFS:
        fix = "mount it writable, or let the container do without masked paths: --security-opt unmask=ALL"
        return FeatureUnavailable(cause, error.filename, "read-only", fix, number)
    return FeatureUnavailable(cause, "Linux", host.release, f"Linux {since} or newer", number)


def layer(name: str, reason: str | None) -> SandboxUnavailable:
    """Why a worker is without that layer of its sandbox; `reason` is what `sandbox.enter` says."""
    fixes = {
        ("landlock", "unsupported"): "Linux 5.13 or newer, with CONFIG_SECURITY_LANDLOCK",
        ("landlock", "disabled"): "add landlock to lsm= on the kernel's command line",
        ("seccomp", "unsupported"): "an x86_64 or aarch64 machine",
    }
    fix = fixes.get((name, reason or ""), "let the container or service around us allow it")
    return SandboxUnavailable(
        f"this host gives the worker no {name}", name, reason, f"{fix}; or do not require it"
    )


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:  # an attr/current without a security module, say
        return ""


def _is_file(path: str) -> bool:
    """Whether an ordinary file is there, where a device should be."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _mode(path: str) -> int | None:
    try:
        return os.stat(path).st_mode & 0o7777
    except OSError:
        return None
