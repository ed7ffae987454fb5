"""A guest played by the test, and users that write down what they are told.

A `Guest` stands at the other end of a `Stack`'s link.  Its `gets` hands the stack one segment from the guest,
its `sends` takes the oldest frame the stack has sent and holds it against what is expected: a test reads as
a packet diagram.  Time stands still until the test sets `Guest.now`.

Numbers in every diagram: the guest's first byte is 1000, ours is 9000.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from netns_kit.stack import (
    Closed,
    EchoFlow,
    Limits,
    Offloads,
    Refusal,
    Stack,
    State,
    Steering,
    TcpConnection,
    UdpFlow,
)
from netns_kit.stack.wire import ethernet, icmp, ip, ndp, tcp, udp, virtio
from netns_kit.stack.wire.tcp import ACK, FIN, PSH, RST, SYN
from netns_kit.tap.impairment import BadLink, Impairment

OUR_MAC = b"\x52\x55\x0a\x00\x02\x02"
GUEST_MAC = b"\x52\x54\x00\x12\x34\x56"
GATEWAY = {4: bytes([10, 0, 2, 2]), 6: bytes.fromhex("fd000000000000000000000000000002")}
DNS = {4: bytes([10, 0, 2, 3]), 6: bytes.fromhex("fd000000000000000000000000000003")}
LINK_LOCAL = bytes.fromhex("fe800000000000000000000000000002")  # ours
GUEST = {4: bytes([10, 0, 2, 100]), 6: bytes.fromhex("fd000000000000000000000000000100")}
OTHER = {4: bytes([192, 0, 2, 7]), 6: bytes.fromhex("20010db8000000000000000000000007")}
GUEST_PORT, OTHER_PORT = 40000, 80
PORTS = GUEST_PORT.to_bytes(2, "big") + OTHER_PORT.to_bytes(2, "big")
VNET = Offloads(vnet_header=10, csum=True, tso4=True, tso6=True)
SECRET = bytes(range(16))
GUEST_ISS, OUR_ISS = 999, 8999
SYN_OPTIONS = tcp.pack_options(1460, 7)


def beyond(connection: TcpConnection) -> list[tuple[int, bytearray]]:
    """What is kept of `connection` beyond a hole."""
    kept = connection.rcv.out_of_order
    return [] if kept is None else kept.pieces


def key(family: int, guest_port: int = GUEST_PORT, port: int = OTHER_PORT) -> bytes:
    ports = guest_port.to_bytes(2, "big") + port.to_bytes(2, "big")
    return GUEST[family] + OTHER[family] + ports


def rfc1071(data: bytes) -> int:
    """The readable loop of RFC 1071 section 4.1: the checksum of `data`."""
    if len(data) % 2:
        data += b"\0"
    total = 0
    for at in range(0, len(data), 2):
        total += data[at] << 8 | data[at + 1]
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo_header(addresses: bytes, protocol: int, length: int) -> bytes:
    if len(addresses) == 8:
        return addresses + bytes([0, protocol]) + length.to_bytes(2, "big")
    return addresses + length.to_bytes(4, "big") + bytes([0, 0, 0, protocol])


def packet(
    addresses: bytes,
    protocol: int,
    layer4: bytes,
    *,
    sum_at: int | None = None,
    ttl: int = 64,
    tos: int = 0,
    vnet: bool = False,
) -> bytes:
    """A frame from the guest, `layer4` summed by the RFC's loop where `sum_at` says."""
    if sum_at is not None:
        covered = layer4
        if protocol != ip.ICMP:
            covered = pseudo_header(addresses, protocol, len(layer4)) + layer4
        check = rfc1071(covered) or 0xFFFF
        layer4 = layer4[:sum_at] + check.to_bytes(2, "big") + layer4[sum_at + 2 :]
    return frame(addresses, ip.pack(addresses, protocol, len(layer4), ttl=ttl, tos=tos) + layer4, vnet=vnet)


def frame(addresses: bytes, datagram: bytes, *, vnet: bool = False) -> bytes:
    kind = ethernet.IPV4 if len(addresses) == 8 else ethernet.IPV6
    return (virtio.NONE if vnet else b"") + ethernet.pack(OUR_MAC, GUEST_MAC, kind) + datagram


def udp_packet(
    family: int,
    payload: bytes,
    *,
    port: int = 53,
    guest_port: int = GUEST_PORT,
    to: bytes = b"",
    ttl: int = 64,
    tos: int = 0,
) -> bytes:
    addresses = GUEST[family] + (to or OTHER[family])
    datagram = udp.HEADER.pack(guest_port, port, 8 + len(payload), 0) + payload
    return packet(addresses, ip.UDP, datagram, sum_at=6, ttl=ttl, tos=tos)


def echo_packet(
    family: int,
    payload: bytes = b"ping",
    *,
    identifier: int = 7,
    sequence: int = 1,
    to: bytes = b"",
    ttl: int = 64,
) -> bytes:
    kind, protocol = (icmp.ECHO, ip.ICMP) if family == 4 else (icmp.V6_ECHO, ip.ICMPV6)
    message = icmp.HEADER.pack(kind, 0, 0, identifier, sequence) + payload
    return packet(GUEST[family] + (to or OTHER[family]), protocol, message, sum_at=2, ttl=ttl)


def fragments(datagram: bytes, size: int, identification: int = 77) -> list[bytes]:
    """The frames that carry one IP packet in pieces of `size` bytes."""
    if datagram[0] >> 4 == 4:
        addresses, protocol, ttl, payload = datagram[12:20], datagram[9], datagram[8], datagram[20:]
    else:
        addresses, protocol, ttl, payload = datagram[8:40], datagram[6], datagram[7], datagram[40:]
    found = []
    for at in range(0, len(payload), size):
        piece, more = payload[at : at + size], at + size < len(payload)
        found.append(fragment(addresses, protocol, at, piece, more, identification, ttl))
    return found


def fragment(
    addresses: bytes,
    protocol: int,
    at: int,
    piece: bytes,
    more: bool,
    identification: int = 77,
    ttl: int = 64,
) -> bytes:
    if len(addresses) == 8:
        field, length = at >> 3 | more << 13, len(piece)
        header = ip.pack_ipv4(
            addresses, protocol, length, identification=identification, fragment=field, ttl=ttl
        )
    else:
        header = ip.pack_ipv6(addresses, ip.FRAGMENT, 8 + len(piece), ttl=ttl)
        header += ip.pack_ipv6_fragment(protocol, at, more, identification)
    return frame(addresses, header + piece)


@dataclass
class Sent:
    """A frame the stack sent, taken apart."""

    frame: bytes
    virtio: tuple[int, ...]
    packet: ip.Packet

    def verify(self) -> None:
        """Every checksum, by the RFC's loop.  A partial one is the pseudo-header's sum."""
        protocol, layer4 = self.packet.protocol, bytes(self.packet.payload)
        covered = pseudo_header(self.packet.addresses, protocol, len(layer4))
        if protocol in (ip.TCP, ip.UDP) and self.virtio and self.virtio[0] & virtio.NEEDS_CSUM:
            at = {ip.TCP: 16, ip.UDP: 6}[protocol]
            partial = int.from_bytes(layer4[at : at + 2], "big")
            assert (partial ^ 0xFFFF) in (rfc1071(covered), rfc1071(covered) ^ 0xFFFF), "partial checksum"
            return
        if self.packet.more_fragments or self.packet.fragment_offset:
            return
        if protocol == ip.ICMP:
            covered = b""
        assert rfc1071(covered + layer4) == 0, "checksum"


def take_apart(data: bytes, vnet: bool = False) -> Sent:
    at = 10 if vnet else 0
    destination, source, kind = ethernet.parse(data, at)
    assert (destination, source) == (GUEST_MAC, OUR_MAC)
    parse = ip.parse_ipv4 if kind == ethernet.IPV4 else ip.parse_ipv6
    sent = Sent(data, virtio.parse(data) if vnet else (), parse(memoryview(data)[at + 14 :]))
    sent.verify()
    return sent


class Listener:
    """A TCP user that writes down what it is told, and takes as much as it is set to."""

    def __init__(self, connection: TcpConnection) -> None:
        self.connection = connection
        self.events: list[object] = []
        self.bytes = bytearray()
        self.room: int | None = None  # None: takes everything
        self.on: dict[str, Callable[[], object]] = {}  # what else to do when told

    def _told(self, name: str, event: object = None) -> None:
        self.events.append(event or name)
        self.on.get(name, lambda: None)()

    def established(self) -> None:
        self._told("established")

    def deliver(self, data: memoryview) -> int:
        taken = len(data) if self.room is None else min(len(data), self.room)
        if self.room is not None:
            self.room -= taken
        self.bytes += data[:taken]
        self.on.get("deliver", lambda: None)()
        return taken

    def urgent(self, data: memoryview) -> int:
        taken = self.deliver(data)
        if taken:
            self.events.append(("urgent", bytes(data)))
        return taken

    def keepalive(self, idle: float) -> None:
        self.events.append(("keepalive", idle))

    def traffic_class(self, tos: int) -> None:
        self.events.append(("traffic class", tos))

    def end(self) -> None:
        self._told("end")

    def writable(self) -> None:
        self._told("writable")

    def closed(self, why: Closed) -> None:
        self._told("closed", why)


class Datagrams:
    """A user of UDP and echo flows that writes down what it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[object, ...]] = []
        self.expired_flows: list[UdpFlow | EchoFlow] = []

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        self.got.append((bytes(payload), marks >> 16, segment_size))

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, packet: ip.Packet) -> None:
        self.got.append((sequence, bytes(payload), packet.ttl))

    def expired(self, flow: UdpFlow | EchoFlow) -> None:
        self.expired_flows.append(flow)


class Users:
    """A `StackUser`: every TCP connection gets a `Listener`, every other flow the same `Datagrams`."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.datagrams = Datagrams()
        self.flows: list[UdpFlow | EchoFlow] = []
        self.refusal: Refusal | None = None

    def tcp_opened(self, connection: TcpConnection) -> None:
        listener = Listener(connection)
        connection.user = listener
        self.listeners.append(listener)

    def udp_opened(self, flow: UdpFlow) -> Refusal | None:
        return self._opened(flow)

    def echo_opened(self, flow: EchoFlow) -> Refusal | None:
        return self._opened(flow)

    def _opened(self, flow: UdpFlow | EchoFlow) -> Refusal | None:
        if self.refusal is None:
            flow.user = self.datagrams
            self.flows.append(flow)
        return self.refusal


@cache
def _limits(given: Limits | None, ack_delay: float) -> Limits:
    """Those of a guest: some tests have a hundred thousand guests."""
    return replace(given or Limits(), tcp_ack_delay=ack_delay)


class Guest:
    """The other end of a stack's link, played by a test."""

    def __init__(
        self,
        family: int = 4,
        *,
        offloads: Offloads | None = None,
        limits: Limits | None = None,
        mtu: int = 1500,
        iss: int | None = OUR_ISS,
        addresses: tuple[bytes, ...] | None = None,
        ack_delay: float = 0.0,
        advertised: ndp.Advertisement | None = None,
        steering: Steering | None = None,
    ) -> None:
        self.family = family
        self.now = 0.0
        self.users = Users()
        self.frames: deque[bytes] = deque()
        self.vnet = offloads is not None and offloads.vnet_header > 0
        self.stack = Stack(
            self.users,
            lambda *buffers: self.frames.append(b"".join(buffers)),
            addresses=addresses or (GATEWAY[4], DNS[4], GATEWAY[6], LINK_LOCAL, DNS[6]),
            mac=OUR_MAC,
            mtu=mtu,
            secret=SECRET,
            offloads=offloads,
            limits=_limits(limits, ack_delay),
            advertised=advertised,
            steering=steering,
        )
        if iss is not None:
            setattr(self.stack.tcp, "isn", lambda key, now: iss)  # noqa: B010 - diagrams need fixed numbers
        self.stack.link.learn(GUEST[family], GUEST_MAC)

    # -- any frame

    def gives(self, data: bytes) -> None:
        self.stack.receive(memoryview(data), self.now)
        self.stack.flush()

    def taken(self) -> Sent:
        """The oldest frame the stack has sent."""
        assert self.frames, "the stack has sent nothing"
        return take_apart(self.frames.popleft(), self.vnet)

    def quiet(self) -> None:
        assert not self.frames, f"the stack has sent {len(self.frames)} frames"

    def passes(self, seconds: float) -> None:
        """Time, with every timer run when it is due."""
        end = self.now + seconds
        while self.stack.deadline <= end + 1e-6:  # sums of tenths are not exact
            self.now = max(self.now, self.stack.deadline)
            self.stack.handle_timers(self.now)
            self.stack.flush()
        self.now = max(self.now, end)

    # -- TCP

    def segment(
        self,
        flags: int,
        seq: int = 1000,
        ack: int = 0,
        data: bytes = b"",
        *,
        window: int = 65535,
        options: bytes = b"",
        ports: bytes = PORTS,
        urgent: int = 0,
        tos: int = 0,
    ) -> bytes:
        header = tcp.pack(
            src_port=int.from_bytes(ports[:2], "big"),
            dst_port=int.from_bytes(ports[2:], "big"),
            seq=seq & 0xFFFFFFFF,
            ack=ack & 0xFFFFFFFF,
            flags=flags,
            window=window,
            options=options,
        )
        addresses = GUEST[self.family] + OTHER[self.family]
        header = header[:18] + urgent.to_bytes(2, "big") + header[20:]
        return packet(addresses, ip.TCP, header + data, sum_at=16, tos=tos, vnet=self.vnet)

    def gets(
        self,
        flags: int,
        seq: int = 1000,
        ack: int = 0,
        data: bytes = b"",
        *,
        window: int = 65535,
        options: bytes = b"",
        ports: bytes = PORTS,
        urgent: int = 0,
        tos: int = 0,
    ) -> None:
        """The stack gets a segment from the guest."""
        segment = self.segment(
            flags, seq, ack, data, window=window, options=options, ports=ports, urgent=urgent, tos=tos
        )
        self.gives(segment)

    def sends(
        self,
        flags: int,
        seq: int | None = None,
        ack: int | None = None,
        data: bytes = b"",
        *,
        window: int | None = None,
    ) -> tcp.Segment:
        """The stack has sent this segment, and it is the oldest not looked at."""
        sent = self.taken()
        assert sent.packet.protocol == ip.TCP
        assert sent.packet.addresses == OTHER[self.family] + GUEST[self.family]
        segment = tcp.parse(sent.packet.payload)
        shown = segment.flags & ~PSH, segment.seq, segment.ack, bytes(segment.payload)
        expected = (
            flags,
            segment.seq if seq is None else seq & 0xFFFFFFFF,
            segment.ack if ack is None else ack & 0xFFFFFFFF,
            data,
        )
        assert shown == expected, f"sent {describe(shown)}, not {describe(expected)}"
        if window is not None:
            assert segment.window == window
        return segment

    @property
    def listener(self) -> Listener:
        return self.users.listeners[-1]

    @property
    def connection(self) -> TcpConnection:
        return self.listener.connection

    def state(self) -> State:
        state = self.connection.state
        waits = self.connection.key in self.stack.time_wait.records
        return State.CLOSED if state is State.TIME_WAIT and not waits else state

    def send(self, data: bytes) -> None:
        """The user sends."""
        assert self.connection.room() >= len(data)
        self.connection.send(data, self.now)

    def shutdown(self) -> None:
        self.connection.shutdown(self.now)

    def resume(self, room: int | None = None) -> None:
        self.listener.room = room
        self.connection.resume(self.now)
        self.stack.flush()

    # -- states

    def on_hold(self, *, window: int = 65535, options: bytes = SYN_OPTIONS) -> Guest:
        self.gets(SYN, GUEST_ISS, window=window, options=options)
        return self

    def opening(self, *, window: int = 65535, options: bytes = SYN_OPTIONS) -> Guest:
        self.on_hold(window=window, options=options)
        self.connection.accept(self.now)
        self.frames.clear()
        return self

    def established(self, *, window: int = 512, options: bytes = SYN_OPTIONS) -> Guest:
        """The guest at 1000 with a window of 64 KiB (512 << 7), we at 9000."""
        self.opening(options=options)
        self.gets(ACK, 1000, 9000, window=window)
        self.quiet()
        self.window = window
        return self

    def connecting(self) -> Guest:
        """We have opened."""
        connection = self.stack.connect_tcp(key(self.family), listener := Listener(None), self.now)  # type: ignore[arg-type]  # the connection is made here
        listener.connection = connection
        self.users.listeners.append(listener)
        self.frames.clear()
        return self

    def into(self, state: State) -> Guest:
        """By the shortest way."""
        if state is State.SYN_HELD:
            return self.on_hold()
        if state is State.SYN_SENT:
            return self.connecting()
        if state is State.SYN_RECEIVED:
            return self.opening()
        self.established()
        if state in (State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSING, State.TIME_WAIT):
            self.shutdown()
        if state in (State.FIN_WAIT_2, State.TIME_WAIT):
            self.gets(ACK, 1000, 9001, window=512)
        if state in (State.CLOSE_WAIT, State.LAST_ACK):
            self.gets(FIN | ACK, 1000, 9000, window=512)
        if state is State.CLOSING:
            self.gets(FIN | ACK, 1000, 9000, window=512)
        if state is State.TIME_WAIT:
            self.gets(FIN | ACK, 1000, 9001, window=512)
        if state is State.LAST_ACK:
            self.shutdown()
        if state is State.CLOSED:
            self.connection.abort(self.now)
        self.frames.clear()
        assert self.state() is state
        return self


def describe(segment: tuple[int, int, int, bytes]) -> str:
    names = {SYN: "SYN", FIN: "FIN", RST: "RST", ACK: "ACK"}
    flags = "|".join(name for bit, name in names.items() if segment[0] & bit) or str(segment[0])
    return f"<{flags} seq={segment[1]} ack={segment[2]} {len(segment[3])} bytes {segment[3][:24]!r}>"


# -- two real ends ------------------------------------------------------------------------------------


class End:
    """One end of a transfer: sends `out`, writes down what comes, half-closes when done."""

    def __init__(self, pair: Pair, out: bytes) -> None:
        self.pair = pair
        self.out = memoryview(out)
        self.at = 0
        self.bytes = bytearray()
        self.ended = self.finished = False
        self.why: Closed | None = None
        self.connection: TcpConnection | None = None

    def _pump(self) -> None:
        connection, now = self.connection, self.pair.now
        assert connection is not None
        while self.at < len(self.out):
            room = min(connection.room(), 65000)
            if not room:
                connection.wait_for_room(now)
                return
            connection.send(bytes(self.out[self.at : self.at + room]), now)
            self.at += room
        if not self.finished:
            self.finished = True
            connection.shutdown(now)

    def established(self) -> None:
        self._pump()

    def writable(self) -> None:
        self._pump()

    def deliver(self, data: memoryview) -> int:
        self.bytes += data
        self.pair.progress()
        return len(data)

    def urgent(self, data: memoryview) -> int:
        return self.deliver(data)

    def keepalive(self, idle: float) -> None:
        pass

    def traffic_class(self, tos: int) -> None:
        pass

    def end(self) -> None:
        self.ended = True

    def closed(self, why: Closed) -> None:
        self.why = why

    def tcp_opened(self, connection: TcpConnection) -> None:
        self.connection = connection
        connection.user = self
        connection.accept(self.pair.now)

    def udp_opened(self, flow: UdpFlow) -> Refusal | None:
        return Refusal.DROP

    def echo_opened(self, flow: EchoFlow) -> Refusal | None:
        return Refusal.DROP


@dataclass
class Pair:
    """Two stacks that talk to each other over a bad link in each direction, with a clock of their own."""

    impairment: Impairment
    size: int
    offloads: Offloads | None = None
    mtu: int = 1500
    family: int = 4
    now: float = 0.0
    last: float = 0.0
    longest_stall: float = 0.0
    recorded: list[bytes] | None = None

    def progress(self) -> None:
        self.longest_stall = max(self.longest_stall, self.now - self.last)
        self.last = self.now

    def run(self) -> Pair:
        random = Random(self.impairment.seed)
        protect = 14 + (10 if self.offloads else 0)
        seeds = (self.impairment.seed * 2 + side for side in (0, 1))
        links = [BadLink(replace(self.impairment, seed=seed), protect=protect) for seed in seeds]
        self.ends = [End(self, random.randbytes(self.size)) for _ in (0, 1)]
        addresses, macs = (GATEWAY, GUEST), (OUR_MAC, GUEST_MAC)
        stacks = [
            Stack(
                self.ends[side],
                self._emitter(links[side]),
                addresses=(addresses[side][self.family],),
                mac=macs[side],
                mtu=self.mtu,
                secret=SECRET,
                offloads=self.offloads,
            )
            for side in (0, 1)
        ]
        for side in (0, 1):  # each knows the other: finding out is tested elsewhere
            stacks[side].link.learn(addresses[1 - side][self.family], macs[1 - side])
        flow = GATEWAY[self.family] + GUEST[self.family] + PORTS[2:] + PORTS[:2]
        self.ends[1].connection = stacks[1].connect_tcp(flow, self.ends[1], 0.0)
        while not all(end.why for end in self.ends):
            due = min(*(link.deadline for link in links), *(stack.deadline for stack in stacks))
            assert due < 1e6, "nothing will ever happen again"
            self.now = max(self.now, due)
            for side in (0, 1):
                stacks[side].handle_timers(self.now)
                for data in links[1 - side].receive(self.now):
                    stacks[side].receive(memoryview(data), self.now)
                stacks[side].flush()
        self.stacks = stacks
        return self

    def _emitter(self, link: BadLink) -> Callable[..., object]:
        def emit(*buffers: bytes) -> None:
            data = b"".join(buffers)
            if self.recorded is not None:
                self.recorded.append(data)
            link.send(data, self.now)

        return emit

    def check(self) -> None:
        for end, other in (self.ends, self.ends[::-1]):
            assert end.why is Closed.NORMAL
            assert end.ended
            assert len(end.bytes) == len(other.out)
            assert end.bytes == other.out
