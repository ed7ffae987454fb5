"""UDP flows, echo, ARP and neighbours, fragments."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netns_kit.stack import Limits, Offloads, Refusal, State
from netns_kit.stack.reassembly import PACKET
from netns_kit.stack.wire import arp, ethernet, icmp, ip, udp, virtio
from netns_kit.stack.wire.tcp import ACK, SYN
from tests.support.stack import (
    DNS,
    GATEWAY,
    GUEST,
    GUEST_MAC,
    GUEST_PORT,
    OTHER,
    OUR_MAC,
    PORTS,
    VNET,
    Guest,
    Sent,
    echo_packet,
    fragment,
    fragments,
    key,
    packet,
    udp_packet,
)


def unreachable(sent: Sent) -> tuple[bytes, int, bytes]:
    """Who says so, the code, and the quoted packet from its layer 4 on."""
    message = icmp.parse(sent.packet.payload)
    ipv4 = len(sent.packet.addresses) == 8
    assert message.type == (icmp.UNREACHABLE if ipv4 else icmp.V6_UNREACHABLE)
    return sent.packet.source, message.code, bytes(message.payload[20 if ipv4 else 40 :])


# -- UDP ----------------------------------------------------------------------------------------------


def test_a_datagram_each_way(guest: Guest) -> None:
    guest.gives(udp_packet(guest.family, b"question"))
    assert guest.users.datagrams.got == [(b"question", 64, 0)]
    flow = guest.stack.udp[key(guest.family, port=53)]
    flow.send(b"answer", guest.now)
    sent = guest.taken().packet
    assert sent.addresses == OTHER[guest.family] + GUEST[guest.family]
    source, target, _, payload = udp.parse(sent.payload)
    assert (source, target, bytes(payload)) == (53, GUEST_PORT, b"answer")


@pytest.mark.parametrize("vnet", [False, True])
def test_what_is_too_long_for_its_family_is_dropped(family: int, vnet: bool) -> None:
    """A datagram of IPv6 may be meant for IPv4: from a resolver, or a client of a forwarded port."""
    guest = Guest(family, offloads=VNET if vnet else None)
    flow = guest.stack.add_udp(key(family), guest.now)
    most = 65507 if family == 4 else 65527
    for size in (most + 1, 65535, most + 1):
        flow.send(bytes(size), guest.now)
    guest.quiet()
    assert guest.stack.dropped == {"udp-length": 3}
    flow.send(bytes(most), guest.now)
    assert len(guest.frames) > 40


@pytest.mark.parametrize("size", [0, 1, 1471, 1473, 9000, 65507])
@pytest.mark.parametrize("offloads", [None, VNET], ids=["plain", "offloads"])
def test_every_size_crosses(family: int, size: int, offloads: Offloads | None) -> None:
    """To the guest in fragments where it exceeds the MTU; back the same way, since we put them together."""
    guest, data = Guest(family, offloads=offloads), bytes(range(256)) * 256
    flow = guest.stack.add_udp(key(family), guest.now)
    flow.send(data[:size], guest.now)
    back = Guest(family)
    while guest.frames:
        sent = guest.taken()
        assert len(sent.packet.whole) <= 1500
        again = bytes(sent.packet.whole)  # as if it were the guest's
        header = (virtio.NONE if back.vnet else b"") + ethernet.pack(
            OUR_MAC, GUEST_MAC, ethernet.IPV4 if family == 4 else ethernet.IPV6
        )
        if offloads and sent.virtio[0]:
            assert size <= 1472
            return
        back.gives(header + again)
    assert [payload for payload, *_ in back.users.datagrams.got] == [data[:size]]
    assert back.stack.stats()["fragments"] == 0


def test_a_super_datagram_is_passed_on_whole(family: int) -> None:
    guest = Guest(family, offloads=VNET)
    data = udp_packet(family, bytes(5000))
    guest.gives(virtio.pack(virtio.NEEDS_CSUM, virtio.GSO_UDP_L4, 42, 1000, 34, 6) + data)
    guest.gives(virtio.pack(virtio.NEEDS_CSUM, virtio.GSO_UDP_L4, 42, 5000, 34, 6) + data)
    assert [(len(payload), size) for payload, _, size in guest.users.datagrams.got] == [  # type: ignore[arg-type]  # bytes
        (5000, 1000),
        (5000, 0),
    ]


def test_without_a_checksum() -> None:
    """Over IPv4 zero means none; over IPv6 it is an error (RFC 8200 8.1)."""
    for family in (4, 6):
        guest = Guest(family)
        datagram = udp.HEADER.pack(GUEST_PORT, 53, 12, 0) + b"data"
        guest.gives(packet(GUEST[family] + OTHER[family], ip.UDP, datagram))
        assert len(guest.users.datagrams.got) == (family == 4)
        assert guest.stack.dropped["checksum"] == (family == 6)


@pytest.mark.parametrize(
    ("refusal", "codes"),
    [
        (Refusal.RESET, (3, 4)),
        (Refusal.NET_UNREACHABLE, (0, 0)),
        (Refusal.HOST_UNREACHABLE, (1, 3)),
        (Refusal.PROHIBITED, (13, 1)),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_refused(guest: Guest, refusal: Refusal, codes: tuple[int, int], later: bool) -> None:
    """At once or when the host's socket reports it, and the same for echo."""
    code = codes[0 if guest.family == 4 else 1]
    by = OTHER if refusal is Refusal.RESET else GATEWAY
    if not later:
        guest.users.refusal = refusal
    guest.gives(udp_packet(guest.family, b"hello"))
    guest.gives(echo_packet(guest.family))
    for flow in guest.users.flows:
        flow.refuse(refusal)
    speaker, shown, quoted = unreachable(guest.taken())
    assert (speaker, shown, quoted[:4]) == (by[guest.family], code, PORTS[:2] + b"\0\x35")
    speaker, shown, quoted = unreachable(guest.taken())
    assert (speaker, shown, quoted[4:6]) == (by[guest.family], code, b"\0\x07")
    if not later:
        assert {**guest.stack.udp, **guest.stack.echo} == {}
        assert guest.stack.deadline < 100
        guest.passes(1000)


def test_dropped_silently(guest: Guest) -> None:
    guest.users.refusal = Refusal.DROP
    guest.gives(udp_packet(guest.family, b"hello"))
    guest.gives(echo_packet(guest.family))
    guest.quiet()


def test_flows_end_after_their_time(guest: Guest) -> None:
    """RFC 4787: short while nothing has been answered, long once something has."""
    guest.gives(udp_packet(guest.family, b"x", port=1))
    guest.gives(udp_packet(guest.family, b"x", port=2))
    answered = guest.stack.udp[key(guest.family, port=2)]
    answered.send(b"y", guest.now)
    guest.passes(20)
    guest.gives(udp_packet(guest.family, b"x", port=1))
    guest.passes(29.9)
    assert len(guest.stack.udp) == 2
    guest.passes(0.1)
    assert list(guest.stack.udp.values()) == [answered]
    guest.passes(129)
    assert guest.stack.udp
    guest.passes(1.1)
    assert not guest.stack.udp
    assert len(guest.users.datagrams.expired_flows) == 2
    assert guest.stack.deadline == float("inf")


# -- echo ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [GATEWAY, DNS])
@pytest.mark.parametrize("size", [0, 56, 1472, 3000, 60000])
def test_our_own_addresses_answer(guest: Guest, own: dict[int, bytes], size: int) -> None:
    payload = bytes(size)
    guest.gives(echo_packet(guest.family, payload, to=own[guest.family]))
    found = b""
    while guest.frames:
        sent = guest.taken()
        assert sent.packet.addresses == own[guest.family] + GUEST[guest.family]
        found += sent.packet.payload
    message = icmp.parse(memoryview(found))
    assert message.type == (icmp.ECHO_REPLY if guest.family == 4 else icmp.V6_ECHO_REPLY)
    assert (message.high, message.low, bytes(message.payload)) == (7, 1, payload)
    assert not guest.stack.echo


def test_echo_to_elsewhere_is_a_flow(guest: Guest) -> None:
    guest.gives(echo_packet(guest.family, b"ping", ttl=2))
    guest.quiet()
    assert guest.users.datagrams.got == [(1, b"ping", 2)]
    (flow,) = guest.stack.echo.values()
    assert flow.identifier == 7
    flow.reply(1, b"ping", 55, guest.now)
    sent = guest.taken()
    assert (sent.packet.ttl, sent.packet.source) == (55, OTHER[guest.family])
    assert icmp.parse(sent.packet.payload).high == 7
    guest.passes(60)
    assert not guest.stack.echo


# -- who is where -------------------------------------------------------------------------------------


def arp_frame(operation: int, sender: bytes, target: bytes, mac: bytes = GUEST_MAC) -> bytes:
    body = arp.pack(arp.Arp(operation, mac, sender, bytes(6), target))
    return ethernet.pack(ethernet.BROADCAST, mac, ethernet.ARP) + body


@pytest.mark.parametrize("own", [GATEWAY[4], DNS[4]])
def test_arp_is_answered_for_our_addresses_alone(own: bytes) -> None:
    guest = Guest()
    guest.gives(arp_frame(arp.REQUEST, GUEST[4], own))
    reply = guest.frames.popleft()
    assert ethernet.parse(reply) == (GUEST_MAC, OUR_MAC, ethernet.ARP)
    assert arp.parse(reply[14:]) == (arp.REPLY, OUR_MAC, own, GUEST_MAC, GUEST[4])
    guest.gives(arp_frame(arp.REQUEST, GUEST[4], bytes([10, 0, 2, 50])))
    guest.gives(arp_frame(arp.REPLY, GUEST[4], own))
    guest.gives(arp_frame(arp.REQUEST, bytes(4), GUEST[4]))  # RFC 5227: a probe
    guest.quiet()


def unresolved(**options: object) -> Guest:
    guest = Guest(**options)  # type: ignore[arg-type]  # Guest's own
    guest.stack.link._neighbours.clear()
    return guest


def test_a_frame_waits_for_the_link_address() -> None:
    guest = unresolved()
    guest.connecting()
    guest.stack.link._waiting.clear()
    guest.passes(0.25)
    request = guest.frames.popleft()
    assert ethernet.parse(request)[0] == ethernet.BROADCAST
    assert arp.parse(request[14:]) == (arp.REQUEST, OUR_MAC, GATEWAY[4], bytes(6), GUEST[4])
    guest.quiet()
    guest.gives(arp_frame(arp.REPLY, GUEST[4], GATEWAY[4]))
    guest.sends(SYN, 8999)
    guest.gets(SYN | ACK, 999, 9000)
    guest.sends(ACK, 9000, 1000)


@pytest.mark.parametrize("offloads", [None, VNET], ids=["plain", "offloads"])
def test_a_datagram_waits_too(offloads: Offloads | None) -> None:
    guest = unresolved(offloads=offloads)
    flow = guest.stack.add_udp(key(4), guest.now)
    flow.send(b"hello", guest.now)
    guest.frames.clear()
    guest.stack.link.learn(GUEST[4], GUEST_MAC)
    assert bytes(udp.parse(guest.taken().packet.payload)[3]) == b"hello"


def test_what_waits_in_vain_is_given_up() -> None:
    """And not sent, long after, to whoever has the address then."""
    guest = unresolved()
    for start in (0.0, 10.0):
        guest.passes(start)
        guest.stack.add_udp(key(4, port=int(start) + 1), guest.now).send(b"hello", guest.now)
        guest.passes(2.9)
        assert guest.stack.stats()["waiting_frames"] == 1
        guest.passes(0.1)
        assert guest.stack.stats()["waiting_frames"] == 0
    assert guest.stack.dropped["unresolved"] == 2
    guest.frames.clear()
    guest.stack.link.learn(GUEST[4], GUEST_MAC)
    guest.quiet()


def test_what_waits_is_bounded() -> None:
    """Few frames for an address, few addresses; the oldest address makes room."""
    guest = unresolved(limits=Limits(waiting_frames=4))
    for number in range(1, 40):
        address = bytes([10, 0, 2, number + 100])
        for _ in range(9):
            guest.stack.link.send(address, guest.stack.link.prefix(address) + b"frame")
    waiting = guest.stack.link._waiting
    assert [address[3] - 100 for address in waiting] == [36, 37, 38, 39]
    assert all(len(frames) == 4 for frames in waiting.values())


def test_the_guest_moves_to_another_link_address(family: int) -> None:
    guest = Guest(family).established()
    guest.gives(udp_packet(family, b"x"))
    flow = guest.stack.udp[key(family, port=53)]
    moved = b"\x02\0\0\0\0\x01"
    if family == 4:
        guest.gives(arp_frame(arp.REQUEST, GUEST[4], GUEST[4], moved))  # gratuitous
    else:
        data = bytearray(udp_packet(family, b"x", port=99))
        data[6:12] = moved
        guest.gives(bytes(data))  # a new flow tells as well
    guest.frames.clear()
    guest.send(b"x")
    flow.send(b"x", guest.now)
    assert [data[:6] for data in guest.frames] == [moved, moved]


def test_what_is_no_link_address() -> None:
    guest = unresolved()
    for mac in (bytes(6), ethernet.BROADCAST, b"\x33\x33\0\0\0\1"):
        guest.gives(arp_frame(arp.REQUEST, GUEST[4], OTHER[4], mac))
    guest.gives(arp_frame(arp.REQUEST, GATEWAY[4], OTHER[4]))  # ours is ours
    assert not guest.stack.link._neighbours


def test_neighbours_are_bounded() -> None:
    guest = Guest(limits=Limits(neighbours=8))
    for number in range(100):
        guest.gives(arp_frame(arp.REQUEST, bytes([10, 0, 3, number]), GATEWAY[4]))
    assert len(guest.stack.link._neighbours) == 8


def test_a_guest_that_claims_our_address(family: int) -> None:
    guest = Guest(family)
    datagram = udp.HEADER.pack(GUEST_PORT, 53, 8, 0)
    guest.gives(packet(GATEWAY[family] + OTHER[family], ip.UDP, datagram, sum_at=6))
    guest.quiet()
    assert guest.stack.dropped == {"ip-source-ours": 1}
    assert not guest.stack.udp


def test_without_an_address_of_that_family() -> None:
    """An unresolved IPv4 guest of a stack that has IPv6 addresses alone."""
    guest = Guest(addresses=(GATEWAY[6],))
    guest.stack.link._neighbours.clear()
    data = bytearray(echo_packet(4))
    data[6] |= 1  # a multicast source: nothing to learn from
    guest.users.refusal = Refusal.HOST_UNREACHABLE
    guest.gives(bytes(data))
    assert len(guest.frames) == 1


# -- fragments ----------------------------------------------------------------------------------------


def pieces_of(family: int, size: int = 3000, step: int = 1000) -> list[bytes]:
    return fragments(udp_packet(family, bytes(range(250)) * (size // 250))[14:], step)


@settings(max_examples=60)
@given(st.sampled_from([4, 6]), st.data())
def test_fragments_in_any_order_and_twice(family: int, data: st.DataObject) -> None:
    guest, pieces = Guest(family), pieces_of(family, 4000, 504)
    once = data.draw(st.permutations(pieces))
    again = data.draw(st.lists(st.sampled_from(pieces), max_size=5))
    for number, piece in enumerate(once[:-1]):
        guest.gives(piece)
        if number < len(again) and again[number] is not once[-1]:
            guest.gives(again[number]) if again[number] in once[: number + 1] else None
    assert not guest.users.datagrams.got
    guest.gives(once[-1])
    assert guest.users.datagrams.got == [(bytes(range(250)) * 16, 64, 0)]
    assert guest.stack.stats()["fragments"] == 0


@pytest.mark.parametrize(
    ("at", "size", "more"),
    [(8, 8, True), (0, 16, True), (992, 16, True), (1000, 504, True), (1992, 8, False), (4000, 8, True)],
)
def test_an_overlap_damns_the_packet(family: int, at: int, size: int, more: bool) -> None:
    """RFC 5722, for both families: also what comes later is dropped."""
    guest, pieces = Guest(family), pieces_of(family)
    guest.gives(pieces[0])
    guest.gives(pieces[1])
    guest.gives(pieces[3])
    guest.gives(fragment(GUEST[family] + OTHER[family], ip.UDP, at, bytes(size), more))
    for piece in pieces:
        guest.gives(piece)
    assert not guest.users.datagrams.got
    assert guest.stack.dropped["fragment-overlap"] == 5
    assert guest.stack.stats()["fragments"] == PACKET
    (damned,) = guest.stack._reassembly._partials.values()
    assert (damned.pieces, damned.first) == ({}, None)
    guest.passes(31)
    for piece in pieces:
        guest.gives(piece)
    assert len(guest.users.datagrams.got) == 1


def test_what_ends_before_what_has_come_damns_the_packet(family: int) -> None:
    guest, pieces = Guest(family), pieces_of(family)
    guest.gives(pieces[2])
    guest.gives(fragment(GUEST[family] + OTHER[family], ip.UDP, 1000, bytes(8), False))
    assert guest.stack.dropped["fragment-overlap"] == 1
    guest.gives(pieces[0])
    assert guest.stack.dropped["fragment-overlap"] == 2


def test_packets_do_not_mix(family: int) -> None:
    guest = Guest(family)
    for number in range(2):
        for identification in range(3):
            guest.gives(
                fragments(udp_packet(family, bytes([identification] * 16))[14:], 16, identification)[number]
            )
    assert [payload for payload, *_ in guest.users.datagrams.got] == [bytes([n] * 16) for n in range(3)]


def test_incomplete_packets_are_forgotten(family: int) -> None:
    guest = Guest(family)
    guest.gives(pieces_of(family)[0])
    assert guest.stack.stats()["fragments"] > 1000
    guest.passes(31)
    guest.gives(fragment(GUEST[family] + OTHER[family], ip.UDP, 0, bytes(8), True, 99))
    assert guest.stack.stats()["fragments"] < 1000
    guest.gives(pieces_of(family)[1])
    assert not guest.users.datagrams.got


def test_incomplete_packets_are_bounded(family: int) -> None:
    """By their bytes and what each costs beside; the oldest goes."""
    guest = Guest(family, limits=Limits(fragments=100_000))
    addresses = GUEST[family] + OTHER[family]
    for identification in range(1000):
        guest.gives(fragment(addresses, ip.UDP, 8, bytes(8), True, identification))
        guest.gives(fragment(addresses, ip.UDP, 64, bytes(1000), True, identification))
        assert guest.stack.stats()["fragments"] <= 100_000
    for piece in pieces_of(family)[1:]:
        guest.gives(piece)
    guest.gives(pieces_of(family)[0])
    assert len(guest.users.datagrams.got) == 1


def test_a_packet_of_too_many_pieces(family: int) -> None:
    guest = Guest(family)
    for at in range(0, 8 * 4000, 8):
        guest.gives(fragment(GUEST[family] + OTHER[family], ip.UDP, at, bytes(8), True))
    assert guest.stack.dropped["fragment-overlap"] > 2000
    assert guest.stack.stats()["fragments"] == PACKET


@pytest.mark.parametrize(
    ("at", "size", "more", "reason"),
    [
        (0, 7, True, "fragment-length"),
        (8, 0, True, "fragment-length"),
        (65528, 80, False, "fragment-too-long"),
    ],
)
def test_fragments_that_cannot_be(family: int, at: int, size: int, more: bool, reason: str) -> None:
    guest = Guest(family)
    guest.gives(fragment(GUEST[family] + OTHER[family], ip.UDP, at, bytes(size), more))
    assert guest.stack.dropped == {reason: 1}


def test_an_atomic_fragment_is_a_packet() -> None:
    """RFC 6946"""
    guest = Guest(6)
    datagram = udp_packet(6, b"hello")[14 + 40 :]
    guest.gives(fragment(GUEST[6] + OTHER[6], ip.UDP, 0, datagram, False))
    assert guest.users.datagrams.got == [(b"hello", 64, 0)]


def test_a_fragmented_datagram_is_refused_with_its_beginning(family: int) -> None:
    guest = Guest(family)
    guest.users.refusal = Refusal.RESET
    for piece in pieces_of(family):
        guest.gives(piece)
    sent = guest.taken()
    assert unreachable(sent)[0] == OTHER[family]
    assert len(sent.packet.whole) <= 1280


def test_a_fragmented_segment(family: int) -> None:
    guest = Guest(family).established()
    for piece in fragments(guest.segment(ACK, 1000, 9000, bytes(2000))[14:], 800):
        guest.gives(piece)
    guest.sends(ACK, 9000, 3000)


def test_stats_name_what_is_there(guest: Guest) -> None:
    guest.established()
    guest.gives(udp_packet(guest.family, b"x"))
    guest.gives(echo_packet(guest.family))
    guest.gives(b"")
    assert guest.stack.stats() == {
        "tcp_connections": 1,
        "tcp_established": 1,
        "tcp_pending": 0,
        "tcp_time_waits": 0,
        "tcp_memory": 0,
        "udp_flows": 1,
        "echo_flows": 1,
        "fragments": 0,
        "neighbours": 1,
        "waiting_frames": 0,
        "dropped_ethernet_truncated": 1,
    }
    assert guest.state() is State.ESTABLISHED
