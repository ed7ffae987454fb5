"""Whatever a guest sends, nothing is raised out of `Stack.receive`, and what is malformed is counted.

The fuzzer makes a million frames, by mutating some recorded from two real ends, and datagrams, pings, ARP
and fragments.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netns_kit.stack import Limits, Offloads, State
from netns_kit.stack.wire import arp, checksum, ethernet, icmp, ip, ndp, virtio
from netns_kit.tap.impairment import Impairment
from tests.support import LONG
from tests.support.stack import (
    DNS,
    GATEWAY,
    GUEST,
    GUEST_MAC,
    OTHER,
    VNET,
    Guest,
    Pair,
    beyond,
    echo_packet,
    fragments,
    packet,
    udp_packet,
)

FRAMES = 1_000_000 if LONG else 200_000
LIMITS = Limits(
    tcp_connections=64,
    tcp_receive=1 << 16,
    tcp_send=1 << 16,
    tcp_out_of_order=16,
    udp_flows=32,
    echo_flows=16,
    fragments=1 << 16,
    neighbours=16,
    waiting_frames=4,
)


def recorded(family: int) -> list[bytes]:
    """Frames without a virtio header, of every kind a guest sends."""
    pair = Pair(Impairment(loss=0.1, delay=0.001, seed=family), 20_000, family=family, recorded=[]).run()
    frames = [data for data in pair.recorded or () if data[:6] != GUEST_MAC]
    for to in (GATEWAY, DNS, OTHER):
        frames += [echo_packet(family, to=to[family]), udp_packet(family, b"question", to=to[family])]
        frames.append(udp_packet(family, bytes(1000), to=to[family]))
    frames += fragments(udp_packet(family, bytes(4000))[14:], 1480)
    frames += fragments(echo_packet(family, bytes(3000))[14:], 504, 78)
    if family == 6:
        frames += discovery() + extended()
    request = arp.pack(arp.Arp(arp.REQUEST, GUEST_MAC, GUEST[4], bytes(6), GATEWAY[4]))
    frames.append(ethernet.pack(ethernet.BROADCAST, GUEST_MAC, ethernet.ARP) + request)
    return frames


def discovery() -> list[bytes]:
    """What hosts say to their neighbours and ask their router."""
    said = [
        (ndp.Neighbour(ndp.SOLICITATION, 0, GATEWAY[6], GUEST_MAC), ndp.solicited_node(GATEWAY[6])),
        (ndp.Neighbour(ndp.SOLICITATION, 0, GATEWAY[6], GUEST_MAC), GATEWAY[6]),
        (ndp.Neighbour(ndp.ADVERTISEMENT, 0xE0, GUEST[6], GUEST_MAC), GATEWAY[6]),
        (ndp.Neighbour(ndp.ROUTER_SOLICITATION, mac=GUEST_MAC), ndp.ALL_NODES),
    ]
    frames = [packet(GUEST[6] + to, ip.ICMPV6, ndp.pack(each), sum_at=2, ttl=255) for each, to in said]
    return [(b"\x33\x33" + each[2:] if each[38] == 0xFF else each) for each in frames]


def extended() -> list[bytes]:
    """Datagrams behind extension headers of every kind."""
    datagram, addresses = udp_packet(6, b"question")[54:], GUEST[6] + OTHER[6]
    options, route = bytes([ip.UDP, 0, 5, 2, 0, 0, 1, 0]), bytes([ip.UDP, 0, 0, 0, 0, 0, 0, 0])
    atomic = ip.pack_ipv6_fragment(ip.UDP, 0, False, 7)
    headers = (
        (ip.HOP_BY_HOP, options),
        (ip.DESTINATION, options),
        (ip.ROUTING, route),
        (ip.FRAGMENT, atomic),
    )
    frames = [packet(addresses, kind, header + datagram) for kind, header in headers]
    chain = bytes([ip.DESTINATION]) + options[1:]
    return [*frames, packet(addresses, ip.HOP_BY_HOP, chain + options + datagram)]


SUMS = {(4, ip.TCP): 16, (4, ip.UDP): 6, (4, ip.ICMP): 2, (6, ip.TCP): 16, (6, ip.UDP): 6, (6, ip.ICMPV6): 2}


def mend(frame: bytearray, random: Random) -> None:
    """Make some of the lengths and sums right, so that what is wrong is found further in."""
    version, size = frame[14] >> 4, (frame[14] & 15) * 4 if frame[14] >> 4 == 4 else 40
    if version not in (4, 6) or size < 20 or len(frame) < 14 + size:
        return
    if random.random() < 0.8:
        at, length = (16, len(frame) - 14) if version == 4 else (18, len(frame) - 54)
        frame[at : at + 2] = length.to_bytes(2, "big")
    if version == 4:
        frame[24:26] = bytes(2)
        frame[24:26] = checksum.checksum(checksum.total(frame[14 : 14 + size])).to_bytes(2, "big")
    protocol = frame[23 if version == 4 else 20]
    at = 14 + size + SUMS.get((version, protocol), 2000)
    if at + 2 <= len(frame) and random.random() < 0.8:
        frame[at : at + 2] = bytes(2)
        layer4 = frame[14 + size :]
        addresses = frame[26:34] if version == 4 else frame[22:54]
        pseudo = 0 if protocol == ip.ICMP else checksum.pseudo_header(addresses, protocol, len(layer4))
        frame[at : at + 2] = checksum.checksum(pseudo, checksum.total(layer4)).to_bytes(2, "big")


def mutate(frame: bytes, random: Random) -> bytes:
    """One to four faults, most of them in the headers behind the link's."""
    data = bytearray(frame)
    for _ in range(random.randint(1, 4)):
        if not data:
            break
        kind, start = random.random(), 0 if random.random() < 0.05 else min(14, len(data) - 1)
        at = start + int(random.random() * random.random() * min(len(data) - start, 100))
        if kind < 0.4:
            data[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        elif kind < 0.75:
            data[at] ^= 1 << random.randrange(8)
        elif kind < 0.8:
            del data[random.randrange(len(data)) :]
        elif kind < 0.85:
            data[at:at] = random.randbytes(random.choice((1, 2, 4, 8)))
        elif kind < 0.9:
            del data[at : at + random.choice((1, 2, 4, 8))]
        else:
            data[at : at + 4] = random.randbytes(4)
    if random.random() < 0.9 and len(data) > 34:
        mend(data, random)
    return bytes(data)


def bounded(guest: Guest) -> None:
    stack = guest.stack
    assert len(stack.tcp) <= LIMITS.tcp_connections
    assert len(stack.udp) <= LIMITS.udp_flows
    assert len(stack.echo) <= LIMITS.echo_flows
    assert stack.stats()["fragments"] <= LIMITS.fragments
    assert len(stack.link._neighbours) <= LIMITS.neighbours
    assert sum(map(len, stack.link._waiting.values())) <= LIMITS.waiting_frames**2
    assert len(stack.timers) < 2000
    assert not stack.acks.at_once
    assert len(stack.dropped) < 60  # reasons are words of ours
    for connection in stack.tcp.values():
        held = sum(map(len, connection.rcv.unread)) + sum(len(run) for _, run in beyond(connection))
        assert held <= LIMITS.tcp_receive


@pytest.mark.parametrize("offloads", [None, VNET], ids=["plain", "offloads"])
@pytest.mark.timeout(600)
def test_mutated_frames(family: int, offloads: Offloads | None) -> None:
    """A quarter of all for each; the users accept, answer, refuse and hold back at random."""
    random = Random(f"{family} {offloads}")
    advertised = ndp.Advertisement(GUEST[6][:8] + bytes(8)) if family == 6 else None
    guest = Guest(family, offloads=offloads, limits=LIMITS, iss=None, advertised=advertised)
    frames = recorded(family)
    heads = [virtio.NONE, virtio.pack(1, 1, 54, 1460, 34, 16), virtio.pack(1, 5, 42, 100, 34, 6)]
    heads += [virtio.pack(2, 0, 0, 0, 0, 0), virtio.pack(255, 255, 65535, 65535, 65535, 65535)]
    for number in range(FRAMES // 4):
        data = mutate(frames[number % len(frames)], random)
        if offloads:
            data = random.choice(heads) + data
            if not number % 50:
                data = data[: random.randrange(20)]
        guest.stack.receive(memoryview(data), guest.now)
        if not number % 16:
            guest.now += 0.01
            guest.stack.handle_timers(guest.now)
            guest.stack.flush()
            live(guest, random)
            guest.frames.clear()
    bounded(guest)
    malformed = sum(guest.stack.dropped.values())
    assert malformed > FRAMES // 4 * 0.3
    assert len(guest.stack.dropped) > 10
    guest.passes(100_000)
    stats = guest.stack.stats()
    assert (stats["udp_flows"], stats["echo_flows"]) == (0, 0)
    on_hold = [connection for connection in guest.stack.tcp.values() if connection.state is State.SYN_HELD]
    assert len(on_hold) == len(guest.stack.tcp)  # these wait for their user, not for the guest


def live(guest: Guest, random: Random) -> None:
    """What users do meanwhile."""
    connections = list(guest.stack.tcp.values())
    if connections:
        connection = random.choice(connections)
        random.choice((connection.accept, connection.accept, connection.resume, connection.shutdown))(
            guest.now
        )
        if connection.room():
            connection.send(b"data", guest.now)
        if random.random() < 0.02:
            connection.abort(guest.now)
    if guest.users.listeners:
        guest.users.listeners[-1].room = random.choice((None, 0, 100))
    for flow in [*guest.stack.udp.values()][:1]:
        flow.send(b"answer", guest.now)
    del guest.users.flows[:], guest.users.datagrams.got[:], guest.users.listeners[:-1]


@settings(max_examples=500)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([ethernet.IPV4, ethernet.IPV6, ethernet.ARP]),
            st.sampled_from([b"", b"\x45\0\0", b"\x60\0\0\0", b"\0\1\x08\0\6\4\0\1"]),
            st.binary(max_size=120),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_any_bytes(frames: list[tuple[int, bytes, bytes]], vnet: bool) -> None:
    guest = Guest(offloads=VNET if vnet else None, limits=LIMITS)
    for kind, start, rest in frames:
        data = bytearray(ethernet.pack(b"\xff" * 6, GUEST_MAC, kind) + start + rest)
        if len(data) > 34:
            mend(data, Random(len(data)))
        guest.gives((virtio.NONE if vnet else b"") + bytes(data))
    bounded(guest)


def counted(data: bytes, family: int = 4, offloads: Offloads | None = None) -> dict[str, int]:
    guest = Guest(family, offloads=offloads)
    guest.gives(data)
    guest.quiet()
    return dict(guest.stack.dropped)


def test_each_is_counted_by_its_reason() -> None:
    good = udp_packet(4, b"hello")
    assert counted(good) == {}
    assert counted(b"", offloads=VNET) == {"virtio-truncated": 1}
    assert counted(good[:13]) == {"ethernet-truncated": 1}
    assert counted(b"\x02" + good[1:]) == {"ethernet-not-ours": 1}
    assert counted(good[:12] + b"\x88\xcc" + good[14:]) == {"ethernet-type": 1}
    assert counted(good[:33]) == {"ipv4-truncated": 1}
    assert counted(good[:-1] + b"?") == {"checksum": 1}
    assert counted(echo_packet(4)[:-1] + b"?") == {"checksum": 1}
    assert counted(echo_packet(6)[:-1] + b"?", 6) == {"checksum": 1}
    assert counted(Guest().segment(0x10)[:-1] + b"\x01") == {"checksum": 1}
    assert counted(packet_of(4, 99)) == {"ip-protocol": 1}
    assert counted(packet_of(4, ip.ICMPV6)) == {"ip-protocol": 1}
    assert counted(packet_of(6, ip.ICMP), 6) == {"ip-protocol": 1}
    assert counted(echo_packet(4, to=bytes([224, 0, 0, 1]))) == {"icmp-not-unicast": 1}
    assert counted(echo_packet(6, to=b"\xff\x02" + bytes(13) + b"\1"), 6) == {"icmp-not-unicast": 1}


def packet_of(family: int, protocol: int) -> bytes:
    payload = bytes(8)
    header = ip.pack(GUEST[family] + OTHER[family], protocol, len(payload))
    kind = ethernet.IPV4 if family == 4 else ethernet.IPV6
    return ethernet.pack(b"\xff" * 6, GUEST_MAC, kind) + header + payload


def test_an_error_message_is_not_answered(guest: Guest) -> None:
    kind = icmp.UNREACHABLE if guest.family == 4 else icmp.V6_UNREACHABLE
    echo = bytearray(echo_packet(guest.family))
    at = 34 if guest.family == 4 else 54
    echo[at] = kind
    check = int.from_bytes(echo[at + 2 : at + 4], "big")
    difference = ((icmp.ECHO if guest.family == 4 else icmp.V6_ECHO) - kind) << 8
    total = check + difference
    echo[at + 2 : at + 4] = ((total & 0xFFFF) + (total >> 16)).to_bytes(2, "big")
    guest.gives(bytes(echo))
    guest.quiet()
    assert guest.stack.dropped == {"icmp-quoted": 1}
