"""The exceptions a caller may catch.

Every one says what failed (`cause`), which setting decided it (`knob`) with the `value` it has, and the least
that would put it right (`fix`); the message is those parts in a row.  Where a caller would look at an errno
the exception is an `OSError` too.  Failures of a command's `exec` are not here: they are the plain
`FileNotFoundError`, `PermissionError` and so on that `subprocess` raises.
"""

from __future__ import annotations

import errno as _errno

TYPE_CHECKING = False  # as type checkers know it, without importing `typing`

if TYPE_CHECKING:
    from typing import ClassVar

__all__ = [
    "AddressError",
    "AlreadyOpened",
    "ArgumentError",
    "ArgumentTypeError",
    "FeatureUnavailable",
    "IdMapError",
    "NamespaceGone",
    "NetnsKitError",
    "NotFound",
    "NotImportable",
    "NotPrivileged",
    "OwnNamespace",
    "PingNotPermitted",
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
    "WrongEventLoop",
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
    """This host does not let the caller make a user or a network namespace, or use the rights it gives."""

    usual_errno = _errno.EPERM


class NotPrivileged(_SystemError, PermissionError):
    """The caller lacks the right to join that namespace, or to change something in it."""

    usual_errno = _errno.EPERM


class IdMapError(_SystemError):
    """The uids and gids asked for could not be mapped."""

    usual_errno = _errno.EPERM


class TunUnavailable(_SystemError):
    """/dev/net/tun gives no tap device."""

    usual_errno = _errno.ENODEV


class NamespaceGone(NetnsKitError):
    """The namespace was closed, its agent died, or the process whose namespace it was has ended."""


class OwnNamespace(NetnsKitError, ValueError):
    """The namespace to attach to is the one the caller is in: of a process, say, that has not unshared yet."""


class AlreadyOpened(NetnsKitError, RuntimeError):
    """The object was opened before: it is opened once, by `open` or by entering its `async with` block."""


class WrongEventLoop(NetnsKitError, RuntimeError):
    """The object was opened on another event loop, which has not ended: it is used and closed on that one."""


class PrivilegedPortError(_SystemError, PermissionError):
    """The port is below `net.ipv4.ip_unprivileged_port_start` and the caller lacks CAP_NET_BIND_SERVICE."""

    usual_errno = _errno.EACCES


class PingNotPermitted(_SystemError, PermissionError):
    """The kernel gives the caller no ping socket: his group is not within `net.ipv4.ping_group_range`, say."""

    usual_errno = _errno.EACCES


class FeatureUnavailable(_SystemError):
    """Something of the host that this library makes use of is not there, or is denied: the errno tells which."""

    usual_errno = _errno.ENOSYS


class PortInUseError(_SystemError):
    """Another socket has that address, port and protocol."""

    usual_errno = _errno.EADDRINUSE


class SysctlError(_SystemError):
    """A sysctl could not be read or written, or is not what it was to be."""

    usual_errno = _errno.EINVAL


class ArgumentError(NetnsKitError, ValueError):
    """An argument whose value cannot be used.

    `knob` is the argument's name, `value` what was given, as `repr` shows it, and `cause` what was expected.
    """

    def __str__(self) -> str:
        given = self.cause if self.knob is None else f"{self.knob}={self.value}: {self.cause}"
        return given if self.fix is None else f"{given}; {self.fix}"


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of a type that cannot be used."""


class PortSpecError(NetnsKitError, ValueError):
    """A port specification that cannot be understood."""


class AddressError(ArgumentError):
    """An address, a network, a MAC address or the name of an interface that cannot be used."""


class RecordError(NetnsKitError, ValueError):
    """A domain name, or a record of one, that cannot be understood."""


class NotFound(NetnsKitError, KeyError):
    """There is no such thing: a forward or a record that is to be removed, a finding that is asked for."""


class StackClosed(NetnsKitError):
    """The stack is not running: its block has been left, or it has failed."""


class StackCrashed(NetnsKitError):
    """The engine stopped on a bug: `__cause__` is the exception.  Or its worker process ended: `cause` says how,
    `value` what it wrote last.
    """


class DeviceGone(NetnsKitError):
    """The device carries no more frames: it was removed, or closed by its other end, or closed here."""


class NotImportable(NetnsKitError, TypeError):
    """An `Uplink`, or a part of one, that a worker process cannot have: it is found by module and name there."""


class SandboxUnavailable(NetnsKitError):
    """A layer of the worker's sandbox that was required, and that this host does not give."""
