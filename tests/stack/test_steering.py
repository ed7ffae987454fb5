"""Several stacks on one link: whose a packet is, wherever it comes in."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from netns_kit.stack import Closed, Steering
from netns_kit.stack.wire import arp, ethernet, icmp, ip, ndp
from netns_kit.stack.wire.tcp import ACK, RST, SYN
from tests.support.stack import (
    GATEWAY,
    GUEST,
    GUEST_MAC,
    OTHER,
    OUR_ISS,
    OUR_MAC,
    PORTS,
    SYN_OPTIONS,
    Guest,
    Listener,
    echo_packet,
    fragments,
    key,
    packet,
    udp_packet,
)


class Shared:
    """A guest with as many queues as there are stacks; what one hands over another has at once."""

    def __init__(self, family: int, count: int) -> None:
        self.family = family
        self.queues = [
            Guest(family, steering=Steering(number, count, self._hand_over)) for number in range(count)
        ]
        self.handed: list[tuple[int, int]] = []  # to whom, and the hops there

    def _hand_over(self, number: int, hops: int, frame: memoryview) -> None:
        self.handed.append((number, hops))
        queue = self.queues[number]
        steering = queue.stack.steering
        steering.hops = hops
        queue.gives(bytes(frame))
        steering.hops = 0

    def connections(self) -> list[int]:
        return [len(queue.stack.tcp) for queue in self.queues]

    def sent(self) -> list[int]:
        return [len(queue.frames) for queue in self.queues]


@pytest.fixture(params=[2, 3])
def shared(request: pytest.FixtureRequest, family: int) -> Shared:
    return Shared(family, request.param)


def test_a_connection_is_whose_its_syn_comes_to(shared: Shared) -> None:
    last = shared.queues[-1]
    last.established()
    last.gets(ACK, 1000, 9000, b"hello")
    assert bytes(last.listener.bytes) == b"hello"
    assert not shared.handed
    assert shared.connections() == [0] * (len(shared.queues) - 1) + [1]


def test_what_comes_in_elsewhere_goes_round_to_whose_it_is(shared: Shared) -> None:
    last, first = shared.queues[-1], shared.queues[0]
    last.established()
    first.gets(ACK, 1000, 9000, b"hello")
    assert bytes(last.listener.bytes) == b"hello"
    last.sends(ACK, 9000, 1005)
    assert shared.handed == [(number, number) for number in range(1, len(shared.queues))]


def test_what_nobody_knows_is_reset_once(shared: Shared) -> None:
    for number, queue in enumerate(shared.queues):
        queue.gets(ACK, 1000, 9000)
        last = shared.queues[number - 1]
        last.sends(RST, 9000)
        assert not any(shared.sent())


def test_all_that_is_no_tcp_is_the_firsts(shared: Shared) -> None:
    for queue in shared.queues:
        queue.gives(udp_packet(shared.family, b"x", port=7))
        queue.gives(echo_packet(shared.family))
    first, others = shared.queues[0], shared.queues[1:]
    assert (len(first.stack.udp), len(first.stack.echo)) == (1, 1)
    assert len(first.users.datagrams.got) == 2 * len(shared.queues)
    assert not any(queue.stack.udp or queue.stack.echo for queue in others)


def test_fragments_of_a_connection_find_it(shared: Shared) -> None:
    last = shared.queues[-1]
    last.established()
    segment = last.segment(ACK, 1000, 9000, b"in pieces of sixteen bytes")
    for number, piece in enumerate(fragments(segment[ethernet.SIZE :], 16)):
        shared.queues[number % len(shared.queues)].gives(piece)
    assert bytes(last.listener.bytes) == b"in pieces of sixteen bytes"


def test_an_error_about_a_connection_that_we_open_ends_it(shared: Shared) -> None:
    """It is no TCP, so it is the first's, who may not know it."""
    last = shared.queues[-1].connecting()
    header = GUEST[shared.family] + OTHER[shared.family]
    syn = PORTS[2:] + PORTS[:2] + OUR_ISS.to_bytes(4, "big") + bytes(12)
    ours = OTHER[shared.family] + GUEST[shared.family]
    quoted = ip.pack(ours, ip.TCP, len(syn)) + syn
    ipv4 = shared.family == 4
    kind, protocol = (icmp.UNREACHABLE, ip.ICMP) if ipv4 else (icmp.V6_UNREACHABLE, ip.ICMPV6)
    error = icmp.HEADER.pack(kind, 1, 0, 0, 0) + quoted
    shared.queues[1].gives(packet(header, protocol, error, sum_at=2))
    assert last.listener.events == [Closed.UNREACHABLE]


def test_what_answers_a_question_for_a_link_address_is_told_to_all() -> None:
    shared = Shared(4, 3)
    address = bytes((10, 0, 2, 50))
    answer = arp.Arp(arp.REPLY, GUEST_MAC, address, OUR_MAC, GATEWAY[4])
    frame = ethernet.pack(OUR_MAC, GUEST_MAC, ethernet.ARP) + arp.pack(answer)
    shared.queues[1].gives(frame)
    assert all(queue.stack.link.mac_of(address) == GUEST_MAC for queue in shared.queues)
    assert sorted(shared.handed) == [(0, 1), (2, 1)], "and they tell nobody"


def test_who_asks_for_our_link_address_is_answered_once() -> None:
    shared = Shared(4, 3)
    question = arp.Arp(arp.REQUEST, GUEST_MAC, GUEST[4], bytes(6), GATEWAY[4])
    shared.queues[1].gives(ethernet.pack(ethernet.BROADCAST, GUEST_MAC, ethernet.ARP) + arp.pack(question))
    assert shared.sent() == [0, 1, 0]


def test_connections_to_the_guest_are_shared_out(shared: Shared) -> None:
    """Also where clients have but every other port, as Linux gives them."""
    steering = shared.queues[0].stack.steering
    owners = [steering.owner(key(shared.family, 80, port)) for port in range(32768, 61000, 2)]
    for number in range(len(shared.queues)):
        share = owners.count(number) / len(owners)
        assert abs(share - 1 / len(shared.queues)) < 0.01


def test_a_connection_to_the_guest_may_be_answered_anywhere(shared: Shared) -> None:
    last = shared.queues[-1]
    connection = last.stack.connect_tcp(key(shared.family), listener := Listener(None), last.now)  # type: ignore[arg-type]  # the connection is made here
    listener.connection = connection
    last.users.listeners.append(listener)
    last.sends(SYN, OUR_ISS)
    shared.queues[0].gets(SYN | ACK, 999, 9000, options=SYN_OPTIONS)
    assert listener.events == ["established"]


@pytest.fixture
def hand_over() -> Callable[[int, int, memoryview], None]:
    def hand_over(number: int, hops: int, frame: memoryview) -> None:
        raise AssertionError((number, hops))

    return hand_over


def test_alone_nothing_is_handed_over(hand_over: Callable[[int, int, memoryview], None]) -> None:
    guest = Guest(4, steering=Steering(0, 1, hand_over))
    guest.gets(ACK, 1000, 9000)
    guest.sends(RST, 9000)
    guest.gives(udp_packet(4, b"x", port=7))
    assert guest.users.datagrams.got


def said(message: ndp.Neighbour, source: bytes, to: bytes) -> bytes:
    data = packet(source + to, ip.ICMPV6, ndp.pack(message), sum_at=2, ttl=ndp.HOP_LIMIT)
    return (ndp.group_mac(to) if to[0] == 0xFF else OUR_MAC) + data[6:]


@pytest.mark.parametrize("came_in", [0, 1])
def test_neighbour_discovery_is_the_firsts(came_in: int) -> None:
    """One answer to each question; but what is told of a neighbour may be what any of them has asked."""
    shared = Shared(6, 3)
    queue, rest = shared.queues[came_in], [0] * 2
    question = ndp.Neighbour(ndp.SOLICITATION, 0, GATEWAY[6], GUEST_MAC)
    queue.gives(said(question, GUEST[6], ndp.solicited_node(GATEWAY[6])))
    assert shared.sent() == [1, *rest]
    queue.gives(said(question, GUEST[6], GATEWAY[6]))
    assert shared.sent() == [2, *rest]
    stranger = GUEST[6][:15] + b"\7"
    for each in shared.queues:
        each.stack.add_udp(stranger + OTHER[6] + PORTS, 0.0).send(b"news", 0.0)
        each.frames.clear()
    answer = ndp.Neighbour(ndp.ADVERTISEMENT, ndp.SOLICITED, stranger, GUEST_MAC)
    queue.gives(said(answer, stranger, GATEWAY[6]))
    assert shared.sent() == [1, 1, 1]
    assert [bytes(each.taken().packet.payload[8:]) for each in shared.queues] == [b"news"] * 3
