"""RangeSet: a set of numbers kept as ranges, which shows what has arrived and what is missing between.

The same class serves blocks of SACK, out-of-order text, and the fragments of a packet.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from .seq import HALF, MASK

Range = tuple[int, int]
"""The first number, and one past the last."""


class RangeSet:
    """A set of numbers modulo 2**32 that lie within half of the circle.  It is kept as sorted ranges that do not
    touch.

    >>> known = RangeSet()
    >>> known.add(10, 20), known.add(30, 40), known.add(12, 18)
    (True, True, False)
    >>> list(known), list(known.missing(0, 50))
    ([(10, 20), (30, 40)], [(0, 10), (20, 30), (40, 50)])
    >>> known.add(20, 30), list(known)
    (True, [(10, 40)])
    """

    __slots__ = ("_edges",)

    def __init__(self) -> None:
        # starts at even places, ends at odd ones; they go on beyond 2**32, so that they are sorted
        self._edges: list[int] = []

    def __len__(self) -> int:
        return len(self._edges) // 2

    def __iter__(self) -> Iterator[Range]:
        edges = self._edges
        for at in range(0, len(edges), 2):
            yield edges[at] & MASK, edges[at + 1] & MASK

    @property
    def start(self) -> int:
        """The first number of the set, which must not be empty."""
        return self._edges[0] & MASK

    @property
    def end(self) -> int:
        """The number after the last one of the set, which must not be empty."""
        return self._edges[-1] & MASK

    def add(self, start: int, end: int) -> bool:
        """Add the numbers from `start` to `end`, without `end`.  Return whether any of them is new."""
        edges = self._edges
        low, high = self._place(start, end)
        left, right = bisect_left(edges, low), bisect_right(edges, high)
        # at an odd place, a range has begun before, and the new one continues it
        merged = [low] * (left & 1 == 0) + [high] * (right & 1 == 0)
        if low == high or edges[left:right] == merged:
            return False
        edges[left:right] = merged
        return True

    def overlaps(self, start: int, end: int) -> bool:
        """Return whether any number from `start` to `end`, without `end`, is in the set; if they are equal, whether
        `start` is.
        """
        low, high = self._place(start, end)
        left, right = bisect_right(self._edges, low), bisect_left(self._edges, high)
        return left & 1 == 1 or left < right

    def missing(self, start: int, end: int) -> Iterator[Range]:
        """Iterate over the ranges between `start` and `end` that are not in the set.  Later changes are not seen."""
        edges = self._edges
        low, high = self._place(start, end)
        left, right = bisect_right(edges, low), bisect_left(edges, high)
        holes = [low] * (left & 1 == 0) + edges[left:right] + [high] * (right & 1 == 0)
        for at in range(0, len(holes) - 1, 2):
            if holes[at] < holes[at + 1]:
                yield holes[at] & MASK, holes[at + 1] & MASK

    def discard_before(self, number: int) -> None:
        """Remove all numbers before `number`."""
        low, _ = self._place(number, number)
        at = bisect_right(self._edges, low)
        self._edges[:at] = [low] * (at & 1)

    def bound(self, most: int) -> None:
        """Keep at most `most` ranges: the first ones, and the last one."""
        if len(self) > most:
            del self._edges[2 * most - 2 : -2]

    def clear(self) -> None:
        """Remove all numbers."""
        self._edges.clear()

    def _place(self, start: int, end: int) -> Range:
        """Return both numbers in the coordinates of `_edges`, which may go beyond 2**32.

        If `end` lies before `start` the numbers returned are equal: the range is empty.
        """
        near = self._edges[0] if self._edges else start
        low, size = near + ((start - near + HALF) & MASK) - HALF, (end - start) & MASK
        return low, low + size if size < HALF else low
