"""The exceptions a caller may catch.

Every one says what failed (`cause`), which setting decided it (`knob`) with the `value` it has, and the least
that would put it right (`fix`); the message is those parts in a row.  Where a caller would look at an errno
the exception is an `OSError` too.  Failures of a command's `exec` are not here: they are the plain
`FileNotFoundError`, `PermissionError` and so on that `subprocess` raises.
"""

from __future__ import annotations

import errno as _errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AddressError",
    "IdMapError",
    "NamespaceGone",
    "NetnsKitError",
    "NotImportable",
    "NotPrivileged",
    "PortInUseError",
    "PortSpecError",
    "PrivilegedPortError",
    "RecordError",
    "SandboxUnavailable",
    "StackClosed",
    "StackCrashed",
    "SysctlError",
    "TunUnavailable",
    "UserNamespaceDenied",
]


class NetnsKitError(Exception):
    """Base of all errors of this library.

    `cause` is what failed, `knob` the name of the setting behind it (a sysctl, a file, an argument), `value`
    what it is now and `fix` what to do; all but the cause may be None.
    """

    def __init__(
        self, cause: str, knob: str | None = None, value: object = None, fix: str | None = None
    ) -> None:
        super().__init__(cause, knob, value, fix)
        self.cause = cause
        self.knob = knob
        self.value = value
        self.fix = fix

    def __str__(self) -> str:
        setting = f"{self.knob} is {self.value}" if self.knob else self.value
        return "; ".join(str(part) for part in (self.cause, setting, self.fix) if part is not None)


class _SystemError(NetnsKitError, OSError):
    """One with an errno: the kernel's if it is known, else the one usual for the class."""

    usual_errno: ClassVar[int]

    def __init__(
        self,
        cause: str,
        knob: str | None = None,
        value: object = None,
        fix: str | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(cause, knob, value, fix)
        self.errno = errno or self.usual_errno
        self.strerror = str(self)
        self.args = (cause, knob, value, fix, errno)  # what pickle hands to __init__


class UserNamespaceDenied(_SystemError, PermissionError):
    """This host does not let the caller make a user or a network namespace."""

    usual_errno = _errno.EPERM

    @classmethod
    def diagnose(cls, errno: int, step: str, *, proc: Path = Path("/proc")) -> Self:
        """Why `step` ("unshare user", "map" or "unshare net") failed with `errno`, by what this host says of
        itself.
        """
        cause = f"{step}: {os.strerror(errno)}"

        def setting(name: str) -> int | None:
            try:
                return int((proc / "sys" / name.replace(".", "/")).read_text())
            except (OSError, ValueError):
                return None

        if errno in {_errno.ENOSPC, _errno.EUSERS}:
            knob = "user.max_net_namespaces" if step == "unshare net" else "user.max_user_namespaces"
            return cls(
                cause,
                knob,
                setting(knob),
                f"raise it here and in every user namespace above: sysctl -w {knob}=N",
                errno,
            )
        if setting(knob := "kernel.unprivileged_userns_clone") == 0:
            return cls(cause, knob, 0, f"sysctl -w {knob}=1", errno)
        if setting(knob := "kernel.apparmor_restrict_unprivileged_userns"):
            fix = f"give this Python an AppArmor profile that allows `userns,`, or sysctl -w {knob}=0"
            return cls(cause, knob, 1, fix, errno)
        if "\nSeccomp:\t2" in _read(proc / "self/status"):
            fix = "allow unshare with CLONE_NEWUSER in the seccomp profile of the container or service"
            return cls(cause, "Seccomp in /proc/self/status", 2, fix, errno)
        knob = "user.max_user_namespaces"
        return cls(
            cause,
            knob,
            setting(knob),
            "leave the chroot or container that forbids it, or let it allow it",
            errno,
        )


class NotPrivileged(_SystemError, PermissionError):
    """The caller lacks the right to join that namespace, or to change something in it."""

    usual_errno = _errno.EPERM


class IdMapError(_SystemError):
    """The uids and gids asked for could not be mapped."""

    usual_errno = _errno.EPERM


class TunUnavailable(_SystemError):
    """/dev/net/tun gives no tap device."""

    usual_errno = _errno.ENODEV

    @classmethod
    def diagnose(cls, exc: OSError, name: str) -> Self:
        """What keeps the tap `name` from being opened: `exc.filename` tells the node from the device."""
        node, errno = "/dev/net/tun", exc.errno or cls.usual_errno
        cause = f"tap {name}: {exc.filename or node}: {exc.strerror}"
        if exc.filename == node:
            if errno == _errno.ENOENT:
                return cls(
                    cause, node, "missing", "modprobe tun, or give the container --device /dev/net/tun", errno
                )
            if errno in {_errno.EACCES, _errno.EPERM}:
                fix = (
                    "chmod 0666 /dev/net/tun and 0755 /dev/net, or allow the device in the container's cgroup"
                )
                return cls(cause, node, _mode(node), fix, errno)
            return cls(cause, node, "without a driver", "modprobe tun (after a kernel update: reboot)", errno)
        if errno == _errno.EBUSY:
            return cls(cause, name, "in use", "close the program that has it, or choose another name", errno)
        if errno in {_errno.EPERM, _errno.EACCES}:
            fix = "use a namespace made by create(), or CAP_NET_ADMIN in this one"
            return cls(cause, "CAP_NET_ADMIN", "missing", fix, errno)
        return cls(cause, name, None, "choose the name of a tap, or one that does not exist", errno)


class NamespaceGone(NetnsKitError):
    """The namespace was closed, its agent died, or the process whose namespace it was has ended."""


class PrivilegedPortError(_SystemError, PermissionError):
    """The port is below `net.ipv4.ip_unprivileged_port_start` and the caller lacks CAP_NET_BIND_SERVICE."""

    usual_errno = _errno.EACCES


class PortInUseError(_SystemError):
    """Another socket has that address, port and protocol."""

    usual_errno = _errno.EADDRINUSE


class SysctlError(_SystemError):
    """A sysctl could not be read or written in the namespace."""

    usual_errno = _errno.EINVAL


class PortSpecError(NetnsKitError, ValueError):
    """A port specification that cannot be understood."""


class AddressError(NetnsKitError, ValueError):
    """An address, prefix, MAC or MTU that cannot be used."""


class RecordError(NetnsKitError, ValueError):
    """A domain name, or a record of one, that cannot be understood."""


class StackClosed(NetnsKitError):
    """The stack is not running: its block has been left, or it has failed."""


class StackCrashed(NetnsKitError):
    """The engine stopped on a bug: `__cause__` is the exception.  Or its worker process ended: `cause` says how,
    `value` what it wrote last.
    """


class NotImportable(NetnsKitError, TypeError):
    """An `Uplink`, or a part of one, that a worker process cannot have: it is found by module and name there."""


class SandboxUnavailable(NetnsKitError):
    """A layer of the worker's sandbox that was required, and that this host does not give."""


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _mode(path: str) -> str:
    try:
        return f"mode {os.stat(path).st_mode & 0o7777:04o}"
    except OSError as exc:
        return exc.strerror or "unknown"
