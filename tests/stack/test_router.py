"""What makes a router of the stack: hops, ICMP errors, who is heard, and which flow makes room for another."""

from __future__ import annotations

import pytest

from netns_kit.stack import IcmpError, Limits, Refusal
from netns_kit.stack.wire import ethernet, icmp, ip, udp
from netns_kit.stack.wire.tcp import ACK, SYN
from tests.support.stack import (
    DNS,
    GATEWAY,
    GUEST,
    GUEST_MAC,
    OTHER,
    PORTS,
    SYN_OPTIONS,
    Guest,
    Sent,
    echo_packet,
    fragments,
    key,
    packet,
    udp_packet,
)

ROUTER = {4: bytes([198, 51, 100, 1]), 6: bytes.fromhex("20010db8000100000000000000000001")}
HEADER = {4: 20, 6: 40}


def message(sent: Sent) -> tuple[bytes, icmp.Message]:
    """Who says so, and what."""
    return sent.packet.source, icmp.parse(sent.packet.payload)


def quoted(sent: Sent, family: int) -> ip.Packet:
    payload = icmp.parse(sent.packet.payload).payload
    padded = memoryview(bytes(payload) + bytes(65535))  # an ICMP error quotes the beginning only
    return ip.parse_ipv4(padded) if family == 4 else ip.parse_ipv6(padded)


# -- hops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["udp", "echo", "syn"])
@pytest.mark.parametrize("ttl", [0, 1])
def test_the_last_hop_is_the_gateway(guest: Guest, what: str, ttl: int) -> None:
    family = guest.family
    segment = guest.segment(SYN, 999, options=SYN_OPTIONS)
    frames = {
        "udp": udp_packet(family, b"probe", port=33434, ttl=ttl),
        "echo": echo_packet(family, b"probe", ttl=ttl),
        "syn": packet(GUEST[family] + OTHER[family], ip.TCP, segment[14 + HEADER[family] :], ttl=ttl),
    }
    guest.gives(frames[what])
    sent = guest.taken()
    speaker, error = message(sent)
    assert (speaker, error.code) == (GATEWAY[family], 0)
    assert error.type == (icmp.TIME_EXCEEDED if family == 4 else icmp.V6_TIME_EXCEEDED)
    assert bytes(error.payload) == frames[what][14:], "the guest's own packet"
    assert {**guest.stack.tcp, **guest.stack.udp, **guest.stack.echo} == {}
    assert guest.stack.dropped["ip-ttl"] == 1


def test_our_own_addresses_are_no_hop_away(guest: Guest) -> None:
    guest.gives(echo_packet(guest.family, b"ping", to=GATEWAY[guest.family], ttl=1))
    assert message(guest.taken())[1].type in (icmp.ECHO_REPLY, icmp.V6_ECHO_REPLY)
    guest.gives(udp_packet(guest.family, b"query", to=DNS[guest.family], ttl=1))
    assert guest.users.datagrams.got == [(b"query", 1, 0)]


@pytest.mark.parametrize("kind", [icmp.UNREACHABLE, icmp.TIME_EXCEEDED, icmp.ECHO_REPLY])
def test_an_error_draws_no_error(kind: int) -> None:
    """RFC 1122 3.2.2: nor does a reply."""
    guest = Guest()
    error = icmp.HEADER.pack(kind, 0, 0, 0, 0) + bytes(28)
    guest.gives(packet(GUEST[4] + OTHER[4], ip.ICMP, error, sum_at=2, ttl=1))
    guest.quiet()


@pytest.mark.parametrize("source", [bytes(4), bytes([224, 0, 0, 1]), GATEWAY[4]])
def test_nobody_is_told_who_cannot_be(source: bytes) -> None:
    guest = Guest()
    datagram = udp.HEADER.pack(1, 2, 8, 0)
    guest.gives(packet(source + OTHER[4], ip.UDP, datagram, ttl=1))
    guest.quiet()
    assert guest.stack.dropped["ip-ttl"] == 1


def test_a_datagram_in_fragments_uses_up_its_hops_as_well(family: int) -> None:
    guest = Guest(family)
    whole = udp_packet(family, bytes(3000), ttl=1)[14:]
    for piece in fragments(whole, 1200):
        guest.gives(piece)
    assert message(guest.taken())[0] == GATEWAY[family]
    guest.quiet()


# -- ICMP errors from further on ----------------------------------------------------------------------


def errors(family: int) -> dict[str, IcmpError]:
    ipv4 = family == 4
    return {
        "exceeded": IcmpError(11 if ipv4 else 3, 0, offender=ROUTER[family], ttl=60),
        "prohibited": IcmpError(3 if ipv4 else 1, 13 if ipv4 else 1, offender=ROUTER[family]),
        "too big": IcmpError(3 if ipv4 else 2, 4 if ipv4 else 0, 1400, ROUTER[family]),
        "closed": IcmpError(3 if ipv4 else 1, 3 if ipv4 else 4, offender=OTHER[family]),
        "ours": IcmpError(3 if ipv4 else 2, 4 if ipv4 else 0, 1280),
    }


@pytest.mark.parametrize("name", list(errors(4)))
def test_an_error_is_told_as_it_came(guest: Guest, name: str) -> None:
    """Type, code, MTU, offender and hops; about the packet as the guest sent it."""
    family, error = guest.family, errors(guest.family)[name]
    guest.gives(udp_packet(family, b"question"))
    guest.gives(echo_packet(family, b"ping", sequence=5))
    guest.gets(SYN, 999, options=SYN_OPTIONS)
    next(iter(guest.stack.udp.values())).refuse(error, payload=b"question")
    next(iter(guest.stack.echo.values())).refuse(error, 5, b"ping")
    guest.connection.refuse(error)
    layers = (
        udp_packet(family, b"question")[14 + HEADER[family] :],
        echo_packet(family, b"ping", sequence=5)[14 + HEADER[family] :],
        PORTS + (999).to_bytes(4, "big") + bytes(4) + b"\x50\x02",
    )
    for protocol, layer4 in zip((ip.UDP, ip.ICMP if family == 4 else ip.ICMPV6, ip.TCP), layers, strict=True):
        sent = guest.taken()
        speaker, shown = message(sent)
        assert speaker == (error.offender or GATEWAY[family])
        assert (shown.type, shown.code, shown.high << 16 | shown.low) == (error.type, error.code, error.mtu)
        assert sent.packet.ttl == error.ttl
        about = quoted(sent, family)
        assert (about.addresses, about.protocol) == (GUEST[family] + OTHER[family], protocol)
        assert bytes(about.payload).startswith(layer4)
    assert not guest.stack.tcp


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_no_error_is_longer_than_it_may_be(guest: Guest, size: int) -> None:
    """RFC 1812 4.3.2.3: 576 bytes; RFC 4443 2.4: 1280."""
    guest.gives(udp_packet(guest.family, bytes(size)))
    guest.users.flows[0].refuse(Refusal.RESET, payload=bytes(size))
    sent = guest.taken()
    assert len(sent.packet.whole) == min(
        HEADER[guest.family] * 2 + 16 + size, 576 if guest.family == 4 else 1280
    )


# -- traffic class and hops of datagrams --------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 4000])
def test_hops_and_class_reach_the_guest(guest: Guest, size: int) -> None:
    guest.gives(udp_packet(guest.family, b"question", tos=0xB9, ttl=7))
    (flow,) = guest.stack.udp.values()
    for ttl, tos in ((50, 0x03), (50, 0x03), (64, 0), (255, 0xFF)):
        flow.send(bytes(size), guest.now, ttl=ttl, tos=tos)
        while guest.frames:
            sent = guest.taken()
            assert (sent.packet.ttl, sent.packet.tos) == (ttl, tos)


def test_what_may_not_be_fragmented_is_known() -> None:
    for flag in (ip.DONT_FRAGMENT, 0):
        header = ip.pack_ipv4(GUEST[4] + OTHER[4], ip.UDP, 8, fragment=flag)
        assert ip.parse_ipv4(memoryview(header + bytes(8))).dont_fragment is (flag != 0)
    whole = ip.pack_ipv6(GUEST[6] + OTHER[6], ip.UDP, 8) + bytes(8)
    assert ip.parse_ipv6(memoryview(whole)).dont_fragment
    piece = ip.pack_ipv6(GUEST[6] + OTHER[6], ip.FRAGMENT, 16) + ip.pack_ipv6_fragment(ip.UDP, 0, True, 1)
    assert not ip.parse_ipv6(memoryview(piece + bytes(8))).dont_fragment


# -- groups -------------------------------------------------------------------------------------------

MDNS = {4: bytes([224, 0, 0, 251]), 6: bytes.fromhex("ff0200000000000000000000000000fb")}


@pytest.mark.parametrize("mac", [None, ethernet.BROADCAST], ids=["unicast", "group"])
def test_groups_are_not_carried(guest: Guest, mac: bytes | None) -> None:
    """Counted, and nobody is told; however the frame is addressed."""
    data = udp_packet(guest.family, b"who is there?", to=MDNS[guest.family], ttl=255)
    guest.gives((mac or data[:6]) + data[6:])
    assert guest.stack.dropped == {"udp-multicast": 1}
    guest.quiet()
    assert not guest.stack.udp


@pytest.mark.parametrize("address", [bytes([255] * 4), bytes([10, 0, 2, 255])], ids=["limited", "subnet"])
def test_broadcast_is_not_carried(address: bytes) -> None:
    guest = Guest()
    data = udp_packet(4, b"anybody?", to=address)
    guest.gives(ethernet.BROADCAST + data[6:])
    assert guest.stack.dropped == {"udp-broadcast": 1}
    echo = echo_packet(4, to=address)
    guest.gives(ethernet.BROADCAST + echo[6:])
    segment = guest.segment(SYN, 999)
    guest.gives(ethernet.BROADCAST + segment[6:])
    assert guest.stack.dropped == {"udp-broadcast": 1, "icmp-broadcast": 1, "tcp-broadcast": 1}
    guest.quiet()
    assert GUEST_MAC != ethernet.BROADCAST


@pytest.mark.parametrize("protocol", [2, 47, 132], ids=["igmp", "gre", "sctp"])
def test_other_protocols_are_not_carried(protocol: int) -> None:
    guest = Guest()
    guest.gives(packet(GUEST[4] + OTHER[4], protocol, bytes(20)))
    guest.quiet()
    assert guest.stack.dropped == {"ip-protocol": 1}


# -- room ---------------------------------------------------------------------------------------------


def test_who_is_used_is_not_evicted(family: int) -> None:
    """The oldest flow of all talks on, and a thousand others come and go."""
    guest = Guest(family, limits=Limits(udp_flows=100))
    for port in range(1, 1001):
        guest.now += 0.001
        guest.gives(udp_packet(family, b"x", port=7, guest_port=60000))
        guest.gives(udp_packet(family, b"x", port=1000 + port))
    assert len(guest.stack.udp) == 100
    assert key(family, 60000, 7) in guest.stack.udp
    assert guest.stack.dropped["limit-udp-flows"] == 1001 - 100


def test_the_one_idle_longest_makes_room(family: int) -> None:
    """Whichever way the last datagram went."""
    guest = Guest(family, limits=Limits(udp_flows=3, echo_flows=2))
    for port in (1, 2, 3):
        guest.now += 1
        guest.gives(udp_packet(family, b"x", port=port))
        guest.gives(echo_packet(family, identifier=port))
        if port == 2:
            guest.now += 1
            next(iter(guest.stack.echo.values())).reply(1, b"", 64, guest.now)
    guest.now += 1
    guest.stack.udp[key(family, port=1)].send(b"answer", guest.now)
    guest.gives(udp_packet(family, b"x", port=2))
    guest.gives(udp_packet(family, b"x", port=4))
    assert list(guest.stack.udp) == [key(family, port=port) for port in (1, 2, 4)]
    assert [flow.identifier for flow in guest.stack.echo.values()] == [1, 3]
    assert guest.stack.dropped == {"limit-udp-flows": 1, "limit-echo-flows": 1}
    assert len(guest.users.datagrams.expired_flows) == 2


def test_one_is_spared(family: int) -> None:
    guest = Guest(family)
    guest.gives(udp_packet(family, b"x", port=1))
    guest.gives(udp_packet(family, b"x", port=2))
    guest.stack.udp.evict(spare=key(family, port=1))
    assert list(guest.stack.udp) == [key(family, port=1)]


def test_one_question_one_answer(guest: Guest) -> None:
    """A flow to port 53 ends soon after the answer; while none has come it waits as long as any."""
    for port in (53, 54):
        guest.gives(udp_packet(guest.family, b"question", port=port))
    guest.passes(25)
    assert len(guest.stack.udp) == 2
    for flow in list(guest.stack.udp.values()):
        flow.send(b"answer", guest.now)
    guest.passes(9.9)
    assert len(guest.stack.udp) == 2
    guest.passes(0.1)
    assert list(guest.stack.udp) == [key(guest.family, port=54)]
    guest.gets(ACK)
    guest.passes(170)
    assert not guest.stack.udp


def test_what_comes_in_unasked_waits_for_an_answer(family: int) -> None:
    """A flow that we have opened is answered when the guest has spoken."""
    guest = Guest(family)
    flow = guest.stack.add_udp(key(family, port=9), guest.now)
    flow.user = guest.users.datagrams
    flow.send(b"hello?", guest.now)
    flow.send(b"hello??", guest.now)
    assert not flow.answered
    guest.passes(29)
    guest.gives(udp_packet(family, b"here", port=9))
    assert flow.answered
    guest.passes(179)
    assert flow.key in guest.stack.udp
    guest.passes(1)
    assert not guest.stack.udp


def test_a_flow_that_has_ended_does_not_end_another_of_its_name(guest: Guest) -> None:
    guest.gives(udp_packet(guest.family, b"x"))
    guest.gives(echo_packet(guest.family))
    first, second = guest.users.flows
    first.close()
    second.close()
    guest.gives(udp_packet(guest.family, b"x"))
    guest.gives(echo_packet(guest.family))
    first.close()
    second.close()
    assert (len(guest.stack.udp), len(guest.stack.echo)) == (1, 1)
