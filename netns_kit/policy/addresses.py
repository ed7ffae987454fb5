"""Packed addresses and networks, as rules are about them.

An IPv6 address may embed an IPv4 address: IPv4-mapped (RFC 4291 section 2.5.5.2), NAT64 (RFC 6052) and 6to4
(RFC 3056).  What is sent to such an address arrives at the embedded one, so rules decide about that one.

>>> canonical(IPv6Address("64:ff9b::10.0.0.1").packed)
b'\\n\\x00\\x00\\x01'
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Address, IPv6Network
from typing import Generic, TypeAlias, TypeVar

AnyNetwork: TypeAlias = IPv4Network | IPv6Network

PortRanges: TypeAlias = tuple[tuple[int, int], ...]
"""Ports as pairs of the first and the last, in order and apart; none of them for all."""

V = TypeVar("V")

_MAPPED = IPv6Address("::ffff:0:0").packed[:12]
_NAT64 = IPv6Address("64:ff9b::").packed[:12]
_6TO4 = b"\x20\x02"
_EMBEDDING = (  # networks whose addresses embed one, and behind how many bits
    (IPv6Network("::ffff:0:0/96"), 96),
    (IPv6Network("64:ff9b::/96"), 96),
    (IPv6Network("2002::/16"), 16),
)


def canonical(packed: bytes) -> bytes:
    """Return the IPv4 address that a packed address embeds, else the address itself."""
    if len(packed) == 16:
        if packed.startswith((_MAPPED, _NAT64)):
            return packed[12:]
        if packed.startswith(_6TO4):
            return packed[2:6]
    return packed


def embedded_network(network: AnyNetwork) -> IPv4Network | None:
    """Return the IPv4 network that a network's addresses embed, or None if they are not all of that kind."""
    for outer, bits in _EMBEDDING:
        if network.version == 6 and network.prefixlen >= bits and network.subnet_of(outer):
            inner = int(network.network_address) >> (128 - bits - 32) & 0xFFFFFFFF
            return IPv4Network((inner, min(network.prefixlen - bits, 32)))
    return None


class NetworkTable(Generic[V]):
    """Values of networks, found by an address that is in them."""

    __slots__ = ("_by_size",)

    def __init__(self) -> None:
        # for packed addresses of that size: the bits behind each prefix length, and what is in front of them
        self._by_size: dict[int, list[tuple[int, dict[int, V]]]] = {4: [], 16: []}

    def get_or_set(self, network: AnyNetwork, value: V) -> V:
        """Return the network's value, which is `value` if it has none yet."""
        tables = self._by_size[network.max_prefixlen // 8]
        behind = network.max_prefixlen - network.prefixlen
        prefix = int(network.network_address) >> behind
        for bits, table in tables:
            if bits == behind:
                return table.setdefault(prefix, value)
        tables.append((behind, {prefix: value}))
        return value

    def containing(self, packed: bytes) -> list[V]:
        """Return the values of all networks that a packed address is in."""
        number = int.from_bytes(packed, "big")
        return [
            found
            for behind, table in self._by_size[len(packed)]
            if (found := table.get(number >> behind)) is not None
        ]

    def covering(self, network: AnyNetwork) -> list[V]:
        """Return the values of all networks that a network is a part of, or that it is itself."""
        number, behind = int(network.network_address), network.max_prefixlen - network.prefixlen
        return [
            table[number >> bits]
            for bits, table in self._by_size[network.max_prefixlen // 8]
            if bits >= behind and number >> bits in table
        ]


def network_text(network: AnyNetwork) -> str:
    """Return the network as rules show it: an address alone has no prefix length."""
    return str(network.network_address if network.prefixlen == network.max_prefixlen else network)
