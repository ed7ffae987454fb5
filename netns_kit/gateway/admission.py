"""Descriptors: how many flows this process has room for.

Nearly every flow has a descriptor, and the limit on them (RLIMIT_NOFILE) is the process's: the program that embeds us
and every other network in it live by the same one.  So no gateway counts for itself.  A new descriptor has the lowest
number that is free (tests/laws/test_facts.py), so its number tells how many there are at the least, whoever has
opened them.  `RESERVE` of them are left to the program.

When all others are taken, a gateway that wants one gives up one of its own: what is idle, or has not begun.  Flows
may share a socket, or have none, so what counts is that a descriptor is closed, and not how many flows are.  A
gateway with less than its share of what all gateways have gets one nevertheless, and the gateway that has most gives
one back for it.  So a flood in one network does not end the others.
"""

from __future__ import annotations

import os
import resource
from _thread import allocate_lock  # of `threading`, all that is wanted here
from collections.abc import Callable
from fcntl import F_DUPFD_CLOEXEC, fcntl
from typing import ClassVar

from .engine import Engine

RESERVE = 256  # descriptors that no guest can take from the program; half, if there are few
CLOSED_FOR_ONE = 64  # flows that may be closed for one descriptor


class Admission:
    """The claim of one gateway on descriptors of the process.

    Args:
        engine: The engine whose descriptors are the gateway's.
        give_up: Closes a flow; called on the engine's thread when another gateway is owed a descriptor.
    """

    _members: ClassVar[list[Admission]] = []  # of the process, whose descriptors they share
    _lock = allocate_lock()

    def __init__(self, engine: Engine, give_up: Callable[[], None]) -> None:
        self._engine = engine
        self._give_up = give_up
        self.most = most_descriptors()
        self._met = False  # the limit: from then on it is looked up for each flow
        with self._lock:
            self._members.append(self)

    def close(self) -> None:
        """Claim nothing any more.  Calling it again is fine."""
        with self._lock:
            if self in self._members:
                self._members.remove(self)

    def admit(self, make_room: Callable[[], bool]) -> bool:
        """Return whether there is a descriptor for one more flow.

        Args:
            make_room: Closes a flow of this gateway and returns True, or returns False; called if there is none.
        """
        if not self._met and self._engine.newest + 1 < self.most:
            return True
        self._met = True
        self.most = most_descriptors()  # it may have been raised
        free = lowest_free(self._engine.fileno())
        return free < self.most or self.close_one(make_room) or self._is_owed_one(free)

    def close_one(self, make_room: Callable[[], bool]) -> bool:
        """Return whether a descriptor of this gateway has been closed, by `make_room` as in `admit`."""
        had = self._engine.descriptors
        for _ in range(CLOSED_FOR_ONE):
            if not make_room():
                return False
            if self._engine.descriptors < had:
                return True
        return False

    def _is_owed_one(self, free: int) -> bool:
        """Ask the richest gateway for a descriptor, if this one has less than its share.  Return whether it did."""
        with self._lock:
            members = list(self._members)
        share = sum(each._engine.descriptors for each in members) // len(members)
        if self._engine.descriptors >= share:
            return False
        richest = max(members, key=lambda each: each._engine.descriptors)
        if free >= self.most + RESERVE // 2:  # those that are asked have not answered yet
            return False
        richest._engine.call(richest._give_up)
        return True


def lowest_free(fd: int) -> int:
    """Return the number that the next descriptor of this process will have; the limit, if there is none left.

    Args:
        fd: Any descriptor that is open.
    """
    try:
        number = fcntl(fd, F_DUPFD_CLOEXEC, 0)
    except OSError:  # EMFILE: not one is free
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.close(number)
    return number


def most_descriptors() -> int:
    """Return how many descriptors the process may have before flows are refused."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - RESERVE, soft // 2)
