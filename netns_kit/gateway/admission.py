"""Admission: whether this process has a descriptor for one more flow.

Nearly every flow has a descriptor.  The limit on descriptors (RLIMIT_NOFILE) is that of the process, so the program
that embeds us and all other gateways in it share the limit.  A gateway therefore cannot count its own descriptors
alone.  The kernel gives a new descriptor the lowest free number (tests/laws/test_facts.py), so this number shows how
many descriptors the process has at least.  `RESERVE` descriptors are left to the program.

If no other descriptor is free, the gateway that wants one closes flows of its own: idle ones, or ones that have not
begun.  Several flows may share a socket, and some have none, so it closes flows until a descriptor has been closed.
If a gateway has less than its share of the descriptors of all gateways, it is admitted one anyway, and the gateway
that has most closes one instead.  So a flood in one network does not end flows of the others.
"""

from __future__ import annotations

import os
import resource
from _thread import allocate_lock  # of `threading`, all that is wanted here
from collections.abc import Callable
from fcntl import F_DUPFD_CLOEXEC, fcntl
from typing import ClassVar

from .engine import Engine

RESERVE = 256  # descriptors left to the program; of a limit below 512, half
CLOSED_FOR_ONE = 64  # flows that are closed at most to free one descriptor


class Admission:
    """The claim of one gateway on descriptors of the process.

    Args:
        engine: The engine of the gateway, which knows its descriptors.
        give_up: Closes a flow of this gateway.  It is called on the engine's thread when another gateway is owed a
            descriptor.
    """

    _members: ClassVar[list[Admission]] = []  # all that are open in this process
    _lock = allocate_lock()

    def __init__(self, engine: Engine, give_up: Callable[[], None]) -> None:
        self._engine = engine
        self._give_up = give_up
        self.most = most_descriptors()
        # whether the limit has been reached once; from then on each flow is checked in full
        self._met = False
        with self._lock:
            self._members.append(self)

    def close(self) -> None:
        """Withdraw the claim.  Calling it again is allowed."""
        with self._lock:
            if self in self._members:
                self._members.remove(self)

    def admit(self, make_room: Callable[[], bool]) -> bool:
        """Return whether there is a descriptor for one more flow.

        Args:
            make_room: Closes a flow of this gateway, and returns whether it found one.  It is called if no descriptor
                is free.
        """
        if not self._met and self._engine.newest + 1 < self.most:
            return True
        self._met = True
        self.most = most_descriptors()  # it may have been raised
        free = lowest_free(self._engine.fileno())
        return free < self.most or self.close_one(make_room) or self._is_owed_one(free)

    def is_free(self, coming: int = 0) -> bool:
        """Return whether there is a descriptor for one thing more, without closing any for it.

        Args:
            coming: The number of descriptors that are on their way to us.
        """
        return lowest_free(self._engine.fileno()) + coming < most_descriptors()

    def close_one(self, make_room: Callable[[], bool]) -> bool:
        """Close flows until a descriptor of this gateway has been closed.  Return whether one has.

        Args:
            make_room: As for `admit`.
        """
        had = self._engine.descriptors
        for _ in range(CLOSED_FOR_ONE):
            if not make_room():
                return False
            if self._engine.descriptors < had:
                return True
        return False

    def _is_owed_one(self, free: int) -> bool:
        """Return whether this gateway has less than its share; if so, ask the one that has most to close a flow."""
        with self._lock:
            members = list(self._members)
        share = sum(each._engine.descriptors for each in members) // len(members)
        if self._engine.descriptors >= share:
            return False
        richest = max(members, key=lambda each: each._engine.descriptors)
        if free >= self.most + RESERVE // 2:  # the gateways asked before have not closed theirs yet
            return False
        richest._engine.call(richest._give_up)
        return True


def lowest_free(fd: int) -> int:
    """Return the number that the next descriptor of this process will have, or the limit if none is free.

    Args:
        fd: Any open descriptor.
    """
    try:
        number = fcntl(fd, F_DUPFD_CLOEXEC, 0)
    except OSError:  # EMFILE: none is free
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.close(number)
    return number


def most_descriptors() -> int:
    """Return how many descriptors the process may have before flows are refused."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - RESERVE, soft // 2)
