"""What a capture of a gateway has: frames of a second stack, read back."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netns_kit import ArgumentError, CaptureFilter, PolicyError, Record
from netns_kit.domain_names import to_wire
from netns_kit.gateway.captures import Captures
from netns_kit.gateway.frame_capture import _as_on_a_wire
from netns_kit.stack.wire import checksum, ethernet, ip, tcp, udp, virtio
from netns_kit.tap import pcapng
from netns_kit.tap.frame_ring import ACCEPTED, LOST, SEEN, FrameRing
from tests.support.bench import Bench, Make, feed, opened, receive
from tests.support.packets import GATEWAY, GUEST, PORT, RESOLVER, datagram
from tests.support.pcapng import INBOUND, OUTBOUND, Packet, read
from tests.support.servers import port_of

pytestmark = pytest.mark.usefixtures("leaks")

BEGINNING = pcapng.section("", "", "") + pcapng.interface(
    "tap0", 1 << 18, mac=None, system="", hardware="", comment=""
)


class Taken(NamedTuple):
    """What a capture has, and its counters."""

    packets: list[Packet]
    names: dict[str, str]
    seen: int
    accepted: int
    lost: int


Begin = Callable[..., Callable[[], Taken]]


@pytest.fixture
def begin(leaks: None) -> Iterator[Begin]:
    """Begins a capture of a bench, and returns what ends it."""
    with ExitStack() as stack:
        numbers = iter(range(100))

        def start(
            bench: Bench, where: CaptureFilter | None = None, snaplen: int = 1 << 18, size: int = 1 << 22
        ) -> Callable[[], Taken]:
            fd, wake, number = FrameRing.make(size), os.eventfd(0), next(numbers)
            captures, owner = Captures(bench.gateway), FrameRing(fd)
            stack.callback(owner.close)
            stack.callback(os.close, wake)
            start.captures.append(captures)  # type: ignore[attr-defined]  # it is this function's
            captures.begin(number, snaplen, where, fds=[fd, os.dup(wake)])

            def end() -> Taken:
                captures.end(number)
                captures.end(number)  # it has ended
                pieces = owner.waiting()
                found = read(BEGINNING + b"".join(pieces))
                for piece in pieces:
                    piece.release()
                return Taken(found.packets, found.names, *owner.count((SEEN, ACCEPTED, LOST)))

            return end

        start.captures = []  # type: ignore[attr-defined]  # the same
        yield start


def parsed(packet: Packet) -> ip.Packet:
    """The IP packet of a frame, whose header has been verified."""
    return ip.parse_ipv4(memoryview(packet.data)[ethernet.SIZE :])


def is_valid(packet: ip.Packet) -> bool:
    """Whether the checksum of a TCP segment or a datagram is right."""
    pseudo = checksum.pseudo_header(packet.addresses, packet.protocol, len(packet.payload))
    return (pseudo + checksum.total(packet.payload)) % 0xFFFF == 0


def text(packets: list[Packet], direction: int) -> bytes:
    """What the TCP segments of one direction carry, by sequence number."""
    found: dict[int, int] = {}
    first = 0
    for each in packets:
        packet = parsed(each)
        if packet.protocol == ip.TCP and each.direction == direction:
            segment = tcp.parse(packet.payload)
            first = first or (segment.seq + 1)
            for at, byte in enumerate(segment.payload):
                found[(segment.seq + at - first) & 0xFFFFFFFF] = byte
    return bytes(found[at] for at in sorted(found))


@pytest.mark.parametrize("vnet_header", [True, False])
def test_what_crosses_is_in_the_file(
    make: Make, listener: socket.socket, begin: Begin, vnet_header: bool
) -> None:
    bench = make(vnet_header=vnet_header)
    end = begin(bench)
    program, sock = opened(bench, listener)
    there, back = os.urandom(3000), os.urandom(3000)
    with sock:
        program.send(there)
        assert receive(bench, sock, len(there)) == there
        feed(bench, sock, back)
        bench.until(lambda: len(program.received) == len(back))
        program.shutdown()
        bench.settle()
    taken = end()
    of_tcp = [each for each in taken.packets if each.data[12:14] == b"\x08\x00"]
    assert text(of_tcp, OUTBOUND) == there
    assert text(of_tcp, INBOUND) == back
    assert [bool(each.comment) for each in of_tcp] == [True, *[False] * (len(of_tcp) - 1)]
    assert of_tcp[0].comment == "flow 1: outbound tcp, name gateway.containers.internal"
    assert taken.names == {"10.0.2.2": "gateway.containers.internal"}
    for each in of_tcp:
        packet = parsed(each)
        assert is_valid(packet) or len(each.data) > 1514
    assert taken.seen == taken.accepted == len(taken.packets)
    assert taken.lost == 0
    assert [each.time for each in taken.packets] == sorted(each.time for each in taken.packets)
    assert [each.data for each in taken.packets if each.direction == INBOUND and len(each.data) < 64] == [
        each for each in bench.frames if len(each) < 64
    ]


def test_a_flow_that_is_there_is_commented_on_and_a_frame_is_cut(
    make: Make, listener: socket.socket, begin: Begin
) -> None:
    bench = make()
    program, sock = opened(bench, listener)
    end = begin(bench, snaplen=100)
    with sock:
        program.send(bytes(5000))
        receive(bench, sock, 5000)
        feed(bench, sock, bytes(5000))
        bench.until(lambda: len(program.received) == 5000)
    taken = end()
    assert taken.packets[0].comment
    sizes = {(len(each.data), each.size > 1000) for each in taken.packets}
    assert (100, True) in sizes
    assert all(len(each.data) == min(each.size, 100) for each in taken.packets)
    assert {each.direction for each in taken.packets if each.size > 1000} == {OUTBOUND, INBOUND}


def test_without_a_capture_nothing_stands_before_the_device(make: Make, begin: Begin) -> None:
    bench = make()
    device, emit = bench.gateway.device, bench.gateway.stack.link.emit
    after_step = list(bench.engine.after_step)
    first, second = begin(bench), begin(bench)
    assert bench.gateway.device is not device
    bench.inject(datagram(GATEWAY, 9, b"one"))
    bench.settle()
    one = first()
    bench.inject(datagram(GATEWAY, 9, b"two"))
    bench.settle()
    two = second()
    assert len(one.packets) < len(two.packets)
    assert two.packets[: len(one.packets)] != []
    assert bench.gateway.device is device
    assert bench.gateway.stack.link.emit == emit
    assert bench.engine.after_step == after_step


def test_what_the_ring_has_no_room_for_is_counted(make: Make, begin: Begin) -> None:
    bench = make()
    end = begin(bench, size=4096)
    for _ in range(10):
        bench.inject(datagram(GATEWAY, 9, bytes(1000)))
        bench.settle()
    taken = end()
    assert taken.lost > 0
    assert len(taken.packets) == taken.accepted - taken.lost


def test_a_filter_knows_all_names_that_an_address_was_given_for(
    make: Make, listener: socket.socket, begin: Begin
) -> None:
    """Not only the one that was answered last."""
    bench = make()
    bench.gateway.zone.add(Record("*.wild.example", "10.0.2.2"))
    end = begin(bench, CaptureFilter("one.wild.example"))
    for name in "one.wild.example", "two.wild.example":
        message = b"\0\1\1\0\0\1\0\0\0\0\0\0" + to_wire(name) + b"\0\1\0\1"
        bench.inject(datagram(RESOLVER, 53, message, source_port=PORT))
        bench.settle()
    _, sock = opened(bench, listener)
    sock.close()
    assert any(each.data[23] == ip.TCP for each in end().packets)


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        (CaptureFilter(), True),
        (CaptureFilter(protocol="tcp"), True),
        (CaptureFilter(protocol="udp"), False),
        (CaptureFilter("10.0.2.2"), True),
        (CaptureFilter("10.0.2.0/24"), True),
        (CaptureFilter("2001:db8::/32"), False),
        (CaptureFilter("192.0.2.0/24"), False),
        (CaptureFilter(ports=PORT), True),
        (CaptureFilter(ports=9), False),
        (CaptureFilter("Gateway.Containers.Internal"), True),
        (CaptureFilter("*.containers.internal"), True),
        (CaptureFilter("containers.internal"), False),
        (CaptureFilter(protocol="tcp", ports=9), False),
        (CaptureFilter("PRIVATE"), True),
        (CaptureFilter("METADATA"), False),
        (CaptureFilter(["192.0.2.1", "10.0.2.100"], ports=PORT), True),
        (CaptureFilter("10.0.2.2", ports=PORT), False),  # that end has another port
        (CaptureFilter("10.0.2.2", ports="1-65535"), True),
    ],
)
def test_a_filter(
    make: Make, listener: socket.socket, begin: Begin, where: CaptureFilter, fits: bool
) -> None:
    bench = make()
    end = begin(bench, where)
    program, sock = opened(bench, listener)
    with sock:
        program.send(b"hello")
        receive(bench, sock, 5)
    bench.settle()
    taken = end()
    assert any(each.data[23] == ip.TCP for each in taken.packets) is fits
    assert taken.accepted == len(taken.packets) <= taken.seen
    assert taken.seen >= 5


def test_a_flow_is_commented_on_again_with_what_is_known_later(
    make: Make, listener: socket.socket, begin: Begin
) -> None:
    bench = make()
    end = begin(bench)
    program, sock = opened(bench, listener)
    captures = begin.captures[0]  # type: ignore[attr-defined]  # the fixture's
    captures.comment(0, 1, "process 7 (sh)")
    captures.comment(0, 99, "no such flow")
    captures.comment(5, 1, "no such capture")
    with sock:
        for _ in range(2):
            program.send(b"hello")
            receive(bench, sock, 5)
    bench.settle()
    comments = [each.comment for each in end().packets if each.comment]
    first = "flow 1: outbound tcp, name gateway.containers.internal"
    assert comments == [first, f"{first}, process 7 (sh)"]


def test_another_flow_between_the_same_ends_has_its_own_comment(
    make: Make, listener: socket.socket, begin: Begin
) -> None:
    bench = make()
    end = begin(bench)
    for _ in range(2):
        program, sock = opened(bench, listener)
        with sock:
            program.send(b"hello")
            receive(bench, sock, 5)
            program.abort()
            bench.settle()
    comments = [each.comment for each in end().packets if each.comment]
    assert [comment.split(":")[0] for comment in comments] == ["flow 1", "flow 2"]


def test_what_is_no_filter() -> None:
    with pytest.raises(ArgumentError, match="protocol"):
        CaptureFilter(protocol="sctp")  # type: ignore[arg-type]  # as a caller may
    for wrong in "10.0.2.0/33", "HOST", "https://example.org", 7:
        with pytest.raises(PolicyError, match="targets"):
            CaptureFilter(wrong)  # type: ignore[arg-type]  # as a caller may
    with pytest.raises(PolicyError, match="port"):
        CaptureFilter(ports=0)
    with pytest.raises(PolicyError, match="ports"):
        CaptureFilter(ports=53, protocol="arp")
    assert CaptureFilter(["Example.ORG", "PRIVATE"], ports=[80, 443]).targets == ("example.org", "PRIVATE")


@given(st.binary(min_size=1, max_size=3000), st.integers(24, 700))
@example(bytes(3000), 700)
def test_a_super_datagram_is_cut_as_a_wire_would_have_it(payload: bytes, size: int) -> None:
    layer4 = datagram(GATEWAY, 9, payload)[20:]
    head = ip.pack_ipv4(GUEST + GATEWAY, ip.UDP, len(layer4), identification=7)
    vnet = virtio.pack(virtio.NEEDS_CSUM, virtio.GSO_UDP_L4, 42, size, 34, 6)
    frame = vnet + ethernet.pack(bytes(6), bytes(6), ethernet.IPV4) + head + layer4
    cut = [ip.parse_ipv4(memoryview(each)[14:]) for each in _as_on_a_wire(frame, virtio.SIZE)]
    assert [bytes(each.payload[udp.SIZE :]) for each in cut] == [
        payload[at : at + size] for at in range(0, len(payload), size)
    ]
    for number, each in enumerate(cut):
        assert is_valid(each)
        assert int.from_bytes(each.payload[4:6], "big") == len(each.payload)
        assert int.from_bytes(each.whole[4:6], "big") == 7 + number
        assert checksum.total(each.whole[:20]) == 0


def test_every_frame_may_be_hostile(make: Make, begin: Begin) -> None:
    bench = make()
    end = begin(bench, CaptureFilter(ports=port_of_nobody()))
    whole = datagram(GATEWAY, 9)
    for size in range(len(whole)):
        bench.inject(whole[:size])
        bench.inject(whole[:size], ethernet.IPV6)
        bench.inject(whole[:size], ethernet.ARP)
        bench.settle()
    for every in begin(bench, None), begin(bench, CaptureFilter("10.0.2.0/24")):
        for size in range(1, 30):
            for octet in b"\x00\x01\xff":
                bench.far.write(bytes((octet,)) * size)
            bench.settle()
        every()
    long = bytes(22) + b"\x08\x00\x45" + bytes(8) + bytes([ip.TCP]) + bytes(50)
    for frame in long, long[:22] + b"\x86\xdd\x60" + bytes(5) + bytes([ip.TCP]) + bytes(60):
        for size in range(10, len(frame)):
            bench.gateway.device.write(frame[:size])
    bench.settle()
    assert end().packets == []


def port_of_nobody() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return port_of(sock)
