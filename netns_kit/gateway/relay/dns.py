"""DNS: the server's queries and answers, over few sockets for each upstream, whoever asks.

Over UDP an upstream is spoken to from a set of sockets, each on a port that the kernel has chosen at random.  One
that has asked `QUERIES_PER_SOCKET` times is followed by another, up to `SOCKETS_PER_UPSTREAM` of them; then they take
turns.  So the ports are not those of a minute ago (RFC 5452 section 9.2), and a storm takes no more descriptors than
that.  Over TCP an upstream has one connection, and each zone transfer one of its own, which is read no faster than
the client reads.  When nothing is under way all are closed.

An answer is heard from where the query went, for the sockets are connected, and on the very socket that it left by.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import lru_cache, partial
from ipaddress import ip_address

from netns_kit.dns import Action, Answer, DnsProxy, DnsServer, Send, Upstream, Zone
from netns_kit.dns.cache import Cache
from netns_kit.gateway.engine import IN, Engine
from netns_kit.stack import Refusal, TcpConnection, UdpFlow
from netns_kit.stack.user import Transport
from netns_kit.stack.wire import flow_key
from netns_kit.uplink.flow import Endpoint, Target
from netns_kit.uplink.sockets import DATAGRAMS_PER_STEP, MAX_DATAGRAM, socket_address
from netns_kit.uplink.uplink import Uplink

from .dns_streams import ClientStream, ResolverStream, Turn

QUERIES_PER_SOCKET = 64
SOCKETS_PER_UPSTREAM = 8
IDS_KEPT = 256  # of a socket, beyond those that are awaited
HALF_OPEN_MAX = 256  # connections whose handshake the guest has not finished: the oldest is reset
CLIENTS_MAX = 1024  # connections of the guest: the one that has been quiet longest is reset

_Route = Callable[[Transport, bytes], Target | Refusal]
"""Returns the resolvers for a flow of that key, as they are now, or how it would be refused."""


class DnsRelay:
    """The DNS server and its sockets.

    Args:
        failed: Called with what the uplink's hook has raised.
        route: Asked again for each query but the first of a flow, so that an old connection asks new resolvers.
    """

    def __init__(
        self,
        engine: Engine,
        uplink: Uplink,
        zone: Zone,
        failed: Callable[[BaseException], object],
        route: _Route,
    ) -> None:
        self.queued = 0  # bytes of answers that clients do not read: see `ClientStream`
        self._half_open: dict[ClientStream, None] = {}  # the oldest first
        self._clients: OrderedDict[ClientStream, None] = OrderedDict()  # the quiet first
        self._opening: UdpFlow | None = None  # has just been routed
        self._route = route
        self._engine = engine
        self._uplink = uplink
        self._failed = failed
        self._server = DnsServer(
            zone,
            DnsProxy(random_id=lambda: int.from_bytes(os.urandom(2), "big")),
            cache=Cache() if uplink.dns.cache else None,
            hook=uplink.dns.hook,
            failed=failed,
        )
        self._resolvers: tuple[Endpoint, ...] | None = None
        self._sockets: dict[Upstream, list[_Socket]] = {}  # the one that asks is the last
        self._streams: dict[Upstream, ResolverStream] = {}
        self._transfers: dict[tuple[Upstream, int], ResolverStream] = {}  # by the id of the query
        self._per_socket = QUERIES_PER_SOCKET
        self.timer_at = self.timer_entry = math.inf

    def udp_opened(self, flow: UdpFlow, target: Target) -> None:
        """Take the queries of `flow`.  The resolvers are those of `target`, for everybody from now on."""
        self._set_resolvers(target.candidates)
        flow.user = self
        self._opening = flow

    def tcp_opened(self, connection: TcpConnection, target: Target) -> None:
        """Accept `connection` and take its queries, as `udp_opened` does."""
        self._set_resolvers(target.candidates)
        if len(self._half_open) >= HALF_OPEN_MAX:
            next(iter(self._half_open)).abort()
        if len(self._clients) >= CLIENTS_MAX:
            next(iter(self._clients)).abort()
        connection.user = stream = ClientStream(self._engine, connection, self)
        self._half_open[stream] = None
        self._clients[stream] = None
        connection.accept(self._engine.now)

    def opened(self, stream: ClientStream) -> None:
        """Note that the guest has finished the handshake."""
        self._half_open.pop(stream, None)

    def gone(self, stream: ClientStream) -> None:
        """Forget a connection that is over."""
        self._half_open.pop(stream, None)
        self._clients.pop(stream, None)

    def relieve(self) -> None:
        """Cut off the client that leaves most unread."""
        max(self._clients, key=lambda each: each.unread).abort()

    def _set_resolvers(self, resolvers: tuple[Endpoint, ...]) -> None:
        if resolvers is not self._resolvers:
            self._resolvers = resolvers
            found = {"": resolvers, **self._uplink.dns.domains}
            manner = self._uplink.dns_manner()
            self._per_socket = 1 if manner.ports else QUERIES_PER_SOCKET
            self._server.set_upstreams(
                {domain: [(str(host), port) for host, port in each] for domain, each in found.items()}, manner
            )

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        if not self._may_ask("udp", flow, flow.key):
            return
        size = segment_size or len(payload) or 1
        address = _client(flow.key)
        for start in range(0, len(payload), size):
            query = bytes(payload[start : start + size])
            self._do(self._server.query(query, flow, address, self._engine.now) or [])
        self._wait()

    def _may_ask(self, protocol: Transport, client: UdpFlow | ClientStream, key: bytes) -> bool:
        """Return whether the client's flow is still carried; if so, the resolvers are as they are now."""
        if client is self._opening:
            self._opening = None
            return True
        found = self._route(protocol, key)
        if isinstance(found, Refusal):
            return False
        self._set_resolvers(found.candidates)
        return True

    def expired(self, flow: UdpFlow) -> None:
        pass  # its answer may still come, and can still be sent

    def ask(self, query: bytes, turn: Turn, key: bytes) -> bool:
        """Take a query of a client's stream.  Return False if it was none, or is not allowed any more."""
        self._clients.move_to_end(turn.stream)
        if not self._may_ask("tcp", turn.stream, key):
            return False
        actions = self._server.query(query, turn, _client(key), self._engine.now, "tcp")
        if actions is None:
            return False
        self._do(actions)
        self._wait()
        return True

    def name_of(self, address: bytes) -> str | None:
        """Return what the address is called, if that is known: see `DnsServer.name_of`."""
        return self._server.name_of(address)

    def close(self) -> None:
        """Close the sockets.  Calling it again is fine."""
        for upstream in [*self._sockets, *self._streams]:
            self._close(upstream)
        for transfer in list(self._transfers):
            self._transfers.pop(transfer).close()

    def stats(self) -> dict[str, int]:
        """Return the server's counters, and how many sockets there are."""
        sockets = sum(map(len, self._sockets.values())) + len(self._streams) + len(self._transfers)
        return {**self._server.stats(), "sockets": sockets, "clients": len(self._clients)}

    def handle_timer(self, now: float) -> None:
        """Ask again, or another upstream, what has not been answered."""
        for (upstream, ident), stream in self._transfers.items():
            if stream.is_paused:
                self._server.proxy.prolong(upstream, ident, now)
        self._do(self._server.handle_timer(now))
        self._wait()

    def _wait(self) -> None:
        deadline = self._server.deadline
        if self._transfers:
            awaited = self._server.proxy.awaited
            for upstream, ident in [each for each in self._transfers if each[1] not in awaited(each[0])]:
                self._transfers.pop((upstream, ident)).close()
        if deadline == math.inf and (self._sockets or self._streams):  # nothing is under way
            self.close()
        self._engine.timers.arm(self, deadline)

    def _do(self, wanted: list[Action]) -> None:
        now, actions = self._engine.now, deque(wanted)
        while actions:
            action = actions.popleft()
            if isinstance(action, Send):
                if not self._send(action):
                    actions += self._server.upstream_failed(action.upstream, now)
            elif isinstance(action.client, UdpFlow):
                action.client.send(action.message, now)
                action.client.close()  # one question, one answer: DNS clients use a port once
            elif isinstance(action.client, Turn):
                action.client.answer(action.message, now)

    # -- upstreams ----------------------------------------------------------------------------------

    def _send(self, action: Send) -> bool:
        upstream, message, transfer = action
        try:
            if transfer:
                self._transfer(upstream, message)
            elif upstream.transport == "tcp":
                stream = self._streams.get(upstream) or self._connect(upstream)
                stream.send(message)
            else:
                asking = self._socket_for(upstream)
                asking.ids.add(int.from_bytes(message[:2], "big"))
                if len(asking.ids) >= asking.look_at:
                    asking.ids &= self._server.proxy.awaited(upstream)
                    asking.look_at = 2 * len(asking.ids) + IDS_KEPT
                asking.socket.send(message)
        except BlockingIOError:
            return True  # lost, as datagrams are; the proxy asks again
        except OSError:
            self._close(upstream)
            return False
        return True

    def _socket_for(self, upstream: Upstream) -> _Socket:
        """Return the socket to ask from now."""
        sockets = self._sockets.setdefault(upstream, [])
        if not sockets or sockets[-1].asked >= self._per_socket:
            sockets.append(self._another(upstream, sockets))
        sockets[-1].asked += 1
        return sockets[-1]

    def _another(self, upstream: Upstream, sockets: list[_Socket]) -> _Socket:
        """Return a new socket; the oldest, if there are enough or no more to be had."""
        if len(sockets) < SOCKETS_PER_UPSTREAM:
            try:
                asking = _Socket(self._open(upstream))
            except OSError:
                if not sockets:
                    raise
            else:
                self._engine.add(asking.socket.fileno(), partial(self._on_events, upstream, asking), IN)
                return asking
        asking = sockets.pop(0)
        asking.asked = 0
        return asking

    def _open(self, upstream: Upstream) -> socket.socket:
        address = _parsed(upstream.address)
        try:
            sock = self._uplink.open(upstream.transport, address)
        except (OSError, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._failed(error)
            raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH)) from error
        try:
            sock.connect(socket_address(address, upstream.port))
        except BlockingIOError:
            pass  # TCP: it is under way
        except OSError:
            sock.close()
            raise
        return sock

    def _close(self, upstream: Upstream) -> None:
        for each in self._sockets.pop(upstream, ()):
            self._engine.remove(each.socket.fileno())
            each.socket.close()
        if upstream in self._streams:
            self._streams.pop(upstream).close()

    def _on_events(self, upstream: Upstream, asking: _Socket, _: int) -> None:
        now, sock = self._engine.now, asking.socket
        for _ in range(DATAGRAMS_PER_STEP):
            if sock.fileno() < 0:
                break
            try:
                message = sock.recv(MAX_DATAGRAM)
            except BlockingIOError:
                break
            except OSError:
                self._close(upstream)
                self._do(self._server.upstream_failed(upstream, now))
                break
            if int.from_bytes(message[:2], "big") in asking.ids:
                self._do(self._server.response(message, upstream, now))
            else:
                self._server.proxy.unmatched += 1
        self._wait()

    def _connect(self, upstream: Upstream) -> ResolverStream:
        stream = ResolverStream(
            self._engine,
            self._open(upstream),
            heard=partial(self._heard, upstream),
            ended=partial(self._ended, upstream),
        )
        self._streams[upstream] = stream
        return stream

    def _heard(self, upstream: Upstream, message: bytes) -> bool:
        """Take a message of a stream.  Return whether it answers something that was awaited."""
        ident, awaited = int.from_bytes(message[:2], "big"), self._server.proxy.awaited
        was_awaited = ident in awaited(upstream)
        self._do(self._server.response(message, upstream, self._engine.now))
        self._wait()
        return was_awaited and ident not in awaited(upstream)

    def _ended(self, upstream: Upstream) -> None:
        """Go on without a connection that is over.

        A server may end any after a while, or after so many queries (RFC 7766 section 6.2.4): one that has answered
        is asked the rest on another.  One that has not has failed.
        """
        stream, awaited = self._streams.pop(upstream), self._server.proxy.awaited(upstream)
        rest = [
            message for ident, message in stream.unanswered.items() if int.from_bytes(ident, "big") in awaited
        ]
        if rest and not (stream.has_answered and all(self._send(Send(upstream, each)) for each in rest)):
            self._close(upstream)
            self._do(self._server.upstream_failed(upstream, self._engine.now))
        self._wait()

    # -- zone transfers -----------------------------------------------------------------------------

    def _transfer(self, upstream: Upstream, message: bytes) -> None:
        """Ask on a connection that no other query shares, so that nobody waits when it is not read."""
        ident = int.from_bytes(message[:2], "big")
        if (upstream, ident) not in self._transfers:
            self._transfers[upstream, ident] = ResolverStream(
                self._engine,
                self._open(upstream),
                heard=partial(self._transferred, upstream, ident),
                ended=partial(self._transfer_ended, upstream, ident),
            )
            self._transfers[upstream, ident].send(message)

    def _transferred(self, upstream: Upstream, ident: int, message: bytes) -> bool:
        actions = self._server.response(message, upstream, self._engine.now)
        readers = [each.client for each in actions if isinstance(each, Answer)]
        self._do(actions)
        stream = self._transfers.get((upstream, ident))
        for reader in readers:
            if stream is not None and isinstance(reader, Turn):
                if not reader.stream.is_open:
                    self._do(self._server.query_failed(upstream, ident, self._engine.now))
                elif reader.stream.is_full:
                    stream.pause()
                    reader.stream.when_read.append(stream.resume)
        self._wait()
        return bool(readers)

    def _transfer_ended(self, upstream: Upstream, ident: int) -> None:
        del self._transfers[upstream, ident]
        self._do(self._server.query_failed(upstream, ident, self._engine.now))
        self._wait()


_parsed = lru_cache(maxsize=64)(ip_address)


def _client(key: bytes) -> bytes:
    """Return the guest's address in a flow's key."""
    return flow_key.parse(key).guest


class _Socket:
    """One of the sockets towards an upstream: how often it has asked in its turn, and the ids of its queries, with
    those answered until there are `look_at` of them."""

    __slots__ = ("asked", "ids", "look_at", "socket")

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.asked = 0
        self.ids: set[int] = set()
        self.look_at = IDS_KEPT
