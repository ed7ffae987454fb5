"""Listeners of the modes "socket" and "transparent": clients reach programs inside by sockets of the namespace."""

from __future__ import annotations

import errno
import math
import socket
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Literal, TypeAlias

from netns_kit.gateway.engine import EDGE, ERROR, IN
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.inside import Source
from netns_kit.stack.user import Ending, Transport
from netns_kit.uplink.flow import Endpoint
from netns_kit.uplink.sockets import (
    RESET_ON_CLOSE,
    Ancillary,
    ask_for_errors,
    family_of,
    read_errors,
    refusal_for,
)

from .arrivals import Arrival, Place, Targets, bind_as_client
from .homes import Home
from .listeners import PKTINFO, PKTINFO_MESSAGES, Accepted, Listener, StreamListener
from .ports import PortForward, UnixSocket
from .splices import Pipes, Splice

DATAGRAMS_PER_STEP = 64
WAITING_BYTES = 65536  # of a client's datagrams that are kept until one is answered
WAITING_LEAST = 4096  # bytes that a kept datagram counts as, at least
Answer: TypeAlias = Callable[[memoryview], None]


class SocketListeners:
    """What the listeners of these modes share in one stack: the sockets of the namespace, pipes and a buffer.

    They lead to `home`, by default the stack's own namespace.

    Raises:
        FeatureUnavailable: There are no sockets of the namespace.
    """

    def __init__(self, gateway: Gateway, home: Home | None = None) -> None:
        self.gateway = gateway
        self.home: Home = home or gateway
        self.inside = self._source()
        self.pipes = Pipes(gateway.router.admission.is_free)
        self.accepted: Accepted[StreamFlow] = Accepted(gateway.engine, StreamFlow.begin)

    def _source(self) -> Source:
        return self.home.inside

    def listen(self, forward: PortForward, made: socket.socket | None = None) -> Listener:
        """Listen as `forward` says, or by the socket that was `made` so.  Raises as `Listener`."""
        return (SpliceListener if forward.protocol == "tcp" else DatagramListener)(self, forward, made)

    def waiting(self) -> int:
        """Return how many clients have no socket inside yet."""
        return len(self.accepted.clients) + self.inside.waiting()

    def close(self) -> None:
        """Close the pipes."""
        self.pipes.close()


class Published:
    """A client of a published port, as people see the flow (see `netns_kit.gateway.beside`)."""

    direction: Literal["outbound", "inbound"] = "inbound"

    def __init__(self, shared: SocketListeners, forward: PortForward, client: tuple[str, int]) -> None:
        self._gateway = gateway = shared.gateway
        self.home = shared.home
        self._client = client
        self._ends: tuple[Endpoint, Endpoint] | None = None  # once somebody wants to know
        self.cause: object = forward
        self._forward = forward
        self.protocol: Transport = forward.protocol
        self.id = gateway.next_flow_id()
        self.opened = gateway.engine.now
        self.ending: Ending = "finished"

    @property
    def host(self) -> Endpoint | None:
        address, port = self._client
        return Endpoint(address, port) if address else None

    @property
    def guest(self) -> Endpoint:
        return self.ends()[0]

    @property
    def remote(self) -> Endpoint:
        return self.ends()[1]

    def ends(self) -> tuple[Endpoint, Endpoint]:
        """Return both ends of the connection inside; before there is one, where it may lead."""
        if self._ends is not None:
            return self._ends
        forward, own = self._forward, self.home.guest(self._gateway.subnet)
        sock = self._inner()
        if sock is not None and family_of(sock) != socket.AF_UNIX:
            with suppress(OSError):
                remote = Endpoint(*sock.getsockname()[:2])
                self._ends = Endpoint(*sock.getpeername()[:2]), remote
                return self._ends
        guest = own if forward.guest is None or isinstance(forward.guest, UnixSocket) else forward.guest
        return Endpoint(guest, forward.guest_port), Endpoint(own, 0)

    def _inner(self) -> socket.socket | None:
        """Return the socket inside."""
        raise NotImplementedError


class SocketListener(Listener):
    """A port or a unix socket of the host that leads to a socket inside."""

    _kind: int
    """The type of the socket inside."""

    def __init__(
        self, shared: SocketListeners, forward: PortForward, made: socket.socket | None = None
    ) -> None:
        self._shared = shared
        super().__init__(shared.gateway, forward, made, shared.home)

    def _begin(self) -> None:
        self._targets = Targets(self._gateway, self._home, self.forward, self._kind)
        super()._begin()


class SpliceListener(SocketListener, StreamListener):
    """A TCP port or a unix socket of the host that leads to one inside."""

    _kind = int(socket.SOCK_STREAM)

    def _begin(self) -> None:
        if family_of(self._socket) != socket.AF_UNIX:  # what it accepts has this from it
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        super()._begin()

    def _on_events(self, events: int) -> None:
        super()._on_events(events)
        self._shared.accepted.lead_on()

    def _has_room(self) -> bool:
        coming = self._shared.waiting()
        return super()._has_room() and (not coming or self._gateway.router.admission.is_free(coming))

    def _accepted(self, sock: socket.socket, client: Any) -> None:
        address = client[:2] if isinstance(client, tuple) else ("", 0)
        places = self._targets.for_client(address)
        self._shared.accepted.clients.append((self._flow(address, sock, places), sock))

    def _flow(self, client: tuple[str, int], sock: socket.socket, places: list[Place]) -> StreamFlow:
        return StreamFlow(self._shared, self.forward, client, sock, places)


class StreamFlow(Published):
    """A client's connection, on its way in and then joined to one inside."""

    def __init__(
        self,
        shared: SocketListeners,
        forward: PortForward,
        client: tuple[str, int],
        outer: socket.socket,
        places: list[Place],
    ) -> None:
        gateway = shared.gateway
        super().__init__(shared, forward, client)
        self._outer, self._pipes = outer, shared.pipes
        self._splice: Splice | None = None
        self._arrival = Arrival(shared.inside, gateway.engine, places, self._joined)
        self._is_watched = False
        gateway.begun(self)

    def begin(self, outer: socket.socket) -> None:
        """Lead the client, whose socket is `outer`, to a program inside, unless it has been ended meanwhile."""
        if outer.fileno() < 0:
            return
        self._arrival.begin()
        if self._splice is None and outer.fileno() >= 0:  # it takes its time
            with suppress(OSError):
                self._gateway.engine.add(outer.fileno(), self._on_outer, EDGE)
                self._is_watched = True

    def _on_outer(self, events: int) -> None:
        if events & ERROR:  # it has reset the connection, and waits no more; an end alone tells nothing
            self.end("reset by peer" if self.direction == "inbound" else "reset by guest")

    def _unwatch(self) -> None:
        self._is_watched = False
        self._gateway.engine.remove(self._outer.fileno())

    def _inner(self) -> socket.socket | None:
        return None if self._splice is None else self._splice.inner

    @property
    def state(self) -> str:
        return "connecting" if self._splice is None else "established"

    @property
    def carried(self) -> tuple[int, int]:
        splice = self._splice
        return (0, 0) if splice is None else (splice.outward.carried, splice.inward.carried)

    def _joined(self, inner: socket.socket | OSError, _: Place) -> None:
        gateway = self._gateway
        if self._is_watched:
            self._unwatch()
        if isinstance(inner, OSError):
            self._refused(inner)
            return
        try:
            self._splice = Splice(gateway.engine, self._pipes, self._outer, inner, self._parted)
        except OSError as error:
            inner.close()
            self._refused(error)
        else:
            if gateway.watcher is not None:
                self.ends()

    def _parted(self, splice: Splice) -> None:
        if splice.reset_by is not None:
            by_guest = (splice.reset_by is splice.inner) == (self.direction == "inbound")
            self.ending = "reset by guest" if by_guest else "reset by peer"
        self._gateway.ended(self)

    def _refused(self, error: OSError) -> None:
        """Reset the client: nobody inside takes it."""
        self._gateway.refused(self, refusal_for(error.errno or errno.EIO))
        self._reset()

    def _reset(self) -> None:
        if family_of(self._outer) != socket.AF_UNIX:
            self._outer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._outer.close()
        self._gateway.ended(self)

    def end(self, ending: Ending = "ended") -> None:
        self.ending = ending
        if self._splice is not None:
            self._splice.close(reset=True)
        else:
            self._arrival.close()
            if self._is_watched:
                self._unwatch()
            self._reset()


class DatagramListener(SocketListener):
    """A UDP port of the host that leads to one inside, by a socket for each client.  Closing it ends its flows.

    Of too many clients, the one who has been silent longest makes room.
    """

    _kind = int(socket.SOCK_DGRAM)

    def _begin(self) -> None:
        super()._begin()
        self._flows = OrderedDict[tuple[Any, bytes], DatagramFlow]()  # the last to be used is last
        self._socket.setsockopt(*PKTINFO[family_of(self._socket)], 1)
        self._engine.add(self._socket.fileno(), self._on_events, IN)
        self._gateway.router.beside.append(self._close_idle)

    def close(self) -> None:
        self._gateway.router.beside.remove(self._close_idle)
        self._engine.remove(self._socket.fileno())
        self._socket.close()
        for flow in list(self._flows.values()):
            flow.end()

    def _on_events(self, _: int) -> None:
        buffer = self._shared.pipes.buffer
        for _ in range(DATAGRAMS_PER_STEP):
            try:
                size, ancillary, _, client = self._socket.recvmsg_into([buffer], 128)
            except BlockingIOError:
                return
            except OSError:  # of an earlier one that was sent
                continue
            told = [each for each in ancillary if each[:2] in PKTINFO_MESSAGES]
            key = client, told[0][2] if told else b""
            flow = self._flows.get(key)
            if flow is None:
                flow = self._open(client, key, told)
            else:
                self._flows.move_to_end(key)
            if flow is not None:
                flow.from_client(bytes(buffer[:size]))
            if self._engine.is_late:
                return

    def _open(self, client: Any, key: tuple[Any, bytes], told: Ancillary) -> DatagramFlow | None:
        if not self._gateway.router.make_room():
            return None
        if len(self._flows) >= self._gateway.stack.limits.udp_flows:
            self._close_idle()
        places = self._targets.for_client(client[:2])
        flow = self._flow(client, places, partial(self._answer, told, client))
        flow.ended = partial(self._flows.pop, key, None)
        self._flows[key] = flow
        flow.begin()
        return flow

    def _flow(self, client: Any, places: list[Place], answer: Answer) -> DatagramFlow:
        return DatagramFlow(self._shared, self.forward, client, places, answer)

    def _close_idle(self) -> bool:
        """End the flow of the client who has been silent longest.  Return whether there was one."""
        flow = next(iter(self._flows.values()), None)
        if flow is not None:
            flow.end("made room")
        return flow is not None

    def _answer(self, told: Ancillary, client: Any, data: memoryview) -> None:
        with suppress(OSError):  # lost, as datagrams are
            self._socket.sendmsg([data], told, 0, client)


class DatagramFlow(Published):
    """A client's datagrams, and the answers to them.

    It ends when nothing has crossed for as long as a flow of the stack may be idle (see `netns_kit.stack.Limits`).

    Args:
        places: Where to try.  The next one is tried when the kernel says that nobody has the port, as long as nothing
            has come back.
        answer: Sends a datagram to the client.
    """

    def __init__(
        self, shared: SocketListeners, forward: PortForward, client: Any, places: list[Place], answer: Answer
    ) -> None:
        super().__init__(shared, forward, client[:2])
        self._shared = shared
        self.timer_at = self.timer_entry = math.inf
        self.ended: Callable[[], object] = int
        self._places = places
        self._answer = answer
        self._socket: socket.socket | None = None
        self._waiting: list[bytes] = []  # for the next place, if this one refuses, until one is answered
        self._room = WAITING_BYTES
        self._from, self._to = 0, 0
        self._answered = self._is_over = False
        self._last = shared.gateway.engine.now

    def begin(self) -> None:
        """Get a socket inside."""
        gateway = self._gateway
        gateway.begun(self)
        gateway.engine.timers.arm(self, self._last + self._lifetime)
        self._shared.inside.take(self._places[0].kind, self._take)

    @property
    def state(self) -> str:
        return "open"

    @property
    def carried(self) -> tuple[int, int]:
        return self._from, self._to

    @property
    def _lifetime(self) -> float:
        limits = self._gateway.stack.limits
        return limits.udp_stream if self._answered else limits.udp_one_way

    def _inner(self) -> socket.socket | None:
        return self._socket

    def from_client(self, data: bytes) -> None:
        """Carry a datagram inside."""
        self._last = self._gateway.engine.now
        if not self._answered and len(data) <= self._room:
            self._room -= max(len(data), WAITING_LEAST)
            self._waiting.append(data)
        if self._socket is not None:
            self._send(self._socket, data)

    def _send(self, sock: socket.socket, data: bytes) -> None:
        place = self._places[0]
        for _ in range(2):  # an error that waits is raised by the next send, which then sends nothing
            try:
                self._to += sock.sendto(data, place.address) if place.source else sock.send(data)
            except BlockingIOError:
                return
            except OSError:
                if self._refused(sock):
                    return
            else:
                return

    def _take(self, sock: socket.socket | OSError) -> None:
        if self._is_over:
            if not isinstance(sock, OSError):
                sock.close()
            return
        place = self._places[0]
        if isinstance(sock, OSError):
            self._try_next()
            return
        try:
            ask_for_errors(sock)
            if place.source is not None:
                bind_as_client(sock, place.source)
            else:
                sock.connect(place.address)
            self._gateway.engine.add(sock.fileno(), self._on_events, IN)
        except OSError:
            sock.close()
            self._try_next()
            return
        self._socket = sock
        self._send_waiting(sock)

    def _send_waiting(self, sock: socket.socket) -> None:
        """Send what the client has sent so far, as long as this place is the one that is tried."""
        place = self._places[0]
        for data in list(self._waiting):
            if self._socket is sock and self._places[0] is place:
                self._send(sock, data)

    def _on_events(self, events: int) -> None:
        sock = self._socket
        if sock is None or (events & ERROR and self._refused(sock)):
            return
        buffer = self._shared.pipes.buffer
        for _ in range(DATAGRAMS_PER_STEP):
            try:
                size = sock.recv_into(buffer)
            except BlockingIOError:
                return
            except OSError:
                if self._refused(sock):
                    return
                continue
            if not self._answered:
                self._answered, self._waiting = True, []
            self._last = self._gateway.engine.now
            self._from += size
            self._answer(buffer[:size])
            if self._gateway.engine.is_late:
                return

    def _refused(self, sock: socket.socket) -> bool:
        """Read the errors that wait.  Where nobody has the port, try the next place, and return True."""
        refused = any(each.error == errno.ECONNREFUSED for each in read_errors(sock))
        if not refused or self._answered:
            return False
        source = self._places[0].source
        if source is not None and len(self._places) > 1 and self._places[1].source == source:
            del self._places[0]  # this socket serves as well: another may not have the client's port yet
            self._send_waiting(sock)
            return True
        self._drop()
        self._try_next()
        return True

    def _try_next(self) -> None:
        if len(self._places) == 1:
            self.end()
            return
        del self._places[0]
        self._shared.inside.take(self._places[0].kind, self._take)

    def _drop(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            self._gateway.engine.remove(sock.fileno())
            sock.close()

    def handle_timer(self, now: float) -> None:
        """End the flow if it has been idle for its time, else wait for the rest of it."""
        due = self._last + self._lifetime
        if due > now:
            self._gateway.engine.timers.arm(self, due)
        else:
            self.end("idle")

    def end(self, ending: Ending = "ended") -> None:
        if self._is_over:
            return
        self.ending = ending
        self._is_over = True
        self.timer_at = math.inf
        if self._gateway.watcher is not None:
            self.ends()
        self._drop()
        self.ended()
        self._gateway.ended(self)
