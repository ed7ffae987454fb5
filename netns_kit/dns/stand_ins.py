"""Stand-ins: addresses that stand for names which somebody else resolves.

A proxy that is told a name resolves it.  So nobody here has to know its address, and a program gets one that leads to
no host: it stands for the name, and what goes there is sent by the name.

An address stands for one name.  It is given to no other one while a flow leads there, nor before the TTL of the last
answer with it is over; the addresses are given in turn, so another name gets it only when all the rest were given
meanwhile.  An address that stands for no name any more leads nowhere.

A client that asks for many names takes none from others: it has as many addresses at most as are left for them, and
of its own makes room for more.

Of several workers each gives addresses of a part of its own, and tells the others until when they stay as they are.
Who answers with an address of another's, or has flows there, tells the giver so before that time, and later no more.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Container
from ipaddress import IPv4Address, IPv4Network

NETWORK = IPv4Network("198.18.0.0/15")  # RFC 2544: for benchmarks within a network
NAMES_MAX = 32768
TTL = 60
_SPARE = TTL / 2  # for which an address stays longer where workers tell each other: so seldom they have to
_LATE = 5  # seconds in which it is not given again, as another worker may have said something of it
_FORGOTTEN = 8  # a full table forgets one name in so many
_PAUSE = 1  # seconds until one in which too few could be forgotten is looked through again


class _Lease:
    """The name that an address stands for, until when that stays so, and the client that it was given to."""

    __slots__ = "client", "name", "until"

    def __init__(self, name: bytes, until: float, client: bytes = b"") -> None:
        self.name = name
        self.until = until
        self.client = client


class StandIns:
    """The addresses that stand for names.

    Args:
        network: Where the addresses are.
        used: Returns the packed addresses that flows lead to.
        tell: Tells the other workers a name, its address and until when it stays so; None: there are none.
        part, parts: Which part of the network is given here, and of how many.
        most: The number of names at most.
    """

    def __init__(
        self,
        network: IPv4Network,
        used: Callable[[], Container[bytes]],
        tell: Callable[[bytes, bytes, float], object] | None = None,
        *,
        part: int = 0,
        parts: int = 1,
        most: int = NAMES_MAX,
    ) -> None:
        self.network = network
        self._used = used
        self._tell = tell
        self._kept = TTL if tell is None else TTL + _SPARE
        self._first = int(network.network_address)
        self._behind = self._first + network.num_addresses
        self._size = network.num_addresses // parts
        self._start = self._first + part * self._size
        self._given = 0
        self._most = min(most, self._size // 2)
        self._others_most = parts * self._most
        self._own: OrderedDict[bytes, _Lease] = OrderedDict()  # by address, the longest unused first
        self._others: OrderedDict[bytes, _Lease] = OrderedDict()  # those of other workers, the same
        self._addresses: dict[bytes, bytes] = {}
        self._clients: Counter[bytes] = Counter()  # with the numbers of addresses that they have of our own
        self._full_until = -math.inf

    def __len__(self) -> int:
        return len(self._own)

    def __contains__(self, address: bytes) -> bool:
        """Return whether an address, packed, is one that stands for a name or for none."""
        return len(address) == 4 and self._first <= int.from_bytes(address, "big") < self._behind

    def name_of(self, address: bytes) -> bytes | None:
        """Return the name that a packed address stands for, on the wire and in lower case; None: for none."""
        lease = self._own.get(address) or self._others.get(address)
        return None if lease is None else lease.name

    def is_sure(self, address: bytes, now: float) -> bool:
        """Return whether no other worker may have given an address to another name meanwhile."""
        return address in self._own or (address in self._others and self._others[address].until > now)

    def use(self, address: bytes, now: float) -> None:
        """Have an address stay as it is for the time of its TTL, if it is known."""
        leases = self._own if address in self._own else self._others
        lease = leases.get(address)
        if lease is None or lease.until >= now + TTL or not self.is_sure(address, now):
            return
        lease.until = now + self._kept
        leases.move_to_end(address)
        if self._tell is not None:
            self._tell(lease.name, address, lease.until)

    def address_of(self, name: bytes, client: bytes, now: float) -> bytes | None:
        """Return the packed address that stands for a name from now on; None: there is none for this client.

        Args:
            name: The name, on the wire and in lower case.
            client: Who asks.
            now: The time.
        """
        known = self._addresses.get(name)
        if known is not None and self.is_sure(known, now):
            self.use(known, now)
            return known
        if not self._has_room(client):
            self._make_room(client, now)
            if not self._has_room(client):
                return None
        while True:  # at least half of them are free
            self._given = self._given % (self._size - 1) + 1  # not the first one, which is the network's
            address = IPv4Address(self._start + self._given).packed
            if address not in self._own:
                break
        self._own[address] = _Lease(name, -math.inf, client)
        self._addresses[name] = address
        self._clients[client] += 1
        self.use(address, now)
        return address

    def learn(self, name: bytes, address: bytes, until: float, now: float) -> None:
        """Have an address stand for a name, or of one of ours stay as it is, as another worker has said."""
        if address not in self:
            return
        until = min(until, now + self._kept)
        if 0 <= int.from_bytes(address, "big") - self._start < self._size:
            lease = self._own.get(address)
            if lease is not None and lease.name == name and until > lease.until:
                lease.until = until
                self._own.move_to_end(address)
            return
        self._forget(self._others, address)
        self._others[address] = _Lease(name, until)
        known = self._addresses.get(name)
        if known is None or not self.is_sure(known, now):
            self._addresses[name] = address
        if len(self._others) > self._others_most:
            self._forget(self._others, next(iter(self._others)))

    def _has_room(self, client: bytes) -> bool:
        return self._clients[client] < self._most - len(self._own)

    def _make_room(self, client: bytes, now: float) -> None:
        """Forget names that nobody uses: those of a client, or where there is hardly room for any, of all."""
        if now < self._full_until:
            return
        used = self._used()
        left = self._most // _FORGOTTEN + 1
        is_full = self._most - len(self._own) < left
        for address, lease in list(self._own.items()):
            if lease.until + _LATE > now:
                break
            if address in used:
                self.use(address, now)
            elif is_full or lease.client == client:
                self._forget(self._own, address)
                left -= 1
                if not left:
                    return
        self._full_until = now + _PAUSE

    def _forget(self, leases: OrderedDict[bytes, _Lease], address: bytes) -> None:
        lease = leases.pop(address, None)
        if lease is None:
            return
        if self._addresses.get(lease.name) == address:
            del self._addresses[lease.name]
        if leases is self._own:
            self._clients[lease.client] -= 1
            if not self._clients[lease.client]:
                del self._clients[lease.client]
