"""What we pack we parse, for every format; what lies is `BadPacket`; the checksum beside the RFC's loop."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.stack.wire import (
    BadPacket,
    BadParameter,
    arp,
    checksum,
    ethernet,
    icmp,
    ip,
    ndp,
    tcp,
    udp,
    virtio,
)
from netns_kit.stack.wire.tcp import Options
from tests.support.stack import pseudo_header, rfc1071

u8, u16, u32 = st.integers(0, 0xFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
macs, ipv4 = st.binary(min_size=6, max_size=6), st.binary(min_size=4, max_size=4)
pairs = st.one_of(st.binary(min_size=8, max_size=8), st.binary(min_size=32, max_size=32))
payloads = st.binary(max_size=100)
protocols = st.sampled_from([ip.ICMP, ip.TCP, ip.UDP, ip.ICMPV6])


def parse_ip(data: bytes) -> ip.Packet:
    return (ip.parse_ipv4 if data[0] >> 4 == 4 else ip.parse_ipv6)(memoryview(data))


# -- checksum -----------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_the_checksum_is_that_of_the_readable_loop(data: bytes) -> None:
    expected = rfc1071(data)
    assert checksum.checksum(checksum.total(data)) == (expected or 0xFFFF)  # minus zero is written 0xFFFF


@given(pairs, protocols, payloads)
def test_the_pseudo_header_too(addresses: bytes, protocol: int, payload: bytes) -> None:
    pseudo = checksum.pseudo_header(addresses, protocol, len(payload))
    expected = rfc1071(pseudo_header(addresses, protocol, len(payload)) + payload)
    assert checksum.checksum(pseudo, checksum.total(payload)) == (expected or 0xFFFF)


@given(st.binary(min_size=2, max_size=60).filter(lambda data: len(data) % 2 == 0))
def test_a_summed_packet_sums_to_zero(data: bytes) -> None:
    data += checksum.checksum(checksum.total(data)).to_bytes(2, "big")
    assert checksum.total(data) == 0


# -- mirrors ------------------------------------------------------------------------------------------


@given(macs, macs, u16)
def test_ethernet(destination: bytes, source: bytes, kind: int) -> None:
    assert ethernet.parse(ethernet.pack(destination, source, kind)) == (destination, source, kind)


@given(st.builds(arp.Arp, u16, macs, ipv4, macs, ipv4), st.binary(max_size=18))
def test_arp(message: arp.Arp, padding: bytes) -> None:
    assert arp.parse(arp.pack(message) + padding) == message


@given(u8, u8, u16, u16, u16, u16)
def test_virtio(flags: int, kind: int, size: int, segment: int, start: int, offset: int) -> None:
    header = virtio.pack(flags, kind, size, segment, start, offset)
    assert len(header) == virtio.SIZE
    assert virtio.parse(header) == (flags, kind, size, segment, start, offset)


@given(pairs, protocols, payloads, u8, u8, st.binary(max_size=20))
def test_ip(addresses: bytes, protocol: int, payload: bytes, ttl: int, tos: int, padding: bytes) -> None:
    data = ip.pack(addresses, protocol, len(payload), ttl=ttl, tos=tos) + payload
    packet = parse_ip(data + padding)
    assert (packet.addresses, packet.protocol, packet.ttl, packet.tos) == (addresses, protocol, ttl, tos)
    assert (bytes(packet.payload), bytes(packet.whole)) == (payload, data)
    assert packet.source + packet.destination == addresses
    assert (packet.more_fragments, packet.fragment_offset) == (False, 0)


@given(st.binary(min_size=8, max_size=8), u16, st.integers(0, 0x1FFF), st.booleans())
def test_ipv4_fragment(addresses: bytes, identification: int, units: int, more: bool) -> None:
    header = ip.pack_ipv4(addresses, ip.UDP, 0, identification=identification, fragment=units | more << 13)
    packet = parse_ip(header)
    assert (packet.fragment_offset, packet.more_fragments) == (units * 8, more)
    if units or more:
        assert packet.identification == identification


@given(st.binary(min_size=32, max_size=32), u32, st.integers(0, 0x1FFF), st.booleans(), payloads)
def test_ipv6_fragment(addresses: bytes, identification: int, units: int, more: bool, payload: bytes) -> None:
    if more:
        payload = payload[: len(payload) & ~7]
    header = ip.pack_ipv6(addresses, ip.FRAGMENT, 8 + len(payload))
    header += ip.pack_ipv6_fragment(ip.UDP, units * 8, more, identification)
    if units * 8 + len(payload) > 0xFFFF:
        with pytest.raises(BadParameter) as raised:
            parse_ip(header + payload)
        assert (raised.value.code, raised.value.pointer) == (ip.WRONG_FIELD, 42)
        return
    packet = parse_ip(header + payload)
    assert (packet.fragment_offset, packet.more_fragments) == (units * 8, more)
    assert (packet.protocol, bytes(packet.payload)) == (ip.UDP, payload)
    if units or more:
        assert packet.identification == identification


@given(
    u16, u16, u32, u32, u8, u16, st.none() | u16, st.none() | st.integers(0, 14), st.booleans(),
    st.none() | st.tuples(u32, u32), payloads,
)  # fmt: skip
def test_tcp(
    source: int, target: int, seq: int, ack: int, flags: int, window: int, mss: int | None, scale: int | None,
    permitted: bool, stamp: tuple[int, int] | None, payload: bytes,
) -> None:  # fmt: skip
    header = tcp.pack(
        src_port=source, dst_port=target, seq=seq, ack=ack, flags=flags, window=window,
        options=tcp.pack_options(mss, scale, permitted, stamp),
    )  # fmt: skip
    segment = tcp.parse(memoryview(header + payload))
    assert header[:4] == source.to_bytes(2, "big") + target.to_bytes(2, "big")
    assert (segment.seq, segment.ack, segment.flags, segment.window) == (seq, ack, flags, window)
    assert tcp.parse_options(segment.options) == (mss, scale, permitted, (), stamp)
    assert bytes(segment.payload) == payload
    assert segment.length == len(payload) + bool(flags & tcp.SYN) + bool(flags & tcp.FIN)


@given(u16, u16, u16, payloads, st.binary(max_size=9))
def test_udp(source: int, target: int, check: int, payload: bytes, padding: bytes) -> None:
    datagram = udp.HEADER.pack(source, target, 8 + len(payload), check) + payload
    *numbers, found = udp.parse(memoryview(datagram + padding))
    assert (numbers, bytes(found)) == ([source, target, check], payload)


@given(u8, u8, u16, u16, payloads)
def test_icmp(kind: int, code: int, high: int, low: int, payload: bytes) -> None:
    message = icmp.parse(memoryview(icmp.HEADER.pack(kind, code, 0, high, low) + payload))
    assert tuple(message) == (kind, code, high, low, payload)


# -- lies ---------------------------------------------------------------------------------------------


PARSERS = [arp.parse, icmp.parse, ip.parse_ipv4, ip.parse_ipv6, ndp.parse, tcp.parse, udp.parse]


@given(st.sampled_from(PARSERS), st.binary(max_size=90), st.sampled_from([None, 0x45, 0x46, 0x60]))
def test_bytes_raise_bad_packet_or_nothing(parse: object, data: bytes, first: int | None) -> None:
    if first is not None and data:
        data = bytes([first]) + data[1:]
    assert callable(parse)
    with suppress(BadPacket):
        parse(memoryview(data))


@given(st.binary(max_size=44))
def test_options_never_raise(options: bytes) -> None:
    mss, scale, _, blocks, _ = tcp.parse_options(memoryview(options))
    assert len(blocks) <= 5
    assert mss is None or 0 <= mss <= 0xFFFF
    assert scale is None or 0 <= scale <= tcp.MAX_WINDOW_SCALE


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", Options()),
        ("020405b4 01030307", Options(1460, 7)),
        ("0204 05b4 0402 080a 00000001 00000000 01 030309", Options(1460, 9, True, stamp=(1, 0))),
        ("0101 080a 00000001 ffffffff", Options(stamp=(1, 0xFFFFFFFF))),
        ("0809 00000001 000000", Options()),  # of another length: none
        ("01 01 01 020405b4", Options(1460)),
        ("00 020405b4", Options()),  # the end is the end
        ("020405b4 0300", Options(1460)),  # a length of zero ends the list
        ("020405b4 0301", Options(1460)),
        ("020405b4 03ff07", Options(1460)),  # more than there is
        ("02", Options()),
        ("0203 05 030307", Options(None, 7)),  # an MSS of another length is none
        ("030463 00 020405b4", Options(1460)),
        ("0303ff", Options(None, 14)),  # RFC 7323 2.3: fourteen is the most
        ("fe03aa 020405b4", Options(1460)),  # unknown: skipped
        ("0403ff", Options()),  # of another length: not permitted
        ("0101 050a 00000001 00000002", Options(sack=((1, 2),))),
        ("0512 00000001 00000002 fffffff0 00000003", Options(sack=((1, 2), (0xFFFFFFF0, 3)))),
        ("050b 00000001 00000002 00", Options()),  # not a number of blocks
        ("050a 00000001 000000", Options()),  # more than there is
        ("0502", Options()),
    ],
)
def test_options(options: str, expected: Options) -> None:
    assert tcp.parse_options(memoryview(bytes.fromhex(options))) == expected


@given(u16, u8, st.none() | st.tuples(u32, u32), st.none() | st.tuples(st.integers(0, 19), u8))
def test_options_read_at_one_go_are_those_read_one_by_one(
    mss: int, scale: int, stamp: tuple[int, int] | None, spoilt: tuple[int, int] | None
) -> None:
    options = bytearray(tcp.pack_options(mss, scale, True, stamp))
    if spoilt is not None and spoilt[0] < len(options):
        options[spoilt[0]] = spoilt[1]
    assert tcp.parse_options(memoryview(options)) == tcp._parse_each(memoryview(options), len(options))


@given(st.lists(st.tuples(u32, u32), min_size=1, max_size=4))
def test_sack(blocks: list[tuple[int, int]]) -> None:
    packed = tcp.pack_sack(blocks)
    assert len(packed) % 4 == 0
    assert tcp.parse_options(memoryview(packed)) == Options(sack=tuple(blocks))


def test_no_options() -> None:
    assert tcp.parse_options(None) == Options()


V4 = ip.pack_ipv4(bytes(range(8)), ip.UDP, 4) + b"data"
V6 = ip.pack_ipv6(bytes(range(32)), ip.UDP, 4) + b"data"


def summed(header: bytes) -> bytes:
    header = header[:10] + b"\0\0" + header[12:]
    return header[:10] + rfc1071(header[: (header[0] & 15) * 4]).to_bytes(2, "big") + header[12:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (V4[:19], "ipv4-truncated"),
        (summed(b"\x44" + V4[1:]), "ipv4-header"),
        (summed(b"\x65" + V4[1:]), "ipv4-header"),
        (summed(b"\x4f" + V4[1:]), "ipv4-length"),
        (summed(V4[:2] + b"\0\x13" + V4[4:]), "ipv4-length"),
        (summed(V4[:2] + b"\0\x19" + V4[4:]), "ipv4-length"),
        (V4[:8] + b"\0" + V4[9:], "ipv4-checksum"),
    ],
)
def test_ipv4_that_lies(data: bytes, reason: str) -> None:
    with pytest.raises(BadPacket, match=reason):
        ip.parse_ipv4(memoryview(data))


def test_ipv4_options_are_skipped() -> None:
    header = summed(b"\x46\0\0\x1c" + V4[4:20] + b"\x94\x04\0\0")
    assert bytes(ip.parse_ipv4(memoryview(header + b"data")).payload) == b"data"


def extension(following: int, units: int = 0) -> bytes:
    return bytes([following, units]) + bytes(6 + 8 * units)


def v6(first: int, rest: bytes) -> bytes:
    return ip.pack_ipv6(bytes(range(32)), first, len(rest)) + rest


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (V6[:39], "ipv6-truncated"),
        (b"\x40" + V6[1:], "ipv6-header"),
        (V6[:-1], "ipv6-length"),
        (v6(0, b"\x11\0\0"), "ipv6-extension"),
        (v6(0, extension(17)[:7]), "ipv6-extension"),
        (v6(60, b"\x11\x05" + bytes(14)), "ipv6-extension"),
        (v6(44, bytes(7)), "ipv6-extension"),
        (v6(0, extension(43) + extension(60)[:4]), "ipv6-extension"),
    ],
)
def test_ipv6_that_lies(data: bytes, reason: str) -> None:
    with pytest.raises(BadPacket, match=reason):
        ip.parse_ipv6(memoryview(data))


def test_ipv6_extensions_are_skipped() -> None:
    packet = parse_ip(v6(0, extension(43, 1) + extension(60) + extension(17) + b"data"))
    assert (packet.protocol, bytes(packet.payload)) == (17, b"data")


def problem(data: bytes) -> tuple[str, int, int]:
    """The reason, and what the sender is told: code and pointer."""
    with pytest.raises(BadParameter) as raised:
        ip.parse_ipv6(memoryview(data))
    return raised.value.reason, raised.value.code, raised.value.pointer


def options(following: int, *content: int) -> bytes:
    """An extension header with these options, padded."""
    size = -(-(2 + len(content)) // 8) * 8
    left = size - 2 - len(content)
    padding = b"" if not left else b"\0" if left == 1 else bytes([1, left - 2]) + bytes(left - 2)
    return bytes([following, size // 8 - 1, *content]) + padding


def test_what_the_sender_of_ipv6_is_told() -> None:
    """RFC 8200 4, RFC 7112 5"""
    hops = extension(0)
    assert problem(v6(60, hops + extension(17))) == ("ipv6-next-header", ip.UNKNOWN_HEADER, 40)
    source_route = bytes([17, 2, 0, 1]) + bytes(20)
    assert problem(v6(43, source_route)) == ("ipv6-routing", ip.WRONG_FIELD, 42)
    assert problem(v6(0, extension(43) + source_route)) == ("ipv6-routing", ip.WRONG_FIELD, 50)
    for kind in (0x80, 0xC2):  # the second is the jumbo payload's
        assert problem(v6(60, options(17, kind, 0))) == ("ipv6-option", ip.UNKNOWN_OPTION, 42)
    assert problem(v6(0, options(17, 5, 2, 0, 0, 0xBF, 0))) == ("ipv6-option", ip.UNKNOWN_OPTION, 46)
    piece = ip.pack_ipv6_fragment(17, 0, True, 1)
    assert problem(v6(44, piece + bytes(9))) == ("fragment-length", ip.WRONG_FIELD, 4)
    last = ip.pack_ipv6_fragment(17, 0xFFF8, False, 1)
    assert problem(v6(44, last + bytes(8))) == ("fragment-too-long", ip.WRONG_FIELD, 42)
    cut = ip.pack_ipv6_fragment(60, 0, True, 1) + bytes([17, 1]) + bytes(6)
    assert problem(v6(44, cut)) == ("fragment-headers", ip.INCOMPLETE_CHAIN, 0)
    nested = ip.pack_ipv6_fragment(43, 0, True, 1) + source_route
    assert problem(v6(44, nested)) == ("ipv6-routing", ip.WRONG_FIELD, 50)


def test_what_ipv6_options_may_do() -> None:
    for content in ((0x1E, 0), (0x3F, 3, 1, 2, 3), (1, 1, 0), (0, 0, 0), (5, 2, 0, 0)):
        assert parse_ip(v6(60, options(17, *content) + b"data")).protocol == 17
    with pytest.raises(BadPacket, match="ipv6-option") as raised:
        parse_ip(v6(60, options(17, 0x40, 0)))
    assert not isinstance(raised.value, BadParameter), "dropped in silence"
    for lie in ((1, 200), (0, 0, 0, 0, 0, 5), (0x1E, 5)):
        with pytest.raises(BadPacket, match="ipv6-option"):
            parse_ip(v6(60, bytes([17, 0, *lie]) + bytes(6 - len(lie))))


def test_extension_headers_are_bounded() -> None:
    """However many fit, no more than a few are looked at."""
    assert parse_ip(v6(60, extension(60) * 7 + extension(17))).protocol == 17
    with pytest.raises(BadPacket, match="ipv6-extensions"):
        parse_ip(v6(60, extension(60) * 8 + extension(17)))
    with pytest.raises(BadPacket, match="ipv6-extensions"):
        parse_ip(v6(44, ip.pack_ipv6_fragment(44, 0, False, 1) * 500))
    with pytest.raises(BadPacket, match="ipv6-options"):
        parse_ip(v6(60, extension(17, 255)))


def test_a_fragment_that_is_the_whole_is_none() -> None:
    """RFC 6946"""
    packet = parse_ip(v6(44, ip.pack_ipv6_fragment(60, 0, False, 1) + extension(17) + b"data"))
    assert (packet.protocol, bytes(packet.payload)) == (17, b"data")
    assert (packet.more_fragments, packet.fragment_offset) == (False, 0)


@given(st.sampled_from([0, 43, 44, 60]), st.binary(max_size=200))
def test_where_the_next_header_is_named(first: int, rest: bytes) -> None:
    with suppress(BadPacket):
        packet = parse_ip(v6(first, rest))
        ip.put_together(packet)
        assert packet.whole[ip.next_header_at(packet.whole)] == packet.protocol


# -- neighbour discovery ------------------------------------------------------------------------------

MAC = bytes(range(6))
TARGET = bytes(range(16))


@pytest.mark.parametrize(
    "message",
    [
        ndp.Neighbour(ndp.SOLICITATION, 0, TARGET, MAC),
        ndp.Neighbour(ndp.SOLICITATION, 0, TARGET),
        ndp.Neighbour(ndp.ADVERTISEMENT, ndp.ROUTER | ndp.SOLICITED, TARGET, MAC),
        ndp.Neighbour(ndp.ROUTER_SOLICITATION, mac=MAC),
        ndp.Neighbour(ndp.ROUTER_SOLICITATION),
    ],
)
def test_neighbours(message: ndp.Neighbour) -> None:
    packed = ndp.pack(message)
    assert ndp.parse(memoryview(packed)) == message
    unknown = bytes([254, 2]) + bytes(14)
    assert ndp.parse(memoryview(packed + unknown)) == message
    for size in range(len(packed)):
        with suppress(BadPacket):
            assert ndp.parse(memoryview(packed[:size])) == message._replace(mac=b"")
    for lie in (b"\x01", b"\x01\0", b"\xfe\0" + bytes(6), b"\xfe\x02" + bytes(6)):
        with pytest.raises(BadPacket, match="ndp-option"):
            ndp.parse(memoryview(packed + lie))


def test_groups_of_the_link() -> None:
    """The examples of RFC 4291 2.7.1 and RFC 2464 7."""
    target = bytes.fromhex("403700000000000000010800200e8c6c")
    assert ndp.solicited_node(target).hex() == "ff0200000000000000000001ff0e8c6c"
    assert ndp.group_mac(ndp.solicited_node(target)) == bytes.fromhex("3333ff0e8c6c")
    assert ndp.group_mac(ndp.ALL_NODES) == bytes.fromhex("333300000001")


def test_what_follows_a_fragment_header_belongs_to_the_whole() -> None:
    """Its offsets count from there, so a first fragment's destination options are not skipped."""
    packet = parse_ip(v6(44, ip.pack_ipv6_fragment(60, 0, True, 1) + extension(17) + b"12345678"))
    assert (packet.protocol, len(packet.payload)) == (60, 16)


@pytest.mark.parametrize(
    ("parse", "data", "reason"),
    [
        (tcp.parse, bytes(19), "tcp-truncated"),
        (tcp.parse, bytes(12) + b"\x40" + bytes(7), "tcp-offset"),
        (tcp.parse, bytes(12) + b"\x60" + bytes(7), "tcp-offset"),
        (udp.parse, bytes(7), "udp-truncated"),
        (udp.parse, b"\0\1\0\2\0\7\0\0", "udp-length"),
        (udp.parse, b"\0\1\0\2\0\x09\0\0", "udp-length"),
        (icmp.parse, bytes(7), "icmp-truncated"),
        (arp.parse, bytes(27), "arp-truncated"),
        (arp.parse, bytes(28), "arp-not-ethernet-ipv4"),
    ],
)
def test_what_lies(parse: object, data: bytes, reason: str) -> None:
    assert callable(parse)
    with pytest.raises(BadPacket, match=reason):
        parse(memoryview(data))
