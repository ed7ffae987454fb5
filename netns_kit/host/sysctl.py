"""Sysctls as this process has them (sysctl(8), proc_sys(5)): to be read and checked, never set.

Those below net. are of the network namespace that the calling thread is in, those below user. of its user
namespace: outside any, the host's.  For a namespace of one's own there are `Namespace.get_sysctl` and
`Namespace.set_sysctl`, with the same names.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from netns_kit.errors import SysctlError

__all__ = ["check", "numbers", "path", "read"]

ROOT = "/proc/sys/"


def path(name: str) -> str:
    """Of the file below /proc/sys: `net.ipv4.conf.eth0/1.rp_filter` and `net/ipv4/conf/eth0.1/rp_filter` are the
    same, as sysctl(8) reads them.  Raises `SysctlError` for what is no name.
    """
    slashed = name
    if "/" not in name or 0 <= name.find(".") < name.find("/"):
        slashed = name.translate({ord("."): "/", ord("/"): "."})
    if any(part in {"", ".", ".."} or "\0" in part for part in slashed.split("/")):
        raise SysctlError(f"sysctl {name!r}: not a name", errno=errno.EINVAL)
    return slashed


def read(name: str) -> str:
    """The value, words separated by one space.  Raises `SysctlError`: with ENOENT this kernel has no such sysctl."""
    try:
        with open(ROOT + path(name), encoding="utf-8", errors="surrogateescape") as file:
            return " ".join(file.read().split())
    except OSError as error:
        if isinstance(error, SysctlError):
            raise
        raise SysctlError(f"sysctl {name}: {error.strerror}", errno=error.errno) from error


def numbers(name: str) -> tuple[int, ...]:
    """The value of a sysctl that is one or several integers.  Raises `SysctlError` as `read` does, and where it is
    something else.
    """
    value = read(name)
    try:
        return tuple(map(int, value.split()))
    except ValueError as error:
        raise SysctlError(f"sysctl {name}: not a number", name, value) from error


def check(name: str, wanted: str | int | Sequence[int]) -> None:
    """Raises `SysctlError` unless that is the value, as text or as numbers.  It says what to run."""
    words = str(wanted).split() if isinstance(wanted, str | int) else map(str, wanted)
    text = " ".join(words)
    value = read(name)
    if value != text:
        raise SysctlError(f"sysctl {name} is to be {text}", name, value, f'sysctl -w {name}="{text}"')
