"""How much a TCP connection may keep: its windows, and the memory that all connections share.

Windows, and what is in flight, are sized by what crosses (dynamic right-sizing): twice what one round trip brings,
the smallest round trip seen, so that a long path is not held up and a queue feeds nothing.
"""

from __future__ import annotations

import math

from .seq import distance

TUNE_INTERVAL = 0.01  # seconds, at least, between two looks at what crosses


class Memory:
    """`held`: bytes kept for all connections of a stack.  `limit`: beyond it they get by with little."""

    __slots__ = ("held", "limit")

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit

    @property
    def full(self) -> bool:
        return self.held >= self.limit


class Tuner:
    """What a window should be for what crosses."""

    __slots__ = ("_position", "_since", "due")

    def __init__(self, position: int) -> None:
        self.due = -math.inf
        self._since = -math.inf
        self._position = position

    def wanted(self, position: int, now: float, rtt: float) -> int:
        """Twice what has crossed per `rtt` since the last look: `position` is how far it has got."""
        crossed, elapsed = distance(self._position, position), now - self._since
        self.due = now + max(rtt, TUNE_INTERVAL)
        self._since, self._position = now, position
        return int(2 * crossed * rtt / elapsed) if elapsed > 0 else 0
