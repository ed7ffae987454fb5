"""Timers: the deadlines of many owners in one heap.

A flow moves its deadline at nearly every packet, so moving it to a later time costs one assignment.  The heap keeps
the entry with the earliest deadline of each owner.  When an entry comes up before its owner's deadline, it is put
back with the deadline of that moment.
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush, heapreplace
from typing import Protocol

SWEEP = 256  # entries at which useless ones are removed; then again when their number has doubled


class Timed(Protocol):
    """An owner of a deadline.

    The owner may set `timer_at` itself (infinity: nothing is due).  It must call `Timers.arm` instead if the new time
    may be earlier than `timer_entry`, which is used by `Timers` only.
    """

    timer_at: float
    timer_entry: float

    def handle_timer(self, now: float) -> None:
        """Do what is due.  The time `timer_at` has come, and is infinity again."""


class Timers:
    """The deadlines of many owners."""

    __slots__ = ("_heap", "_order", "_sweep_at", "deadline")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timed]] = []
        self._order = 0
        self._sweep_at = SWEEP
        self.deadline = math.inf
        """The time at which `expire` must be called.  It may be too early, but never too late."""

    def __len__(self) -> int:
        return len(self._heap)

    def arm(self, owner: Timed, at: float) -> None:
        """Set the deadline of an owner."""
        owner.timer_at = at
        if at < owner.timer_entry:
            owner.timer_entry = at
            self._order += 1
            heappush(self._heap, (at, self._order, owner))
            if len(self._heap) > self._sweep_at:
                self._sweep()
            self.deadline = min(self.deadline, at)

    def _sweep(self) -> None:
        """Remove the entries of owners without a deadline.

        Otherwise a closed connection would stay in memory until its keepalive would have been due, for two hours.
        """
        kept = []
        for item in self._heap:
            entry, _, owner = item
            if entry == owner.timer_entry:
                if owner.timer_at < math.inf:
                    kept.append(item)
                else:
                    owner.timer_entry = math.inf
        heapify(kept)
        self._heap[:] = kept
        self.deadline = kept[0][0] if kept else math.inf
        self._sweep_at = max(SWEEP, 2 * len(kept))

    def expire(self, now: float) -> None:
        """Call every owner whose deadline has come."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            entry, order, owner = heap[0]
            if entry != owner.timer_entry:
                heappop(heap)  # the owner had an earlier entry, which has been handled
            elif owner.timer_at > now:
                owner.timer_entry = owner.timer_at
                if owner.timer_at == math.inf:
                    heappop(heap)
                else:
                    heapreplace(heap, (owner.timer_at, order, owner))
            else:
                heappop(heap)
                owner.timer_entry = math.inf
                owner.timer_at = math.inf
                owner.handle_timer(now)
        self.deadline = heap[0][0] if heap else math.inf
