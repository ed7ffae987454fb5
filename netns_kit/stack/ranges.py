"""Sets of numbers kept as ranges: what has arrived, and what is missing between.

One class serves what SACK tells us, text that waits beyond a hole, and the fragments of a packet.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from .seq import HALF, MASK

Range = tuple[int, int]
"""The first number, and one past the last."""


class RangeSet:
    """A set of numbers modulo 2**32, all within half of the circle: ranges in order, which do not touch.

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
        # starts at even places, ends at odd ones; they go on beyond 32 bits where the circle begins anew
        self._edges: list[int] = []

    def __len__(self) -> int:
        return len(self._edges) // 2

    def __iter__(self) -> Iterator[Range]:
        edges = self._edges
        for at in range(0, len(edges), 2):
            yield edges[at] & MASK, edges[at + 1] & MASK

    @property
    def start(self) -> int:
        """The first number of a set that is not empty."""
        return self._edges[0] & MASK

    @property
    def end(self) -> int:
        """One past the last number of a set that is not empty."""
        return self._edges[-1] & MASK

    def add(self, start: int, end: int) -> bool:
        """Add the numbers from `start` to before `end`, and return whether one of them is new."""
        edges = self._edges
        low, high = self._place(start, end)
        left, right = bisect_left(edges, low), bisect_right(edges, high)
        # an odd place is within a range or at its end, and that range goes on
        merged = [low] * (left & 1 == 0) + [high] * (right & 1 == 0)
        if low == high or edges[left:right] == merged:
            return False
        edges[left:right] = merged
        return True

    def overlaps(self, start: int, end: int) -> bool:
        """Return whether a number from `start` to before `end` is in the set; if they are equal, `start`."""
        low, high = self._place(start, end)
        left, right = bisect_right(self._edges, low), bisect_left(self._edges, high)
        return left & 1 == 1 or left < right

    def missing(self, start: int, end: int) -> Iterator[Range]:
        """Iterate over the ranges from `start` to before `end` that are not in the set, as it is when this begins."""
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
        """Keep so many ranges: the first ones, and the last."""
        if len(self) > most:
            del self._edges[2 * most - 2 : -2]

    def clear(self) -> None:
        """Remove all numbers."""
        self._edges.clear()

    def _place(self, start: int, end: int) -> Range:
        """Return both numbers as they lie beside those of the set, which may have gone around the circle.

        They are the same if `end` lies before `start`: nothing is between.
        """
        near = self._edges[0] if self._edges else start
        low, size = near + ((start - near + HALF) & MASK) - HALF, (end - start) & MASK
        return low, low + size if size < HALF else low
