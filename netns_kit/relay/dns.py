"""DNS: the proxy's queries and answers, over one socket for each upstream."""

from __future__ import annotations

import math
import os
import socket
from ipaddress import ip_address

from netns_kit.dns.proxy import Action, DnsProxy, Send, Upstream
from netns_kit.engine import IN, Engine
from netns_kit.stack import UdpFlow
from netns_kit.uplink import Target, Uplink

from .sockets import DATAGRAMS_PER_STEP, MAX_DATAGRAM


class DnsRelay:
    """The DNS proxy and its sockets: one for each upstream, whoever asks, open while something is under way."""

    def __init__(self, engine: Engine, uplink: Uplink) -> None:
        self._engine = engine
        self._uplink = uplink
        self._proxy = DnsProxy(random_id=lambda: int.from_bytes(os.urandom(2), "big"))
        self._sockets: dict[Upstream, socket.socket] = {}
        self.timer_at = self.timer_entry = math.inf

    def add(self, flow: UdpFlow, target: Target) -> None:
        """`flow` brings queries for these resolvers, and so does every other from now on."""
        upstreams = tuple((str(endpoint.address), endpoint.port) for endpoint in target.endpoints)
        if upstreams != self._proxy.upstreams:
            self._proxy.set_upstreams(upstreams)
        flow.user = self

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        size = segment_size or len(payload) or 1
        for start in range(0, len(payload), size):
            query = bytes(payload[start : start + size])
            self._do(self._proxy.query(query, flow, self._engine.now))
        self._wait()

    def expired(self, flow: UdpFlow) -> None:
        pass  # its answer may still come, and can still be sent

    def close(self) -> None:
        """Close the sockets.  Again is fine."""
        while self._sockets:
            self._close(next(iter(self._sockets)))

    def stats(self) -> dict[str, int]:
        """The proxy's counters."""
        return self._proxy.stats()

    def handle_timer(self, now: float) -> None:
        """What an upstream has not answered is asked again, or of another."""
        self._do(self._proxy.handle_timer(now))
        self._wait()

    def _wait(self) -> None:
        deadline = self._proxy.deadline
        if deadline == math.inf:  # nothing is under way
            self.close()
        self._engine.timers.arm(self, deadline)

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
                break
            try:
                message = sock.recv(MAX_DATAGRAM)
            except BlockingIOError:
                break
            except OSError:
                self._close(upstream)
                self._do(self._proxy.upstream_failed(upstream, now))
                break
            self._do(self._proxy.response(message, upstream, now))
        self._wait()
