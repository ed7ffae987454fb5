"""IPv4 (RFC 791) and IPv6 (RFC 8200) headers, as one record.

Addresses stay packed and together: `Packet.addresses` is source and destination as they lie in the
header, 8 bytes or 32, and that length is the family.  What is keyed by them never asks which it is.
"""

from __future__ import annotations

from struct import Struct

from . import checksum
from .errors import BadPacket

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
FRAGMENT = 44  # IPv6's fragment header
_SKIPPED = frozenset({0, 43, 60})  # hop-by-hop, routing and destination options: skipped, never obeyed
_MORE_FRAGMENTS, _OFFSET = 0x2000, 0x1FFF
DONT_FRAGMENT = 0x4000

_IPV4 = Struct("!BBHHHBBH8s")
_IPV6 = Struct("!IHBB32s")
_EXTENSION = Struct("!BB")
_FRAGMENT = Struct("!BxHI")
IPV4_SIZE = _IPV4.size
IPV6_SIZE = _IPV6.size


class Packet:
    """One IP packet or fragment.  `payload` and `whole` are views lent by the caller of `parse`."""

    __slots__ = (
        "addresses",
        "dont_fragment",
        "fragment_offset",
        "identification",
        "more_fragments",
        "payload",
        "protocol",
        "tos",
        "ttl",
        "whole",
    )

    def __init__(
        self,
        addresses: bytes,
        protocol: int,
        payload: memoryview,
        whole: memoryview,
        ttl: int = 64,
        tos: int = 0,
        identification: int = 0,
        fragment_offset: int = 0,
        more_fragments: bool = False,
        dont_fragment: bool = False,
    ) -> None:
        self.addresses = addresses
        self.protocol = protocol
        self.payload = payload
        self.whole = whole
        self.ttl = ttl
        self.tos = tos
        self.identification = identification
        self.fragment_offset = fragment_offset  # bytes
        self.more_fragments = more_fragments
        self.dont_fragment = dont_fragment

    @property
    def marks(self) -> int:
        """What a router looks at beside the address: `marks` of TTL, TOS and DF."""
        return marks(self.ttl, self.tos, self.dont_fragment)

    @property
    def source(self) -> bytes:
        return self.addresses[: len(self.addresses) // 2]

    @property
    def destination(self) -> bytes:
        return self.addresses[len(self.addresses) // 2 :]


def marks(ttl: int, tos: int, dont_fragment: bool) -> int:
    """As one number: equal ones are equal in all three."""
    return ttl << 16 | tos << 8 | dont_fragment


def parse_ipv4(view: memoryview) -> Packet:
    """Raises `BadPacket`, and nothing else.  Options are skipped; link padding is cut off."""
    if len(view) < IPV4_SIZE:
        raise BadPacket("ipv4-truncated")
    version_ihl, tos, length, identification, fragment, ttl, protocol, _, addresses = _IPV4.unpack_from(view)
    size = (version_ihl & 0xF) << 2
    if version_ihl >> 4 != 4 or size < IPV4_SIZE:
        raise BadPacket("ipv4-header")
    if not size <= length <= len(view):
        raise BadPacket("ipv4-length")
    if int.from_bytes(view[:size], "big") % 0xFFFF:
        raise BadPacket("ipv4-checksum")
    if not fragment & (_MORE_FRAGMENTS | _OFFSET):
        packet = Packet(addresses, protocol, view[size:length], view[:length], ttl, tos)
        packet.dont_fragment = fragment & DONT_FRAGMENT != 0
        return packet
    return Packet(
        addresses,
        protocol,
        view[size:length],
        view[:length],
        ttl,
        tos,
        identification,
        (fragment & _OFFSET) << 3,
        bool(fragment & _MORE_FRAGMENTS),
    )


def pack_ipv4(
    addresses: bytes,
    protocol: int,
    length: int,
    *,
    ttl: int = 64,
    tos: int = 0,
    identification: int = 0,
    fragment: int = DONT_FRAGMENT,
) -> bytes:
    """A header of 20 bytes for `length` bytes of payload.  `fragment` is flags and offset as on the wire."""
    header = bytearray(
        _IPV4.pack(0x45, tos, IPV4_SIZE + length, identification, fragment, ttl, protocol, 0, addresses)
    )
    header[10:12] = checksum.checksum(checksum.total(header)).to_bytes(2, "big")
    return bytes(header)


def parse_ipv6(view: memoryview) -> Packet:
    """Raises `BadPacket`, and nothing else.  Extension headers are skipped safely (RFC 8200 section 4)."""
    if len(view) < IPV6_SIZE:
        raise BadPacket("ipv6-truncated")
    word, length, protocol, hops, addresses = _IPV6.unpack_from(view)
    if word >> 28 != 6:
        raise BadPacket("ipv6-header")
    end = IPV6_SIZE + length
    if end > len(view):
        raise BadPacket("ipv6-length")
    at = IPV6_SIZE
    identification = offset = 0
    more = False
    while protocol in _SKIPPED or protocol == FRAGMENT:
        if at + 8 > end:
            raise BadPacket("ipv6-extension")
        if protocol == FRAGMENT:
            protocol, field, identification = _FRAGMENT.unpack_from(view, at)
            offset, more = field & 0xFFF8, bool(field & 1)
            at += 8
            if offset or more:
                break  # what follows are bytes of a whole that is not there yet
        else:
            protocol, units = _EXTENSION.unpack_from(view, at)
            at += 8 + 8 * units
    if at > end:
        raise BadPacket("ipv6-extension")
    tos, whole = word >> 20 & 0xFF, offset == 0 and not more
    return Packet(
        addresses, protocol, view[at:end], view[:end], hops, tos, identification, offset, more, whole
    )


def pack_ipv6(addresses: bytes, protocol: int, length: int, *, ttl: int = 64, tos: int = 0) -> bytes:
    """A header of 40 bytes for `length` bytes of payload."""
    return _IPV6.pack(6 << 28 | tos << 20, length, protocol, ttl, addresses)


def pack_ipv6_fragment(protocol: int, offset: int, more: bool, identification: int) -> bytes:
    """The fragment extension header; `offset` is in bytes."""
    return _FRAGMENT.pack(protocol, offset | more, identification)


def pack(addresses: bytes, protocol: int, length: int, *, ttl: int = 64, tos: int = 0) -> bytes:
    """The header of an unfragmented packet of either family."""
    header = pack_ipv4 if len(addresses) == 8 else pack_ipv6
    return header(addresses, protocol, length, ttl=ttl, tos=tos)


def is_unicast(address: bytes) -> bool:
    """Neither multicast, nor broadcast, nor no address at all."""
    if len(address) == 4:
        return address[0] < 224 and address != bytes(4)
    return address[0] != 0xFF and address != bytes(16)


def is_multicast(address: bytes) -> bool:
    return 224 <= address[0] < 240 if len(address) == 4 else address[0] == 0xFF
