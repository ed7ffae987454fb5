"""ACKs that are owed, and when they leave.

An ACK for much leaves when the frames at hand have been handled: one for all of them, and a sender that fills
windows does not wait.  An ACK for little waits `Limits.tcp_ack_delay`, so that the answer may carry it (RFC 9293
3.8.6.3), which saves a frame for each question and answer.  A guest that sends nothing more until the ACK comes
(RFC 896) would lose that time at each turn: where a delayed ACK has travelled alone after all, the next `QUICK` are
not delayed.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .timers import Timers

MUCH = 536  # bytes, the smallest default MSS: so at least every second segment of full size is acknowledged at once
QUICK = 16
NOT_OWED, AT_ONCE = math.inf, -math.inf


class AckOwner(Protocol):
    """A connection that owes an ACK.

    `ack_at` is when it is due: `NOT_OWED`, `AT_ONCE` or a time.  `ack_is_listed` belongs to `Acks`.
    """

    ack_at: float
    ack_is_listed: bool

    def send_ack(self) -> None:
        """Send it: it is due at once."""

    def ack_is_overdue(self) -> None:
        """Send it: it has waited in vain for a segment to carry it."""


class Acks:
    """The ACKs that a stack owes.

    An owner whose ACK is due at once adds itself to `at_once`.
    """

    __slots__ = ("_listed", "_timers", "at_once", "delay", "timer_at", "timer_entry")

    def __init__(self, delay: float, timers: Timers) -> None:
        self.delay = delay
        self.at_once: list[AckOwner] = []
        self._listed: deque[tuple[float, AckOwner]] = deque()  # each once, and not later than its ACK is due
        self._timers = timers
        self.timer_at = self.timer_entry = math.inf

    def wait(self, owner: AckOwner) -> None:
        """Have the ACK sent at the `ack_at` of an owner that is not listed: now, and `delay` seconds more."""
        owner.ack_is_listed = True
        if not self._listed:
            self._timers.arm(self, owner.ack_at)
        self._listed.append((owner.ack_at, owner))

    def flush(self) -> None:
        """Send those due at once, unless a segment has carried them meanwhile."""
        due, self.at_once = self.at_once, []
        for owner in due:
            if owner.ack_at == AT_ONCE:
                owner.send_ack()

    def handle_timer(self, now: float) -> None:
        """Send those that have waited for long enough."""
        listed = self._listed
        while listed:
            at, owner = listed[0]
            if at > now:
                self._timers.arm(self, at)
                return
            del listed[0]
            if now < owner.ack_at < NOT_OWED:  # that was carried, and another is owed since
                insort(listed, (owner.ack_at, owner), key=lambda entry: entry[0])
                continue
            owner.ack_is_listed = False
            if AT_ONCE < owner.ack_at <= now:
                owner.ack_is_overdue()
