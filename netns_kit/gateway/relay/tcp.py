"""TcpRelay: connects one TCP connection of the stack to one stream socket of the host.

The state tells what may still come from the host's side; `_ahead` gives details of IDLE and READABLE:

                    begin             event                     FIN is read
    DIALLING --> connected --> IDLE <-------> READABLE --> LAST -----------> ENDED
        |                                read all |          | event: FIN or error
        |                                         +-- sending failed --> BROKEN --> CLOSED
        +--- refused, or the guest gives up ---------------------------------------> CLOSED

    DIALLING   the uplink is connecting; the guest's SYN waits
    IDLE       everything has been read; an event will tell of more
    READABLE   there may be more to read; a read that returns less than was asked for has read everything
    LAST       the host's side has ended or failed: no further event will come, and the rest is read to its end
    BROKEN     sending has failed: the rest is read as in LAST, and then the connection is reset
    ENDED      the host's FIN has been passed on; the guest may still send
    CLOSED     there is no socket

Urgent data.  The socket keeps urgent data in line (SO_OOBINLINE).  The kernel ends a read at the urgent mark; the
byte behind the mark is the urgent one.  A read that begins at the mark would pass it unnoticed.  So where there may
be a mark, the ioctl SIOCATMARK must be called before a read, which costs as much as a small read.  `_ahead` tells
where:

    NO_MARK    the next byte is not urgent: an event has told of it, and of nothing urgent
    UNKNOWN    the last read may have ended at a mark of which no event has told yet.  Either it was as long as it
    could
               be, or there is an unhandled event that is older than the read
    A_MARK     an event has told of an urgent byte: a read may be short because it ends at the mark
"""

from __future__ import annotations

import fcntl
import socket
from collections.abc import Callable
from enum import Enum

from netns_kit.gateway.engine import ERROR, HANG_UP, IN, OUT, READ_HANG_UP, URGENT, Engine
from netns_kit.host.abi import SIOCATMARK
from netns_kit.stack import Closed, Ending, IcmpError, Refusal, TcpConnection
from netns_kit.stack.windows import BUFFER
from netns_kit.uplink.dial import Refused
from netns_kit.uplink.sockets import RESET_ON_CLOSE, is_internet, prepare_stream, set_tos

from .dialled import EVENTS, Dialled

BURSTS_PER_STEP = 8
KEEPALIVE_INTERVAL = 75  # seconds between probes, at most; the kernel's default
MAX_KEEPIDLE = 32767  # tcp(7)
_NO_MORE = READ_HANG_UP | HANG_UP | ERROR
_UNUSUAL = _NO_MORE | URGENT


class RelayState(Enum):
    """What may still come from the host's side.  The module describes each state."""

    DIALLING = "dialling"
    IDLE = "idle"
    READABLE = "readable"
    LAST = "last"
    BROKEN = "broken"
    ENDED = "ended"
    CLOSED = "closed"


DIALLING, IDLE, READABLE, LAST, BROKEN, ENDED, CLOSED = RelayState
_TO_BE_READ = (READABLE, LAST, BROKEN)
_PLAINLY_READ = (READABLE, LAST)
_ENDING = (BROKEN, ENDED)
NO_MARK, UNKNOWN, A_MARK = range(3)


class TcpRelay(Dialled):
    """A connection of the guest, and its stream on the host's side.

    If it is made with a connection, the guest has opened it, and `begin` dials the host's side.  If it is made
    without one, a client has opened it: `run` takes the client's socket, and `connection` is set when it is being
    opened to the guest.
    """

    __slots__ = ("_ahead", "_at_once", "_blocked", "_doubted_at", "_sink", "_socket", "connection", "state")

    def __init__(
        self,
        engine: Engine,
        connection: TcpConnection | None = None,
        failed: Callable[[BaseException], Refused] | None = None,
    ) -> None:
        self._engine = engine
        self._failed = failed
        self._pending = None
        self.connection = connection
        self.state = DIALLING
        self._socket: socket.socket | None = None
        self._sink: socket.socket | None = None  # the same, until sending has failed
        self._ahead = NO_MARK
        self._at_once = 1  # bursts in one read; it doubles while each read returns as much as it can
        self._doubted_at = 0  # the step of the engine in which `_ahead` became UNKNOWN
        self._blocked = False  # whether the host's socket was full at the last send

    # -- the host's side ----------------------------------------------------------------------------

    def _refused(self, why: Refusal | IcmpError) -> None:
        connection, self.connection = self.connection, None
        self.state = CLOSED
        if connection is not None:
            connection.refuse(why)

    def _connected(self, sock: socket.socket) -> None:
        """Accept the guest's connection, which has waited for the dial."""
        connection = self.connection
        assert connection is not None, "who gives the connection up gives up the dial"
        self._socket = self._sink = sock
        self.state = IDLE
        if prepare_stream(sock):
            connection.host = sock.getsockname()[:2]
        if connection.tos:  # it may have changed since dialling began
            set_tos(sock, connection.tos)
        connection.accept(self._engine.now)

    def run(self, sock: socket.socket) -> None:
        """Take a client's socket, while the connection to the guest is being opened.

        Args:
            sock: The socket, which has been given to `prepare_stream`, or was accepted from one that has.

        Raises:
            OSError: The socket cannot be polled.  It stays the caller's then.
        """
        self._engine.add(sock.fileno(), self._on_events, EVENTS)
        self._socket = self._sink = sock
        self.state = IDLE

    @property
    def socket(self) -> socket.socket | None:
        """The socket of the host's side; None: there is none."""
        return self._socket

    def peer(self) -> tuple[str, int] | None:
        """Return the address and port of the host's peer, or None if the peer has gone."""
        try:
            address, port, *_ = ("", 0) if self._socket is None else self._socket.getpeername()
        except OSError:
            return None
        return address, port

    def local(self) -> tuple[str, int] | None:
        """Return the address and port of the host's socket; None if there is none."""
        if self._socket is None or not is_internet(self._socket):
            return None
        address, port, *_ = self._socket.getsockname()
        return address, port

    def _on_events(self, events: int) -> None:
        if events & _UNUSUAL or self.state in _ENDING:
            self._on_unusual(events)
        elif events & IN:
            if self._ahead and self._doubted_at != self._engine.steps:  # the event is newer than the doubt
                self._ahead = NO_MARK
            self.state = READABLE
            self._pump()
        if events & OUT and self._blocked and self.connection is not None:
            self._blocked = False
            self.connection.resume(self._engine.now)

    def _on_unusual(self, events: int) -> None:
        """Handle an event of urgent data or of the end of the host's side, and any event after these."""
        if self.state is ENDED:
            if events & ERROR:
                self._look_for_failure()
            return
        if events & URGENT:
            self._ahead = A_MARK
        elif events & IN and self._doubted_at != self._engine.steps:
            self._ahead = NO_MARK
        if self.state is not BROKEN and events & (_NO_MORE | IN):
            self.state = LAST if events & _NO_MORE else READABLE
        self._pump()  # what came before an error is delivered before it

    def _look_for_failure(self) -> None:
        sock = self._socket
        if sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.abort()

    def _pump(self) -> None:
        """Carry bytes from the host to the guest, as far as the guest's window has room.

        This is the short way, for one read that returns everything there is.  `_pump_long` handles all other cases.
        """
        connection, sock = self.connection, self._socket
        if connection is None or sock is None:
            return
        if self.state not in _PLAINLY_READ or self._at_once > 1 or self._ahead:
            self._pump_long()
            return
        now, snd = self._engine.now, connection.snd
        wanted = connection.room()
        if wanted > snd.burst:
            wanted = snd.burst
        elif not wanted:
            connection.wait_for_room(now)
            return
        memory = snd.memory
        try:
            size = sock.recv_into(memory.buffer, wanted)
        except BlockingIOError:
            self.state = IDLE
        except OSError:
            self.abort()
        else:
            if not size:
                self._pass_end_on(connection)
                return
            connection.send(memory.take(size), now)
            if size == wanted:
                self._ahead, self._doubted_at, self._at_once = UNKNOWN, self._engine.steps, 2
                self._pump_long(BURSTS_PER_STEP - 1)
            elif self.state is READABLE:
                self.state = IDLE
            else:  # LAST: the end comes next
                self._pump()

    def _pump_long(self, left: int = BURSTS_PER_STEP) -> None:
        """Carry up to `left` bursts of bytes from the host to the guest, in every case: this is the long way."""
        connection, sock, engine = self.connection, self._socket, self._engine
        if connection is None or sock is None:
            return
        now, snd, carried = engine.now, connection.snd, 0
        memory, burst = snd.memory, snd.burst
        while left > 0 and self.state in _TO_BE_READ:
            at_once = min(self._at_once, left)
            left -= at_once
            wanted = min(connection.room(), burst * at_once)
            if not wanted:
                if self.state is BROKEN:  # a reset would overtake what the guest has no room for
                    self.abort()
                else:
                    connection.wait_for_room(now)
                return
            urgent = self._ahead and _at_mark(sock)
            try:
                if urgent:
                    size = sock.recv_into(memory.buffer, 1)
                elif wanted <= BUFFER:
                    size = sock.recv_into(memory.buffer, wanted)
                else:
                    size, _, _, _ = sock.recvmsg_into(memory.buffers(burst, wanted))
            except BlockingIOError:
                self._ahead = NO_MARK
                if self.state is BROKEN:
                    self.abort()
                else:
                    self.state = IDLE
                return
            except OSError:
                self.abort()
                return
            if not size:
                self._pass_end_on(connection)
                return
            if urgent:
                self._ahead = NO_MARK
                connection.send_urgent(bytes(memory.buffer[:1]), now)
                continue
            rest = size
            while wanted > BUFFER and rest > burst:
                connection.send(memory.take(burst), now)
                rest -= burst
            connection.send(memory.take(rest), now)
            carried += size
            if size == wanted:
                self._at_once = min(2 * self._at_once, BURSTS_PER_STEP)
                if self._ahead is not A_MARK:
                    self._ahead, self._doubted_at = UNKNOWN, engine.steps
                continue
            self._at_once = min(-(-carried // burst), BURSTS_PER_STEP)
            if self._ahead is not A_MARK:
                self._ahead = NO_MARK
                if self.state is READABLE:
                    self.state = IDLE
        if self.state in _TO_BE_READ:
            engine.again(self._pump)

    def _pass_end_on(self, connection: TcpConnection) -> None:
        """Tell the guest that the host's side has ended."""
        if self.state is BROKEN:
            self.abort()
        else:
            self.state = ENDED
            connection.shutdown(self._engine.now)

    def abort(self, *, reset: bool = False, ending: Ending = "reset by peer") -> None:
        """Reset the connection towards the guest and close the socket; with `reset=True` reset the peer too."""
        connection, self.connection = self.connection, None
        self._close(reset=reset)
        if connection is not None:
            connection.abort(self._engine.now, ending)

    def _break(self) -> None:
        """Handle a failed send.  What the host's side has sent before is still read, as far as the guest has room for
        it.
        """
        self._sink = None
        if self.state is ENDED:
            self.abort()
        else:
            self.state = BROKEN
            self._pump()

    def _close(self, *, reset: bool = False) -> None:
        sock, self._socket, self._sink = self._socket, None, None
        self.state = CLOSED
        if self._pending is not None:
            self._give_up()
        if sock is not None:
            self._engine.remove(sock.fileno())
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            sock.close()

    # -- the guest's side: TcpUser ------------------------------------------------------------------

    def established(self) -> None:
        if self.state in _TO_BE_READ:
            self._pump()

    def deliver(self, data: memoryview) -> int:
        sock = self._sink
        if sock is None:
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
        sock = self._sink
        if sock is None:
            return 0
        if not is_internet(sock):  # AF_UNIX has no urgent data here
            return self.deliver(data)
        try:
            return sock.send(data, socket.MSG_OOB)
        except BlockingIOError:
            self._blocked = True
        except OSError:
            self._break()
        return 0

    def end(self) -> None:
        if self._sink is not None:
            try:
                self._sink.shutdown(socket.SHUT_WR)
            except OSError:
                self._break()

    def writable(self) -> None:
        if self.state in _TO_BE_READ:
            self._pump()
            if not self._ahead:  # an unhandled event of this step may be older than this read
                self._ahead, self._doubted_at = UNKNOWN, self._engine.steps

    def keepalive(self, idle: float) -> None:
        """Probe the host's peer as often as the guest probes us: it wants to know whether its peer is there."""
        sock = self._socket
        if (
            sock is not None
            and is_internet(sock)
            and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        ):
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
        self._close(reset=why is not Closed.NORMAL)


def _at_mark(sock: socket.socket) -> bool:
    """Return whether the next byte is the urgent one (sockatmark(3)).  Only TCP sockets have urgent bytes."""
    try:
        return any(fcntl.ioctl(sock, SIOCATMARK, bytes(4)))
    except OSError:
        return False
