"""Sysctls as this process sees them (sysctl(8), proc_sys(5)): they are read and checked, never set.

Sysctls below net. belong to the network namespace of the calling thread, those below user. to its user namespace: by
default the host's.  `Namespace.get_sysctl` and `Namespace.set_sysctl` take the same names, for that namespace.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from netns_kit.errors import SysctlError

__all__ = ["check", "numbers", "path", "read"]

ROOT = "/proc/sys/"


def path(name: str) -> str:
    """Return the path of a sysctl's file below /proc/sys.

    `net.ipv4.conf.eth0/1.rp_filter` and `net/ipv4/conf/eth0.1/rp_filter` are the same, as for sysctl(8).

    Raises `SysctlError` for what is no name.
    """
    slashed = name
    if "/" not in name or 0 <= name.find(".") < name.find("/"):
        slashed = name.translate({ord("."): "/", ord("/"): "."})
    if any(part in {"", ".", ".."} or "\0" in part for part in slashed.split("/")):
        raise SysctlError(f"sysctl {name!r}: expected a name like net.ipv4.ip_forward", errno=errno.EINVAL)
    return slashed


def read(name: str) -> str:
    """Return a sysctl's value, its words separated by one space.

    Raises `SysctlError`, with ENOENT if this kernel has no such sysctl.
    """
    try:
        with open(ROOT + path(name), encoding="utf-8", errors="surrogateescape") as file:
            return " ".join(file.read().split())
    except OSError as error:
        if isinstance(error, SysctlError):
            raise
        raise SysctlError(f"sysctl {name}: {error.strerror}", errno=error.errno) from error


def numbers(name: str) -> tuple[int, ...]:
    """Return the value of a sysctl that is one or several integers.

    Raises `SysctlError` as `read` does, and for any other value.
    """
    value = read(name)
    try:
        return tuple(map(int, value.split()))
    except ValueError as error:
        raise SysctlError(f"sysctl {name}: expected numbers", name, value) from error


def check(name: str, wanted: str | int | Sequence[int]) -> None:
    """Raise `SysctlError` unless a sysctl has that value, given as text or as numbers.

    The error says what to run.
    """
    words = str(wanted).split() if isinstance(wanted, str | int) else map(str, wanted)
    text = " ".join(words)
    value = read(name)
    if value != text:
        raise SysctlError(f"sysctl {name}: expected {text}", name, value, f'sysctl -w {name}="{text}"')
