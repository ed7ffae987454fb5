"""Frames taken apart: what each layer says, of whole frames, of cut ones, and of what makes no sense."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit import CapturedPacket, Packets
from netns_kit.dhcp import message as dhcp
from netns_kit.display.dissect import MOST_ANSWERS, Dissection, hexadecimal
from netns_kit.dns import message as dns
from netns_kit.domain_names import to_wire
from netns_kit.stack.wire import arp, ethernet, icmp, ip, ndp, tcp, udp
from tests.support.displays import HOSTILE, checked
from tests.support.packets import (
    GATEWAY,
    GATEWAY_MAC,
    GUEST,
    GUEST_MAC,
    RESOLVER,
    datagram,
    echo_request,
    packet,
    syn,
)

HERE, THERE = bytes.fromhex("20010db8" + "00" * 11 + "01"), bytes.fromhex("20010db8" + "00" * 11 + "02")


def framed(inside: bytes, kind: int = ethernet.IPV4) -> bytes:
    return ethernet.pack(GATEWAY_MAC, GUEST_MAC, kind) + inside


def summaries(frame: bytes, size: int | None = None) -> list[str]:
    found = Dissection(frame, len(frame) if size is None else size)
    return [f"{layer.name}: {layer.summary}" for layer in found.layers]


def segment(payload: bytes, flags: int = tcp.PSH | tcp.ACK, options: bytes = b"", port: int = 80) -> bytes:
    head = tcp.pack(src_port=40000, dst_port=port, seq=7, ack=9, flags=flags, window=512, options=options)
    return framed(packet(ip.TCP, GUEST + GATEWAY, head + payload, 16))


def query(name: str, kind: int = 1) -> bytes:
    return struct.pack("!6H", 0x1234, dns.RD, 1, 0, 0, 0) + to_wire(name) + struct.pack("!HH", kind, dns.IN)


def answer(name: str, *records: tuple[int, bytes], rcode: int = 0) -> bytes:
    asked = query(name)
    head = struct.pack("!6H", 0x1234, dns.QR | rcode, 1, len(records), 0, 0)
    told = (struct.pack("!HHHIH", 0xC00C, kind, dns.IN, 60, len(data)) + data for kind, data in records)
    return head + asked[12:] + b"".join(told)


def test_arp() -> None:
    asked = arp.pack(arp.Arp(arp.REQUEST, GUEST_MAC, GUEST, bytes(6), GATEWAY))
    assert summaries(framed(asked, ethernet.ARP))[1] == "ARP: who has 10.0.2.2? tell 10.0.2.100"
    told = arp.pack(arp.Arp(arp.REPLY, GATEWAY_MAC, GATEWAY, GUEST_MAC, GUEST))
    assert summaries(framed(told, ethernet.ARP))[1] == "ARP: 10.0.2.2 is at 52:55:0a:00:02:02"


def test_a_segment_and_its_options() -> None:
    found = Dissection(segment(b"", tcp.SYN, tcp.pack_options(1460, 7, True, (5, 6))), 78)
    assert (found.source, found.destination, found.protocol) == ("10.0.2.100:40000", "10.0.2.2:80", "TCP")
    assert found.info == "SYN, seq 7, ack 9, window 512"
    options = dict(found.layers[-1].fields)["options"]
    assert options == "MSS 1460, window scale 7, SACK permitted, timestamps 5, 6"
    assert [layer.name for layer in found.layers] == ["Ethernet", "IPv4", "TCP"]


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP: GET /a HTTP/1.1"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP: HTTP/1.1 404 Not Found"),
        (b"\x16\x03\x01\x00\x20\x01\x00", "TLS: ClientHello"),
        (b"\x17\x03\x03\x00\x20\x01\x00", "TLS: application data"),
        (b"hello", "TCP: PSH ACK, 5 bytes, seq 7, ack 9, window 512"),
    ],
)
def test_what_data_begins_with(payload: bytes, told: str) -> None:
    assert summaries(segment(payload))[-1] == told


def test_names_are_asked_for_and_answered() -> None:
    asked = framed(datagram(RESOLVER, 53, query("www.example.org", 28)))
    assert summaries(asked)[-1] == "DNS: AAAA www.example.org?"
    records = (5, to_wire("example.org")), (1, bytes((192, 0, 2, 1)))
    told = framed(datagram(GUEST, 9, answer("www.example.org", *records), RESOLVER, source_port=53))
    assert summaries(told)[-1] == "DNS: A www.example.org → CNAME example.org, 192.0.2.1"
    none = framed(datagram(GUEST, 9, answer("www.example.org", rcode=3), RESOLVER, source_port=53))
    assert summaries(none)[-1] == "DNS: A www.example.org → NXDOMAIN"
    over_tcp = segment(struct.pack("!H", 30) + query("example.org"), port=53)
    assert summaries(over_tcp)[-1] == "DNS: A example.org?"
    assert summaries(framed(datagram(RESOLVER, 53, b"no")))[-1] == "DNS: malformed: header truncated"


def test_of_many_answers_the_first_are_read() -> None:
    records = [(1, bytes((192, 0, 2, n % 256))) for n in range(MOST_ANSWERS + 1000)]
    frame = framed(datagram(GUEST, 9, answer("example.org", *records), RESOLVER, source_port=53))
    assert summaries(frame)[-1] == "DNS: A example.org → 192.0.2.0, 192.0.2.1, 192.0.2.2, …"
    fields = Dissection(frame, len(frame)).layers[-1].fields
    assert fields[-2:] == (("answer", "192.0.2.29"), ("answers", "… and 1,000 more"))
    assert len([name for name, _ in fields if name == "answer"]) == MOST_ANSWERS
    exact = framed(datagram(GUEST, 9, answer("x.test", *records[:MOST_ANSWERS]), RESOLVER, source_port=53))
    assert Dissection(exact, len(exact)).layers[-1].fields[-1] == ("answer", "192.0.2.29")


def test_a_lease_is_asked_for() -> None:
    options = {dhcp.TYPE: bytes((dhcp.REQUEST_ADDRESS,)), dhcp.ADDRESS: GUEST, dhcp.HOSTNAME: b"box"}
    message = dhcp.Message(op=dhcp.REQUEST, xid=7, chaddr=GUEST_MAC, options=options).pack()
    frame = framed(datagram(b"\xff" * 4, 67, message, bytes(4), source_port=68))
    assert summaries(frame)[-1] == "DHCP: request 10.0.2.100"
    assert dict(Dissection(frame, len(frame)).layers[-1].fields)["host name"] == "box"
    assert (
        summaries(framed(datagram(b"\xff" * 4, 67, b"no", source_port=68)))[-1]
        == "DHCP: malformed: truncated"
    )


def test_pings_errors_and_neighbours() -> None:
    assert summaries(framed(echo_request(GATEWAY)))[-1] == "ICMP: echo request, id 7, number 1"
    refused = icmp.HEADER.pack(icmp.UNREACHABLE, icmp.PORT, 0, 0, 0) + bytes(28)
    assert summaries(framed(packet(ip.ICMP, GATEWAY + GUEST, refused, 2)))[-1] == "ICMP: port unreachable"
    asked = ndp.pack(ndp.Neighbour(ndp.SOLICITATION, 0, THERE, GUEST_MAC))
    found = summaries(framed(packet(ip.ICMPV6, HERE + THERE, asked, 2), ethernet.IPV6))
    assert found[-1] == "ICMPv6: neighbour solicitation of 2001:db8::2"


def test_ends_of_ipv6_have_brackets() -> None:
    head = udp.HEADER.pack(1, 2, udp.SIZE, 0)
    found = Dissection(framed(packet(ip.UDP, HERE + THERE, head, 6), ethernet.IPV6), 62)
    assert (found.source, found.destination) == ("[2001:db8::1]:1", "[2001:db8::2]:2")


def test_a_fragment_is_told_from_a_whole() -> None:
    head = ip.pack_fragment(GUEST + GATEWAY, ip.UDP, 8, 16, more=True, identification=5)
    assert summaries(framed(head + bytes(8)))[-1] == "fragment: of packet 0x5, at byte 16"


def test_a_frame_that_was_cut_is_read_as_far_as_it_goes() -> None:
    whole = segment(b"x" * 1000)
    found = Dissection(whole[:60], len(whole))
    assert found.info == "PSH ACK, 1,000 bytes, seq 7, ack 9, window 512"
    assert found.payload == b"x" * 6


def test_a_length_that_no_packet_has_takes_no_memory() -> None:
    whole = segment(b"x" * 1000)
    tracemalloc.start()
    try:
        found = Dissection(whole[:60], 1 << 26)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert found.info == "PSH ACK, 1,000 bytes, seq 7, ack 9, window 512"


def test_what_makes_no_sense_says_so() -> None:
    assert summaries(b"short") == ["malformed: ethernet-truncated"]
    assert summaries(framed(b"\x45" + bytes(30)))[-1].startswith("malformed: ipv4-")
    assert summaries(framed(b"abc", 0x88CC)) == ["Ethernet: 02:00:00:00:00:64 → 52:55:0a:00:02:02"]


@given(st.binary(max_size=120), st.sampled_from([0x0800, 0x86DD, 0x0806, 0x9999]), st.integers(0, 200))
def test_hostile_bytes_raise_nothing(data: bytes, kind: int, more: int) -> None:
    frame = framed(data, kind)
    shown = CapturedPacket(1, 0.0, "", frame, len(frame) + more)
    assert str(shown)
    assert shown._repr_html_()


@given(st.binary(max_size=120), st.sampled_from([53, 67, 80]))
def test_hostile_payloads_raise_nothing(data: bytes, port: int) -> None:
    for frame in (framed(datagram(GATEWAY, port, data, source_port=68)), segment(data, port=port)):
        assert str(CapturedPacket(1, 0.0, "", frame, len(frame)))


def test_packets_are_shown_as_a_table_and_each_by_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    frames = [framed(syn(GATEWAY, 80)), segment(b"GET /<script> HTTP/1.1\r\n\r\n")]
    packets = Packets.of(
        (
            CapturedPacket(n, n / 10, "from guest", frame, len(frame), HOSTILE)
            for n, frame in enumerate(frames, 1)
        ),
        {"10.0.2.2": HOSTILE},
    )
    text, html = checked(packets)
    assert "GET /<script> HTTP/1.1" in text
    assert html.count("<tr") == 3
    assert "0000  47 45 54 20 2f 3c 73 63" in checked(packets[1])[0]
    assert packets[1].layers[2].name == "TCP"
    assert isinstance(packets[:1], Packets), "some of them are shown alike"
    many = Packets.of([packets[0]] * 300, {})
    assert "… and 260 more" in str(many)
    assert "… and 100 more" in many._repr_html_()
    assert str(Packets()) == "Packets: 0 packets"


def test_a_dump_is_cut_with_a_count() -> None:
    lines = hexadecimal(bytes(600))
    assert len(lines) == 33
    assert lines[-1] == "… and 88 more bytes"
