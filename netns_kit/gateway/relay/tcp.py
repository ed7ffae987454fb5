"""One TCP connection of the stack beside one stream socket of the host.

Urgent data: the socket keeps it in line (SO_OOBINLINE), and the kernel ends a read at its mark, where the ioctl
SIOCATMARK says so: the byte behind the mark is the urgent one.  It is asked only where a mark may be, since it costs
as much as reading: not after a read that ended for want of bytes, when the next event will tell.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from collections.abc import Callable, Iterator

from netns_kit.gateway.engine import EDGE, ERROR, HANG_UP, IN, OUT, READ_HANG_UP, URGENT, Engine
from netns_kit.stack import Closed, IcmpError, Refusal, TcpConnection
from netns_kit.uplink.uplink import Endpoint, Target, Uplink

from .sockets import ask_for_errors, family_of, read_errors, refusal_for, set_tos, set_ttl, socket_address

BUFFERS_PER_STEP = 8
KEEPALIVE_INTERVAL = 75  # seconds between probes, at most: the kernel's own
MAX_KEEPIDLE = 32767  # tcp(7)
SIOCATMARK = 0x8905  # asm-generic/sockios.h
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST, and drops what is queued


class TcpRelay:
    """One connection.  Made connecting (`connect`) for the guest's flows, or running (`run`) for inbound ones."""

    __slots__ = (
        "_blocked",
        "_broken",
        "_candidates",
        "_ended",
        "_engine",
        "_mark_near",
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
        self._mark_near = False  # what is read next may be urgent: told so, or nothing ended the last read
        self._blocked = False
        self._broken = False  # sending has failed: what the host said before is still to be read

    # -- the host's side ----------------------------------------------------------------------------

    def connect(self, uplink: Uplink, target: Target) -> None:
        """Connect to the first endpoint of `target` that answers; then, and only then, accept the guest."""
        self._candidates = iter(target.endpoints)
        self._connect_next(uplink, Refusal.NET_UNREACHABLE)

    def _connect_next(self, uplink: Uplink, why: Refusal | IcmpError) -> None:
        """`why` not to where it was tried last."""
        connection = self.connection
        if connection is None:
            return
        for endpoint in self._candidates or ():
            try:
                sock = uplink.open("tcp", endpoint.address)
            except OSError as failure:
                why = refusal_for(failure.errno or errno.EIO)
                continue
            if family_of(sock) == socket.AF_INET6:
                ask_for_errors(sock)
            set_ttl(sock, connection.ttl)
            if connection.tos:
                set_tos(sock, connection.tos)
            try:
                error = sock.connect_ex(socket_address(*endpoint))
            except OSError as failure:  # its zone is no interface of ours
                error = failure.errno or errno.EIO
            if error in (0, errno.EINPROGRESS):
                try:
                    self._own(sock, lambda events: self._while_connecting(events, uplink))
                    return
                except OSError as failure:
                    error = failure.errno or errno.EIO
            sock.close()
            why = refusal_for(error)
        self.connection = None
        connection.refuse(why)

    def _while_connecting(self, events: int, uplink: Uplink) -> None:
        sock, connection = self._socket, self.connection
        if sock is None or connection is None or not events & (OUT | ERROR | HANG_UP):
            return
        told = read_errors(sock) if events & ERROR else []
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & (ERROR | HANG_UP) else 0
        if told or error:
            self._close_socket()
            self._connect_next(uplink, told[-1].for_guest(connection.key) if told else refusal_for(error))
            return
        self._candidates = None
        connection.host = sock.getsockname()[:2]
        if family_of(sock) == socket.AF_INET6:
            ask_for_errors(sock, wanted=False)
        self._engine.replace(sock.fileno(), self._on_events)
        connection.accept(self._engine.now)
        self._on_events(events)

    def run(self, sock: socket.socket) -> None:
        """`sock` is connected; the guest is being connected to.  Raises OSError, and `sock` is the caller's then."""
        self._own(sock, self._on_events)

    def peer(self) -> tuple[str, int] | None:
        """Address and port of the host's peer; None if it has gone already."""
        try:
            address, port, *_ = ("", 0) if self._socket is None else self._socket.getpeername()
        except OSError:
            return None
        return address, port

    def _own(self, sock: socket.socket, handler: Callable[[int], None]) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the guest's kernel has done Nagle's part
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._engine.add(sock.fileno(), handler, IN | OUT | READ_HANG_UP | URGENT | EDGE)
        self._socket = sock

    def _on_events(self, events: int) -> None:
        if events & (IN | READ_HANG_UP | HANG_UP | ERROR):
            self._readable = not self._ended
            if events & (READ_HANG_UP | HANG_UP | ERROR | URGENT):
                self._read_to_end = True
            if events & URGENT:
                self._mark_near = True
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
        burst, memory = connection.snd.burst, connection.snd.memory
        for _ in range(BUFFERS_PER_STEP):
            if not self._readable:
                return
            wanted = min(connection.room(), burst)
            if not wanted:
                if self._broken:  # what the guest has no room for, a reset would have overtaken
                    self.abort()
                else:
                    connection.wait_for_room(now)
                return
            urgent = self._mark_near and _at_mark(sock)
            try:
                size = sock.recv_into(memory.buffer, 1 if urgent else wanted)
            except BlockingIOError:
                self._readable = False
                if self._broken:
                    self.abort()
                return
            except OSError:
                self.abort()
                return
            if not size and self._broken:
                self.abort()
                return
            if not size:
                self._readable, self._ended = False, True
                connection.shutdown(now)
                return
            if urgent:
                connection.send_urgent(bytes(memory.buffer[:1]), now)
                continue
            connection.send(memory.take(size), now)
            self._mark_near = self._read_to_end or size == wanted
            if size < wanted and not self._read_to_end:
                self._readable = False
        if self._readable:
            self._engine.again(self._pump)

    def abort(self, *, reset: bool = False) -> None:
        """The host's side is gone: RST to the guest; with `reset`, to the host's peer too."""
        connection, self.connection = self.connection, None
        self._close_socket(reset=reset)
        if connection is not None:
            connection.abort(self._engine.now)

    def _break(self) -> None:
        """Sending has failed: the host's side is gone, once what it said before has been read, as far as the guest
        has room for it."""
        self._broken = True
        if self._ended:
            self.abort()
        else:
            self._readable = self._read_to_end = True
            self._pump()

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
        if sock is None or self._broken:
            return 0
        try:
            taken = sock.send(data)
        except BlockingIOError:
            taken = 0
        except OSError:
            self._break()
            return 0
        if taken < len(data):
            self._blocked = True
        return taken

    def urgent(self, data: memoryview) -> int:
        sock = self._socket
        if sock is None or self._broken:
            return 0
        try:
            return sock.send(data, socket.MSG_OOB)
        except BlockingIOError:
            self._blocked = True
        except OSError:
            self._break()
        return 0

    def end(self) -> None:
        if self._socket is not None and not self._broken:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:
                self._break()

    def writable(self) -> None:
        if self._readable:
            self._pump()

    def keepalive(self, idle: float) -> None:
        """The guest wants to know whether its peer is there: so do we, as often."""
        sock = self._socket
        if sock is not None and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            seconds = max(round(idle), 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(seconds, MAX_KEEPIDLE))
            interval = min(seconds, KEEPALIVE_INTERVAL)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def traffic_class(self, tos: int) -> None:
        if self._socket is not None:
            set_tos(self._socket, tos)

    def closed(self, why: Closed) -> None:
        self.connection = None
        self._close_socket(reset=why is not Closed.NORMAL)


def _at_mark(sock: socket.socket) -> bool:
    """Whether the next byte is the urgent one (sockatmark(3))."""
    return any(fcntl.ioctl(sock, SIOCATMARK, bytes(4)))
