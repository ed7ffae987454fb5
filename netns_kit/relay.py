"""Relays: one flow of the stack beside one socket of the host.

`TcpRelay` joins a `TcpConnection` and a stream socket, `UdpRelay` a guest endpoint's flows and one datagram
socket, `PingRelay` an `EchoFlow` and a ping socket, `DnsRelay` the DNS proxy and its upstream sockets.
A relay owns its sockets: whatever ends first, the guest's side or the host's, it closes them and tells the other.

What the host's sockets report becomes what the guest would have seen without us: `refusal_for`.
Sockets are edge-triggered; `_readable` remembers that there may be more to read.  A relay reads no more than the
stack has room for, and no more than a few buffers per step, so one busy flow starves nobody.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_address

from .dns.proxy import Action, DnsProxy, Send, Upstream
from .engine import EDGE, ERROR, HANG_UP, IN, OUT, READ_HANG_UP, URGENT, Engine
from .stack import Closed, EchoFlow, Refusal, TcpConnection, UdpFlow
from .uplink import Endpoint, Target, Uplink

BUFFERS_PER_STEP = 8
DATAGRAMS_PER_STEP = 64
MAX_DATAGRAM = 65536
UDP_SEGMENT = 103  # linux/udp.h
_NO_SEGMENTATION = frozenset({errno.EIO, errno.EINVAL, errno.EMSGSIZE})  # what UDP_SEGMENT meets at times
IP_RECVTTL = 12  # linux/in.h
ICMP_ECHO, ICMPV6_ECHO = 8, 128
ERROR_SPACE = 512
ORIGIN_LOCAL = 1  # linux/errqueue.h
_EXTENDED_ERROR = struct.Struct("=IB")  # the head of struct sock_extended_err
_RECVERR = {  # linux/in.h, linux/in6.h
    int(socket.AF_INET): (socket.IPPROTO_IP, 11),
    int(socket.AF_INET6): (socket.IPPROTO_IPV6, 25),
}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST, and drops what is queued

_REFUSALS = {
    errno.ECONNREFUSED: Refusal.RESET,
    errno.ENETUNREACH: Refusal.NET_UNREACHABLE,
    errno.ENETDOWN: Refusal.NET_UNREACHABLE,
    errno.EHOSTUNREACH: Refusal.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Refusal.HOST_UNREACHABLE,
    errno.EACCES: Refusal.PROHIBITED,
    errno.EPERM: Refusal.PROHIBITED,
    errno.ETIMEDOUT: Refusal.DROP,
    errno.EMSGSIZE: Refusal.DROP,  # the host's kernel has learnt the path's MTU, and cuts the next one
}


def refusal_for(error: int) -> Refusal:
    """What the guest is told when the host's socket fails with this errno."""
    return _REFUSALS.get(error, Refusal.RESET)


class TcpRelay:
    """One connection.  Made connecting (`connect`) for the guest's flows, or running (`run`) for inbound ones."""

    __slots__ = (
        "_blocked",
        "_candidates",
        "_ended",
        "_engine",
        "_read_to_end",
        "_readable",
        "_socket",
        "connection",
    )

    def __init__(self, engine: Engine, connection: TcpConnection | None = None) -> None:
        self._engine = engine
        self.connection = connection
        self._socket: socket.socket | None = None
        self._candidates: Iterator[Endpoint] | None = None  # while connecting: where else
        self._readable = False
        self._ended = False  # the host has sent FIN
        self._read_to_end = False  # a short read proves nothing: no further event will tell of the rest
        self._blocked = False

    # -- the host's side ----------------------------------------------------------------------------

    def connect(self, uplink: Uplink, target: Target) -> None:
        """Connect to the first endpoint of `target` that answers; then, and only then, accept the guest."""
        self._candidates = iter(target.endpoints)
        self._connect_next(uplink, errno.ENETUNREACH)

    def _connect_next(self, uplink: Uplink, error: int) -> None:
        for endpoint in self._candidates or ():
            try:
                sock = uplink.open("tcp", endpoint.address)
            except OSError as failure:
                error = failure.errno or error
                continue
            try:
                error = sock.connect_ex((str(endpoint.address), endpoint.port))
            except socket.gaierror:  # its zone is no interface of ours
                error = errno.ENETUNREACH
            if error in (0, errno.EINPROGRESS):
                self._own(sock, lambda events: self._while_connecting(events, uplink))
                return
            sock.close()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.refuse(refusal_for(error))

    def _while_connecting(self, events: int, uplink: Uplink) -> None:
        sock, connection = self._socket, self.connection
        if sock is None or connection is None or not events & (OUT | ERROR | HANG_UP):
            return
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._close_socket()
            self._connect_next(uplink, error)
            return
        self._candidates = None
        self._engine.replace(sock.fileno(), self._on_events)
        connection.accept(self._engine.now)
        self._on_events(events)

    def run(self, sock: socket.socket) -> None:
        """`sock` is connected; the guest is being connected to."""
        self._own(sock, self._on_events)

    def _own(self, sock: socket.socket, handler: Callable[[int], None]) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the guest's kernel has done Nagle's part
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._socket = sock
        self._engine.add(sock.fileno(), handler, IN | OUT | READ_HANG_UP | URGENT | EDGE)

    def _on_events(self, events: int) -> None:
        if events & (IN | READ_HANG_UP | HANG_UP | ERROR):
            self._readable = not self._ended
            if events & (READ_HANG_UP | HANG_UP | ERROR | URGENT):
                self._read_to_end = True
            if events & ERROR and self._ended and self._failed():
                return
            self._pump()  # what came before an error is read before it
        if events & OUT and self._blocked and self.connection is not None:
            self._blocked = False
            self.connection.resume(self._engine.now)

    def _failed(self) -> bool:
        sock = self._socket
        if sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.abort()
            return True
        return False

    def _pump(self) -> None:
        """From the host to the guest, as far as there is room."""
        connection, sock, now = self.connection, self._socket, self._engine.now
        if connection is None or sock is None:
            return
        burst = connection.snd.burst
        for _ in range(BUFFERS_PER_STEP):
            if not self._readable:
                return
            wanted = min(connection.room(), burst)
            if not wanted:
                connection.wait_for_room(now)
                return
            try:
                data = sock.recv(wanted)
            except BlockingIOError:
                self._readable = False
                return
            except OSError:
                self.abort()
                return
            if not data:
                self._readable, self._ended = False, True
                connection.shutdown(now)
                return
            connection.send(data, now)
            if len(data) < wanted and not self._read_to_end:
                self._readable = False
        if self._readable:
            self._engine.again(self._pump)

    def abort(self) -> None:
        """The host's side is gone: RST to the guest."""
        connection, self.connection = self.connection, None
        self._close_socket()
        if connection is not None:
            connection.abort(self._engine.now)

    def _close_socket(self, *, reset: bool = False) -> None:
        sock, self._socket = self._socket, None
        self._readable = False
        if sock is not None:
            self._engine.remove(sock.fileno())
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            sock.close()

    # -- the guest's side: TcpUser ------------------------------------------------------------------

    def established(self) -> None:
        self._pump()

    def deliver(self, data: memoryview) -> int:
        sock = self._socket
        if sock is None:
            return 0
        try:
            taken = sock.send(data)
        except BlockingIOError:
            taken = 0
        except OSError:
            self.abort()
            return 0
        if taken < len(data):
            self._blocked = True
        return taken

    def end(self) -> None:
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:
                self.abort()

    def writable(self) -> None:
        if self._readable:
            self._pump()

    def closed(self, why: Closed) -> None:
        self.connection = None
        self._close_socket(reset=why is not Closed.NORMAL)


class UdpRelay:
    """One guest endpoint and one socket (RFC 4787: endpoint-independent mapping).

    Datagrams come in only from where the guest has sent to.
    """

    __slots__ = ("_dropped", "_engine", "_flows", "_forget", "_socket", "_targets")

    def __init__(
        self, engine: Engine, sock: socket.socket, dropped: Counter[str], forget: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._dropped = dropped
        self._socket = sock
        self._forget = forget
        self._flows: dict[tuple[str, int], UdpFlow] = {}
        self._targets: dict[bytes, tuple[str, int]] = {}
        sock.setsockopt(*_RECVERR[sock.family], 1)
        engine.add(sock.fileno(), self._on_events, IN)

    def add(self, flow: UdpFlow, target: Endpoint) -> None:
        """`flow` goes to `target`; what comes from there is an answer to it."""
        address = (str(target.address), target.port)
        flow.user = self
        self._flows[address] = flow
        self._targets[flow.key] = address

    def datagram(self, flow: UdpFlow, payload: memoryview, ttl: int, segment_size: int) -> None:
        error = self._send(flow, payload, segment_size)
        if segment_size and error in _NO_SEGMENTATION:
            for start in range(0, len(payload), segment_size):
                self.datagram(flow, payload[start : start + segment_size], ttl, 0)
            return
        if error and self._errors():  # an earlier datagram's: those are told, this one is sent
            error = self._send(flow, payload, segment_size)
        if error:
            flow.refuse(refusal_for(error))

    def _send(self, flow: UdpFlow, payload: memoryview, segment_size: int) -> int:
        """The errno, or 0: also when the host's queue is full.  Then it is lost, as datagrams are."""
        target = self._targets[flow.key]
        try:
            if segment_size:
                size = struct.pack("=H", segment_size)
                self._socket.sendmsg([payload], [(socket.SOL_UDP, UDP_SEGMENT, size)], 0, target)
            else:
                self._socket.sendto(payload, target)
        except BlockingIOError:
            return 0
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def expired(self, flow: UdpFlow) -> None:
        self._flows.pop(self._targets.pop(flow.key), None)
        if not self._targets:
            self.close()

    def close(self) -> None:
        """Close the socket.  Again is fine."""
        if self._socket.fileno() >= 0:
            self._engine.remove(self._socket.fileno())
            self._socket.close()
            self._forget()

    def _on_events(self, events: int) -> None:
        now = self._engine.now
        if events & ERROR:
            self._errors()
        for _ in range(DATAGRAMS_PER_STEP):
            try:
                payload, sender = self._socket.recvfrom(MAX_DATAGRAM)
            except OSError:
                return  # nothing more, or an error that the next event tells of
            flow = self._flows.get(sender[:2])
            if flow is None:
                self._dropped["udp-filtered"] += 1
            else:
                flow.send(payload, now)

    def _errors(self) -> int:
        """Tell the guest of what ICMP has told the host's socket (ip(7), IP_RECVERR); how many there were."""
        for count in range(DATAGRAMS_PER_STEP):
            try:
                _, ancillary, _, sent_to = self._socket.recvmsg(0, ERROR_SPACE, socket.MSG_ERRQUEUE)
            except OSError:
                return count
            flow = self._flows.get(sent_to[:2])
            for level, kind, data in ancillary:
                if flow is not None and (level, kind) == _RECVERR[self._socket.family]:
                    error, origin = _EXTENDED_ERROR.unpack_from(data)
                    if origin != ORIGIN_LOCAL:
                        flow.refuse(refusal_for(error))
        return DATAGRAMS_PER_STEP


class PingRelay:
    """One echo flow and one ping socket (icmp(7), "ping sockets": no privilege but net.ipv4.ping_group_range).

    The kernel puts an identifier of its own on the wire and takes only replies to it; the guest sees its own.
    """

    __slots__ = ("_engine", "_flow", "_hop_limit", "_kind", "_socket")

    def __init__(self, engine: Engine, sock: socket.socket, flow: EchoFlow, target: Endpoint) -> None:
        ipv4 = sock.family == socket.AF_INET
        self._kind = ICMP_ECHO if ipv4 else ICMPV6_ECHO
        if ipv4:
            sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
            self._hop_limit = (socket.IPPROTO_IP, socket.IP_TTL)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
            self._hop_limit = (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
        sock.connect((str(target.address), 0))
        self._engine = engine
        self._socket = sock
        self._flow = flow
        flow.user = self
        engine.add(sock.fileno(), self._on_events, IN)

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, ttl: int) -> None:
        try:
            self._socket.setsockopt(*self._hop_limit, max(ttl - 1, 1))
            self._socket.send(struct.pack("!BBHHH", self._kind, 0, 0, 0, sequence) + payload)
        except BlockingIOError:
            pass
        except OSError as error:
            flow.refuse(refusal_for(error.errno or 0))

    def expired(self, flow: EchoFlow) -> None:
        self._engine.remove(self._socket.fileno())
        self._socket.close()

    def _on_events(self, _: int) -> None:
        for _ in range(DATAGRAMS_PER_STEP):
            try:
                message, ancillary, _, _ = self._socket.recvmsg(MAX_DATAGRAM, socket.CMSG_SPACE(4))
            except BlockingIOError:
                return
            except OSError as error:
                self._flow.refuse(refusal_for(error.errno or 0))
                continue
            ttl = next((struct.unpack("=i", data)[0] for _, _, data in ancillary), 64)
            sequence = int.from_bytes(message[6:8], "big")
            self._flow.reply(sequence, message[8:], ttl, self._engine.now)


class DnsRelay:
    """The DNS proxy and its sockets: one for each upstream, whoever asks, open while something is under way."""

    def __init__(self, engine: Engine, uplink: Uplink) -> None:
        self._engine = engine
        self._uplink = uplink
        self._proxy = DnsProxy(random_id=lambda: int.from_bytes(os.urandom(2), "big"))
        self._sockets: dict[Upstream, socket.socket] = {}
        engine.deadlines.append(lambda: self._proxy.deadline)
        engine.after_step.append(self._on_time)

    def add(self, flow: UdpFlow, target: Target) -> None:
        """`flow` brings queries for these resolvers, and so does every other from now on."""
        upstreams = tuple((str(endpoint.address), endpoint.port) for endpoint in target.endpoints)
        if upstreams != self._proxy.upstreams:
            self._proxy.set_upstreams(upstreams)
        flow.user = self

    def datagram(self, flow: UdpFlow, payload: memoryview, ttl: int, segment_size: int) -> None:
        size = segment_size or len(payload) or 1
        for start in range(0, len(payload), size):
            query = bytes(payload[start : start + size])
            self._do(self._proxy.query(query, flow, self._engine.now))

    def expired(self, flow: UdpFlow) -> None:
        pass  # its answer may still come, and can still be sent

    def close(self) -> None:
        """Close the sockets.  Again is fine."""
        while self._sockets:
            self._close(next(iter(self._sockets)))

    def stats(self) -> dict[str, int]:
        """The proxy's counters."""
        return self._proxy.stats()

    def _on_time(self) -> None:
        if self._proxy.deadline <= self._engine.now:
            self._do(self._proxy.handle_timer(self._engine.now))
        if self._proxy.deadline == math.inf:  # nothing is under way
            self.close()

    def _do(self, actions: list[Action]) -> None:
        now = self._engine.now
        while actions:
            action = actions.pop(0)
            if isinstance(action, Send):
                if not self._send(action):
                    actions += self._proxy.upstream_failed(action.upstream, now)
            elif isinstance(action.client, UdpFlow):
                action.client.send(action.message, now)
                action.client.close()  # one question, one answer: DNS clients use a port once

    def _send(self, action: Send) -> bool:
        try:
            sock = self._sockets.get(action.upstream) or self._open(action.upstream)
            sock.send(action.message)
        except BlockingIOError:
            return True  # lost, as datagrams are; the proxy asks again
        except OSError:
            self._close(action.upstream)
            return False
        return True

    def _open(self, upstream: Upstream) -> socket.socket:
        sock = self._uplink.open("udp", ip_address(upstream[0]))
        try:
            sock.connect(upstream)
        except OSError:
            sock.close()
            raise
        self._sockets[upstream] = sock
        self._engine.add(sock.fileno(), lambda _: self._on_events(upstream), IN)
        return sock

    def _close(self, upstream: Upstream) -> None:
        sock = self._sockets.pop(upstream, None)
        if sock is not None:
            self._engine.remove(sock.fileno())
            sock.close()

    def _on_events(self, upstream: Upstream) -> None:
        now = self._engine.now
        for _ in range(DATAGRAMS_PER_STEP):
            sock = self._sockets.get(upstream)
            if sock is None:
                return
            try:
                message = sock.recv(MAX_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:
                self._close(upstream)
                self._do(self._proxy.upstream_failed(upstream, now))
                return
            self._do(self._proxy.response(message, upstream, now))
