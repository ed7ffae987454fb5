"""Packet: an IPv4 (RFC 791) or IPv6 (RFC 8200) packet, as one record.

Addresses stay packed and together: `Packet.addresses` is source and destination, as in the header.  `Packet.family`
has the other differences between the families.
"""

from __future__ import annotations

from struct import Struct

from . import checksum
from .errors import BadPacket, BadParameter
from .family import IPV4, IPV6, Family

ICMP, TCP, UDP, ICMPV6 = IPV4.icmp, 6, 17, IPV6.icmp
HOP_BY_HOP, ROUTING, FRAGMENT, NO_NEXT_HEADER, DESTINATION = 0, 43, 44, 59, 60  # IPv6's
_EXTENSIONS = frozenset({HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION})
MOST_EXTENSIONS = MOST_OPTIONS = 8  # per packet, and per header (RFC 8504 5.3); no kernel sends as many
_PAD1, _PADN, _ROUTER_ALERT = 0, 1, 5
# codes of BadParameter: RFC 4443, 7112
WRONG_FIELD, UNKNOWN_HEADER, UNKNOWN_OPTION, INCOMPLETE_CHAIN = (0, 1, 2, 3)
_MORE_FRAGMENTS, _OFFSET, _PIECE = 0x2000, 0x1FFF, 0x3FFF
DONT_FRAGMENT = 0x4000

_IPV4 = Struct("!BBHHHBBH8s")
_IPV6 = Struct("!IHBB32s")
_EXTENSION = Struct("!BB")
_FRAGMENT = Struct("!BxHI")
IPV4_SIZE = _IPV4.size
IPV6_SIZE = _IPV6.size


class Packet:
    """One IP packet or fragment.  `payload` and `whole` are views that the caller of the parser lends.

    The receiver sets what is known of the frame: `frame` itself, its `source_mac`, and `summed`, which tells whether
    the link vouches for the checksum.
    """

    __slots__ = (
        "addresses", "dont_fragment", "family", "fragment_offset", "frame", "identification",
        "more_fragments", "payload", "protocol", "source_mac", "summed", "tos", "ttl", "whole"
    )  # fmt: skip

    frame: memoryview
    source_mac: bytes
    summed: bool

    def __init__(
        self,
        family: Family,
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
        self.family = family
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
        """TTL, TOS and DF as one number: what a router handles besides the addresses."""
        return self.ttl << 16 | self.tos << 8 | self.dont_fragment

    @property
    def source(self) -> bytes:
        """Packed address of the sender."""
        return self.addresses[: self.family.address_size]

    @property
    def destination(self) -> bytes:
        """Packed address of the receiver."""
        return self.addresses[self.family.address_size :]

    def verify(self, length: int) -> None:
        """Verify the checksum over the pseudo-header and the first `length` bytes of `payload`.

        Raises:
            BadPacket: It is wrong.
        """
        pseudo = checksum.pseudo_header(self.addresses, self.protocol, length)
        if (pseudo + checksum.total(self.payload[:length])) % 0xFFFF:
            raise BadPacket("checksum")


def parse_ipv4(view: memoryview) -> Packet:
    """Parse an IPv4 packet.  Options are skipped, and padding of the link is removed.

    Raises:
        BadPacket: The bytes are not such a packet.  Nothing else is raised.
    """
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
    whole = view[:length]
    if not fragment & _PIECE:
        return Packet(
            IPV4,
            addresses,
            protocol,
            whole[size:],
            whole,
            ttl,
            tos,
            0,
            0,
            False,
            fragment & DONT_FRAGMENT != 0,
        )
    offset, more = (fragment & _OFFSET) << 3, bool(fragment & _MORE_FRAGMENTS)
    return Packet(IPV4, addresses, protocol, whole[size:], whole, ttl, tos, identification, offset, more)


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
    """Pack a header of 20 bytes for `length` bytes of payload.  `fragment` has flags and offset, as on the wire."""
    header = bytearray(
        _IPV4.pack(0x45, tos, IPV4_SIZE + length, identification, fragment, ttl, protocol, 0, addresses)
    )
    header[10:12] = checksum.checksum(checksum.total(header)).to_bytes(2, "big")
    return bytes(header)


def parse_ipv6(view: memoryview) -> Packet:
    """Parse an IPv6 packet.  Extension headers are skipped: we do not route by them, and options have no effect.

    Raises:
        BadParameter: The sender must be told what is wrong (RFC 8200 section 4).
        BadPacket: The bytes are not such a packet.  Nothing else is raised.
    """
    if len(view) < IPV6_SIZE:
        raise BadPacket("ipv6-truncated")
    word, length, protocol, hops, addresses = _IPV6.unpack_from(view)
    if word >> 28 != 6:
        raise BadPacket("ipv6-header")
    end = IPV6_SIZE + length
    if end > len(view):
        raise BadPacket("ipv6-length")
    tos = word >> 20 & 0xFF
    at, piece, whole = IPV6_SIZE, None, view[:end]
    if protocol in _EXTENSIONS:
        protocol, at, _, piece = _look_through(view, protocol, IPV6_SIZE, end, 6)
    if piece is None:
        return Packet(IPV6, addresses, protocol, whole[at:], whole, hops, tos, 0, 0, False, True)
    offset, more, identification = piece
    if more and (end - at) & 7:
        raise BadParameter("fragment-length", WRONG_FIELD, 4)
    if offset + end - at > 0xFFFF:
        raise BadParameter("fragment-too-long", WRONG_FIELD, at - 6)
    if not offset:
        try:
            _look_through(view, protocol, at, end, at - 8)
        except BadParameter:
            raise
        except BadPacket as bad:
            raise BadParameter("fragment-headers", INCOMPLETE_CHAIN, 0) from bad
    return Packet(IPV6, addresses, protocol, whole[at:], whole, hops, tos, identification, offset, more)


def put_together(packet: Packet) -> None:
    """Skip the extension headers at the beginning of a reassembled packet.

    Raises:
        BadPacket: They are malformed.
    """
    if packet.protocol in _EXTENSIONS and packet.family is IPV6:
        view = packet.payload
        packet.protocol, at, _, piece = _look_through(view, packet.protocol, 0, len(view), 0)
        if piece is not None:
            raise BadPacket("fragment-nested")
        packet.payload = view[at:]


def next_header_at(view: memoryview) -> int:
    """Return the offset at which a valid IPv6 packet names the protocol after its extension headers."""
    _, at, named_at, piece = _look_through(view, view[6], IPV6_SIZE, len(view), 6)
    if piece is not None:
        _, _, named_at, _ = _look_through(view, view[named_at], at, len(view), named_at)
    return named_at


def has_extensions(packet: Packet) -> bool:
    """Return whether an IPv6 packet has extension headers, including that of a fragment."""
    return packet.whole[6] != packet.protocol


def _look_through(
    view: memoryview, protocol: int, at: int, end: int, named_at: int
) -> tuple[int, int, int, tuple[int, bool, int] | None]:
    """Walk the extension headers, up to a fragment header.  `named_at` is the offset at which `protocol` is named.

    Return the protocol that follows, its offset, and the offset at which it is named; of a fragment also its offset,
    whether more fragments follow, and its identification.
    """
    for _ in range(MOST_EXTENSIONS + 1):
        if protocol not in _EXTENSIONS:
            return protocol, at, named_at, None
        if at + 8 > end:
            raise BadPacket("ipv6-extension")
        if protocol == FRAGMENT:
            protocol, field, identification = _FRAGMENT.unpack_from(view, at)
            named_at = at
            at += 8
            if field & 0xFFF9:  # else it is an atomic fragment, a whole packet (RFC 6946)
                return protocol, at, named_at, (field & 0xFFF8, bool(field & 1), identification)
            continue
        following, units = _EXTENSION.unpack_from(view, at)
        after = at + 8 + 8 * units
        if after > end:
            raise BadPacket("ipv6-extension")
        if protocol == HOP_BY_HOP and at != IPV6_SIZE:
            raise BadParameter("ipv6-next-header", UNKNOWN_HEADER, named_at)
        if protocol != ROUTING:
            _look_at_options(view, at + 2, after)
        elif view[at + 3]:  # segments left: RFC 8200 4.4
            raise BadParameter("ipv6-routing", WRONG_FIELD, at + 2)
        protocol, named_at, at = following, at, after
    raise BadPacket("ipv6-extensions")


def _look_at_options(view: memoryview, at: int, end: int) -> None:
    """Check the options of a header.  The type of an unknown option tells what to do (RFC 8200 4.2)."""
    for _ in range(2 * MOST_OPTIONS):  # each option may have padding
        if at >= end:
            return
        kind = view[at]
        if kind == _PAD1:
            at += 1
            continue
        if at + 2 > end or at + 2 + view[at + 1] > end:
            raise BadPacket("ipv6-option")
        if kind not in (_PADN, _ROUTER_ALERT) and kind >> 6:
            if kind >> 6 == 1:
                raise BadPacket("ipv6-option")
            raise BadParameter("ipv6-option", UNKNOWN_OPTION, at)
        at += 2 + view[at + 1]
    if at < end:
        raise BadPacket("ipv6-options")


def pack_ipv6(addresses: bytes, protocol: int, length: int, *, ttl: int = 64, tos: int = 0) -> bytes:
    """Pack a header of 40 bytes for `length` bytes of payload."""
    return _IPV6.pack(6 << 28 | tos << 20, length, protocol, ttl, addresses)


def pack_ipv6_fragment(protocol: int, offset: int, more: bool, identification: int) -> bytes:
    """Pack the fragment extension header; `offset` is in bytes."""
    return _FRAGMENT.pack(protocol, offset | more, identification)


def pack_fragment(
    addresses: bytes,
    protocol: int,
    length: int,
    offset: int,
    *,
    more: bool,
    identification: int,
    ttl: int = 64,
    tos: int = 0,
) -> bytes:
    """Pack the headers of a fragment of either family, with `length` bytes of payload from `offset` on."""
    if len(addresses) == 8:
        piece = offset >> 3 | more << 13
        return pack_ipv4(
            addresses, protocol, length, ttl=ttl, tos=tos, identification=identification, fragment=piece
        )
    fragment = pack_ipv6_fragment(protocol, offset, more, identification)
    return pack_ipv6(addresses, FRAGMENT, len(fragment) + length, ttl=ttl, tos=tos) + fragment


def pack(addresses: bytes, protocol: int, length: int, *, ttl: int = 64, tos: int = 0) -> bytes:
    """Pack the header of an unfragmented packet of either family."""
    header = pack_ipv4 if len(addresses) == 8 else pack_ipv6
    return header(addresses, protocol, length, ttl=ttl, tos=tos)


def halves(addresses: bytes) -> tuple[bytes, bytes]:
    """Return source and destination of a packet's addresses."""
    half = len(addresses) // 2
    return addresses[:half], addresses[half:]


def destination_of(view: memoryview) -> bytes:
    """Return the destination address of a packet.  The view must have at least a header."""
    return bytes(view[16:20] if view[0] >> 4 == 4 else view[24:40])


def source_of(view: memoryview) -> bytes:
    """Return the source address of a packet.  The view must have at least a header."""
    return bytes(view[12:16] if view[0] >> 4 == 4 else view[8:24])


def sum_into(layer4: bytes, addresses: bytes, protocol: int, at: int) -> bytes:
    """Return a message with its checksum in the field at `at`, which is zero so far.  It covers the pseudo-header
    too.
    """
    pseudo = 0 if protocol == ICMP else checksum.pseudo_header(addresses, protocol, len(layer4))
    check = checksum.checksum(pseudo, checksum.total(layer4))
    return layer4[:at] + check.to_bytes(2, "big") + layer4[at + 2 :]


def is_unicast(address: bytes) -> bool:
    """Return whether an address is that of one host: no multicast, broadcast or unspecified address."""
    if len(address) == 4:
        return address[0] < 224 and address != bytes(4)
    return address[0] != 0xFF and address != bytes(16)


def is_multicast(address: bytes) -> bool:
    """Return whether an address is a multicast address."""
    return 224 <= address[0] < 240 if len(address) == 4 else address[0] == 0xFF


def is_link_local(address: bytes) -> bool:
    """Return whether an address is in fe80::/10, which no router forwards (RFC 4291 2.5.6)."""
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80
