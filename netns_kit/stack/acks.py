"""ACKs that are owed, and when they leave.

An ACK for much leaves when the frames at hand have been handled: one for all of them, and a sender that fills
windows is not kept waiting.  One for little waits `Limits.tcp_ack_delay`, that the answer may take it along
(RFC 9293 3.8.6.3), which saves a frame for each question and answer.  A guest that holds back what it has to say
until the ACK comes (RFC 896) would lose that time at each turn: where a delayed ACK has travelled alone after all,
the next `QUICK` are not delayed.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .timers import Timers

MUCH = 536  # bytes, the smallest default MSS: so at least every second segment of full size is acknowledged at once
QUICK = 16
NOT_OWED, AT_ONCE = math.inf, -math.inf


class Debtor(Protocol):
    """Who owes an ACK.  `ack_at` is when it is due: `NOT_OWED`, `AT_ONCE` or a time."""

    ack_at: float

    def send_ack(self) -> None: ...

    def ack_is_overdue(self) -> None: ...


class Acks:
    """`at_once` is for whoever sets `ack_at` to that."""

    __slots__ = ("_later", "_timers", "at_once", "delay", "timer_at", "timer_entry")

    def __init__(self, delay: float, timers: Timers) -> None:
        self.delay = delay
        self.at_once: list[Debtor] = []
        self._later: deque[tuple[float, Debtor]] = deque()
        self._timers = timers
        self.timer_at = self.timer_entry = math.inf

    def later(self, debtor: Debtor) -> None:
        """It has set its `ack_at`."""
        if not self._later:
            self._timers.arm(self, debtor.ack_at)
        self._later.append((debtor.ack_at, debtor))

    def flush(self) -> None:
        """Send those due at once, unless a segment has carried them meanwhile."""
        due, self.at_once = self.at_once, []
        for debtor in due:
            if debtor.ack_at == AT_ONCE:
                debtor.send_ack()

    def handle_timer(self, now: float) -> None:
        later = self._later
        while later:
            at, debtor = later[0]
            if debtor.ack_at == at:
                if at > now:
                    self._timers.arm(self, at)
                    return
                debtor.ack_is_overdue()
            later.popleft()
