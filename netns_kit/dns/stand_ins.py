"""Stand-ins: addresses that stand for names which somebody else resolves.

A proxy that is told a name resolves it.  So nobody here has to know its address, and a program gets one that leads to
no host: it stands for the name, and what goes there is sent by the name.

An address stands for one name.  The addresses are given in turn, and one that is in use stays as it is: so another
name gets an address only when all others were given meanwhile, and no flow leads there.  An address that stands for
no name any more leads nowhere.

Of several workers each gives addresses of a part of its own, and tells the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container
from ipaddress import IPv4Address, IPv4Network

NETWORK = IPv4Network("198.18.0.0/15")  # RFC 2544: for benchmarks within a network
NAMES_MAX = 16384
TTL = 60
_FORGOTTEN = 8  # a full table forgets one name in so many


class StandIns:
    """The addresses that stand for names.

    Args:
        network: Where the addresses are.
        used: Returns the packed addresses that flows lead to.
        part, parts: Which part of the network is given here, and of how many.
        most: The number of names at most; the one that was asked for or used longest ago makes room.
    """

    def __init__(
        self,
        network: IPv4Network,
        used: Callable[[], Container[bytes]],
        *,
        part: int = 0,
        parts: int = 1,
        most: int = NAMES_MAX,
    ) -> None:
        self.network = network
        self._first = int(network.network_address)
        self._behind = self._first + network.num_addresses
        self._used = used
        self._size = network.num_addresses // parts
        self._start = self._first + part * self._size
        self._given = 0
        self._most = min(most, self._size // 2)
        self._names: OrderedDict[bytes, bytes] = OrderedDict()  # by address, the longest unused first
        self._addresses: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, address: bytes) -> bool:
        """Return whether an address, packed, is one that stands for a name or for none."""
        return len(address) == 4 and self._first <= int.from_bytes(address, "big") < self._behind

    def name_of(self, address: bytes) -> bytes | None:
        """Return the name that a packed address stands for, on the wire and in lower case; None: for none."""
        return self._names.get(address)

    def use(self, address: bytes) -> None:
        """Note that an address is used."""
        if address in self._names:
            self._names.move_to_end(address)

    def address_of(self, name: bytes) -> tuple[bytes, bool] | None:
        """Return the packed address that stands for a name from now on, and whether it is new; None: there is none.

        Args:
            name: The name, on the wire and in lower case.
        """
        known = self._addresses.get(name)
        if known is not None:
            self._names.move_to_end(known)
            return known, False
        if len(self._names) >= self._most:
            self._make_room()
        if len(self._names) < self._most:
            for _ in range(self._size):
                self._given = self._given % (self._size - 1) + 1  # not the first one, which is the network's
                address = IPv4Address(self._start + self._given).packed
                if address not in self._names:
                    self.learn(name, address)
                    return address, True
        return None

    def learn(self, name: bytes, address: bytes) -> None:
        """Have an address stand for a name, as another worker has said."""
        if address not in self:
            return
        self._forget(address)
        self._names[address] = name
        self._addresses.setdefault(name, address)
        if len(self._names) > 2 * self._most:  # those of others
            self._make_room()

    def _make_room(self) -> None:
        used = self._used()
        left = len(self._names) // _FORGOTTEN + 1
        for address in list(self._names):
            if address not in used:
                self._forget(address)
                left -= 1
                if not left:
                    return

    def _forget(self, address: bytes) -> None:
        name = self._names.pop(address, None)
        if name is not None and self._addresses.get(name) == address:
            del self._addresses[name]
