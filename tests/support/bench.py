"""A gateway on a fake link: the guest is a second stack of ours, or packets made by hand; the host is real."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from netns_kit.arguments import Address
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.setup import Setup
from netns_kit.gateway.worker_links import WorkerLinks
from netns_kit.stack import Closed, Limits, Refusal, Stack, TcpConnection, UdpFlow
from netns_kit.stack.echo import EchoFlow
from netns_kit.stack.user import Transport
from netns_kit.stack.wire import ethernet, ip, virtio
from netns_kit.subnet import Subnet
from netns_kit.tap.device import TapDevice
from netns_kit.tap.frame_device import FRAME_MAX, Device
from netns_kit.tap.impairment import Impairment
from netns_kit.uplink.uplink import Uplink
from tests.support.packets import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, PORT
from tests.support.servers import SECONDS, port_of

SUBNET = Subnet.parse("10.0.2.0/24", ipv6=True)


class Program:
    """A program of the guest, with one connection: it reads all that comes, and sends what it is told to."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.connection: TcpConnection | None = None
        self.is_established = False
        self.received = bytearray()
        self.ended = False
        self.why: Closed | None = None
        self._waiting = bytearray()
        self._last = False

    def send(self, data: bytes) -> None:
        self._waiting += data
        self._pump()

    def shutdown(self) -> None:
        self._last = True
        self._pump()

    def abort(self) -> None:
        assert self.connection is not None
        self.connection.abort(self._bench.now)

    def _pump(self) -> None:
        connection, now = self.connection, self._bench.now
        assert connection is not None
        while self._waiting:
            room = min(connection.room(), 65000)
            if not room:
                connection.wait_for_room(now)
                return
            connection.send(bytes(self._waiting[:room]), now)
            del self._waiting[:room]
        if self._last:
            connection.shutdown(now)

    def established(self) -> None:
        self.is_established = True

    def deliver(self, data: memoryview) -> int:
        self.received += data
        return len(data)

    def urgent(self, data: memoryview) -> int:
        return self.deliver(data)

    def keepalive(self, idle: float) -> None:
        pass

    def traffic_class(self, tos: int) -> None:
        pass

    def end(self) -> None:
        self.ended = True

    def writable(self) -> None:
        self._pump()

    def closed(self, why: Closed) -> None:
        self.why = why


class Mailbox:
    """The guest's end of its datagrams."""

    def __init__(self) -> None:
        self.received: list[bytes] = []

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        self.received.append(bytes(payload))

    def expired(self, flow: UdpFlow) -> None:
        pass


class Spy(Uplink):
    """Remembers what it was asked to open, and fails as it is told to."""

    opened: list[tuple[Transport, Address]]
    failure: int = 0

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        self.__dict__.setdefault("opened", []).append((protocol, target))
        if self.failure:
            raise OSError(self.failure, os.strerror(self.failure))
        return super().open(protocol, target, port)


class Bench:
    """Host, gateway, link and guest; time passes while somebody waits."""

    def __init__(
        self,
        uplink: Uplink | None = None,
        *,
        vnet_header: bool = True,
        mtu: int = 1500,
        bad: Impairment | None = None,
        limits: Limits | None = None,
        peers: WorkerLinks | None = None,
        supplies: tuple[socket.socket, ...] = (),
    ) -> None:
        self.engine = Engine()
        self.near, self.far = TapDevice.pair(vnet_header=vnet_header, mtu=mtu)
        self.tap: Device = self.near if bad is None else self.near.impaired(bad)
        self.uplink = uplink or Uplink(allow_host_loopback=True)
        given = (supplies,) if supplies else ()
        setup = Setup(self.tap, self.uplink, SUBNET, limits=limits or Limits(), supplies=given)
        self.gateway = Gateway(self.engine, setup, peers=peers)
        self.guest = Stack(
            self,
            self.far.write,
            addresses=(GUEST,),
            mac=GUEST_MAC,
            mtu=mtu,
            secret=bytes(16),
            offloads=self.far.offloads,
        )
        self.guest.link.learn(GATEWAY, GATEWAY_MAC)
        self.header = virtio.NONE if vnet_header else b""
        self.frames: list[bytes] = []
        """What the gateway sent, without virtio header."""
        self.accepted: list[Program] = []
        self.clock = time.monotonic
        self.ahead = 0.0

    def close(self) -> None:
        self.gateway.close()
        self.engine.close()
        self.near.release()
        self.far.release()

    @property
    def now(self) -> float:
        return self.clock() + self.ahead

    def stop_the_clock(self) -> None:
        """Let no time pass: what takes this machine long takes the gateway none."""
        now = self.clock()
        self.clock = lambda: now

    # -- the guest's stack tells us ---------------------------------------------------------------

    def tcp_opened(self, connection: TcpConnection) -> None:
        program = Program(self)
        program.connection, connection.user = connection, program
        self.accepted.append(program)
        connection.accept(self.now)

    def udp_opened(self, flow: UdpFlow) -> Refusal | None:
        return Refusal.RESET

    def echo_opened(self, flow: EchoFlow) -> Refusal | None:
        return Refusal.RESET

    # -- time ---------------------------------------------------------------------------------------

    def step(self, wait: float = 0.0) -> None:
        """One step of the engine, and whatever the guest makes of it."""
        self.engine.dispatch(self.engine.poll(wait), self.now)
        buffer = memoryview(bytearray(FRAME_MAX))
        while (size := self.far.read_into(buffer)) is not None:
            self.frames.append(bytes(buffer[len(self.header) : size]))
            self.guest.receive(buffer[:size], self.now)
        self.guest.flush()
        self.guest.handle_timers(self.now)

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            due = min(self.engine.deadline, self.guest.deadline) - self.now
            self.step(min(max(due, 0.0), 0.05))  # what a thread does wakes nobody here

    def settle(self) -> None:
        """Until nothing is left to do at once."""
        poll = select.poll()
        poll.register(self.engine.fileno(), select.POLLIN)
        self.step()
        while poll.poll(0) or self.engine.deadline <= self.now:
            self.step()

    # -- the guest acts -----------------------------------------------------------------------------

    def connect(self, address: bytes, port: int, source: int = PORT) -> Program:
        program = Program(self)
        key = address + GUEST + port.to_bytes(2, "big") + source.to_bytes(2, "big")
        self.guest.link.learn(address, GATEWAY_MAC)
        program.connection = self.guest.connect_tcp(key, program, self.now)
        return program

    def socket(
        self, address: bytes, port: int, source: int = PORT, guest: bytes = GUEST
    ) -> tuple[Mailbox, UdpFlow]:
        self.guest.link.learn(address, GATEWAY_MAC)
        key = address + guest + port.to_bytes(2, "big") + source.to_bytes(2, "big")
        flow = self.guest.add_udp(key, self.now)
        flow.user = mailbox = Mailbox()
        return mailbox, flow

    def inject(self, packet: bytes, kind: int = ethernet.IPV4) -> None:
        self.far.write(self.header + ethernet.pack(GATEWAY_MAC, GUEST_MAC, kind) + packet)

    def answers(self) -> list[ip.Packet]:
        """The IP packets that the gateway has sent since the last time."""
        frames, self.frames = self.frames, []
        return [
            (ip.parse_ipv4 if frame[12:14] == b"\x08\x00" else ip.parse_ipv6)(memoryview(frame)[14:])
            for frame in frames
            if frame[12:14] != b"\x08\x06"
        ]


Make = Callable[..., Bench]


@pytest.fixture
def make(leaks: None) -> Iterator[Make]:
    with ExitStack() as stack:

        def build(*args: object, **options: object) -> Bench:
            bench = Bench(*args, **options)  # type: ignore[arg-type]  # as they come
            stack.callback(bench.close)
            return bench

        yield build


@pytest.fixture
def listener(leaks: None) -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(SECONDS)
        yield sock


def opened(bench: Bench, listener: socket.socket, source: int = PORT) -> tuple[Program, socket.socket]:
    """A connection from the guest to the host's loopback, and the host's end of it."""
    program = bench.connect(GATEWAY, port_of(listener), source)
    bench.until(lambda: program.is_established)
    sock, _ = listener.accept()
    sock.setblocking(False)
    return program, sock


def readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def receive(bench: Bench, sock: socket.socket, size: int) -> bytes:
    """So much from the host's end of a connection, while time passes for the guest."""
    data = bytearray()
    while len(data) < size:
        bench.until(lambda: readable(sock))
        chunk = sock.recv(size - len(data))
        assert chunk, "ended early"
        data += chunk
    return bytes(data)


def feed(bench: Bench, sock: socket.socket, data: bytes) -> None:
    """Send it from the host's end, while time passes for the guest."""
    view = memoryview(data)
    while view:
        bench.until(lambda: select.select([], [sock], [], 0)[1])
        view = view[sock.send(view) :]


def friend_of(friend: socket.socket) -> socket.socket:
    """A socket that nobody has sent to."""
    friend.settimeout(SECONDS)
    other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    other.bind(("127.0.0.1", 0))
    return other
