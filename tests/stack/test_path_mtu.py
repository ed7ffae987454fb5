"""Behind the guest there may be links of a smaller MTU: what a router there says is heeded (RFC 1191, RFC 8201)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from netns_kit.stack import Limits
from netns_kit.stack.wire import icmp, ip, virtio
from netns_kit.stack.wire import tcp as wire
from netns_kit.stack.wire.tcp import ACK
from tests.support.stack import GATEWAY, GUEST, OTHER, VNET, Guest, echo_packet, key, packet, udp_packet

ROUTER = {4: bytes((10, 0, 2, 101)), 6: bytes.fromhex("fd000000000000000000000000000101")}
MTU = 1300
HEADERS = {4: 40, 6: 60}


def too_big(guest: Guest, sent: bytes, mtu: int = MTU) -> None:
    """A router behind the guest says it of what we have sent, from its IP header on."""
    family, vnet = guest.family, guest.vnet
    if family == 4:
        message = icmp.HEADER.pack(icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED, 0, 0, mtu) + sent[:28]
    else:
        message = icmp.HEADER.pack(icmp.V6_TOO_BIG, 0, 0, mtu >> 16, mtu & 0xFFFF) + sent[:200]
    protocol = ip.ICMP if family == 4 else ip.ICMPV6
    guest.gives(packet(ROUTER[family] + OTHER[family], protocol, message, sum_at=2, vnet=vnet))


def from_ip(guest: Guest) -> bytes:
    """The oldest frame the stack has sent, from its IP header on."""
    return bytes(guest.taken().packet.whole)


def text(guest: Guest) -> list[tuple[int, int, int]]:
    """Of each segment the stack has sent: number, bytes, and into which pieces a super-segment is cut."""
    found = []
    while guest.frames:
        sent = guest.taken()
        segment = wire.parse(sent.packet.payload)
        found.append((segment.seq, len(segment.payload), sent.virtio[3] if sent.virtio else 0))
    return found


@pytest.mark.parametrize("vnet", [False, True])
def test_a_connection_is_cut_smaller_and_sent_again(family: int, vnet: bool) -> None:
    guest = Guest(family, offloads=VNET if vnet else None).established(window=512)
    mss = 1460 if family == 4 else 1440
    guest.send(bytes(3 * mss))
    first = from_ip(guest)
    guest.frames.clear()
    too_big(guest, first)
    small = MTU - HEADERS[family]
    again = text(guest)
    assert again[0][0] == 9000
    assert sum(size for _, size, _ in again) == 3 * mss
    assert max((gso if vnet else 0) or size for _, size, gso in again) == small
    guest.gets(ACK, 1000, 9000 + 3 * mss, window=512)
    guest.send(bytes(2 * small))
    assert max(gso if vnet else size for _, size, gso in text(guest)) == small


@pytest.mark.parametrize("mtu", [1500, 9000])
def test_no_larger_than_it_was(family: int, mtu: int) -> None:
    guest = Guest(family).established(window=512)
    guest.send(bytes(1000))
    sent = from_ip(guest)
    too_big(guest, sent, mtu)
    guest.quiet()


def test_never_for_nothing(family: int) -> None:
    """The tiniest MTU leaves a segment that is one; and the same said again has nothing sent again."""
    guest = Guest(family).established(window=512)
    guest.send(bytes(1000))
    sent = from_ip(guest)
    too_big(guest, sent, 1)
    assert max(size for _, size, _ in text(guest)) == 48
    for mtu in (1, 0, 0xFFFF):
        too_big(guest, sent, mtu)
        guest.quiet()


def test_only_about_what_is_in_flight(family: int) -> None:
    guest = Guest(family).established(window=512)
    guest.send(bytes(1000))
    sent = from_ip(guest)
    guest.gets(ACK, 1000, 10000, window=512)
    too_big(guest, sent)
    guest.send(bytes(1400))
    assert text(guest) == [(10000, 1400, 0)]
    stranger = sent[: len(sent) - 1000 - 20] + b"\x01\x02" + sent[len(sent) - 1000 - 18 :]
    too_big(guest, stranger)
    guest.quiet()


@pytest.mark.parametrize("vnet", [False, True])
def test_datagrams_leave_in_fragments(family: int, vnet: bool) -> None:
    guest = Guest(family, offloads=VNET if vnet else None)
    question = udp_packet(family, b"question")
    guest.gives((virtio.NONE if vnet else b"") + question)
    flow = guest.stack.udp[key(family, port=53)]
    flow.send(bytes(1400), guest.now)
    sent = from_ip(guest)
    guest.quiet()
    too_big(guest, sent)
    flow.send(bytes(1400), guest.now)
    pieces = [guest.taken().packet for _ in range(2)]
    assert all(len(piece.whole) <= MTU for piece in pieces)
    assert sum(len(piece.payload) for piece in pieces) == 1408
    flow.send(bytes(2800), guest.now, segment_size=1400)
    assert len(guest.frames) == 4
    guest.frames.clear()
    flow.send(bytes(1200), guest.now)
    assert len(guest.taken().packet.payload) == 1208


def test_super_datagrams_too(family: int) -> None:
    """What has been cut to the link's own MTU is now in fragments; what is small enough is one frame as before."""
    guest = Guest(family, offloads=replace(VNET, uso4=True, uso6=True))
    guest.gives(virtio.NONE + udp_packet(family, b"question"))
    flow = guest.stack.udp[key(family, port=53)]
    flow.send(bytes(2800), guest.now, segment_size=1400)
    sent = from_ip(guest)
    guest.quiet()
    too_big(guest, sent)
    flow.send(bytes(2800), guest.now, segment_size=1400)
    assert all(len(guest.taken().packet.whole) <= MTU for _ in range(4))
    flow.send(bytes(2400), guest.now, segment_size=1200)
    assert len(guest.taken().packet.payload) == 2408


def test_echo_replies_too(family: int) -> None:
    """Our own, and others'."""
    guest = Guest(family)
    guest.gives(echo_packet(family, bytes(1400), to=GATEWAY[family]))
    too_big(guest, from_ip(guest))
    guest.gives(echo_packet(family, bytes(1400), to=GATEWAY[family]))
    assert len(guest.frames) == 2
    guest = Guest(family)
    guest.gives(echo_packet(family, bytes(1400)))
    [flow] = guest.stack.echo.values()
    flow.reply(1, bytes(1400), 64, guest.now)
    too_big(guest, from_ip(guest))
    flow.reply(1, bytes(1400), 64, guest.now)
    assert len(guest.frames) == 2


def test_about_a_flow_that_is_none_it_is_not_believed(family: int) -> None:
    guest = Guest(family)
    guest.gives(udp_packet(family, b"question"))
    flow = guest.stack.udp[key(family, port=53)]
    flow.send(bytes(1400), guest.now)
    sent = bytearray(from_ip(guest))
    sent[HEADERS[family] - 20] ^= 1  # its port
    too_big(guest, bytes(sent))
    flow.send(bytes(1400), guest.now)
    assert len(guest.frames) == 1


def test_no_fewer_bytes_than_a_link_must_take(family: int) -> None:
    guest = Guest(family)
    for mtu in (1, 68, 500):
        guest.gives(udp_packet(family, b"question"))
        flow = guest.stack.udp[key(family, port=53)]
        flow.send(bytes(10), guest.now)
        too_big(guest, from_ip(guest), mtu)
    assert guest.stack.link.mtu_to(GUEST[family]) == (552 if family == 4 else 1280)


def test_as_many_are_kept_as_neighbours(family: int) -> None:
    guest = Guest(family, limits=Limits(neighbours=2))
    link, addresses = guest.stack.link, [bytes(len(GUEST[family]) - 1) + bytes((last,)) for last in range(3)]
    for address in addresses:
        link.narrow(address, MTU)
    assert [link.mtu_to(address) for address in addresses] == [1500, MTU, MTU]


@pytest.mark.parametrize("size", range(28))
def test_what_is_cut_off_is_dropped(family: int, size: int) -> None:
    guest = Guest(family).established()
    guest.send(bytes(1000))
    too_big(guest, from_ip(guest)[:size])
    guest.quiet()
