"""Acks: the ACKs that connections owe, and when they are sent.

An ACK for many bytes is sent as soon as the frames at hand have been handled.  So there is one ACK for all of them,
and a sender that fills windows does not wait.

An ACK for few bytes waits `Limits.tcp_ack_delay` seconds, so that the answer may carry it (RFC 9293 3.8.6.3).  That
saves a frame for each question and answer.  But a guest may send nothing more until the ACK comes (RFC 896), and
would then lose this time in each turn.  Therefore, if a delayed ACK was sent without an answer after all, the next
`QUICK` ACKs are not delayed.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .timers import Timers

MUCH = 536  # bytes, the default MSS of IPv4: the ACK for so many bytes is not delayed
QUICK = 16
NOT_OWED, AT_ONCE = math.inf, -math.inf


class AckOwner(Protocol):
    """A connection that owes an ACK.

    `ack_at` tells when the ACK is due: `NOT_OWED`, `AT_ONCE` or a time.  `ack_is_listed` is used by `Acks` only.
    """

    ack_at: float
    ack_is_listed: bool

    def send_ack(self) -> None:
        """Send the ACK, which is due at once."""

    def report_hole(self) -> None:
        """Send an ACK if text that is missing has not arrived meanwhile."""

    def ack_is_overdue(self) -> None:
        """Send the ACK, which has waited but was not carried by another segment."""


class Acks:
    """The ACKs that the connections of a stack owe.

    An owner whose ACK is due at once appends itself to `at_once`.
    """

    __slots__ = ("_listed", "_timers", "at_once", "delay", "holes", "timer_at", "timer_entry")

    def __init__(self, delay: float, timers: Timers) -> None:
        self.delay = delay
        self.at_once: list[AckOwner] = []
        self.holes: dict[AckOwner, None] = {}
        self._listed: deque[tuple[float, AckOwner]] = deque()  # each owner once, at the due time or earlier
        self._timers = timers
        self.timer_at = self.timer_entry = math.inf

    def wait(self, owner: AckOwner) -> None:
        """List an owner, so that its ACK is sent at its `ack_at`.

        That must be `delay` seconds from now, so that the list stays in order.
        """
        owner.ack_is_listed = True
        if not self._listed:
            self._timers.arm(self, owner.ack_at)
        self._listed.append((owner.ack_at, owner))

    def flush(self) -> None:
        """Send the ACKs that are due at once, unless another segment has carried them meanwhile."""
        due, self.at_once = self.at_once, []
        for owner in due:
            if owner.ack_at == AT_ONCE:
                owner.send_ack()

    def report_later(self, owner: AckOwner) -> None:
        """Have an owner report its hole, if it has one still at the next `report_holes`."""
        self.holes[owner] = None
        self.at_once.append(owner)  # so that whoever calls `flush` looks at `holes`, and nobody else

    def report_holes(self) -> None:
        """Send the ACKs that report holes which are not filled yet."""
        due, self.holes = self.holes, {}
        for owner in due:
            owner.report_hole()

    def handle_timer(self, now: float) -> None:
        """Send the ACKs that have waited for their time."""
        listed = self._listed
        while listed:
            at, owner = listed[0]
            if at > now:
                self._timers.arm(self, at)
                return
            del listed[0]
            if now < owner.ack_at < NOT_OWED:  # that ACK was carried, and a later one is owed now
                insort(listed, (owner.ack_at, owner), key=lambda entry: entry[0])
                continue
            owner.ack_is_listed = False
            if AT_ONCE < owner.ack_at <= now:
                owner.ack_is_overdue()
