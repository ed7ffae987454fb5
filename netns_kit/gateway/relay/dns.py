"""DnsRelay: the DNS server, with the sockets of its clients and upstreams.

An upstream is asked over UDP from a set of sockets, each on a random port that the kernel has chosen.  When the
newest socket has sent `QUERIES_PER_SOCKET` queries, the next one is opened, up to `SOCKETS_PER_UPSTREAM`; after that
the sockets take turns.  So the ports change (RFC 5452 section 9.2), and even a storm of queries uses few descriptors.
Over TCP an upstream has one connection.  Each zone transfer has a connection of its own, which is read no faster than
the client reads.  When no query is pending, all sockets are closed.

The sockets are connected, so an answer is only accepted from the address that was asked, and only on the socket that
has sent the query.
"""

from __future__ import annotations

import math
import os
import socket
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache, partial
from ipaddress import ip_address
from typing import Protocol

from netns_kit.arguments import Address
from netns_kit.dns import Action, Answer, DnsProxy, DnsServer, Send, Upstream, Zone
from netns_kit.dns.cache import ENTRIES, Cache
from netns_kit.dns.guard import Guard
from netns_kit.dns.message import NXDOMAIN, SERVFAIL
from netns_kit.dns.server import Standing
from netns_kit.gateway.engine import IN, Engine
from netns_kit.stack import Refusal, TcpConnection, UdpFlow
from netns_kit.stack.user import Transport
from netns_kit.stack.wire import flow_key
from netns_kit.uplink.dial import Dial, Refused
from netns_kit.uplink.flow import Endpoint, Target
from netns_kit.uplink.sockets import DATAGRAMS_PER_STEP, MAX_DATAGRAM, socket_address
from netns_kit.uplink.uplink import Uplink

from .dns_streams import ClientStream, ResolverStream, Turn

QUERIES_PER_SOCKET = 64
SOCKETS_PER_UPSTREAM = 8
IDS_KEPT = 256  # ids of answered queries that a socket remembers, at least
HALF_OPEN_MAX = 256  # clients' connections whose handshake is not over; beyond that the oldest is reset
CLIENTS_MAX = 1024  # clients' connections; beyond that the one that has been silent longest is reset


class Router(Protocol):
    """What the DNS relay needs of the gateway's `FlowRouter`."""

    def route_served(self, transport: Transport, key: bytes) -> Target | Refusal:
        """Return the current resolvers for the flow of that key, or how it is refused now."""

    def open_socket(self, transport: Transport, address: Address) -> socket.socket:
        """Return a socket of the uplink's.  Raises OSError, whatever the uplink raises."""

    def dial_resolver(self, resolver: Endpoint) -> Dial:
        """Have the uplink dial a resolver."""

    def cannot_dial(self, error: BaseException) -> Refused:
        """Report the failure of a dial, and return how it is refused."""


class DnsRelay:
    """The DNS server and its sockets.

    Args:
        engine: The engine that polls the sockets.
        uplink: Its settings of DNS are used.
        zone: Our own records.
        failed: Called with the exception of a hook that raises.
        router: Opens sockets and dials.  It routes every query after the first of a flow again, so that an old flow
            asks the current resolvers.

    Attributes:
        entries: The number of answers that are kept, if any are.
        query: Takes each query, as `DnsServer.query` does.  It may be another function for some time.
    """

    entries = ENTRIES

    def __init__(
        self,
        engine: Engine,
        uplink: Uplink,
        zone: Zone,
        failed: Callable[[BaseException], object],
        router: Router,
    ) -> None:
        self.queued = 0  # bytes of answers that clients have not read: see `ClientStream`
        self._half_open: dict[ClientStream, None] = {}  # the oldest first
        self._clients: OrderedDict[ClientStream, None] = OrderedDict()  # the one silent longest first
        self._opening: UdpFlow | None = None  # the flow that has just been routed, for its first query
        self._router = router
        self._engine = engine
        self._uplink = uplink
        self._server = DnsServer(
            zone,
            DnsProxy(
                random_id=lambda: int.from_bytes(os.urandom(2), "big"),
                unknown=NXDOMAIN if uplink.dns.unknown == "nxdomain" else SERVFAIL,
            ),
            cache=Cache(self.entries) if uplink.dns.cache else None,
            hook=uplink.dns.hook,
            failed=failed,
        )
        self.query = self._server.query
        self._resolvers: tuple[Endpoint, ...] | None = None
        self._sockets: dict[Upstream, list[_Socket]] = {}  # the last one of a list sends the next query
        self._streams: dict[Upstream, ResolverStream] = {}
        self._transfers: dict[tuple[Upstream, int], ResolverStream] = {}  # by upstream and id of the query
        self._per_socket = QUERIES_PER_SOCKET
        self.timer_at = self.timer_entry = math.inf

    @property
    def guard(self) -> Guard | None:
        """The guard, which may be set at any time: every answer is judged by the one of the moment it is sent."""
        return self._server.guard

    @guard.setter
    def guard(self, guard: Guard | None) -> None:
        self._server.guard = guard

    def stand_in(self, stands: Standing) -> None:
        """Have names answered with addresses that stand for them."""
        self._server.stands = stands

    def udp_opened(self, flow: UdpFlow, target: Target) -> None:
        """Take the queries of a flow.  The candidates of `target` are the resolvers of all queries from now on."""
        self._set_resolvers(target.candidates)
        flow.user = self
        self._opening = flow

    def tcp_opened(self, connection: TcpConnection, target: Target) -> None:
        """Accept a connection and take its queries, as `udp_opened` does."""
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
        """Note that the handshake of a client's connection is over."""
        self._half_open.pop(stream, None)

    def gone(self, stream: ClientStream) -> None:
        """Forget a client's connection that is over."""
        self._half_open.pop(stream, None)
        self._clients.pop(stream, None)

    def relieve(self) -> None:
        """Reset the client's connection that leaves most unread."""
        max(self._clients, key=lambda each: each.unread).abort()

    def _set_resolvers(self, resolvers: tuple[Endpoint, ...]) -> None:
        if resolvers is not self._resolvers:
            self._resolvers = resolvers
            found = {"": resolvers, **self._uplink.dns.domains}
            manner = self._uplink.dns_manner()
            self._per_socket = 1 if manner.ports else QUERIES_PER_SOCKET
            self._server.set_upstreams(
                {domain: [(str(host), port) for host, port in each] for domain, each in found.items()},
                manner,
                self._uplink.dns_domain_manner(),
            )

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        size = segment_size or len(payload) or 1
        refusal = self._refusal("udp", flow, flow.key)
        if refusal is not None:
            flow.refuse(refusal, payload[:size])
            return
        address = flow_key.parse(flow.key).guest
        for start in range(0, len(payload), size):
            query = bytes(payload[start : start + size])
            self._do(self.query(query, flow, address, self._engine.now) or [])
        self._wait()

    def _refusal(self, protocol: Transport, client: UdpFlow | ClientStream, key: bytes) -> Refusal | None:
        """Return how a query is refused now, or None after setting the resolvers that it may ask."""
        if client is self._opening:
            self._opening = None
            return None
        found = self._router.route_served(protocol, key)
        if isinstance(found, Refusal):
            return found
        self._set_resolvers(found.candidates)
        return None

    def expired(self, flow: UdpFlow) -> None:
        pass  # an answer may still come, and can then be sent

    def ask(self, query: bytes, turn: Turn, key: bytes) -> bool:
        """Take a query of a client's connection.  Return False if it is not a query, or is refused."""
        self._clients.move_to_end(turn.stream)
        if self._refusal("tcp", turn.stream, key) is not None:
            return False
        actions = self.query(query, turn, flow_key.parse(key).guest, self._engine.now, "tcp")
        if actions is None:
            return False
        self._do(actions)
        self._wait()
        return True

    def name_of(self, address: bytes) -> str | None:
        """Return the name of an address, if it is known: see `DnsServer.name_of`."""
        return self._server.name_of(address)

    def addresses(self) -> tuple[bytes, ...]:
        """Return the addresses of answers whose names are remembered."""
        return self._server.addresses()

    def close(self) -> None:
        """Close the sockets of the upstreams.  Calling it again is allowed."""
        for upstream in [*self._sockets, *self._streams]:
            self._close(upstream)
        for transfer in list(self._transfers):
            self._transfers.pop(transfer).close()

    def stats(self) -> dict[str, int]:
        """Return the server's counters, and the numbers of sockets and clients."""
        sockets = sum(map(len, self._sockets.values())) + len(self._streams) + len(self._transfers)
        return {**self._server.stats(), "sockets": sockets, "clients": len(self._clients)}

    def handle_timer(self, now: float) -> None:
        """Repeat queries that have not been answered, or ask another upstream."""
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
        if deadline == math.inf and (self._sockets or self._streams):  # no query is pending
            self.close()
        self._engine.timers.arm(self, deadline)

    def act(self, actions: list[Action]) -> None:
        """Do what a query that was taken earlier comes to."""
        self._do(actions)
        self._wait()

    def _do(self, actions: list[Action]) -> None:
        now = self._engine.now
        for action in actions:  # it grows meanwhile
            if isinstance(action, Send):
                if not self._send(action):
                    actions += self._server.upstream_failed(action.upstream, now)
            elif isinstance(action.client, UdpFlow):
                action.client.send(action.message, now)
                action.client.close()  # DNS clients use a port for one query
            elif isinstance(action.client, Turn):
                action.client.answer(action.message, now)

    # -- upstreams ----------------------------------------------------------------------------------

    def _send(self, action: Send) -> bool:
        upstream, message, transfer = action
        try:
            if transfer:
                self._transfer(upstream, message)
            elif upstream.transport == "tcp":
                if upstream not in self._streams:
                    heard, ended = partial(self._heard, upstream), partial(self._ended, upstream)
                    self._streams[upstream] = self._dial(upstream, heard, ended)
                self._streams[upstream].send(message)
            else:
                asking = self._socket_for(upstream)
                asking.ids.add(int.from_bytes(message[:2], "big"))
                if len(asking.ids) >= asking.look_at:
                    asking.ids &= self._server.proxy.awaited(upstream)
                    asking.look_at = 2 * len(asking.ids) + IDS_KEPT
                asking.socket.send(message)
        except BlockingIOError:
            return True  # the query is lost, as a datagram may be; the proxy repeats it
        except OSError:
            self._close(upstream)
            return False
        return True

    def _socket_for(self, upstream: Upstream) -> _Socket:
        """Return the socket that sends the next query to an upstream."""
        sockets = self._sockets.setdefault(upstream, [])
        if not sockets or sockets[-1].asked >= self._per_socket:
            sockets.append(self._another(upstream, sockets))
        sockets[-1].asked += 1
        return sockets[-1]

    def _another(self, upstream: Upstream, sockets: list[_Socket]) -> _Socket:
        """Return the next socket: a new one, or the oldest one if there are enough or no more can be opened."""
        if len(sockets) < SOCKETS_PER_UPSTREAM:
            try:
                asking = _Socket(self._router, upstream)
            except OSError:
                if not sockets:
                    raise
            else:
                self._engine.add(asking.socket.fileno(), partial(self._on_events, upstream, asking), IN)
                return asking
        asking = sockets.pop(0)
        asking.asked = 0
        return asking

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

    def _dial(
        self, upstream: Upstream, heard: Callable[[bytes], bool], ended: Callable[[], None]
    ) -> ResolverStream:
        stream = ResolverStream(self._engine, self._router.cannot_dial, heard=heard, ended=ended)
        stream.begin(self._router.dial_resolver(Endpoint._make((_parsed(upstream.address), upstream.port))))
        return stream

    def _heard(self, upstream: Upstream, message: bytes) -> bool:
        """Take a message of a resolver's connection.  Return whether it answers a pending query."""
        ident, awaited = int.from_bytes(message[:2], "big"), self._server.proxy.awaited
        was_awaited = ident in awaited(upstream)
        self._do(self._server.response(message, upstream, self._engine.now))
        self._wait()
        return was_awaited and ident not in awaited(upstream)

    def _ended(self, upstream: Upstream) -> None:
        """Handle the end of a resolver's connection.

        A server may close a connection after some time or some queries (RFC 7766 section 6.2.4).  So if it has
        answered before, the pending queries are sent again on a new connection.  If it has not, the upstream has
        failed.
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
        """Send a query for a zone transfer on a connection of its own, so that no other query waits if it is not
        read.
        """
        ident = int.from_bytes(message[:2], "big")
        if (upstream, ident) not in self._transfers:
            stream = self._dial(
                upstream,
                partial(self._transferred, upstream, ident),
                partial(self._transfer_ended, upstream, ident),
            )
            stream.send(message)
            self._transfers[upstream, ident] = stream

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


class _Socket:
    """One of the UDP sockets to an upstream.

    `asked` is the number of queries since its turn began.  `ids` are those of its queries.  When there are `look_at`
    of them, those that have been answered are removed.
    """

    __slots__ = ("asked", "ids", "look_at", "socket")

    def __init__(self, router: Router, upstream: Upstream) -> None:
        address = _parsed(upstream.address)
        self.socket = router.open_socket("udp", address)
        try:
            self.socket.connect(socket_address(address, upstream.port))
        except OSError:
            self.socket.close()
            raise
        self.asked = 0
        self.ids: set[int] = set()
        self.look_at = IDS_KEPT
