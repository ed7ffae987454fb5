"""Pins: the names for which our DNS has given an address, each until its time is over.

A pin is what a rule by name rests on.  The table is bounded: the pin that ends soonest makes room, and flows that
need it are refused then, until the name is asked for again.

Of an address that was given for more than `NAMES_MAX` names, those that were answered last count.  A wildcard of DNS
gives one address for as many names as a program asks for, and each new flow to it looks at all that count.

Every pin has one entry in a heap, with the time at which it would have ended when the entry was made.  A pin that was
renewed since gets its entry back with the new time when the old one comes up.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import islice
from math import inf

PINS_MAX = 16384
PINS_PER_ANSWER = 64
NAMES_MAX = 64  # of one address


class Pins:
    """The names that addresses were given for, at most `limit` pairs of them."""

    __slots__ = ("_by_address", "_heap", "_is_crowded", "_limit", "_now", "evicted")

    def __init__(self, limit: int = PINS_MAX) -> None:
        self._limit = limit
        self._by_address: dict[bytes, dict[bytes, float]] = {}
        self._heap: list[tuple[float, bytes, bytes]] = []
        self._now = -inf
        self._is_crowded = False  # whether an address ever had more names than count
        self.evicted = 0
        """Number of pins that made room before their time was over."""

    def add(self, name: bytes, address: bytes, until: float) -> None:
        """Note that `name` was answered with `address`.  A pin that is there already ends when the later one does."""
        names = self._by_address.get(address)
        if names is not None and name in names:
            names[name] = max(names.pop(name), until)  # it is the last one now
            return
        if len(self._heap) >= self._limit:
            self._make_room()
        names = self._by_address.setdefault(address, {})
        names[name] = until
        self._is_crowded = self._is_crowded or len(names) > NAMES_MAX
        heappush(self._heap, (until, name, address))

    def keep(self, wanted: Callable[[bytes, bytes], bool]) -> None:
        """Forget the pins for whose name and address `wanted` is not true."""
        kept = [
            (until, name, address)
            for address, names in self._by_address.items()
            for name, until in names.items()
            if wanted(name, address)
        ]
        self._by_address = {}
        for until, name, address in kept:
            self._by_address.setdefault(address, {})[name] = until
        heapify(kept)
        self._heap = kept

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
        return len(self._heap)

    def _make_room(self) -> None:
        """Drop the pin that ends first."""
        while True:
            noted, name, address = self._heap[0]
            names = self._by_address[address]
            until = names[name]
            if until > noted:  # it was renewed
                heapreplace(self._heap, (until, name, address))
                continue
            heappop(self._heap)
            del names[name]
            if not names:
                del self._by_address[address]
            self.evicted += until > self._now
            return
