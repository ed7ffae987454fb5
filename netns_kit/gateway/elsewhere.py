"""Elsewhere: sockets of another namespace for an uplink, and the datagrams that wait for one.

`SourceElsewhere` is the `SocketSource` of one namespace.  `Waiting` has the UDP and ping flows whose socket has not
come yet: they are kept as those that wait for an answer are (`netns_kit.gateway.asking`).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

from netns_kit.child.supply import PING
from netns_kit.stack import EchoFlow, Refusal, Transport, UdpFlow
from netns_kit.uplink.elsewhere import NamespaceSockets, SocketTaker
from netns_kit.uplink.flow import Endpoint, Flow, Target
from netns_kit.uplink.sockets import refusal_for

from .asking import HELD_MAX, Held, HeldDatagrams, Router
from .enforcer import Enforcer, Ruling, ruling_of
from .engine import Engine
from .inside import Inside, Kind

_FAMILIES = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}
_TYPES = {"tcp": int(socket.SOCK_STREAM), "udp": int(socket.SOCK_DGRAM), "icmp": PING}
_STREAM, _DATAGRAM = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM)
_PASSED = Ruling("allow")


class SourceElsewhere:
    """The sockets of one namespace.

    Args:
        engine: Waits for the sockets.
        supply: The socket on which they are ordered; it is closed with this.
        is_free: Returns whether descriptors may be kept that nobody wants yet.
        ended: Called with this object when the namespace has ended.
    """

    def __init__(
        self,
        engine: Engine,
        supply: socket.socket,
        is_free: Callable[[], bool],
        ended: Callable[[SourceElsewhere], object],
    ) -> None:
        self._inside = Inside(engine, supply, is_free)
        self._inside.ended = lambda: ended(self)
        self._given: WeakSet[socket.socket] = WeakSet()

    def has_given(self, sock: socket.socket) -> bool:
        """Return whether a socket came from here."""
        return sock in self._given

    def fileno(self) -> int:
        return self._inside.fileno()

    def has(self, protocol: Transport, version: int) -> bool:
        return self._inside.has(_kind(protocol, version))

    def take(self, protocol: Transport, version: int, taker: SocketTaker) -> None:
        def give(found: socket.socket | OSError) -> None:
            if not isinstance(found, OSError):
                if not _is_of(found, protocol, version):
                    found.close()
                    taker(OSError(errno.EPROTO, os.strerror(errno.EPROTO)))
                    return
                self._given.add(found)
            taker(found)

        self._inside.take(_kind(protocol, version), give)

    def give_back(self, protocol: Transport, version: int, sock: socket.socket) -> None:
        self._inside.give_back(_kind(protocol, version), sock)

    def receive(self) -> None:
        self._inside.receive()

    def close(self) -> None:
        """Close the sockets that nobody has taken.  Calling it again is allowed."""
        self._inside.close()


def _kind(protocol: Transport, version: int) -> Kind:
    return Kind(_FAMILIES[version], _TYPES[protocol])


def _is_of(sock: socket.socket, protocol: Transport, version: int) -> bool:
    """Return whether the kernel says that a socket is of this kind.  Its namespace may be hostile."""
    kind = _STREAM if protocol == "tcp" else _DATAGRAM
    asked = socket.SO_TYPE, socket.SO_DOMAIN
    return [sock.getsockopt(socket.SOL_SOCKET, each) for each in asked] == [kind, _FAMILIES[version]]


class Carrier(Router, Protocol):
    """What lets the flows go on: an `IndirectRouter`."""

    def carry(self, opened: UdpFlow | EchoFlow, target: Endpoint) -> Refusal | None:
        """Give a flow its relay, or return how it is refused."""
        ...


class Waiting:
    """The UDP and ping flows of one gateway that wait for a socket.

    Args:
        engine: The engine of the gateway.
        enforcer: The policy, which may change meanwhile.
        router: What lets the flows go on.
    """

    def __init__(self, engine: Engine, enforcer: Enforcer, router: Carrier) -> None:
        self.engine = engine
        self.router = router
        self._enforcer = enforcer
        self._held: set[Held] = set()

    def hold(
        self, opened: UdpFlow | EchoFlow, flow: Flow, endpoint: Endpoint, sockets: NamespaceSockets
    ) -> Refusal | None:
        """Have a flow wait, or return how it is refused.

        Args:
            opened: The flow.
            flow: The same, as the uplink was asked about it.
            endpoint: Where it goes.
            sockets: Where its socket comes from.
        """
        if len(self._held) >= HELD_MAX:
            self.router.refused += 1
            return Refusal.DROP
        policy, target = self._enforcer.policy_of(flow), Target((endpoint,))
        held = HeldDatagrams(self, opened, flow, target, ruling_of(opened) or _PASSED, policy)
        source, version = sockets.source, endpoint.address.version
        if source.fileno() < 0:
            self.router.refused += 1
            return Refusal.NET_UNREACHABLE
        opened.user = held
        self._held.add(held)

        def take(found: socket.socket | OSError) -> None:
            is_awaited = held in self._held
            self._held.discard(held)
            if not isinstance(found, OSError):
                source.give_back(flow.protocol, version, found)
            if is_awaited:
                self._go_on(held, refusal_for(found.errno or 0) if isinstance(found, OSError) else None)

        source.take(flow.protocol, version, take)
        return None

    def _go_on(self, held: HeldDatagrams, why: Refusal | None) -> None:
        if why is None and held.policy is not self._enforcer.policy_of(held.flow):
            ruling = self._enforcer.flow(held.flow, self.engine.now)
            held.opened.ruling = ruling
            why = None if ruling.action == "allow" else Refusal.PROHIBITED
        if why is None:
            why = self.router.carry(held.opened, held.target.candidates[0])
        if why is None:
            held.pass_on()
        else:
            self.router.refused += 1
            held.refuse(why)

    def withdraw(self, held: Held) -> None:
        """Forget a flow that waits no more."""
        self._held.discard(held)

    def time_over(self, held: Held) -> None:
        """Do nothing: no timer is armed for these."""
