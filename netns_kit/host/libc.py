"""The C library, for calls that Python has no function for; their failures are OSErrors."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, filename: str | None = None) -> int:
    """Return the result of a call of `libc`, or raise the OSError that it failed with."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), filename)
    return result
