"""How much work a unit of traffic is: instructions, calls and system calls, counted and never timed.

    python -m tests.work                       print the table, and how it differs from what is recorded
    python -m tests.work --record [PYTHON...]  record it, in tests/work.json, for this Python and these others

A *scenario* drives a `Gateway` step by step in one thread, between a guest made by hand and sockets of the host's
loopback.  While the gateway runs, a `Meter` counts what the interpreter tells of it: bytecode instructions and calls
of Python and C functions, in netns_kit and below; and those C functions which wrap a system call, by name.  What the
guest and the host's peer do is not counted.  A busy machine changes none of it, for nothing depends on time:

- The gateway's clock is ours, and so is the secret of its sequence numbers.
- It runs only when all that is to come has come: the kernel may be late, it is waited for.
- A scenario begins with a gateway of its own.  What it does first, and all of its first run in a process, fills
  caches and is not counted.

Calls are the same for every version of Python that we run on.  Instructions are not: each minor version has its own
record, and where it has none they are not compared.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import math
import os
import select
import socket
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from ipaddress import IPv4Address
from types import CodeType, FrameType
from typing import Any, NamedTuple

from netns_kit.arguments import Address
from netns_kit.domain_names import to_wire
from netns_kit.forwarder.listeners import TcpListener
from netns_kit.forwarder.ports import PortForward
from netns_kit.forwarder.socket_listeners import SocketListeners
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.setup import Setup
from netns_kit.namespace.agent_sockets import Supply
from netns_kit.policy.pins import Pin
from netns_kit.policy.policy import Policy
from netns_kit.policy.rules import Rule
from netns_kit.stack.user import Transport
from netns_kit.stack.wire import checksum, ethernet, ip, tcp, udp, virtio
from netns_kit.subnet import Subnet
from netns_kit.tap.device import TapDevice
from netns_kit.tap.frame_device import FRAME_MAX
from netns_kit.uplink.uplink import Uplink
from tests.support import ROOT

RECORD = ROOT / "tests" / "work.json"
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
MOST, LEAST = 1.03, 0.9
"""Of what is recorded: a few instructions more are no regression, and a gain is to be recorded, so that it stays."""
COMMAND = "python -m tests.work --record"

SECONDS = 20  # that the host's kernel gets for what takes it microseconds
STEP = 25e-6  # seconds of the gateway's clock
SUBNETS = {4: Subnet.parse("10.0.2.0/24"), 6: Subnet.parse("10.0.2.0/24", ipv6=True)}
GUEST_MAC, GATEWAY_MAC = bytes.fromhex("020000000064"), bytes.fromhex("52550a000202")
PORT = 40000
MSS = 1460
MIB = 1 << 20
LARGE = 44 * MSS  # bytes of a super-frame of Linux
BLOCK = MIB // 8  # bytes that the host has for the guest at once
RECEIVE_BUFFER = 212992  # bytes: what every kernel allows
BURST = 64  # datagrams
SMALL = bytes(64)
SO_PEEK_OFF = 42  # asm-generic/socket.h

TOOL = 4  # of sys.monitoring: one that has no use yet

_WRAPPING = frozenset({"_socket", "fcntl", "posix", "resource", "select"})
_NOT_CALLING = frozenset(
    "CMSG_LEN CMSG_SPACE detach fileno fspath getdefaulttimeout gettimeout htons htonl inet_ntop inet_pton ntohs"
    " ntohl".split()
)


# -- counting ---------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What has been counted, of `units` units all together."""

    units: float = 0.0
    instructions: int = 0
    calls: int = 0
    system_calls: Counter[str] = field(default_factory=Counter)


class Meter:
    """Runs functions and adds up their `work`; but not that of this file, only of what it calls."""

    def __init__(self) -> None:
        self.work = Work()

    def run(self, function: Callable[..., object], *args: object) -> None:
        """Call it, and count."""
        profile = sys.getprofile()
        stop = tell_of_instructions(self._instruction)
        sys.setprofile(self._profile)
        try:
            function(*args)
        finally:
            sys.setprofile(profile)
            stop()

    def _instruction(self, code: CodeType, _: int) -> None:
        if code.co_filename != __file__:
            self.work.instructions += 1

    def _profile(self, frame: FrameType, event: str, function: object) -> None:
        if event not in ("call", "c_call") or frame.f_code.co_filename == __file__:
            return
        self.work.calls += 1
        name = ""
        if event == "c_call":
            name = system_call(function)
        elif frame.f_code is socket.socket.__init__.__code__:
            name = "socket"  # by a slot, which is no function that Python tells of
        if name:
            self.work.system_calls[name] += 1


if sys.version_info >= (3, 12):

    def tell_of_instructions(callback: Callable[[CodeType, int], None]) -> Callable[[], None]:
        """Call it before each, with its place, until what is returned is called.

        `sys.settrace` would miss some in 3.13, where code is new to it.
        """
        event = sys.monitoring.events.INSTRUCTION
        sys.monitoring.use_tool_id(TOOL, __name__)
        sys.monitoring.register_callback(TOOL, event, callback)
        sys.monitoring.set_events(TOOL, event)

        def stop() -> None:
            sys.monitoring.set_events(TOOL, 0)
            sys.monitoring.free_tool_id(TOOL)

        return stop

else:

    def tell_of_instructions(callback: Callable[[CodeType, int], None]) -> Callable[[], None]:
        """Call it before each, with its place, until what is returned is called."""

        def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
            if event == "opcode":
                callback(frame.f_code, frame.f_lasti)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        return partial(sys.settrace, before)


def system_call(function: object) -> str:
    """The name of the system call that a C function wraps, as Python has it; "" if it wraps none."""
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or type(owner).__module__
    name: str = getattr(function, "__name__", "")
    if name in _NOT_CALLING or not (module in _WRAPPING or isinstance(owner, socket.socket)):
        return ""
    return f"epoll.{name}" if isinstance(owner, select.epoll) else name


# -- the gateway, and what is around it -------------------------------------------------------------------


class Remembering(Uplink):
    """Knows the sockets it has opened, so that what has arrived there can be waited for."""

    def __init__(self, resolver: str) -> None:
        super().__init__(allow_host_loopback=True, dns=[resolver])
        self.opened: list[socket.socket] = []

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        sock = super().open(protocol, target, port)
        self.opened.append(sock)
        return sock


PINS = 10_000
ALLOWED = 250  # the rule that lets the scenarios' flows pass


@cache
def thousand_rules() -> Policy:
    """As many rules, every other by name; one in the middle allows the name of the host."""
    rules = [
        Rule("deny", [f"10.{number >> 8}.{number & 255}.0/24"], ports=[number + 1])
        if number % 2
        else Rule("allow", [f"*.n{number}.example"], private=True)
        for number in range(1000)
    ]
    return Policy("deny", rules)


def pins(address: bytes) -> Iterator[Pin]:
    """What our DNS has answered: that address, and many others."""
    yield to_wire(f"www.n{ALLOWED}.example"), address, math.inf, False
    for number in range(PINS - 1):
        yield to_wire(f"www.n{number}.example"), bytes((198, 18, number >> 8, number & 255)), math.inf, False


class Rig:
    """A gateway, the guest's end of its link, and sockets of the host."""

    def __init__(self, *, vnet_header: bool, family: int, policy: Policy | None = None) -> None:
        self.family = family
        subnet = SUBNETS[family]
        local = subnet.ipv6 or subnet
        self.guest, self.target, self.dns = local.guest.packed, local.gateway.packed, local.dns.packed
        self.mss = MSS if family == 4 else MSS - 20
        self.meter: Meter | None = None
        """Counts what the gateway does, once it is there."""
        self._owned = ExitStack()
        self.resolver = self.host(socket.SOCK_DGRAM)
        loopback = "127.0.0.1" if family == 4 else "[::1]"
        self.uplink = Remembering(f"{loopback}:{port_of(self.resolver)}")
        self.vnet_header = vnet_header
        self.near, self.far = TapDevice.pair(vnet_header=vnet_header)
        self.engine = Engine()
        ordered, supply = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ordered.setblocking(False)
        self.supply = Supply(supply)
        self._owned.enter_context(supply)
        setup = Setup(self.near, self.uplink, subnet, policy=policy, supply=ordered)
        self.gateway = Gateway(self.engine, setup, secret=bytes(16))
        if policy is not None:
            self.gateway.enforcer.learn(pins(self.target))
        for release in (self.near.release, self.far.release, self.engine.close, self.gateway.close):
            self._owned.callback(release)
        self.gateway.stack.link.learn(self.guest, GUEST_MAC)
        self.now = 1000.0
        self._buffer = memoryview(bytearray(FRAME_MAX))

    def close(self) -> None:
        self._owned.close()

    # -- the host

    def own_until_closed(self, *ends: Callable[[], object]) -> None:
        """Call these in the end, the last first."""
        for end in ends:
            self._owned.callback(end)

    def own(self, sock: socket.socket) -> socket.socket:
        """`sock`, closed in the end; it blocks, but for no longer than `SECONDS`."""
        sock.settimeout(SECONDS)
        return self._owned.enter_context(sock)

    def host(self, kind: int) -> socket.socket:
        """A socket that has a port of loopback."""
        ipv4 = self.family == 4
        sock = self.own(socket.socket(socket.AF_INET if ipv4 else socket.AF_INET6, kind))
        sock.bind(("127.0.0.1" if ipv4 else "::1", 0))
        return sock

    def listener(self) -> socket.socket:
        sock = self.host(socket.SOCK_STREAM)
        sock.listen()
        return sock

    # -- the gateway

    def step(self) -> None:
        """One step, whether there is anything to do or not."""
        self.now += STEP
        if self.meter is None:
            self.engine.step(self.now)
        else:
            self.meter.run(self.engine.step, self.now)

    def work(self) -> None:
        """As many steps as there is something to do for; that may be waited for."""
        until(self._is_wanted)
        while self._is_wanted():
            self.step()

    def _is_wanted(self) -> bool:
        while ready(self.supply.fileno()):
            self.supply.serve()
        return ready(self.engine.fileno()) or self.engine.deadline <= self.now

    # -- the guest

    def send(self, protocol: int, to: bytes, layer4: bytes, *, gso_size: int = 0) -> None:
        """A packet to the gateway, which is left the checksum if the link can say so."""
        addresses, sum_at = self.guest + to, 16 if protocol == ip.TCP else 6
        header, ipv4 = b"", self.family == 4
        if self.vnet_header:
            kind = virtio.GSO_TCPV4 if ipv4 else virtio.GSO_TCPV6
            gso = kind if gso_size else virtio.GSO_NONE
            start = ethernet.SIZE + (ip.IPV4_SIZE if ipv4 else ip.IPV6_SIZE)
            header = virtio.pack(virtio.NEEDS_CSUM, gso, start + tcp.SIZE, gso_size, start, sum_at)
        else:
            pseudo = checksum.pseudo_header(addresses, protocol, len(layer4))
            check = checksum.checksum(pseudo, checksum.total(layer4)).to_bytes(2, "big")
            layer4 = layer4[:sum_at] + check + layer4[sum_at + 2 :]
        header += ethernet.pack(GATEWAY_MAC, GUEST_MAC, ethernet.IPV4 if ipv4 else ethernet.IPV6)
        self.far.write(header, ip.pack(addresses, protocol, len(layer4)), layer4)
        assert not self.far.backlog, "more than the link holds"

    def send_datagram(self, to: bytes, port: int, payload: bytes, source: int = PORT) -> None:
        self.send(ip.UDP, to, udp.HEADER.pack(source, port, udp.SIZE + len(payload), 0) + payload)

    def heard(self, protocol: int) -> Iterator[memoryview]:
        """What the packets hold that the gateway has sent."""
        at = self.far.offloads.vnet_header + ethernet.SIZE
        parse = ip.parse_ipv4 if self.family == 4 else ip.parse_ipv6
        while (size := self.far.read_into(self._buffer)) is not None:
            packet = parse(self._buffer[at:size])
            assert packet.protocol == protocol
            yield packet.payload

    def heard_datagrams(self) -> int:
        """How many bytes."""
        return sum(len(each) - udp.SIZE for each in self.heard(ip.UDP))


class Connection:
    """A TCP connection of the guest's to the host's loopback: the guest's end, and `host`, its peer."""

    def __init__(
        self, rig: Rig, listener: socket.socket, source: int = PORT, *, stamped: int = False
    ) -> None:
        """`stamped`: it speaks timestamps, as kernels do by default."""
        self._rig = rig
        self._stamped = stamped
        self._ports = {"src_port": source, "dst_port": port_of(listener)}
        self._seq, self._ack = 1000, 0
        self.received = self.segments = 0
        self.ended = False
        self.send(
            flags=tcp.SYN,
            options=tcp.pack_options(rig.mss, 10, sack_permitted=True, stamp=(0, 0) if stamped else None),
        )
        while not self._ack:  # the host's kernel has to answer first
            rig.work()
            self.hear()
        self.socket = rig.uplink.opened[-1]
        self.host = rig.own(listener.accept()[0])
        self.host.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes = b"", *, flags: int = tcp.ACK, options: bytes = b"") -> None:
        """One segment, or super-segment, from the guest."""
        header = tcp.pack(
            **self._ports, seq=self._seq, ack=self._ack, flags=flags, window=0xFFFF, options=options
        )
        mss = self._rig.mss
        if self._stamped and not options:
            header = self._stamp(header)
            mss -= tcp.STAMP_SIZE
        self._rig.send(ip.TCP, self._rig.target, header + data, gso_size=mss if len(data) > mss else 0)
        self._seq += len(data) + (flags & (tcp.SYN | tcp.FIN) != 0)

    def _stamp(self, header: bytes) -> bytes:
        """With the options of every segment, by a clock of a millisecond."""
        offset = (tcp.SIZE + tcp.STAMP_SIZE) << 2
        value = int(self._rig.now * 1000)
        return header[:12] + bytes((offset,)) + header[13:] + tcp.pack_stamp(value, value)

    def hear(self, *, answer_each: int = 0) -> None:
        """Whatever has come; with an ACK for each so many segments that have data."""
        due = 0
        for each in self._rig.heard(ip.TCP):
            segment = tcp.parse(each)
            size = len(segment.payload)
            self._ack = segment.seq + segment.length
            self.received += size
            self.ended |= segment.flags & tcp.FIN != 0
            due += size > 0
            if answer_each and due == answer_each:
                due = 0
                self.send()

    def say(self, data: bytes) -> None:
        """From the host, until all of it is in the gateway's socket."""
        self.host.sendall(data)
        until(lambda: waiting(self.socket) == len(data))


class Served(Connection):
    """A connection of the gateway's to port 80 of the guest, for the client of a published port."""

    def __init__(self, rig: Rig, client: socket.socket) -> None:
        self._rig = rig
        self._stamped = False
        (syn,) = (tcp.parse(each) for each in rig.heard(ip.TCP))
        self._ports = {"src_port": 80, "dst_port": port_of(client)}
        self._seq, self._ack = 1000, syn.seq + syn.length
        self.received = self.segments = 0
        self.ended = False
        options = tcp.pack_options(rig.mss, 10, sack_permitted=True)
        self.send(flags=tcp.SYN | tcp.ACK, options=options)
        rig.work()
        self.hear()


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def ready(fd: int, events: int = select.POLLIN) -> bool:
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(0))


def until(condition: Callable[[], bool]) -> None:
    """What the kernel does on loopback is done before it returns, unless it is very busy: then it is waited for."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        os.sched_yield()


def waiting(sock: socket.socket) -> int:
    """How many bytes of a stream can be read."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


def has_ended(sock: socket.socket) -> bool:
    """Whether the peer of a stream has."""
    return (
        ready(sock.fileno(), select.POLLRDHUP) and waiting(sock) >= 0
    )  # which waits for the kernel to be done


def holds(sock: socket.socket, size: int) -> bool:
    """Whether the datagrams in the receive queue are so many bytes (SO_PEEK_OFF, socket(7))."""
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, size - 1)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)


def take(sock: socket.socket, size: int) -> None:
    """Read so much of a stream."""
    while size:
        size -= len(sock.recv(size))


# -- scenarios --------------------------------------------------------------------------------------------


def tcp_out(
    rig: Rig, meter: Meter, *, segment: int, together: int, rounds: int, stamped: int = False
) -> float:
    """MiB from the guest: `together` segments wait in the tap each time."""
    connection = Connection(rig, rig.listener(), stamped=stamped)
    data = bytes(segment)
    for number in range(2 + rounds):
        rig.meter = meter if number >= 2 else None
        for _ in range(together):
            connection.send(data)
        rig.work()
        take(connection.host, together * segment)
        connection.hear()
    return rounds * together * segment / MIB


def tcp_in(rig: Rig, meter: Meter, *, answer_each: int, rounds: int, stamped: int = False) -> float:
    """MiB to the guest, which acknowledges each so many segments."""
    connection = Connection(rig, rig.listener(), stamped=stamped)
    connection.send()
    rig.work()
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    sizes = [BLOCK // 8, BLOCK // 4, BLOCK // 2, BLOCK, BLOCK]  # for the kernel's window to open
    for number, size in enumerate(sizes + [BLOCK] * rounds):
        rig.meter = meter if number >= len(sizes) else None
        connection.received = 0
        connection.say(bytes(size))
        rig.work()
        while connection.received < size:
            connection.hear(answer_each=answer_each)
            rig.work()
    return rounds * BLOCK / MIB


def tcp_exchange(rig: Rig, meter: Meter, *, rounds: int, stamped: int = False) -> float:
    """A question of 64 bytes and its answer."""
    connection = Connection(rig, rig.listener(), stamped=stamped)
    for number in range(16 + rounds):
        rig.meter = meter if number >= 16 else None
        connection.send(SMALL, flags=tcp.ACK | tcp.PSH)
        rig.work()
        take(connection.host, len(SMALL))
        connection.say(SMALL)
        rig.work()
        connection.hear()
    return rounds


def tcp_connection(rig: Rig, meter: Meter, *, rounds: int) -> float:
    """Connect, a question, its answer and the end of the host's, the end of the guest's."""
    listener = rig.listener()
    for number in range(2 + rounds):
        rig.meter = meter if number >= 2 else None
        connection = Connection(rig, listener, PORT + number)
        connection.send()
        connection.send(SMALL, flags=tcp.ACK | tcp.PSH)
        rig.work()
        take(connection.host, len(SMALL))
        connection.host.sendall(SMALL)
        connection.host.close()
        until(partial(has_ended, connection.socket))
        rig.work()
        connection.hear()
        assert connection.ended
        connection.send()
        connection.send(flags=tcp.FIN | tcp.ACK)
        rig.work()
        connection.hear()
    return rounds


class Client:
    """A connection of the host's to a published port, and what it is joined to inside."""

    def __init__(self, rig: Rig, address: tuple[str, int], server: socket.socket) -> None:
        self._rig = rig
        self.socket = rig.own(socket.create_connection(address, SECONDS))
        rig.work()
        self.server = rig.own(server.accept()[0])

    def exchange(self) -> None:
        """A question of 64 bytes and its answer."""
        for asks, answers in ((self.socket, self.server), (self.server, self.socket)):
            asks.sendall(SMALL)
            self._rig.work()
            take(answers, len(SMALL))

    def close(self) -> None:
        """The end of the server's, then of the client's."""
        for sock in (self.server, self.socket):
            sock.close()
            self._rig.work()


def publish(rig: Rig) -> tuple[tuple[str, int], socket.socket]:
    """A port that leads by a socket inside to a server: where it listens, and the server."""
    server = rig.listener()
    loopback = IPv4Address("127.0.0.1")
    forward = PortForward("tcp", loopback, 0, loopback, port_of(server), mode="socket")
    shared = SocketListeners(rig.gateway)
    listener = shared.listen(forward)
    rig.own_until_closed(listener.close, shared.close)
    return ("127.0.0.1", listener.forward.host_port), server


def port_connection(rig: Rig, meter: Meter, *, rounds: int) -> float:
    """Connect, a question, its answer, the end of the server's, the end of the client's."""
    address, server = publish(rig)
    for number in range(64 + rounds):
        rig.meter = meter if number >= 64 else None
        client = Client(rig, address, server)
        client.exchange()
        client.close()
    return rounds


def port_connection_by_stack(rig: Rig, meter: Meter, *, rounds: int) -> float:
    """The same, through the stack."""
    listener = TcpListener(
        rig.gateway, PortForward("tcp", IPv4Address("127.0.0.1"), 0, None, 80, mode="stack")
    )
    rig.own_until_closed(listener.close)
    for number in range(8 + rounds):
        rig.meter = meter if number >= 8 else None
        client = rig.own(socket.create_connection(("127.0.0.1", listener.forward.host_port), SECONDS))
        rig.work()
        server = Served(rig, client)
        client.sendall(SMALL)
        rig.work()
        server.hear()
        server.send(SMALL, flags=tcp.ACK | tcp.PSH)
        rig.work()
        take(client, len(SMALL))
        server.send(flags=tcp.FIN | tcp.ACK)
        rig.work()
        client.close()
        rig.work()
        server.hear()
        assert server.ended
        server.send()
        rig.work()
    return rounds


def port_exchange(rig: Rig, meter: Meter, *, rounds: int) -> float:
    """A question of 64 bytes and its answer."""
    client = Client(rig, *publish(rig))
    for number in range(4 + rounds):
        rig.meter = meter if number >= 4 else None
        client.exchange()
    rig.meter = None
    return rounds


def udp_exchange(rig: Rig, meter: Meter, *, rounds: int) -> float:
    """A datagram of 64 bytes and its answer."""
    host = rig.host(socket.SOCK_DGRAM)
    for number in range(4 + rounds):
        rig.meter = meter if number >= 4 else None
        rig.send_datagram(rig.target, port_of(host), SMALL)
        rig.work()
        host.sendto(*host.recvfrom(100))
        rig.work()
        heard = rig.heard_datagrams()
        assert heard == len(SMALL)
    return rounds


def udp_out(rig: Rig, meter: Meter, *, rounds: int) -> float:
    """Datagrams of 64 bytes, many at once."""
    host = rig.host(socket.SOCK_DGRAM)
    for number in range(1 + rounds):
        rig.meter = meter if number >= 1 else None
        for _ in range(BURST):
            rig.send_datagram(rig.target, port_of(host), SMALL)
        rig.work()
        for _ in range(BURST):
            host.recv(100)
    return rounds * BURST


def udp_in(rig: Rig, meter: Meter, *, rounds: int) -> float:
    """Datagrams of 64 bytes, many at once."""
    host = rig.host(socket.SOCK_DGRAM)
    rig.send_datagram(rig.target, port_of(host), SMALL)
    rig.work()
    address = host.recvfrom(100)[1]
    (sock,) = rig.uplink.opened
    for number in range(1 + rounds):
        rig.meter = meter if number >= 1 else None
        for _ in range(BURST):
            host.sendto(SMALL, address)
        until(partial(holds, sock, BURST * len(SMALL)))
        rig.work()
        heard = rig.heard_datagrams()
        assert heard == BURST * len(SMALL)
    return rounds * BURST


def dns(rig: Rig, meter: Meter, *, rounds: int) -> float:
    """A query to the namespace's DNS address, and its answer; each from a port of its own, and for another name."""
    for number in range(2 + rounds):
        question = b"\7netns%02d\7example\0\0\1\0\1" % number
        rig.meter = meter if number >= 2 else None
        header = number.to_bytes(2, "big") + bytes.fromhex("0100 0001 0000 0000 0000")
        rig.send_datagram(rig.dns, 53, header + question, PORT + number)
        rig.work()
        query, relay = rig.resolver.recvfrom(512)
        answer = query[:2] + bytes.fromhex("8180 0001 0001 0000 0000") + question
        answer += bytes.fromhex("c00c 0001 0001 0000003c 0004 c0000201")
        rig.resolver.sendto(answer, relay)
        rig.work()
        heard = rig.heard_datagrams()
        assert heard == len(answer)
    return rounds


def idle(rig: Rig, meter: Meter, *, connections: int, rounds: int) -> float:
    """Steps with nothing to do, beside connections that are held."""
    listener = rig.listener()
    for number in range(connections):
        Connection(rig, listener, PORT + number).send()
        rig.work()
    rig.meter = meter
    for _ in range(rounds):
        rig.step()
    return rounds


class Scenario(NamedTuple):
    """`drive` returns how many units the meter has seen."""

    unit: str
    drive: Callable[..., float]
    options: dict[str, int]
    vnet_header: bool = True
    family: int = 4
    policy: bool = False
    """Whether flows are decided by `thousand_rules`."""

    def work(self) -> Work:
        """What its units cost, the same each time."""
        self._measured()  # fills caches
        first, second = self._measured(), self._measured()
        for _ in range(3):  # on a busy machine a kernel may be late: one turn of the loop more
            if first == second:
                break
            one, other = ({**each.system_calls, "epoll.poll": 0} for each in (first, second))
            assert one == other, f"more than a turn: {first}, {second}"
            first, second = second, self._measured()
        assert first == second, f"not the same twice: {first}, {second}"
        return first

    def _measured(self) -> Work:
        meter = Meter()
        policy = thousand_rules() if self.policy else None
        rig = Rig(vnet_header=self.vnet_header, family=self.family, policy=policy)
        gc.disable()  # what others have left behind is not ours to count
        try:
            meter.work.units = self.drive(rig, meter, **self.options)
        finally:
            gc.enable()
            rig.close()
        return meter.work


SCENARIOS = {
    "tcp out": Scenario("MiB", tcp_out, {"segment": LARGE, "together": 4, "rounds": 4}),
    "tcp in": Scenario("MiB", tcp_in, {"answer_each": 1, "rounds": 8}),
    "tcp out at 1500": Scenario("MiB", tcp_out, {"segment": MSS, "together": 32, "rounds": 4}, False),
    "tcp in at 1500": Scenario("MiB", tcp_in, {"answer_each": 2, "rounds": 2}, False),
    "tcp exchange": Scenario("exchange", tcp_exchange, {"rounds": 64}),
    "tcp connection": Scenario("connection", tcp_connection, {"rounds": 16}),
    "tcp connection, 1000 rules": Scenario("connection", tcp_connection, {"rounds": 16}, policy=True),
    "tcp exchange, 1000 rules": Scenario("exchange", tcp_exchange, {"rounds": 64}, policy=True),
    "udp exchange, 1000 rules": Scenario("exchange", udp_exchange, {"rounds": 64}, policy=True),
    "tcp out, timestamps": Scenario(
        "MiB", tcp_out, {"segment": LARGE, "together": 4, "rounds": 4, "stamped": True}
    ),
    "tcp in, timestamps": Scenario("MiB", tcp_in, {"answer_each": 1, "rounds": 8, "stamped": True}),
    "tcp exchange, timestamps": Scenario("exchange", tcp_exchange, {"rounds": 64, "stamped": True}),
    "port connection, socket": Scenario("connection", port_connection, {"rounds": 64}),
    "port connection, stack": Scenario("connection", port_connection_by_stack, {"rounds": 32}),
    "port exchange, socket": Scenario("exchange", port_exchange, {"rounds": 64}),
    "udp exchange": Scenario("exchange", udp_exchange, {"rounds": 64}),
    "udp out": Scenario("datagram", udp_out, {"rounds": 4}),
    "udp in": Scenario("datagram", udp_in, {"rounds": 4}),
    "tcp out, IPv6": Scenario("MiB", tcp_out, {"segment": LARGE, "together": 4, "rounds": 4}, family=6),
    "tcp exchange, IPv6": Scenario("exchange", tcp_exchange, {"rounds": 64}, family=6),
    "udp exchange, IPv6": Scenario("exchange", udp_exchange, {"rounds": 64}, family=6),
    "udp out, IPv6": Scenario("datagram", udp_out, {"rounds": 4}, family=6),
    "dns": Scenario("query", dns, {"rounds": 16}),
    "idle": Scenario("step", idle, {"connections": 16, "rounds": 16}),
}


# -- what is recorded -------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """The work of one scenario; `instructions` by version of Python."""

    calls: int = 0
    system_calls: dict[str, int] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)


def recorded() -> dict[str, Recorded]:
    """By scenario."""
    return {name: Recorded(**each) for name, each in json.loads(RECORD.read_text(encoding="utf-8")).items()}


def compare(work: Work, before: Recorded, unit: str, version: str = VERSION) -> list[str]:
    """What is wrong, one line each: more work than is recorded, or so much less that it should be recorded."""
    total, total_before = work.system_calls.total(), sum(before.system_calls.values())
    figures = [("calls", work.calls, before.calls), ("system calls", min(total, total_before), total_before)]
    if version in before.instructions:
        figures.append(("instructions", work.instructions, before.instructions[version]))
    lines = []
    for what, now, then in figures:
        said = f"{now / work.units:,.2f} {what} per {unit}, {then / work.units:,.2f} are recorded"
        if now > MOST * then:
            lines.append(
                f"{said}, {now / then - 1:.1%} more than that: do less, or renew the record by {COMMAND}"
            )
        elif now < LEAST * then:
            lines.append(
                f"{said}, {1 - now / then:.1%} less than that: to keep the gain, record it by {COMMAND}"
            )
    for name, more in (work.system_calls - Counter(before.system_calls)).items():
        then = before.system_calls.get(name, 0)
        lines.append(
            f"{(then + more) / work.units:,.2f} times {name} per {unit}, {then / work.units:,.2f} are recorded:"
            f" do less, or renew the record by {COMMAND}"
        )
    return lines


def record(found: Mapping[str, Mapping[str, Work]]) -> None:
    """Write it: of each version of Python, the work of each scenario.

    What is recorded of other versions stays where nothing has changed; else it would no longer be true.
    """
    before = recorded() if RECORD.exists() else {}
    after = {}
    for name in SCENARIOS:
        works = {version: each[name] for version, each in found.items()}
        first = next(iter(works.values()))
        for version, work in works.items():
            assert (work.calls, work.system_calls) == (first.calls, first.system_calls), (
                f"{name}: {version} differs"
            )
        instructions = {version: work.instructions for version, work in works.items()}
        now = Recorded(first.calls, dict(sorted(first.system_calls.items())), instructions)
        then = before.get(name, Recorded())
        if then.instructions.items() >= instructions.items():
            now.instructions = {**then.instructions, **instructions}
        now.instructions = dict(
            sorted(now.instructions.items(), key=lambda item: int(item[0].partition(".")[2]))
        )
        after[name] = vars(now)
    RECORD.write_text(json.dumps(after, indent=1) + "\n", encoding="utf-8")


def table(works: Mapping[str, Work], before: Mapping[str, Recorded]) -> Iterator[str]:
    """Per unit, each figure with what it is more or less than recorded, if it is."""
    yield "| | per | instructions | calls | system calls | |"
    yield "|---|---|--:|--:|--:|---|"
    for name, work in works.items():
        then = before.get(name, Recorded())
        total = work.system_calls.total()
        cells = (
            name,
            SCENARIOS[name].unit,
            _cell(work.instructions, then.instructions.get(VERSION), work.units),
            _cell(work.calls, then.calls, work.units),
            _cell(total, sum(then.system_calls.values()), work.units),
            ", ".join(f"{each} {count / work.units:,.2f}" for each, count in work.system_calls.most_common()),
        )
        yield f"| {' | '.join(cells)} |"


def _cell(now: int, then: int | None, units: float) -> str:
    change = f" ({now / then - 1:+.1%})" if then and now != then else ""
    return f"{now / units:,.2f}{change}"


def elsewhere(python: str) -> tuple[str, dict[str, Work]]:
    """The version of that Python, and what it counts."""
    child = subprocess.run(
        [python, "-m", "tests.work", "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=120
    )
    version, found = json.loads(child.stdout)
    for each in found.values():
        each["system_calls"] = Counter(each["system_calls"])
    return version, {name: Work(**each) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.work", description="Work per unit of traffic.")
    parser.add_argument("--record", nargs="*", metavar="PYTHON", help="record it, of these interpreters too")
    parser.add_argument("--json", action="store_true", help="for the use of --record")
    options = parser.parse_args()
    works = {name: scenario.work() for name, scenario in SCENARIOS.items()}
    if options.json:
        print(json.dumps((VERSION, {name: vars(work) for name, work in works.items()})))
        return
    before = recorded() if RECORD.exists() else {}
    if options.record is not None:
        record({VERSION: works, **dict(map(elsewhere, options.record))})
        after = recorded()
        gone = {
            version
            for name in after
            for version in before.get(name, Recorded()).instructions.keys() - after[name].instructions
        }
        if gone:
            print(f"No longer recorded, for want of their interpreters: {', '.join(sorted(gone))}\n")
    print(*table(works, before), sep="\n")


if __name__ == "__main__":
    main()
