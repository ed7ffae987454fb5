"""What interception has of a flow: the way out, the handler's end, and how the two are joined.

Joining.  The engine stops taking the guest's bytes (`hold`), the caller's side passes on what it has, and hands the
uplink's socket over (`go_on`).  From then on the guest's bytes go there.  What the handler has sent to the guest is
still read from the pair of sockets, up to its end; then a plain relay takes the place of this one.
"""

from __future__ import annotations

import array
import errno
import socket
from contextlib import suppress
from typing import Literal

from netns_kit.arguments import Address
from netns_kit.stack import IcmpError, Refusal, TcpConnection, UdpFlow
from netns_kit.stack.user import NOBODY
from netns_kit.stack.wire.flow_key import FlowKey
from netns_kit.uplink.dial import Connected, Dial
from netns_kit.uplink.flow import Flow
from netns_kit.uplink.in_memory import Waiting
from netns_kit.uplink.sockets import RESET_ON_CLOSE, prepare_stream, set_tos

from .engine import IN, OUT
from .flow_router import Routed
from .gateway import Gateway
from .relay.dialled import EVENTS, Dialled
from .relay.peek import Judge, PeekingRelay
from .relay.tcp import BROKEN, CLOSED, IDLE, UNKNOWN, TcpRelay
from .served import DATAGRAM, LONGEST, EndingSeen, Opened, ServedConnection, ServedDatagrams
from .serving import Serving

CONNECTED, REFUSED = b"c", b"r"  # what a reply begins with

_ERRORS = {
    Refusal.RESET: errno.ECONNREFUSED,
    Refusal.NET_UNREACHABLE: errno.ENETUNREACH,
    Refusal.HOST_UNREACHABLE: errno.EHOSTUNREACH,
    Refusal.PROHIBITED: errno.EACCES,
    Refusal.DROP: errno.ETIMEDOUT,
}


class UpstreamDial(Dialled):
    """A dial whose socket the caller's side gets.

    Where the uplink is in memory, the caller's side brings that socket too, as for a flow of the guest's.

    Args:
        of: The intercepted flow.
        number: Its number.
        found: The flow as the uplink is asked about it, and its target.
        reply: Where the socket, or the error, is sent.

    Raises:
        OSError: The caller's side cannot be watched.
    """

    __slots__ = ("_flow", "_gateway", "_number", "_of", "_reply", "_serving", "_target", "id", "service")

    def __init__(self, of: _Intercepted, number: int, found: Routed, reply: socket.socket) -> None:
        self._of = of
        self._serving = serving = of.teller
        self._gateway = gateway = serving.gateway
        self._engine = gateway.engine
        self._failed = gateway.router.cannot_dial
        self._pending = None
        self._number = number
        self._flow, self._target = found
        self._reply = reply
        self.service = serving.world
        self.id = 0  # of what the caller's side decides about
        self._engine.add(reply.fileno(), self._on_reply, IN)

    def run(self, opened: TcpConnection) -> None:
        """Dial."""
        router = self._gateway.router
        self.begin(router.dial(self._flow, self._target, ttl=opened.ttl, tos=opened.tos))
        router.limit(self)

    def open_datagrams(self, pair: list[socket.socket]) -> None:
        """Have the router open a socket, or take the pair for it."""
        self._gateway.router.open_datagrams(self._flow, self._target, self._opened, pair)

    def _opened(self, found: socket.socket | Refusal | Waiting) -> None:
        if isinstance(found, Refusal):
            self.refuse(found)
        elif isinstance(found, Waiting):
            self.begin(found)
        else:
            self.give(found)

    def begin(self, dial: Dial) -> None:
        if not isinstance(dial, Waiting):
            super().begin(dial)
        elif not self.service:  # nobody is there yet
            self._refused(Refusal.HOST_UNREACHABLE)
        else:
            flow, serving = self._flow, self._serving
            self.id = serving.next_id()
            serving.flows[self.id] = self
            name = self._gateway.name_of(flow.destination.address)
            transport: Literal["tcp", "udp"] = "udp" if flow.protocol == "udp" else "tcp"
            guest, there = flow.source, flow.destination
            serving.note(
                Opened(self.id, self.service, transport, guest, there, dial.target, name, self._number)
            )

    # -- what the caller's side decides ---------------------------------------------------------------

    def join(self, sock: socket.socket) -> None:
        """Hand a socket that the caller's side has made back to it."""
        del self._serving.flows[self.id]
        self.give(sock)

    def turn_away(self, why: Refusal) -> None:
        """Refuse the dial."""
        del self._serving.flows[self.id]
        self._refused(why)

    # -- the end --------------------------------------------------------------------------------------

    def _on_reply(self, _: int) -> None:
        """Give up: the caller's side has."""
        self.cut()

    def cut(self) -> None:
        """Give up."""
        self._give_up()
        self._end()

    def _connected(self, sock: socket.socket) -> None:
        self._engine.remove(sock.fileno())
        prepare_stream(sock)
        self.give(sock)

    def give(self, sock: socket.socket) -> None:
        """Hand a socket to the caller's side, if that still waits, and close it here."""
        send_socket(self._reply, sock, self.id)
        self._end()

    def refuse(self, why: Refusal | IcmpError) -> None:
        if self._reply.fileno() >= 0:
            super().refuse(why)

    def _refused(self, why: Refusal | IcmpError) -> None:
        self._of.why = why
        send_refusal(self._reply, why)
        self._end()

    def _end(self) -> None:
        if self._serving.flows.get(self.id) is self:
            self._serving.ended(self.id, self.service, "closed here")
        if self._reply.fileno() >= 0:
            self._engine.remove(self._reply.fileno())
            self._reply.close()
            self._of.dials.discard(self)

    def _on_events(self, events: int) -> None:
        """Do nothing: the socket is the caller's now."""


def send_socket(reply: socket.socket, sock: socket.socket, number: int = 0) -> None:
    """Hand a socket over to the caller's side with the number of what it has made it for, and close it here."""
    rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()])
    with suppress(OSError):  # the caller's side has gone
        reply.sendmsg([CONNECTED + str(number).encode()], [rights], socket.MSG_NOSIGNAL)
    sock.close()


def send_refusal(reply: socket.socket, why: Refusal | IcmpError) -> None:
    """Tell the caller's side how a flow is refused, by an errno."""
    number = _ERRORS[why] if isinstance(why, Refusal) else errno.EHOSTUNREACH
    with suppress(OSError):  # the same
        reply.send(REFUSED + str(number).encode(), socket.MSG_NOSIGNAL)


def target_for(gateway: Gateway, flow: Flow, address: Address | None, port: int | None) -> Routed | Refusal:
    """Return another target for a flow, and the flow as it would be to there; or how that is refused."""
    there = flow.destination.address if address is None else address
    local = gateway.subnet.of(there)
    if local is None:
        return Refusal.NET_UNREACHABLE
    guest = flow.source.address
    if there.version != guest.version:
        guest = gateway.enforcer.address_of(guest, there.version) or local.guest
    remote_port = flow.destination.port if port is None else port
    key = FlowKey(guest.packed, there.packed, flow.source.port, remote_port).pack()
    found = gateway.router.route("udp" if flow.protocol == "udp" else "tcp", key)
    return Refusal.PROHIBITED if found is None else found


class _Intercepted:
    """What a connection and a UDP flow have in common that a handler has."""

    def _intercept(self, serving: Serving, found: Routed) -> None:
        self.teller, self._gateway, self._found = serving, serving.gateway, found
        self.why: Refusal | IcmpError | None = None
        self.dials: set[UpstreamDial] = set()

    def _way_out(
        self, number: int, key: bytes, address: Address | None, port: int | None, reply: socket.socket
    ) -> UpstreamDial | None:
        """Return the dial of a way out, which is to begin; None: it is refused already."""
        found: Routed | Refusal = self._found
        if address is not None or port is not None:
            found = target_for(self._gateway, self._found[0], address, port)
        why = found if isinstance(found, Refusal) else None
        if why is None and not self._gateway.router.make_room(key):
            why = Refusal.NET_UNREACHABLE
        try:
            dial = UpstreamDial(self, number, self._found if isinstance(found, Refusal) else found, reply)
        except OSError:  # the kernel's limit on polled descriptors is reached
            reply.close()
            return None
        self.dials.add(dial)
        if why is not None:
            dial.refuse(why)
            return None
        return dial

    def _over(self) -> None:
        for each in list(self.dials):
            each.cut()


class InterceptedConnection(_Intercepted, ServedConnection):
    """A connection that a handler has.

    Args:
        serving: What has all such flows.
        service: The number under which it was asked for.
        connection: The guest's connection, whose SYN is on hold.
        found: The same, as the uplink was asked about it, and where it goes.
    """

    def __init__(self, serving: Serving, service: int, connection: TcpConnection, found: Routed) -> None:
        super().__init__(serving, service, connection)
        self._intercept(serving, found)
        self._upstream: socket.socket | None = None
        self._way = 0  # the number of that, if it ends in the caller's process
        self._events = 0  # what the engine has told of that
        self._is_held = False
        self._ended_late = False  # whether the guest has ended since

    def join(self, sock: socket.socket) -> None:
        """Go on with the socket that the caller's side has made, when the policy has looked at the first bytes."""
        connection = self.connection
        judging = None if connection is None else self._gateway.router.judging(connection, self._found[0])
        if connection is None or judging is None:
            super().join(sock)
            return
        connection.user = looking = Looking(self, connection, *judging)
        looking.begin(Connected(sock))

    # -- the way out ----------------------------------------------------------------------------------

    def dial(self, address: Address | None, port: int | None, reply: socket.socket) -> None:
        """Dial the way out, and send what comes of it to the caller's side."""
        connection = self.connection
        if connection is None:
            reply.close()
            return
        dial = self._way_out(self.flow, connection.key, address, port, reply)
        if dial is not None:
            dial.run(connection)

    def turn_back(self) -> None:
        """Tell the guest what the way out was refused with; if it is connected already, reset it."""
        connection = self.connection
        self._over()
        if connection is not None and connection.is_on_hold and self.why is not None:
            self.refuse(self.why)
        elif connection is not None:
            self._gateway.router.abort(connection, reset=True)

    def release(self) -> None:
        """Let the connection be carried as if nobody had intercepted it."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        self._over()
        self._serving.ended(self.flow, self.service, "finished")
        connection.user = None
        why = self._gateway.router.let_pass(connection, *self._found)
        if why is not None:
            connection.refuse(why)

    # -- joining --------------------------------------------------------------------------------------

    def hold(self) -> str:
        """Take nothing more from the guest, and return "held".

        Or return "gone" if it has gone, or "looking" if the policy still looks at its first bytes.
        """
        if self.connection is None:
            return "gone"
        if isinstance(self.connection.user, Looking):
            return "looking"
        if self._sink is None:
            return "gone"
        self._sink, self._is_held = None, True
        return "held"

    def go_on(self, sock: socket.socket, way: int) -> bool:
        """Take the way out and its number, and return whether the connection is still there."""
        connection, engine = self.connection, self._engine
        if connection is None or not self._is_held:
            sock.close()
            return False
        try:
            engine.add(sock.fileno(), self._on_upstream, EVENTS)
        except OSError:
            sock.close()
            self.abort()
            return False
        self._sink = self._upstream = sock
        self._way = way
        if prepare_stream(sock):
            connection.host = sock.getsockname()[:2]
        if connection.tos:
            set_tos(sock, connection.tos)
        if self._ended_late:
            super().end()
        connection.resume(engine.now)
        return True

    def _on_upstream(self, events: int) -> None:
        self._events |= events
        if events & OUT and self._blocked and self.connection is not None:
            self._blocked = False
            self.connection.resume(self._engine.now)

    def end(self) -> None:
        self._ended_late = self._is_held and self._sink is None
        super().end()

    def _pass_end_on(self, connection: TcpConnection) -> None:
        sock, pair = self._upstream, self._socket
        if sock is None or pair is None or self.state is BROKEN:
            super()._pass_end_on(connection)
            return
        engine = self._engine
        plain = self._made_of(connection)
        plain._socket = plain._sink = sock
        plain.state, plain._blocked = IDLE, self._blocked
        plain._ahead, plain._doubted_at = UNKNOWN, engine.steps
        self.connection = self._socket = self._sink = self._upstream = None
        self.state = CLOSED
        engine.remove(pair.fileno())
        pair.close()
        connection.user = plain
        engine.replace(sock.fileno(), plain._on_events)
        self._over()
        self._serving.ended(self.flow, self.service, "finished")
        plain._on_events(self._events)

    def _made_of(self, connection: TcpConnection) -> TcpRelay:
        """Return what takes this relay's place; it tells how the way out ends, if that is of the caller's process."""
        way, self._way = self._way, 0
        if not way:
            return TcpRelay(self._engine, connection)
        serving = self.teller
        served = ServedConnection(serving, serving.world, connection)
        served.flow, served._heard_all = way, self._heard_all
        serving.flows[way] = served
        return served

    # -- the end --------------------------------------------------------------------------------------

    def cut(self) -> None:
        if self._upstream is None:  # else it was handed back, and goes on
            super().cut()

    def _told(self, why: EndingSeen) -> None:
        way, self._way = self._way, 0
        if way:
            self._serving.ended(way, self.teller.world, "finished" if self._heard_all else why)
        super()._told(why)

    def lost(self) -> None:
        """Note that the connection has ended while the policy was looking."""
        if self.connection is not None:
            self.connection = None
            self._over()
            self._told("reset")

    def _close(self, *, reset: bool = False) -> None:
        self._over()
        sock, self._upstream = self._upstream, None
        if sock is not None:
            self._engine.remove(sock.fileno())
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            sock.close()
        super()._close(reset=reset)


class Looking(PeekingRelay):
    """An intercepted connection while the policy looks at its first bytes, which the handler does not get before.

    Args:
        served: What goes on when it may pass.
        connection: The connection.
        judge, waits: See `PeekingRelay`.
    """

    __slots__ = ("_served",)

    def __init__(
        self, served: InterceptedConnection, connection: TcpConnection, judge: Judge, waits: bool
    ) -> None:
        gateway = served._gateway
        super().__init__(gateway.engine, connection, gateway.router.cannot_dial, judge, waits=waits)
        self._served = served

    def _made_plain(self) -> TcpRelay:
        return self._served

    def _close(self, *, reset: bool = False) -> None:
        super()._close(reset=reset)
        self._served.lost()


class InterceptedUdp(_Intercepted, ServedDatagrams):
    """A UDP flow that a handler has.

    Args:
        serving: What has all such flows.
        service: The number under which it was asked for.
        flow: The flow.
        found: The same, as the uplink was asked about it, and where it goes.
    """

    def __init__(self, serving: Serving, service: int, flow: UdpFlow, found: Routed) -> None:
        super().__init__(serving, service, flow)
        self._intercept(serving, found)

    def dial(
        self, address: Address | None, port: int | None, reply: socket.socket, pair: list[socket.socket]
    ) -> None:
        """Open a socket for the way out, or take a pair for it, and hand it to the caller's side."""
        dial = self._way_out(self._flow.id, self._flow.key, address, port, reply)
        if dial is not None:
            dial.open_datagrams(pair)
        for each in pair:
            each.close()

    def expired(self, flow: UdpFlow) -> None:
        self._over()
        super().expired(flow)

    def turn_back(self) -> None:
        """Tell the guest what the way out was refused with, and forget the flow."""
        if isinstance(self.why, Refusal):
            self._turn_away(self.why)
        else:
            self.cut()

    def _turn_away(self, why: Refusal) -> None:
        flow = self._flow
        self.expired(flow)
        flow.user = NOBODY
        flow.turn_away(why)
        flow.refuse(why)

    def release(self, rest: socket.socket) -> None:
        """Let the flow be carried as if nobody had intercepted it.

        Args:
            rest: The handler's end, with the datagrams that it has not taken.
        """
        flow, router = self._flow, self._gateway.router
        while self._socket is not None and self._has_more():
            self._on_events(IN)
        kept = []
        while True:
            try:
                record = rest.recv(LONGEST)
            except OSError:
                break
            if not record:
                break
            kept.append(record[len(DATAGRAM) :])
        rest.close()
        self.expired(flow)
        flow.user = NOBODY
        why = router.let_pass(flow, *self._found)
        if why is not None:
            flow.turn_away(why)
            flow.refuse(why)
            return
        for payload in kept:
            flow.user.datagram(flow, memoryview(payload), flow.marks, 0)
        router.flush()

    def _has_more(self) -> bool:
        """Return whether the handler has sent what was not passed on yet."""
        try:
            return self._socket is not None and bool(self._socket.recv(1, socket.MSG_PEEK))
        except OSError:
            return False
