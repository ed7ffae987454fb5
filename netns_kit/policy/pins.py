"""Pins: the names for which our DNS has given an address, each until its time is over.

A pin is what a rule by name rests on.  The table is bounded.  A pin whose time is over makes room; if there is none,
the one that was answered longest ago, and flows that need it are refused then, until the name is asked for again.
Not the one that ends first: long pins, for thousands of names below a wildcard, would keep the place of others' for
as long as they last.

Of an address that was given for more than `NAMES_MAX` names, those that were answered last count.  A wildcard of DNS
gives one address for as many names as a program asks for, and each new flow to it looks at all that count.

Every pin has an entry in a heap, with the time at which it would have ended when the entry was made.  A pin that was
renewed since gets an entry with the new time when the old one comes up.  Entries of pins that have made room stay
until then, or until they are as many as the table is long.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import islice
from math import inf
from typing import TypeAlias

PINS_MAX = 16384
PINS_PER_ANSWER = 64
NAMES_MAX = 64  # of one address

Pin: TypeAlias = tuple[bytes, bytes, float, bool]
"""A name, on the wire and in lower case; an address, packed and canonical; until when it is pinned; and whether the
record is our own, so that the name may have whatever address it gives."""


class Pins:
    """The names that addresses were given for, at most `limit` pairs of them."""

    __slots__ = ("_by_address", "_heap", "_is_crowded", "_limit", "_now", "_order", "evicted")

    def __init__(self, limit: int = PINS_MAX) -> None:
        self._limit = limit
        self._by_address: dict[bytes, dict[bytes, float]] = {}
        self._order: dict[tuple[bytes, bytes], None] = {}  # names and addresses, the last answered at the end
        self._heap: list[tuple[float, bytes, bytes]] = []
        self._now = -inf
        self._is_crowded = False  # whether an address ever had more names than count
        self.evicted = 0
        """Number of pins that made room before their time was over."""

    def add(self, name: bytes, address: bytes, until: float) -> None:
        """Note that `name` was answered with `address`.  A pin that is there already ends when the later one does."""
        names, key = self._by_address.get(address), (name, address)
        if names is not None and name in names:
            names[name] = max(names.pop(name), until)  # it is the last one now
            del self._order[key]
            self._order[key] = None
            return
        if len(self._order) >= self._limit:
            self._make_room()
        names = self._by_address.setdefault(address, {})
        names[name] = until
        self._order[key] = None
        self._is_crowded = self._is_crowded or len(names) > NAMES_MAX
        heappush(self._heap, (until, name, address))
        if len(self._heap) > 2 * self._limit:
            self._sort()

    def keep(self, wanted: Callable[[bytes, bytes], bool]) -> None:
        """Forget the pins for whose name and address `wanted` is not true."""
        for key in list(self._order):
            if not wanted(*key):
                self._drop(*key)
        self._sort()

    def names(self, address: bytes, now: float) -> tuple[bytes, ...]:
        """Return the names that the address is pinned for at this time, the one that was answered last at the end."""
        self._now = now
        if address not in self._by_address:
            return ()
        names = self._by_address[address]
        if self._is_crowded and len(names) > NAMES_MAX:
            last = list(islice(reversed(names.items()), NAMES_MAX))
            return tuple([name for name, until in reversed(last) if until > now])
        return tuple([name for name, until in names.items() if until > now])

    def has(self, name: bytes, address: bytes, now: float) -> bool:
        """Return whether the address is pinned for the name at this time, however many others it is pinned for."""
        return self._by_address.get(address, {}).get(name, now) > now

    def __len__(self) -> int:
        return len(self._order)

    def _make_room(self) -> None:
        """Drop a pin whose time is over, or else the one that was answered longest ago."""
        heap, now = self._heap, self._now
        while heap and heap[0][0] <= now:
            _, name, address = heappop(heap)
            until = self._by_address.get(address, {}).get(name)
            if until is None:  # it has made room
                continue
            if until <= now:
                self._drop(name, address)
                return
            heappush(heap, (until, name, address))  # it was renewed
        self._drop(*next(iter(self._order)))
        self.evicted += 1

    def _drop(self, name: bytes, address: bytes) -> None:
        del self._order[name, address]
        names = self._by_address[address]
        del names[name]
        if not names:
            del self._by_address[address]

    def _sort(self) -> None:
        """Make the heap anew, of the pins that there are."""
        self._heap = [(self._by_address[address][name], name, address) for name, address in self._order]
        heapify(self._heap)
