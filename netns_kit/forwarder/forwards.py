"""Forwards: the published ports of one stack, on the engine's side."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from netns_kit.arguments import Address
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.relay import TcpRelay
from netns_kit.host.undo import on_error
from netns_kit.operations import operation

from .binding import all_or_none
from .homes import Home, MemberHome
from .listeners import Listener, TcpListener, UdpListener
from .ports import PortForward, ReverseForward, UnixSocket

if TYPE_CHECKING:
    from .reverse_listeners import ReverseListeners
    from .socket_listeners import SocketListeners


class Forwards:
    """The listening ports of one stack, each with the owner who has asked for it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._listeners: dict[tuple[int, PortForward | ReverseForward], Listener] = {}
        # of owners whose ports lead elsewhere than to the stack's own
        self._homes: dict[int, MemberHome] = {}
        self._sockets: dict[Home, SocketListeners] = {}  # once there are such
        self._reverses: ReverseListeners | None = None

    @operation()
    def add(self, owner: int, forwards: tuple[PortForward, ...]) -> tuple[PortForward, ...]:
        """Listen on all of these, or on none.  Return what is listening, with the ports that the kernel has chosen.

        An optional one whose port cannot be had is left out.

        Raises:
            PortInUseError, AddressError, FeatureUnavailable, OSError: A port that cannot be had.
        """
        made = all_or_none(
            forwards, lambda forward: self._listener(owner, forward), lambda each: each.close()
        )
        self._listeners |= {(owner, listener.forward): listener for listener in made}
        return tuple(listener.forward for listener in made)

    @operation()
    def adopt(self, owner: int, forward: PortForward, number: int) -> PortForward:
        """Publish a socket that listens already, and was passed under that number, see `Inside`.

        Raises:
            FeatureUnavailable, AddressError, OSError: It cannot be published.
        """
        sock = self._gateway.inside.passed(number)
        with on_error(sock.close):
            listener = self._listener(owner, forward, sock)
        self._listeners[owner, listener.forward] = listener
        return listener.forward

    @operation()
    def disown(self, owner: int, forward: PortForward | ReverseForward, number: int) -> None:
        """Undo what `adopt` or `reverse` has done, or let go of the socket if it was not asked for."""
        with suppress(OSError):
            self._gateway.inside.passed(number).close()
        self.remove(owner, forward)

    @operation()
    def reverse(self, owner: int, reverse: ReverseForward, number: int) -> None:
        """Lead the clients of a socket inside out; it listens, and was passed under that number.

        Raises:
            FeatureUnavailable, OSError: That cannot be done here.
        """
        sock = self._gateway.inside.passed(number)
        with on_error(sock.close):
            if self._reverses is None:
                from .reverse_listeners import ReverseListeners  # for those who use them

                self._reverses = ReverseListeners(self._gateway)
            self._listeners[owner, reverse] = self._reverses.lead_out(reverse, sock)

    @operation()
    def remove(self, owner: int, forward: PortForward | ReverseForward) -> bool:
        """Stop listening.  Return whether the owner had a listener like that."""
        listener = self._listeners.pop((owner, forward), None)
        if listener is not None:
            listener.close()
        return listener is not None

    @operation(sum)
    def cut(self, forward: PortForward | ReverseForward) -> int:
        """End the connections that a port has let in, and return their number."""
        stack = self._gateway.stack
        connections = [
            each for each in stack.tcp.values() if each.inbound and self._came_by(each.user, forward)
        ]
        for connection in connections:
            self._gateway.router.abort(connection, reset=True)
        others = [each for each in self._gateway.beside.values() if each.cause == forward]
        for flow in others:
            flow.end()
        return len(connections) + len(others)

    @operation()
    def list(self, owner: int) -> tuple[PortForward, ...]:
        """Return what listens for this owner, oldest first."""
        return tuple(forward for forward in self._owned_by(owner) if isinstance(forward, PortForward))

    @operation()
    def list_all(self) -> tuple[PortForward, ...]:
        """Return what listens for all owners, oldest first."""
        return tuple(forward for _, forward in self._listeners if isinstance(forward, PortForward))

    @operation()
    def settle(self, owner: int, number: int, addresses: tuple[Address, ...]) -> None:
        """Lead the ports of this owner to a member, whose sockets may be ordered on the socket of that number.

        Raises:
            OSError: There is no room for the socket.
        """
        self._homes[owner] = MemberHome(self._gateway, self._gateway.inside.passed(number), addresses)

    @operation()
    def remove_all(self, owner: int) -> None:
        """Stop all listening for this owner."""
        for forward in self._owned_by(owner):
            self.remove(owner, forward)
        home = self._homes.pop(owner, None)
        if home is not None:
            for flow in list(self._gateway.beside.values()):
                if getattr(flow, "home", None) is home:  # its socket would keep the namespace
                    flow.end()
            sockets = self._sockets.pop(home, None)
            if sockets is not None:
                sockets.close()
            home.close()

    def _owned_by(self, owner: int) -> Sequence[PortForward | ReverseForward]:
        return [forward for whose, forward in self._listeners if whose == owner]

    def close(self) -> None:
        """Stop all listening."""
        while self._listeners:
            self._listeners.popitem()[1].close()
        for shared in (*self._sockets.values(), self._reverses):
            if shared is not None:
                shared.close()
        while self._homes:
            self._homes.popitem()[1].close()

    @staticmethod
    def _came_by(relay: object, forward: PortForward | ReverseForward) -> bool:
        """Return whether the client of a relay has connected to that port."""
        local = relay.local() if isinstance(relay, TcpRelay) else None
        if local is None or isinstance(forward, ReverseForward) or forward.mode != "stack":
            return False
        assert not isinstance(forward.host, UnixSocket)
        address, port = local
        return port == forward.host_port and (forward.host.is_unspecified or address == str(forward.host))

    @operation()
    def target(self, port: int) -> tuple[Address, int] | None:
        """Return where a port leads that is published without a socket, or None if there is none."""
        return self._in_memory.get(port)

    @property
    def _in_memory(self) -> dict[int, tuple[Address, int]]:
        """Where the ports lead that are published without a socket."""
        return {
            each.forward.host_port: target
            for each in self._listeners.values()
            if (target := each.target) is not None
        }

    def _listener(self, owner: int, forward: PortForward, made: socket.socket | None = None) -> Listener:
        gateway = self._gateway
        home: Home = self._homes.get(owner, gateway)
        if gateway.uplink.is_in_memory and made is None:
            from .in_memory_listeners import InMemoryListener  # for those who use them

            return InMemoryListener(gateway, forward, home, self._in_memory)
        if forward.mode in ("socket", "transparent"):
            if home not in self._sockets:
                from .socket_listeners import SocketListeners  # for those who use them

                self._sockets[home] = SocketListeners(gateway, home)
            return self._sockets[home].listen(forward, made)
        return (TcpListener if forward.protocol == "tcp" else UdpListener)(gateway, forward, made, home)
