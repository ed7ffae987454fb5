"""Neighbour discovery and router advertisements, as packet diagrams; and what hostile messages come to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netns_kit.stack.link import RESOLUTION
from netns_kit.stack.router import INTERVAL, PAUSES
from netns_kit.stack.wire import ethernet, icmp, ip, ndp, udp
from tests.support.stack import (
    DNS,
    GATEWAY,
    GUEST,
    GUEST_MAC,
    LINK_LOCAL,
    OTHER,
    OUR_MAC,
    Guest,
    Sent,
    echo_packet,
    key,
    packet,
    take_apart,
    udp_packet,
)

GUEST_LOCAL = bytes.fromhex("fe80000000000000505400fffe123456")
OTHER_MAC = bytes.fromhex("525400aabbcc")
STRANGER = GUEST[6][:15] + b"\x77"  # of the prefix, and nobody's
UNSPECIFIED = bytes(16)
ALL_ROUTERS = bytes.fromhex("ff020000000000000000000000000002")
OURS = (GATEWAY[6], DNS[6], LINK_LOCAL)
SAID = ndp.Advertisement(GUEST[6][:8] + bytes(8), resolvers=(DNS[6],))


@pytest.fixture
def guest() -> Guest:
    """One that we know nothing of yet."""
    guest = Guest(6, advertised=SAID)
    guest.stack.link._neighbours.clear()
    return guest


def message(
    said: ndp.Neighbour, source: bytes, to: bytes, *, hops: int = 255, code: int = 0, more: bytes = b""
) -> bytes:
    """The frame, to the link address that belongs to the group or is ours."""
    layer4 = ndp.pack(said) + more
    layer4 = layer4[:1] + bytes([code]) + layer4[2:]
    data = packet(source + to, ip.ICMPV6, layer4, sum_at=2, ttl=hops)
    return (ndp.group_mac(to) if to[0] == 0xFF else OUR_MAC) + data[6:]


def question(
    target: bytes, source: bytes = GUEST[6], mac: bytes = GUEST_MAC, to: bytes = b""
) -> tuple[ndp.Neighbour, bytes, bytes]:
    return ndp.Neighbour(ndp.SOLICITATION, 0, target, mac), source, to or ndp.solicited_node(target)


def probe(target: bytes) -> tuple[ndp.Neighbour, bytes, bytes]:
    return question(target, UNSPECIFIED, b"")


def told(sent: Sent) -> ndp.Neighbour:
    assert (sent.packet.protocol, sent.packet.ttl) == (ip.ICMPV6, 255)
    return ndp.parse(sent.packet.payload)


def sent(guest: Guest) -> Sent:
    """The oldest frame, wherever it goes."""
    data = guest.frames.popleft()
    destination, source, kind = ethernet.parse(data)
    assert (source, kind) == (OUR_MAC, ethernet.IPV6)
    to = bytes(data[38:54])
    assert destination == (ndp.group_mac(to) if to[0] == 0xFF else GUEST_MAC)
    return take_apart(GUEST_MAC + data[6:])


# -- neighbours ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("source", [GUEST[6], GUEST_LOCAL])
def test_who_asks_for_our_addresses_is_told(guest: Guest, target: bytes, source: bytes) -> None:
    guest.gives(message(*question(target, source)))
    answer = sent(guest)
    assert answer.packet.addresses == target + source
    flags = ndp.ROUTER | ndp.SOLICITED | ndp.OVERRIDE
    assert told(answer) == ndp.Neighbour(ndp.ADVERTISEMENT, flags, target, OUR_MAC)
    assert guest.stack.link.mac_of(source) == GUEST_MAC, "and we know him now"
    guest.quiet()


def test_a_known_neighbour_looks_whether_we_are_still_there(guest: Guest) -> None:
    """RFC 4861 7.3.3: to our address itself, and the option may be left out."""
    guest.gives(message(*question(GATEWAY[6], mac=b"", to=GATEWAY[6])))
    assert sent(guest).packet.addresses == GATEWAY[6] + GUEST[6]
    guest.quiet()


@pytest.mark.parametrize("target", [STRANGER, OTHER[6], GUEST[6]])
def test_nobody_elses_address_is_answered_for(guest: Guest, target: bytes) -> None:
    guest.gives(message(*question(target)))
    guest.gives(message(*probe(target)))
    guest.quiet()
    assert guest.stack.dropped == {}


@pytest.mark.parametrize("target", OURS)
def test_who_is_about_to_take_our_address_finds_it_taken(guest: Guest, target: bytes) -> None:
    """RFC 4862 5.4: all are told, he has no address to be told at."""
    guest.gives(message(*probe(target)))
    answer = sent(guest)
    assert answer.packet.addresses == target + ndp.ALL_NODES
    flags = ndp.ROUTER | ndp.OVERRIDE
    assert told(answer) == ndp.Neighbour(ndp.ADVERTISEMENT, flags, target, OUR_MAC)
    guest.quiet()
    assert guest.stack.link.stats()["neighbours"] == 0


def test_a_frame_for_the_unknown_waits_until_he_has_answered(guest: Guest) -> None:
    flow = guest.stack.add_udp(key(6, 40000, 53), guest.now)
    flow.send(b"news", guest.now)
    asked = sent(guest)
    assert asked.packet.addresses == GATEWAY[6] + ndp.solicited_node(GUEST[6])
    assert told(asked) == ndp.Neighbour(ndp.SOLICITATION, 0, GUEST[6], OUR_MAC)
    guest.quiet()
    answer = ndp.Neighbour(ndp.ADVERTISEMENT, ndp.SOLICITED | ndp.OVERRIDE, GUEST[6], GUEST_MAC)
    guest.gives(message(answer, GUEST[6], GATEWAY[6]))
    assert bytes(guest.taken().packet.payload[8:]) == b"news"


def test_a_link_local_address_is_asked_for_by_ours(guest: Guest) -> None:
    guest.stack.add_udp(GUEST_LOCAL + LINK_LOCAL + bytes(4), 0.0).send(b"news", 0.0)
    assert sent(guest).packet.addresses == LINK_LOCAL + ndp.solicited_node(GUEST_LOCAL)


def test_who_does_not_answer_is_given_up(guest: Guest) -> None:
    guest.stack.add_udp(key(6), guest.now).send(b"news", guest.now)
    guest.passes(RESOLUTION + 0.1)
    assert guest.stack.dropped["unresolved"] == 1


def advertisement(mac: bytes, flags: int, target: bytes = GUEST[6]) -> bytes:
    return message(ndp.Neighbour(ndp.ADVERTISEMENT, flags, target, mac), target, ndp.ALL_NODES)


def test_what_is_advertised_unasked(guest: Guest) -> None:
    """RFC 4861 7.2.5: of whom we know nothing, nothing; else if it is said to override."""
    link = guest.stack.link
    guest.gives(advertisement(GUEST_MAC, ndp.OVERRIDE))
    assert link.mac_of(GUEST[6]) == bytes(6)
    link.learn(GUEST[6], GUEST_MAC)
    guest.gives(advertisement(OTHER_MAC, 0))
    assert link.mac_of(GUEST[6]) == GUEST_MAC
    guest.gives(advertisement(OTHER_MAC, ndp.OVERRIDE))
    assert link.mac_of(GUEST[6]) == OTHER_MAC
    for ours in OURS:
        guest.gives(advertisement(OTHER_MAC, ndp.OVERRIDE, ours))
        assert link.mac_of(ours) == bytes(6)
    guest.quiet()


BAD = {
    "hops": lambda: message(*question(GATEWAY[6]), hops=254),
    "code": lambda: message(*question(GATEWAY[6]), code=1),
    "checksum": lambda: message(*question(GATEWAY[6]))[:-1] + b"?",
    "truncated": lambda: message(*question(GATEWAY[6], mac=b""))[:-1],
    "empty option": lambda: message(*question(GATEWAY[6]), more=bytes(8)),
    "option too long": lambda: message(*question(GATEWAY[6]), more=b"\x01\x02" + bytes(6)),
    "target": lambda: message(*question(ndp.ALL_NODES)),
    "no target": lambda: message(*question(UNSPECIFIED)),
    "source": lambda: message(*question(GATEWAY[6], ndp.ALL_NODES)),
    "probe with a link address": lambda: message(*question(GATEWAY[6], UNSPECIFIED)),
    "probe to one": lambda: message(*question(GATEWAY[6], UNSPECIFIED, b"", GATEWAY[6])),
    "probe to all": lambda: message(*question(GATEWAY[6], UNSPECIFIED, b"", ndp.ALL_NODES)),
    "solicited by all": lambda: advertisement(GUEST_MAC, ndp.SOLICITED),
    "router": lambda: message(ndp.Neighbour(ndp.ROUTER_SOLICITATION), GUEST_LOCAL, ALL_ROUTERS, hops=1),
    "router probe": lambda: message(
        ndp.Neighbour(ndp.ROUTER_SOLICITATION, mac=GUEST_MAC), UNSPECIFIED, ALL_ROUTERS
    ),
    "from a router": lambda: router_like(134),
    "redirect": lambda: router_like(137),
    "in a fragment": lambda: in_a_fragment(),  # noqa: PLW0108 - it is further down
}


def router_like(kind: int) -> bytes:
    layer4 = bytes([kind, 0, 0, 0]) + bytes(36)
    data = packet(GUEST_LOCAL + ndp.ALL_NODES, ip.ICMPV6, layer4, sum_at=2, ttl=255)
    return ndp.group_mac(ndp.ALL_NODES) + data[6:]


def in_a_fragment() -> bytes:
    """RFC 6980: even if it is the whole."""
    data = message(*question(GATEWAY[6]))
    header, layer4 = data[14:54], data[54:]
    piece = ip.pack_ipv6_fragment(ip.ICMPV6, 0, False, 1)
    length = (len(layer4) + 8).to_bytes(2, "big")
    return data[:14] + header[:4] + length + bytes([ip.FRAGMENT]) + header[7:] + piece + layer4


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_what_is_not_as_it_must_be_is_counted(guest: Guest, make: Callable[[], bytes]) -> None:
    guest.gives(make())
    guest.quiet()
    assert sum(guest.stack.dropped.values()) == 1
    assert guest.stack.link.stats()["neighbours"] == 0


@pytest.mark.parametrize("kind", sorted(icmp.V6_GROUPS))
def test_whose_group_is_whose_is_nothing_to_us(guest: Guest, kind: int) -> None:
    """Linux reports its groups with a router alert in front."""
    report = icmp.HEADER.pack(kind, 0, 0, 0, 0) + bytes(16)
    check = packet(GUEST_LOCAL + ndp.ALL_NODES, ip.ICMPV6, report, sum_at=2)[54:]
    alert = bytes([ip.ICMPV6, 0, 5, 2, 0, 0, 1, 0])
    data = packet(GUEST_LOCAL + ndp.ALL_NODES, ip.HOP_BY_HOP, alert + check, ttl=1)
    guest.gives(ndp.group_mac(ndp.ALL_NODES) + data[6:])
    guest.quiet()
    assert guest.stack.dropped == {}


def test_other_groups_are_not_heard(guest: Guest) -> None:
    for data, reason in (
        (echo_packet(6, to=ndp.ALL_NODES), "icmp-multicast"),
        (udp_packet(6, b"question", to=bytes.fromhex("ff0200000000000000000000000000fb")), "udp-multicast"),
    ):
        guest.gives(b"\x33\x33" + data[2:])
        assert guest.stack.dropped.pop(reason) == 1
    guest.quiet()


def test_neighbours_are_bounded(guest: Guest) -> None:
    for number in range(3000):
        source = GUEST[6][:12] + number.to_bytes(4, "big")
        guest.gives(message(*question(GATEWAY[6], source)))
        guest.frames.clear()
    assert guest.stack.link.stats()["neighbours"] == guest.stack.limits.neighbours


# -- the router ---------------------------------------------------------------------------------------


def advertised(guest: Guest) -> tuple[bytes, bytes]:
    """To whom, and what."""
    found = sent(guest)
    assert found.packet.source == LINK_LOCAL
    assert (found.packet.ttl, found.packet.payload[0]) == (255, ndp.ROUTER_ADVERTISEMENT)
    return found.packet.destination, bytes(found.packet.payload)


@pytest.mark.parametrize("source", [UNSPECIFIED, GUEST_LOCAL])
def test_who_asks_for_a_router_is_told_at_once_and_alone(guest: Guest, source: bytes) -> None:
    mac = GUEST_MAC if source == GUEST_LOCAL else b""
    for _ in range(3):
        guest.gives(message(ndp.Neighbour(ndp.ROUTER_SOLICITATION, mac=mac), source, ALL_ROUTERS))
        assert guest.frames[0][:6] == GUEST_MAC
        data = guest.frames.popleft()
        to = data[38:54]
        assert to == (ndp.ALL_NODES if source == UNSPECIFIED else source)
        assert data[22:38] == LINK_LOCAL
        assert (data[21], data[54]) == (255, ndp.ROUTER_ADVERTISEMENT)
        guest.quiet()


def test_all_are_told_now_and_then(guest: Guest) -> None:
    when = []
    guest.stack.handle_timers(guest.now)
    guest.quiet()
    for _ in range(6):
        guest.passes(guest.stack.deadline - guest.now)
        when.append(guest.now)
        assert advertised(guest)[0] == ndp.ALL_NODES
        guest.quiet()
    first, second, third = PAUSES
    start = [first, first + second, first + second + third]
    assert when == pytest.approx([*start, *(start[-1] + INTERVAL * number for number in (1, 2, 3))])


def test_without_anything_to_advertise_nothing_is() -> None:
    guest = Guest(6)
    guest.gives(message(ndp.Neighbour(ndp.ROUTER_SOLICITATION), UNSPECIFIED, ALL_ROUTERS))
    guest.passes(10_000)
    guest.quiet()


# -- without IPv6 -------------------------------------------------------------------------------------


def test_without_an_address_of_ours_ipv6_is_not_spoken() -> None:
    guest = Guest(6, addresses=(GATEWAY[4], DNS[4]))
    frames = [
        message(*question(GATEWAY[6])),
        message(ndp.Neighbour(ndp.ROUTER_SOLICITATION), UNSPECIFIED, ALL_ROUTERS),
        udp_packet(6, b"out"),
        echo_packet(6),
        guest.segment(2),
    ]
    for data in frames:
        guest.gives(data)
    guest.quiet()
    assert guest.stack.dropped == {"ipv6-off": len(frames)}
    assert not guest.users.flows
    assert not guest.users.listeners


# -- scopes -------------------------------------------------------------------------------------------


def error(guest: Guest) -> tuple[bytes, int, int]:
    found = guest.taken()
    said = icmp.parse(found.packet.payload)
    return found.packet.source, said.type, said.code


def test_a_link_local_address_reaches_no_further_than_us(guest: Guest) -> None:
    """RFC 4291 2.5.6, RFC 4443 3.1"""
    datagram = udp.HEADER.pack(40000, 53, 9, 0) + b"x"
    guest.gives(packet(GUEST_LOCAL + OTHER[6], ip.UDP, datagram, sum_at=6))
    assert error(guest) == (LINK_LOCAL, icmp.V6_UNREACHABLE, icmp.V6_BEYOND_SCOPE)
    other = LINK_LOCAL[:15] + b"\x09"
    guest.gives(packet(GUEST_LOCAL + other, ip.UDP, datagram, sum_at=6))
    assert error(guest) == (LINK_LOCAL, icmp.V6_UNREACHABLE, 3)
    assert guest.stack.dropped == {"ip-link-local": 2}
    assert guest.users.flows == []
    for ours in (LINK_LOCAL, GATEWAY[6]):
        guest.gives(packet(GUEST_LOCAL + ours, ip.UDP, datagram, sum_at=6))
        guest.quiet()
    assert len(guest.users.flows) == 2


# -- extension headers --------------------------------------------------------------------------------


def parameter_problem(guest: Guest) -> tuple[bytes, int, int]:
    """Who says so, the code, and the byte that is pointed at."""
    found = guest.taken()
    said = icmp.parse(found.packet.payload)
    assert said.type == icmp.V6_PARAMETER
    assert found.packet.destination == GUEST[6]
    return found.packet.source, said.code, said.high << 16 | said.low


def routed(segments_left: int, to: bytes = OTHER[6]) -> bytes:
    datagram = udp_packet(6, b"around", to=to)[54:]
    header = bytes([ip.UDP, 2, 0, segments_left]) + bytes(20)
    return packet(GUEST[6] + to, ip.ROUTING, header + datagram)


def test_nobody_is_routed_by_a_source_route() -> None:
    guest = Guest(6)
    guest.gives(routed(0))
    assert guest.users.datagrams.got == [(b"around", 64, 0)]
    guest.gives(routed(1))
    assert parameter_problem(guest) == (OTHER[6], ip.WRONG_FIELD, 42)
    assert guest.stack.dropped == {"ipv6-routing": 1}
    guest.gives(routed(1, ndp.ALL_NODES))
    guest.gives(b"\x33\x33" + routed(1)[2:])
    guest.quiet()


@pytest.mark.parametrize("protocol", [132, 51, 50, 135, 253])
def test_a_header_unknown(protocol: int) -> None:
    """RFC 8200 4: said as from the destination, which would have."""
    guest = Guest(6)
    guest.gives(packet(GUEST[6] + OTHER[6], protocol, bytes(20)))
    assert parameter_problem(guest) == (OTHER[6], ip.UNKNOWN_HEADER, 6)
    behind = bytes([protocol, 0, 1, 4, 0, 0, 0, 0])
    guest.gives(packet(GUEST[6] + OTHER[6], ip.DESTINATION, behind + bytes(20)))
    assert parameter_problem(guest) == (OTHER[6], ip.UNKNOWN_HEADER, 40)
    assert guest.stack.dropped == {"ip-protocol": 2}


def test_an_unknown_header_in_fragments() -> None:
    guest = Guest(6)
    options = bytes([132, 0, 1, 4, 0, 0, 0, 0])
    for at, piece, more in ((0, options + bytes(8), True), (16, bytes(8), False)):
        layer4 = ip.pack_ipv6_fragment(ip.DESTINATION, at, more, 9) + piece
        guest.gives(packet(GUEST[6] + OTHER[6], ip.FRAGMENT, layer4))
    assert parameter_problem(guest) == (OTHER[6], ip.UNKNOWN_HEADER, 48)


def test_no_next_header_is_no_error() -> None:
    guest = Guest(6)
    guest.gives(packet(GUEST[6] + OTHER[6], ip.NO_NEXT_HEADER, b""))
    guest.quiet()


def test_options_in_front_of_what_comes_in_fragments() -> None:
    guest = Guest(6)
    datagram = udp_packet(6, bytes(range(200)))[54:]
    whole = bytes([ip.UDP, 0, 1, 4, 0, 0, 0, 0]) + datagram
    for at in range(0, len(whole), 80):
        piece, more = whole[at : at + 80], at + 80 < len(whole)
        layer4 = ip.pack_ipv6_fragment(ip.DESTINATION, at, more, 9) + piece
        guest.gives(packet(GUEST[6] + OTHER[6], ip.FRAGMENT, layer4))
    assert guest.users.datagrams.got == [(bytes(range(200)), 64, 0)]


# -- hostile ------------------------------------------------------------------------------------------

ADDRESSES = st.sampled_from([*OURS, GUEST[6], GUEST_LOCAL, UNSPECIFIED, ndp.ALL_NODES, ALL_ROUTERS, STRANGER])


@settings(max_examples=400)
@given(
    st.lists(
        st.tuples(
            st.integers(130, 138),
            st.sampled_from([0, 0, 0, 1]),
            ADDRESSES,
            ADDRESSES | st.just(ndp.solicited_node(GATEWAY[6])),
            ADDRESSES | st.binary(max_size=16),
            st.binary(max_size=40) | st.just(bytes([1, 1]) + GUEST_MAC),
            st.sampled_from([255, 255, 255, 254]),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_whatever_is_said(said: list[tuple[int, int, bytes, bytes, bytes, bytes, int, bool]]) -> None:
    """Nothing is raised, one frame at most answers one, it goes to the guest, and speaks for our addresses alone."""
    guest = Guest(6, advertised=SAID)
    for kind, code, source, to, target, options, hops, unicast in said:
        layer4 = bytes([kind, code, 0, 0, 0xE0, 0, 0, 0]) + target + options
        data = packet(source + to, ip.ICMPV6, layer4, sum_at=2, ttl=hops)
        if not unicast:
            data = b"\x33\x33" + data[2:]
        before = sum(guest.stack.dropped.values())
        guest.gives(data)
        answered, counted = len(guest.frames), sum(guest.stack.dropped.values()) - before
        assert answered + counted <= 1
        while guest.frames:
            answer = guest.frames.popleft()
            assert answer[22:38] in OURS
            assert answer[38:54] in (source, ndp.ALL_NODES)


def test_more_search_domains_than_an_option_holds_are_cut() -> None:
    said = SAID._replace(search=tuple(f"domain-{number:03}.example" for number in range(200)))
    message = ndp.pack_advertisement(said, OUR_MAC, 1500)
    assert len(message) < 1000
    assert b"domain-000" in message
    assert b"domain-199" not in message
