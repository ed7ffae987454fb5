"""Sequence numbers modulo 2**32 (RFC 9293 section 3.4).  All of TCP's modular arithmetic is here.

>>> less(0xFFFFFFFF, 0), less(0, 0xFFFFFFFF), add(0xFFFFFFFF, 2), distance(0xFFFFFFFE, 3)
(True, False, 1, 5)
"""

from __future__ import annotations

MASK = 0xFFFFFFFF
HALF = 0x80000000


def add(seq: int, count: int) -> int:
    """Return the number `count` after `seq`."""
    return (seq + count) & MASK


def distance(start: int, end: int) -> int:
    """Return how far `end` lies after `start`, modulo 2**32."""
    return (end - start) & MASK


def less(a: int, b: int) -> bool:
    """Return whether `a` lies before `b`."""
    return (a - b) & MASK >= HALF


def in_window(seq: int, start: int, size: int) -> bool:
    """Return whether start <= seq < start + size."""
    return (seq - start) & MASK < size


def acceptable(seq: int, length: int, nxt: int, window: int) -> bool:
    """Return whether a segment is acceptable (RFC 9293 3.10.7.4, first check).

    In contrast to the RFC, an ACK without text may lie on the far edge of the window, as kernels allow it.  It lies
    there if the window was filled and a part got lost.  Otherwise two ends in that state would answer each other for
    ever.
    """
    if length == 0:
        return in_window(seq, nxt, window + 1)
    return window > 0 and (in_window(seq, nxt, window) or in_window(add(seq, length - 1), nxt, window))
