"""scapy as an independent oracle: it takes apart what the stack sends, and agrees on every field and sum."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from netns_kit.domain_names import to_wire
from netns_kit.stack import IcmpError, Refusal, State
from netns_kit.stack.wire import arp, ethernet, icmp, ndp
from netns_kit.stack.wire.tcp import ACK, FIN, pack_options
from netns_kit.tap.impairment import Impairment
from tests.support.stack import (
    DNS,
    GATEWAY,
    GUEST,
    GUEST_MAC,
    GUEST_PORT,
    OTHER,
    OTHER_PORT,
    OUR_MAC,
    Guest,
    Pair,
    echo_packet,
    key,
    udp_packet,
)

scapy: Any = None


@pytest.fixture(scope="module", autouse=True)
def _scapy() -> None:
    """Load it for these tests: it takes a while, and every process that runs tests imports this module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scapy's own imports, of what is deprecated
        globals()["scapy"] = pytest.importorskip("scapy.all")


def name(address: bytes) -> str:
    found: str = scapy.inet_ntop(
        scapy.socket.AF_INET if len(address) == 4 else scapy.socket.AF_INET6, address
    )
    return found


def oracle(data: bytes) -> Any:
    """The frame as scapy sees it, once it has agreed with every length and checksum."""
    seen = scapy.Ether(data)
    assert (seen.src, seen.dst) == (mac(OUR_MAC), mac(GUEST_MAC))
    again = seen.copy()
    layer = again
    while layer and not isinstance(layer, (scapy.IPerror, scapy.IPerror6)):  # a quoted packet is as it was
        for computed in ("len", "plen", "chksum", "cksum", "ihl", "dataofs"):
            if computed in layer.fields:
                delattr(layer, computed)
        layer = layer.payload
    assert bytes(again) == data
    return seen


def mac(packed: bytes) -> str:
    return packed.hex(":")


def ours(seen: Any, family: int) -> Any:
    """The IP layer, from the other end to the guest."""
    layer = seen[scapy.IP if family == 4 else scapy.IPv6]
    assert (layer.src, layer.dst) == (name(OTHER[family]), name(GUEST[family]))
    if family == 4:
        assert (layer.version, layer.ihl, layer.tos, layer.ttl) == (4, 5, 0, 64)
        assert str(layer.flags) == "DF"
    else:
        assert (layer.version, layer.tc, layer.fl, layer.hlim) == (6, 0, 0, 64)
    return layer


def segments(guest: Guest) -> list[Any]:
    found = []
    while guest.frames:
        segment = ours(oracle(guest.frames.popleft()), guest.family)[scapy.TCP]
        assert (segment.sport, segment.dport) == (OTHER_PORT, GUEST_PORT)
        assert (segment.reserved, segment.urgptr) == (0, 0)
        found.append(segment)
    return found


def test_tcp(guest: Guest) -> None:
    guest.on_hold()
    guest.connection.accept(guest.now)
    (segment,) = segments(guest)
    mss = 1460 if guest.family == 4 else 1440
    assert (segment.flags, segment.seq, segment.ack, segment.window) == ("SA", 8999, 1000, 65535)
    assert segment.options == [("MSS", mss), ("NOP", None), ("WScale", 8)]
    guest.gets(ACK, 1000, 9000, b"hello", window=512)
    (segment,) = segments(guest)
    assert (segment.flags, segment.seq, segment.ack, segment.window) == ("A", 9000, 1005, 4096)
    data = bytes(range(256)) * 16
    guest.send(data[:4001])  # odd, so that the sum pads
    found = segments(guest)
    assert b"".join(bytes(segment.payload) for segment in found) == data[:4001]
    assert [len(segment.payload) for segment in found] == [mss, mss, 4001 - 2 * mss]
    assert [str(segment.flags) for segment in found] == ["A", "A", "PA"]
    guest.shutdown()
    (segment,) = segments(guest)
    assert (segment.flags, segment.seq, segment.ack) == ("FA", 13001, 1005)
    guest.connection.abort(guest.now)
    (segment,) = segments(guest)
    assert (segment.flags, segment.seq) == ("RA", 13002)
    assert guest.state() is State.CLOSED


def test_tcp_refused_stray_and_our_own(guest: Guest) -> None:
    guest.on_hold()
    guest.connection.refuse(Refusal.RESET)
    guest.gets(FIN | ACK, 5, 777)
    guest.stack.connect_tcp(key(guest.family), guest.listener, guest.now)
    refused, stray, syn = segments(guest)
    assert (refused.flags, refused.seq, refused.ack, refused.window) == ("RA", 0, 1000, 0)
    assert (stray.flags, stray.seq, stray.ack) == ("R", 777, 0)
    assert (syn.flags, syn.seq, syn.ack) == ("S", 8999, 0)


def advertised(data: bytes) -> Any:
    """The same of what goes to all on the link."""
    seen = oracle(GUEST_MAC + data[6:])
    assert (seen[scapy.IPv6].src, seen[scapy.IPv6].hlim) == ("fe80::2", 255)
    return seen


def test_neighbour_discovery() -> None:
    guest = Guest(6)
    guest.stack.link._neighbours.clear()
    guest.stack.add_udp(key(6), 0.0).send(b"news", 0.0)
    data = guest.frames.popleft()
    assert scapy.Ether(data).dst == scapy.in6_getnsmac(scapy.in6_getnsma(GUEST[6]))
    asked = oracle(GUEST_MAC + data[6:])
    assert asked[scapy.IPv6].dst == scapy.inet_ntop(scapy.socket.AF_INET6, scapy.in6_getnsma(GUEST[6]))
    assert (asked[scapy.IPv6].src, asked[scapy.IPv6].hlim) == (name(GATEWAY[6]), 255)
    assert asked[scapy.ICMPv6ND_NS].tgt == name(GUEST[6])
    assert asked[scapy.ICMPv6NDOptSrcLLAddr].lladdr == mac(OUR_MAC)
    answer = scapy.Ether(src=mac(GUEST_MAC), dst=mac(OUR_MAC))
    answer /= scapy.IPv6(src=name(GUEST[6]), dst=name(GATEWAY[6]), hlim=255)
    answer /= scapy.ICMPv6ND_NA(tgt=name(GUEST[6]), R=0, S=1, O=1)
    guest.gives(bytes(answer / scapy.ICMPv6NDOptDstLLAddr(lladdr=mac(GUEST_MAC))))
    assert bytes(oracle(guest.frames.popleft())[scapy.UDP].payload) == b"news"
    question = scapy.Ether(src=mac(GUEST_MAC), dst="33:33:ff:00:00:02")
    question /= scapy.IPv6(src=name(GUEST[6]), dst="ff02::1:ff00:2", hlim=255)
    question /= scapy.ICMPv6ND_NS(tgt=name(GATEWAY[6]))
    guest.gives(bytes(question / scapy.ICMPv6NDOptSrcLLAddr(lladdr=mac(GUEST_MAC))))
    told = oracle(guest.frames.popleft())[scapy.ICMPv6ND_NA]
    assert (told.code, told.R, told.S, told.O, told.tgt) == (0, 1, 1, 1, name(GATEWAY[6]))
    assert told[scapy.ICMPv6NDOptDstLLAddr].lladdr == mac(OUR_MAC)


@pytest.mark.parametrize(("managed", "other", "autonomous"), [(0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_router_advertisements(managed: bool, other: bool, autonomous: bool) -> None:
    search = ("example.com", "a.very.long.name.example.org.")
    said = ndp.Advertisement(
        GUEST[6][:8] + bytes(8),
        bool(managed),
        bool(other),
        bool(autonomous),
        (DNS[6],),
        tuple(map(to_wire, search)),
    )
    guest = Guest(6, advertised=said, mtu=9000)
    question = scapy.Ether(src=mac(GUEST_MAC), dst="33:33:00:00:00:02")
    question /= scapy.IPv6(src="::", dst="ff02::2", hlim=255) / scapy.ICMPv6ND_RS()
    guest.gives(bytes(question))
    seen = advertised(guest.frames.popleft())
    assert seen[scapy.IPv6].dst == "ff02::1"
    told = seen[scapy.ICMPv6ND_RA]
    assert (told.code, told.chlim, told.routerlifetime) == (0, 64, 1800)
    flags = (told.M, told.O, told.H, told.P)
    assert flags == (managed, other, 0, 0)
    assert (told.reachabletime, told.retranstimer) == (0, 0)
    assert told[scapy.ICMPv6NDOptSrcLLAddr].lladdr == mac(OUR_MAC)
    assert told[scapy.ICMPv6NDOptMTU].mtu == 9000
    prefix = told[scapy.ICMPv6NDOptPrefixInfo]
    assert (prefix.prefix, prefix.prefixlen, prefix.L, prefix.A) == ("fd00::", 64, 1, autonomous)
    assert (prefix.validlifetime, prefix.preferredlifetime) == (86400, 14400)
    resolvers = told[scapy.ICMPv6NDOptRDNSS]
    assert (resolvers.dns, resolvers.lifetime) == ([name(DNS[6])], 1800)
    names = told[scapy.ICMPv6NDOptDNSSL]
    assert [each.rstrip(".") for each in names.searchlist if each] == [each.rstrip(".") for each in search]
    assert names.lifetime == 1800


def test_parameter_problems() -> None:
    guest = Guest(6)
    bad = scapy.Ether(src=mac(GUEST_MAC), dst=mac(OUR_MAC)) / scapy.IPv6(
        src=name(GUEST[6]), dst=name(OTHER[6])
    )
    bad /= scapy.IPv6ExtHdrRouting(addresses=["2001:db8::9"], segleft=1) / scapy.UDP(dport=53)
    guest.gives(bytes(bad))
    told = ours(oracle(guest.frames.popleft()), 6)[scapy.ICMPv6ParamProblem]
    assert (told.code, told.ptr) == (0, 42)
    assert bytes(told.payload) == bytes(bad)[14:]


def test_arp() -> None:
    guest = Guest()
    request = arp.pack(arp.Arp(arp.REQUEST, GUEST_MAC, GUEST[4], bytes(6), DNS[4]))
    guest.gives(ethernet.pack(ethernet.BROADCAST, GUEST_MAC, ethernet.ARP) + request)
    seen = oracle(guest.frames.popleft())[scapy.ARP]
    assert (seen.op, seen.hwsrc, seen.psrc, seen.hwdst, seen.pdst) == (
        2, mac(OUR_MAC), name(DNS[4]), mac(GUEST_MAC), name(GUEST[4])
    )  # fmt: skip
    assert (seen.hwtype, seen.ptype, seen.hwlen, seen.plen) == (1, 0x0800, 6, 4)


def test_echo_reply(guest: Guest) -> None:
    guest.gives(echo_packet(guest.family, b"odd", to=GATEWAY[guest.family], identifier=300, sequence=9))
    seen = oracle(guest.frames.popleft())
    reply = seen[scapy.ICMP if guest.family == 4 else scapy.ICMPv6EchoReply]
    assert (reply.type, reply.code, reply.id, reply.seq) == (0 if guest.family == 4 else 129, 0, 300, 9)
    assert bytes(reply.payload if guest.family == 4 else reply.data) == b"odd"


@pytest.mark.parametrize("refusal", [Refusal.RESET, Refusal.NET_UNREACHABLE, Refusal.PROHIBITED])
def test_unreachable(guest: Guest, refusal: Refusal) -> None:
    """About a SYN, a datagram at once, and a datagram later."""
    if refusal is not Refusal.RESET:
        guest.on_hold()
        guest.connection.refuse(refusal)
    guest.gives(udp_packet(guest.family, b"x", port=9))
    guest.users.flows[0].refuse(refusal)
    guest.users.refusal = refusal
    guest.gives(udp_packet(guest.family, b"x", port=10))
    while guest.frames:
        seen = oracle(guest.frames.popleft())
        if guest.family == 4:
            assert seen[scapy.ICMP].type == 3
            quoted = seen[scapy.IPerror]
        else:
            assert seen[scapy.ICMPv6DestUnreach].type == 1
            quoted = seen[scapy.IPerror6]
        assert (quoted.src, quoted.dst) == (name(GUEST[guest.family]), name(OTHER[guest.family]))
        assert quoted.payload.sport == GUEST_PORT


def test_udp(guest: Guest) -> None:
    flow = guest.stack.add_udp(key(guest.family), guest.now)
    flow.send(b"odd", guest.now)
    datagram = ours(oracle(guest.frames.popleft()), guest.family)[scapy.UDP]
    assert (datagram.sport, datagram.dport, datagram.len) == (OTHER_PORT, GUEST_PORT, 11)
    assert bytes(datagram.payload) == b"odd"


def test_fragments(guest: Guest) -> None:
    flow = guest.stack.add_udp(key(guest.family), guest.now)
    data = bytes(range(256)) * 20
    flow.send(data, guest.now)
    pieces = [scapy.Ether(frame) for frame in guest.frames]
    assert len(pieces) == 4
    assert all(len(frame) <= 1514 for frame in guest.frames)
    if guest.family == 4:
        (whole,) = scapy.defragment([piece[scapy.IP] for piece in pieces])
    else:
        whole = scapy.defragment6([piece[scapy.IPv6] for piece in pieces])
    whole = type(whole)(bytes(whole))
    sum_found = whole[scapy.UDP].chksum
    del whole[scapy.UDP].chksum
    assert type(whole)(bytes(whole))[scapy.UDP].chksum == sum_found
    assert bytes(whole[scapy.UDP].payload) == data


def test_sack(guest: Guest) -> None:
    guest.established(options=pack_options(1460, 7, True))
    guest.gets(ACK, 1100, 9000, bytes(50))
    guest.gets(ACK, 1300, 9000, bytes(50))
    _, segment = segments(guest)
    assert ("SAck", (1300, 1350, 1100, 1150)) in segment.options
    assert (segment.flags, segment.ack, segment.dataofs) == ("A", 1000, 10)


def test_urgent(guest: Guest) -> None:
    guest.established()
    guest.connection.send_urgent(b"now!", guest.now)
    layer = ours(oracle(guest.frames.popleft()), guest.family)
    segment = layer[scapy.TCP]
    assert (segment.flags, segment.urgptr, bytes(segment.payload)) == ("PAU", 4, b"now!")


def test_hops_and_class(guest: Guest) -> None:
    flow = guest.stack.add_udp(key(guest.family), guest.now)
    flow.send(b"x", guest.now, ttl=3, tos=0xB9)
    seen = oracle(guest.frames.popleft())[scapy.IP if guest.family == 4 else scapy.IPv6]
    assert ((seen.ttl, seen.tos) if guest.family == 4 else (seen.hlim, seen.tc)) == (3, 0xB9)


def test_errors_from_further_on(guest: Guest) -> None:
    family, router = guest.family, OTHER[guest.family][:-1] + b"\x09"
    guest.gives(udp_packet(family, b"probe", ttl=1))
    guest.gives(udp_packet(family, b"question"))
    (flow,) = guest.stack.udp.values()
    too_big = (icmp.UNREACHABLE, 4) if family == 4 else (icmp.V6_TOO_BIG, 0)
    flow.refuse(IcmpError(*too_big, 1400, router, 61), payload=b"question")
    exceeded, error = (oracle(frame) for frame in guest.frames)
    if family == 4:
        assert (exceeded[scapy.ICMP].type, exceeded[scapy.IP].src) == (11, name(GATEWAY[4]))
        assert (error[scapy.ICMP].type, error[scapy.ICMP].code, error[scapy.ICMP].nexthopmtu) == (3, 4, 1400)
        assert (error[scapy.IP].src, error[scapy.IP].ttl) == (name(router), 61)
        quoted = error[scapy.UDPerror]
    else:
        assert (exceeded[scapy.ICMPv6TimeExceeded].code, exceeded[scapy.IPv6].src) == (0, name(GATEWAY[6]))
        assert error[scapy.ICMPv6PacketTooBig].mtu == 1400
        assert (error[scapy.IPv6].src, error[scapy.IPv6].hlim) == (name(router), 61)
        quoted = error[scapy.UDPerror]
    assert (quoted.sport, quoted.dport, quoted.len) == (GUEST_PORT, 53, 16)
    assert bytes(quoted.payload) == b"question"


def test_a_whole_conversation_over_a_bad_link() -> None:
    """Both ends are ours; everything either of them says is taken apart."""
    pair = Pair(Impairment(loss=0.1, duplicate=0.05, reorder=0.1, seed=3), 100_000, recorded=[])
    pair.run().check()
    assert pair.recorded is not None
    kinds = set()
    for frame in pair.recorded:
        seen = scapy.Ether(frame)
        again = seen.copy()
        for layer, fields in ((scapy.IP, ("len", "chksum", "ihl")), (scapy.TCP, ("chksum", "dataofs"))):
            for field in fields:
                delattr(again[layer], field)
        assert bytes(again) == frame
        kinds |= {option for option, _ in seen[scapy.TCP].options}
    assert kinds == {"MSS", "NOP", "SAckOK", "SAck", "WScale", "Timestamp"}
