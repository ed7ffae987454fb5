"""Sysctls as this process has them (sysctl(8), proc_sys(5)): they are read and checked, never set.

Those below net. are of the calling thread's network namespace, those below user. of its user namespace.  For other
namespaces there are `Namespace.get_sysctl` and `Namespace.set_sysctl`, with the same names.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from netns_kit.errors import SysctlError

__all__ = ["check", "numbers", "path", "read"]

ROOT = "/proc/sys/"


def path(name: str) -> str:
    """Return the path of a sysctl below /proc/sys.

    `net.ipv4.conf.eth0/1.rp_filter` and `net/ipv4/conf/eth0.1/rp_filter` are the same, as they are for sysctl(8).

    Args:
        name: Its name.

    Raises:
        SysctlError: It is no name.
    """
    slashed = name
    if "/" not in name or 0 <= name.find(".") < name.find("/"):
        slashed = name.translate({ord("."): "/", ord("/"): "."})
    if any(part in {"", ".", ".."} or "\0" in part for part in slashed.split("/")):
        fix = "separate its parts by dots, as sysctl(8) does: net.ipv4.ip_forward"
        raise SysctlError(f"sysctl {name!r}: expected the name of one", fix=fix, errno=errno.EINVAL)
    return slashed


def read(name: str) -> str:
    """Return the value of a sysctl, its words separated by one space.

    Args:
        name: Its name.

    Raises:
        SysctlError: It cannot be read; with ENOENT, this kernel has no such sysctl.
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

    Args:
        name: Its name.

    Raises:
        SysctlError: It cannot be read, or is something else.
    """
    value = read(name)
    try:
        return tuple(map(int, value.split()))
    except ValueError as error:
        raise SysctlError(f"sysctl {name}: expected numbers", name, value) from error


def check(name: str, wanted: str | int | Sequence[int]) -> None:
    """Raise `SysctlError` unless a sysctl has the value `wanted`; the error says what to run.

    Args:
        name: Its name.
        wanted: The value, as text or as numbers.

    Raises:
        SysctlError: It has another value, or cannot be read.
    """
    words = str(wanted).split() if isinstance(wanted, str | int) else map(str, wanted)
    text = " ".join(words)
    value = read(name)
    if value != text:
        raise SysctlError(f"sysctl {name} is to be {text}", name, value, f'sysctl -w {name}="{text}"')
