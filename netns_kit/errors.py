"""The exceptions a caller may catch.

Each has four parts: what failed (`cause`), the setting that decided it (`knob`) with its `value`, and the least
change that helps (`fix`).  The message is those parts in a row.  An exception is an `OSError` as well where a caller
would look at an errno.

Two kinds are defined elsewhere.  `CommandFailed` is a `subprocess.CalledProcessError` and stands beside `Process`:
importing `subprocess` costs more than all of this.  A command that cannot be executed raises the plain
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
    "CaptureError",
    "DeviceGone",
    "DomainNameError",
    "EventLogError",
    "FeatureUnavailable",
    "IdMapError",
    "NamespaceGone",
    "NetnsKitError",
    "NotFound",
    "NotImportable",
    "NotPrivileged",
    "OwnNamespace",
    "PingNotPermitted",
    "PolicyError",
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
    """The base of all errors of this library.

    Args:
        cause: What failed.
        knob: The name of the setting behind it: a sysctl, a file, an argument.  None if there is none.
        value: What that setting is now, or None.
        fix: What to do about it, or None.
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
    """An error with an errno: the kernel's if that is known, else the class's usual one."""

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
    """The requested uids and gids could not be mapped."""

    usual_errno = _errno.EPERM


class TunUnavailable(_SystemError):
    """No tap device can be had from /dev/net/tun."""

    usual_errno = _errno.ENODEV


class NamespaceGone(NetnsKitError):
    """The namespace was closed, its agent died, or the process whose namespace it was has ended."""


class DeviceGone(NetnsKitError):
    """The device carries no more frames: it was removed, or closed by its other end, or closed here."""


class OwnNamespace(NetnsKitError, ValueError):
    """The namespace to attach to is the caller's own: a process that has not unshared yet still has it."""


class AlreadyOpened(NetnsKitError, RuntimeError):
    """The object was opened before.  It can be opened once, by `open` or by entering its `async with` block."""


class WrongEventLoop(NetnsKitError, RuntimeError):
    """The object was opened on another event loop, which still runs.  Use and close the object there."""


class PrivilegedPortError(_SystemError, PermissionError):
    """The port is below `net.ipv4.ip_unprivileged_port_start` and the caller lacks CAP_NET_BIND_SERVICE."""

    usual_errno = _errno.EACCES


class PingNotPermitted(_SystemError, PermissionError):
    """The kernel refuses a ping socket, mostly because the caller's group is not in `net.ipv4.ping_group_range`."""

    usual_errno = _errno.EACCES


class FeatureUnavailable(_SystemError):
    """A feature of the host that this library needs is missing or denied; the errno tells which of the two."""

    usual_errno = _errno.ENOSYS


class PortInUseError(_SystemError):
    """Another socket, or another forward, has that address, port and protocol."""

    usual_errno = _errno.EADDRINUSE


class SysctlError(_SystemError):
    """A sysctl could not be read or written, or does not have the required value."""

    usual_errno = _errno.EINVAL


class ArgumentError(NetnsKitError, ValueError):
    """An argument has a value that cannot be used.

    Args:
        cause: What was expected; it begins with that word.
        knob: The name of the argument.
        value: What was given, as `repr` shows it.
        fix: What to write instead, or None.
    """

    knob: str

    def __init__(self, cause: str, knob: str, value: object, fix: str | None = None) -> None:
        super().__init__(cause, knob, value, fix)

    def __str__(self) -> str:
        given = f"{self.knob}={self.value}: {self.cause}"
        return given if self.fix is None else f"{given}; {self.fix}"


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has a type that cannot be used."""


class AddressError(ArgumentError):
    """An IP address, a network or a MAC address cannot be read, or cannot be used there."""


class DomainNameError(ArgumentError):
    """A domain name cannot be read, or is not allowed there."""


class RecordError(ArgumentError):
    """A DNS record cannot be understood."""


class PortSpecError(ArgumentError):
    """A port specification cannot be understood, or has a port out of range."""


class PolicyError(ArgumentError):
    """A rule of a policy cannot be understood, cannot be enforced, or can never decide about anything.

    Args:
        cause: What was expected; it begins with that word.
        knob: The name of the argument of the rule.
        value: What was given, as `repr` shows it.
        fix: What to write instead, or None.
        rule: The rule with its number, the first being 1; None if the error is not about a rule.
    """

    def __init__(
        self, cause: str, knob: str, value: object, fix: str | None = None, rule: str | None = None
    ) -> None:
        super().__init__(cause, knob, value, fix)
        self.about(rule)

    def about(self, rule: str | None) -> None:
        """Note the rule that the error is about.

        Args:
            rule: The rule with its number, or None.
        """
        self.rule = rule
        self.args = (self.cause, self.knob, self.value, self.fix, rule)  # what pickle hands to __init__

    def __str__(self) -> str:
        told = super().__str__()
        return told if self.rule is None else f"{self.rule}: {told}"


class NotFound(NetnsKitError, KeyError):
    """There is no such thing: a forward or a record that is to be removed, a finding that is asked for."""


class EventLogError(_SystemError):
    """The file of an event log cannot be written; the stack goes on.  The errno tells why, like ENOSPC."""

    usual_errno = _errno.EIO


class CaptureError(_SystemError):
    """The file of a capture cannot be written, or read; the stack goes on.  The errno tells why, like ENOSPC."""

    usual_errno = _errno.EIO


class StackClosed(NetnsKitError):
    """The stack is not running: its block was left, or it failed."""


class StackCrashed(NetnsKitError):
    """The engine stopped on a bug, which is the `__cause__`; or its worker process ended.

    Of a worker process, `cause` says how it ended and `value` what it wrote last.
    """


class NotImportable(NetnsKitError, TypeError):
    """An `Uplink`, or a part of one, cannot be imported in a worker process by its module and name."""


class SandboxUnavailable(NetnsKitError):
    """A required layer of the worker's sandbox is not available on this host."""
