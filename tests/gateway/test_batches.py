"""Datagrams that cross together arrive as they were sent: one by one, in order, each with its marks."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from random import Random

import pytest

from netns_kit.forwarder.listeners import UdpListener
from netns_kit.forwarder.ports import PortForward
from netns_kit.gateway.frame_pump import FRAMES_PER_STEP
from netns_kit.gateway.relay import UdpRelay
from netns_kit.gateway.relay.batches import LARGEST, MOST, ROOM
from netns_kit.host.abi import UDP_SEGMENT
from netns_kit.stack import Limits, UdpFlow
from netns_kit.stack.wire import ip, udp, virtio
from netns_kit.uplink.uplink import Uplink
from tests.support.bench import Bench, Make
from tests.support.packets import GATEWAY, GUEST, PORT
from tests.support.servers import port_of

pytestmark = pytest.mark.usefixtures("leaks")

UDP = socket.AF_INET, socket.SOCK_DGRAM


@pytest.fixture
def host(leaks: None) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        yield sock


def frame(to: int, payload: bytes, *, source: int = PORT, ttl: int = 64, tos: int = 0) -> bytes:
    """As a kernel with offloads sends it: the checksum is left to us."""
    header = udp.HEADER.pack(source, to, udp.SIZE + len(payload), 0)
    return ip.pack(GUEST + GATEWAY, ip.UDP, udp.SIZE + len(payload), ttl=ttl, tos=tos) + header + payload


def everything(sock: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(sock.recv(65536))
        except BlockingIOError:
            return found


class Calls:
    """What the gateway's sockets are asked to send."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pieces: list[int] = []
        self.failure: int = 0
        send = UdpRelay._send

        def spy(relay: UdpRelay, flow: UdpFlow, pieces: Sequence[memoryview], marks: int, size: int) -> int:
            self.pieces.append(len(pieces))
            return self.failure if size and self.failure else send(relay, flow, pieces, marks, size)

        monkeypatch.setattr(UdpRelay, "_send", spy)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def bench(make: Make) -> Bench:
    return make(Uplink(allow_host_loopback=True))


# -- to the host -----------------------------------------------------------------------------------------


def busy(bench: Bench) -> None:
    """The gateway reads many frames at once from now on."""
    for _ in range(2 * FRAMES_PER_STEP):
        bench.inject(b"\x45" + bytes(19))
    for _ in range(6):
        bench.step()


def test_equal_ones_leave_together(bench: Bench, host: socket.socket, calls: Calls) -> None:
    sent = [os.urandom(64) for _ in range(200)]
    for payload in sent:
        bench.inject(frame(port_of(host), payload))
    bench.settle()
    assert everything(host) == sent
    assert len(calls.pieces) < 30
    assert max(calls.pieces) == FRAMES_PER_STEP


def test_one_alone_leaves_at_once(bench: Bench, host: socket.socket, calls: Calls) -> None:
    for number in range(3):
        bench.inject(frame(port_of(host), bytes([number])))
        bench.step()
        assert everything(host) == [bytes([number])]
    assert calls.pieces == [1, 1, 1]


@pytest.mark.parametrize("seed", range(12))
def test_a_mixture_arrives_in_order(bench: Bench, host: socket.socket, seed: int) -> None:
    """Lengths from none to more than is sent together, of two ports, with TTLs and classes of their own."""
    random = Random(seed)
    sent: dict[int, list[bytes]] = {PORT: [], PORT + 1: []}
    got, size = list[bytes](), 64
    for _ in range(150):
        if random.random() < 0.3:
            size = random.choice((0, 1, 64, 64, 1400, LARGEST, LARGEST + 1, 3000))
        source = random.choice((PORT, PORT, PORT + 1))
        payload = (bytes([source - PORT]) + random.randbytes(size))[:size]
        marks = {"ttl": random.choice((64, 64, 64, 9)), "tos": random.choice((0, 0, 0, 8))}
        bench.inject(frame(port_of(host), payload, source=source, **marks))
        sent[source].append(payload)
        if random.random() < 0.15:
            bench.settle()
            got += everything(host)
    bench.settle()
    got += everything(host)
    assert sorted(got) == sorted(sent[PORT] + sent[PORT + 1])
    for source in (PORT, PORT + 1):
        tag = bytes([source - PORT])
        assert [each for each in got if each[:1] == tag] == [each for each in sent[source] if each[:1] == tag]


def test_each_goes_where_it_was_sent(bench: Bench, host: socket.socket) -> None:
    """Of one port of the guest, so of one socket of the host; and so do TTL and class."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        other.setblocking(False)
        other.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        busy(bench)
        for number in range(60):
            to, tos = (host, 0) if number % 7 < 3 else (other, 8 if number % 7 < 5 else 0)
            bench.inject(frame(port_of(to), bytes([number]), tos=tos))
        bench.settle()
        assert everything(host) == [bytes([number]) for number in range(60) if number % 7 < 3]
        for number in range(60):
            if number % 7 >= 3:
                data, ancillary, _, _ = other.recvmsg(100, 100)
                assert (data, ancillary[0][2]) == (bytes([number]), b"\x08" if number % 7 < 5 else b"\0")


def test_where_they_cannot_leave_together_they_leave_one_by_one(
    bench: Bench, host: socket.socket, calls: Calls
) -> None:
    calls.failure = 5  # EIO: the interface has no checksum offload
    sent = [bytes([number]) * 100 for number in range(100)]
    for payload in sent:
        bench.inject(frame(port_of(host), payload))
    bench.settle()
    assert everything(host) == sent
    assert max(calls.pieces) > 1


def test_what_waits_leaves_before_its_flow_ends(make: Make, host: socket.socket) -> None:
    """A flow that has to make room for another has been lent its datagrams in the same batch of frames."""
    bench = make(Uplink(allow_host_loopback=True), limits=Limits(udp_flows=1))
    busy(bench)
    sent = []
    for number in range(20):
        sent.append(bytes([number]))
        bench.inject(frame(port_of(host), sent[-1], source=PORT + number // 5))
    bench.settle()
    assert everything(host) == sent


def test_a_forwarded_port_answers_together(bench: Bench, host: socket.socket, calls: Calls) -> None:
    """Each client with his own, from the address that he has asked."""
    forward = PortForward("udp", "127.0.0.2", 0, None, 7)
    listener = UdpListener(bench.gateway, forward)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        other.setblocking(False)
        asked = ("127.0.0.2", listener.forward.host_port)
        for client in (host, other):
            client.sendto(b"?", asked)
        bench.settle()
        ports = {flow.key[-2:]: flow for flow in bench.gateway.stack.udp.values()}
        busy(bench)
        sent = [os.urandom(64) for _ in range(100)]
        for client in (host, other):
            name = port_of(client).to_bytes(2, "big")
            assert name in ports
            for payload in sent:
                bench.inject(frame(port_of(client), payload, source=7))
        bench.settle()
        assert everything(host) == everything(other) == sent
        host.sendto(b"?", asked)
        bench.settle()
        bench.inject(frame(port_of(host), b"!", source=7))
        bench.settle()
        assert host.recvfrom(10) == (b"!", asked)
    assert len(calls.pieces) < 30
    listener.close()
    assert not bench.gateway.stack.udp


# -- to the guest ----------------------------------------------------------------------------------------


def heard(bench: Bench, host: socket.socket) -> Callable[[bytes], None]:
    """A flow from the guest to `host` is there; what sends to it from there."""
    _, flow = bench.socket(GATEWAY, port_of(host))
    flow.send(b"?", bench.now)
    bench.until(lambda: bench.gateway.stack.udp)
    bench.settle()
    _, address = host.recvfrom(100)
    bench.frames.clear()

    def say(payload: bytes) -> None:
        host.sendto(payload, address)

    return say


def datagrams(bench: Bench) -> list[bytes]:
    """What the frames hold, taken apart as the guest's kernel would."""
    return [bytes(each.payload[udp.SIZE :]) for each in bench.answers()]


def test_equal_ones_come_as_one_frame(bench: Bench, host: socket.socket) -> None:
    say = heard(bench, host)
    sent = [os.urandom(64) for _ in range(200)]
    for payload in sent:
        say(payload)
    bench.settle()
    got = datagrams(bench)
    assert b"".join(got) == b"".join(sent)
    assert len(got) < 20
    assert max(map(len, got)) == 64 * MOST


@pytest.mark.parametrize("vnet_header", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_a_mixture_comes_in_order(make: Make, host: socket.socket, seed: int, vnet_header: bool) -> None:
    bench = make(Uplink(allow_host_loopback=True), vnet_header=vnet_header)
    say = heard(bench, host)
    random = Random(seed)
    sent, size = [], 64
    for _ in range(150):
        if random.random() < 0.2:
            size = random.choice((0, 1, 64, 1400, LARGEST))
        sent.append(random.randbytes(size))
        say(sent[-1])
        if random.random() < 0.05:
            bench.settle()
    bench.settle()
    got = datagrams(bench)
    assert b"".join(got) == b"".join(sent)
    if not vnet_header:
        assert got == sent


def room_for(burst: Sequence[bytes]) -> int:
    """How much of `burst` a socket of this host keeps that has asked for as much room as a relay does."""
    with socket.socket(*UDP) as sock, socket.socket(*UDP) as sender:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM)
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        for payload in burst:
            sender.sendto(payload, sock.getsockname())
        return len(everything(sock))


@pytest.mark.parametrize(("count", "size"), [(700, 1400), (1000, 40)])
def test_a_burst_is_kept_until_it_is_read(bench: Bench, host: socket.socket, count: int, size: int) -> None:
    """Answers of a server to a flow of the guest's, while the gateway is at something else."""
    say = heard(bench, host)
    burst = [number.to_bytes(4, "big") + bytes(size - 4) for number in range(count)]
    kept = room_for(burst)
    for payload in burst:
        say(payload)
    bench.settle()
    assert b"".join(datagrams(bench)) == b"".join(burst[:kept])


def test_a_burst_to_a_forwarded_port_is_kept_until_it_is_read(bench: Bench, host: socket.socket) -> None:
    forward = PortForward("udp", "127.0.0.1", 0, None, 7)
    listener = UdpListener(bench.gateway, forward)
    burst = [number.to_bytes(4, "big") + bytes(36) for number in range(1000)]
    kept = room_for(burst)
    for payload in burst:
        host.sendto(payload, ("127.0.0.1", listener.forward.host_port))
    bench.settle()
    assert b"".join(datagrams(bench)) == b"".join(burst[:kept])
    listener.close()


def test_each_comes_from_where_it_was_sent(bench: Bench, host: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        other.setblocking(False)
        for to in (host, other):
            _, flow = bench.socket(GATEWAY, port_of(to))
            flow.send(b"?", bench.now)
        bench.until(lambda: len(bench.gateway.stack.udp) == 2)
        bench.settle()
        bench.frames.clear()
        address = host.recvfrom(100)[1]
        expected: dict[int, bytes] = {port_of(host): b"", port_of(other): b""}
        for number in range(60):
            sock = host if number % 7 < 3 else other
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 8 * (number // 4 % 2))
            sock.sendto(bytes([number]), address)
            expected[port_of(sock)] += bytes([number])
        bench.settle()
        got = {port_of(host): b"", port_of(other): b""}
        for each in bench.answers():
            datagram = bytes(each.payload)
            got[int.from_bytes(datagram[:2], "big")] += datagram[udp.SIZE :]
            assert {each.tos} == {8 * (number // 4 % 2) for number in datagram[udp.SIZE :]}
        assert got == expected


def test_what_the_host_has_together_stays_together(bench: Bench, host: socket.socket) -> None:
    """A sender with UDP_SEGMENT, over loopback."""
    heard(bench, host)
    (relay,) = bench.gateway.router._udp.values()
    address = ("127.0.0.1", relay._socket.getsockname()[1])
    data = os.urandom(20 * 1400 + 700)
    host.sendmsg([data], [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1400))], 0, address)
    bench.settle()
    assert datagrams(bench) == [data]


def test_frames_say_how_to_take_them_apart(bench: Bench, host: socket.socket) -> None:
    say = heard(bench, host)
    headers: list[tuple[int, ...]] = []
    write = bench.near.write

    def spy(*buffers: bytes | bytearray | memoryview) -> bool:
        headers.append(virtio.parse(bytes(buffers[0])))
        return write(*buffers)

    bench.gateway.stack.link.emit = spy
    for payload in (b"one", b"aa", b"bb", b"cc", b"alone"):
        say(payload)
    for _ in range(10):
        bench.step()
    bench.settle()
    kinds = [(header[1], header[3]) for header in headers]
    assert (virtio.GSO_UDP_L4, 2) in kinds
    assert kinds[-1] == (virtio.GSO_NONE, 0)
