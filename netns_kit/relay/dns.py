"""DNS: the server's queries and answers, over few sockets for each upstream, whoever asks.

Over UDP an upstream is spoken to from a set of sockets, each on a port that the kernel has chosen at random.  One
that has asked `QUERIES_PER_SOCKET` times is followed by another, up to `SOCKETS_PER_UPSTREAM` of them; then they take
turns.  So the ports are not those of a minute ago (RFC 5452 section 9.2), and a storm takes no more descriptors than
that.  Over TCP an upstream has one connection, for the queries that came over TCP.  When nothing is under way all are
closed.

An answer is heard from where the query went, for the sockets are connected, and on the very socket that it left by.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address

from netns_kit.dns import Action, DnsProxy, DnsServer, Send, Upstream, Zone
from netns_kit.dns.cache import Cache
from netns_kit.engine import IN, Engine
from netns_kit.stack import TcpConnection, UdpFlow
from netns_kit.uplink import Endpoint, Uplink

from .dns_streams import ClientStream, ResolverStream, Turn
from .sockets import DATAGRAMS_PER_STEP, MAX_DATAGRAM

QUERIES_PER_SOCKET = 64
SOCKETS_PER_UPSTREAM = 8
IDS_KEPT = 256  # of a socket, beyond those that are awaited


class DnsRelay:
    """The DNS server and its sockets.  `failed` is called with what the uplink's hook has raised."""

    def __init__(
        self, engine: Engine, uplink: Uplink, zone: Zone, failed: Callable[[BaseException], object]
    ) -> None:
        self.queued = 0  # bytes of answers that clients do not read: see `ClientStream`
        self._engine = engine
        self._uplink = uplink
        self._server = DnsServer(
            zone,
            DnsProxy(random_id=lambda: int.from_bytes(os.urandom(2), "big")),
            cache=Cache() if uplink.dns_cache else None,
            hook=uplink.dns_hook,
            failed=failed,
        )
        self._resolvers: tuple[Endpoint, ...] | None = None
        self._sockets: dict[Upstream, list[_Socket]] = {}  # the one that asks is the last
        self._streams: dict[Upstream, ResolverStream] = {}
        self.timer_at = self.timer_entry = math.inf

    def add(self, flow: UdpFlow, resolvers: tuple[Endpoint, ...]) -> None:
        """`flow` brings queries for these resolvers, and so does everybody from now on."""
        self._set_resolvers(resolvers)
        flow.user = self

    def accept(self, connection: TcpConnection, resolvers: tuple[Endpoint, ...]) -> None:
        """The same, of a connection."""
        self._set_resolvers(resolvers)
        connection.user = ClientStream(self._engine, connection, self)
        connection.accept(self._engine.now)

    def _set_resolvers(self, resolvers: tuple[Endpoint, ...]) -> None:
        if resolvers is not self._resolvers:
            self._resolvers = resolvers
            found = {"": resolvers, **self._uplink.dns_domains}
            self._server.set_upstreams(
                {domain: [(str(host), port) for host, port in each] for domain, each in found.items()}
            )

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        size = segment_size or len(payload) or 1
        address = flow.key[: (len(flow.key) - 4) // 2]
        for start in range(0, len(payload), size):
            query = bytes(payload[start : start + size])
            self._do(self._server.query(query, flow, address, self._engine.now))
        self._wait()

    def expired(self, flow: UdpFlow) -> None:
        pass  # its answer may still come, and can still be sent

    def ask(self, query: bytes, turn: Turn, address: bytes) -> bool:
        """A client's stream has brought a query.  False: it was none."""
        actions = self._server.query(query, turn, address, self._engine.now, "tcp")
        heard = bool(actions)
        self._do(actions)
        self._wait()
        return heard

    def name_of(self, address: bytes) -> str | None:
        """What the address is called, if that is known: see `DnsServer.name_of`."""
        return self._server.name_of(address)

    def close(self) -> None:
        """Close the sockets.  Again is fine."""
        for upstream in [*self._sockets, *self._streams]:
            self._close(upstream)

    def stats(self) -> dict[str, int]:
        """The server's counters, and how many sockets there are."""
        sockets = sum(map(len, self._sockets.values())) + len(self._streams)
        return {**self._server.stats(), "sockets": sockets}

    def handle_timer(self, now: float) -> None:
        """What an upstream has not answered is asked again, or of another."""
        self._do(self._server.handle_timer(now))
        self._wait()

    def _wait(self) -> None:
        deadline = self._server.deadline
        if deadline == math.inf and (self._sockets or self._streams):  # nothing is under way
            self.close()
        self._engine.timers.arm(self, deadline)

    def _do(self, actions: list[Action]) -> None:
        now = self._engine.now
        while actions:
            action = actions.pop(0)
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
        upstream, message = action
        try:
            if upstream.transport == "tcp":
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
        """The one to ask from now."""
        sockets = self._sockets.setdefault(upstream, [])
        if not sockets or sockets[-1].asked >= QUERIES_PER_SOCKET:
            sockets.append(self._another(upstream, sockets))
        sockets[-1].asked += 1
        return sockets[-1]

    def _another(self, upstream: Upstream, sockets: list[_Socket]) -> _Socket:
        """A new one, or the oldest if there are enough, or no more to be had."""
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
        sock = self._uplink.open(upstream.transport, ip_address(upstream.address))
        try:
            sock.connect(upstream[:2])
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

    def _heard(self, upstream: Upstream, message: bytes) -> None:
        self._do(self._server.response(message, upstream, self._engine.now))
        self._wait()

    def _ended(self, upstream: Upstream) -> None:
        """The connection is over.  A server may end any after a while, or after so many queries (RFC 7766 section
        6.2.4): one that has answered is asked the rest on another."""
        stream = self._streams.pop(upstream)
        rest = list(stream.unanswered.values()) if stream.answered else []
        again = all(self._send(Send(upstream, message)) for message in rest)
        if not again or (stream.unanswered and not rest):
            self._close(upstream)
            self._do(self._server.upstream_failed(upstream, self._engine.now))
        self._wait()


class _Socket:
    """One of the sockets towards an upstream: how often it has asked in its turn, and the ids of its queries, with
    those answered until there are `look_at` of them."""

    __slots__ = ("asked", "ids", "look_at", "socket")

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.asked = 0
        self.ids: set[int] = set()
        self.look_at = IDS_KEPT
