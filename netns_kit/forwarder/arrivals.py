"""Arrivals: clients of published ports on their way to a program inside, by sockets of the namespace.

Where a port leads to "the namespace's own", a program there may listen on its address, on its loopback, or on either
in the other address family; they are tried in this order, that of the client's family first.  A program that listens
on all addresses so sees the namespace's own address as the client, and never takes a stranger for localhost.  With a
client's own address (transparent mode) it sees the client.
"""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, TypeAlias

from netns_kit.arguments import Address
from netns_kit.gateway.engine import ERROR, HANG_UP, OUT, Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.inside import UNIX, Kind, Source
from netns_kit.stack.wire.ip import is_link_local

from .binding import FAMILIES, client_address
from .homes import Home
from .ports import PortForward, UnixSocket

LOOPBACKS: tuple[Address, Address] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))
FRESH = 1e-3  # seconds in which the namespace's addresses are not looked up again
_TAKEN = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES})
_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN})

SocketAddress: TypeAlias = "tuple[str, int] | str"


class Place(NamedTuple):
    """A place inside to try: the kind of socket, where it is bound to (None: anywhere), and where it connects to."""

    kind: Kind
    source: tuple[str, int] | None
    address: SocketAddress


class Targets:
    """The places inside where a published port may lead, for one listener.

    Args:
        gateway: The gateway of the stack.
        home: Knows the addresses of the namespace.
        forward: The port.
        kind: The type of the sockets, a number.
    """

    def __init__(self, gateway: Gateway, home: Home, forward: PortForward, kind: int) -> None:
        self._gateway = gateway
        self._home = home
        self._networks = gateway.subnet.families
        self._forward = forward
        self._kind = kind
        self._own: list[Address] = []
        self._looked_at = -math.inf  # when these were found
        self._places: list[Place] = []

    def for_client(self, client: tuple[str, int]) -> list[Place]:
        """Return the places to try for a client, in their order, as a list to be used up.

        Args:
            client: The client's address and port; empty for one of a unix socket.
        """
        forward = self._forward
        now = self._gateway.engine.now
        if now > self._looked_at + FRESH:  # DHCP gives addresses while we run
            self._looked_at = now
            own = [self._home.guest(network) for network in self._networks]
            if own != self._own:
                self._own, self._places = own, list(self._found(own))
        if forward.mode != "transparent" or not client[0]:
            return self._places.copy()
        stranger = client_address(client[0].partition("%")[0])
        if stranger.is_loopback or is_link_local(stranger.packed) or stranger in self._own:
            return self._places.copy()
        family = FAMILIES[stranger.version]
        return [
            Place(Kind(family, self._kind, transparent=True), (str(stranger), client[1]), place.address)
            if place.kind.family == family
            else place
            for place in self._places
        ]

    def _found(self, own: list[Address]) -> Iterator[Place]:
        forward = self._forward
        if isinstance(forward.guest, UnixSocket):
            yield Place(UNIX, None, forward.guest.address)
            return
        for address in [forward.guest] if forward.guest is not None else self._addresses(own):
            yield Place(Kind(FAMILIES[address.version], self._kind), None, (str(address), forward.guest_port))

    def _addresses(self, own: list[Address]) -> list[Address]:
        """Return the namespace's own addresses, each with the loopback's behind it."""
        of_family = {4: [LOOPBACKS[0]], 6: [LOOPBACKS[1]]}
        for address in own:
            of_family[address.version].insert(0, address)
        host = self._forward.host
        order = (6, 4) if not isinstance(host, UnixSocket) and host.version == 6 else (4, 6)
        return [address for version in order for address in of_family[version]]


class Arrival:
    """A client of a stream socket, until a program inside has taken it or none wants it.

    Args:
        inside: Has the sockets.
        engine: Waits where a connection takes its time.
        places: Where to try, see `Targets`; they are used up.
        done: Called with the socket that is connected, and what it is connected to; or with the error of the last
            place.
    """

    __slots__ = ("_done", "_engine", "_inside", "_places", "_socket")

    def __init__(
        self,
        inside: Source,
        engine: Engine,
        places: list[Place],
        done: Callable[[socket.socket | OSError, Place], None],
    ) -> None:
        self._inside, self._engine = inside, engine
        self._places = places
        self._done = done
        self._socket: socket.socket | None = None

    def begin(self) -> None:
        """Try the first place."""
        place = self._places[0]
        if isinstance(place.address, str):
            self._inside.connect_unix(place.address, self._try)
        else:
            self._inside.take(place.kind, self._try)

    def _try(self, sock: socket.socket | OSError) -> None:
        if not self._places:  # it was closed meanwhile
            if not isinstance(sock, OSError):
                sock.close()
            return
        place = self._places[0]
        if isinstance(sock, OSError):
            self._next(sock.errno or errno.EIO, None)
            return
        if isinstance(place.address, str):  # it is connected
            self._done(sock, place)
            return
        try:
            if place.source is not None:
                sock.bind(place.source)
            error = sock.connect_ex(place.address)
            if error == errno.EINPROGRESS:  # of the loopback, so it has ended by now
                error = sock.connect_ex(place.address)
        except OSError as failure:
            error = failure.errno or errno.EIO
        if error in (0, errno.EISCONN):
            self._done(sock, place)
        elif error in _UNDER_WAY:  # the program's queue is full
            self._wait(sock)
        else:
            self._next(error, sock)

    def _wait(self, sock: socket.socket) -> None:
        self._socket = sock
        try:
            self._engine.add(sock.fileno(), self._on_events, OUT)
        except OSError as error:
            self._socket = None
            self._next(error.errno or errno.EIO, sock)

    def _on_events(self, events: int) -> None:
        sock, self._socket = self._socket, None
        assert sock is not None
        self._engine.remove(sock.fileno())
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & (ERROR | HANG_UP) else 0
        if error:
            self._next(error, sock)
        else:
            self._done(sock, self._places[0])

    def _next(self, error: int, sock: socket.socket | None) -> None:
        """Try the next place; from another port of the client's, if its own is taken."""
        place = self._places[0]
        if sock is not None:
            sock.close()
        if place.source is not None and place.source[1] and error in _TAKEN:
            self._places[0] = place._replace(source=(place.source[0], 0))
        elif len(self._places) > 1:
            del self._places[0]
        else:
            self._done(OSError(error, ""), place)
            return
        self.begin()

    def close(self) -> None:
        """Try no more.  `done` is not called then."""
        self._places = []
        if self._socket is not None:
            self._engine.remove(self._socket.fileno())
            self._socket.close()
            self._socket = None


def bind_as_client(sock: socket.socket, client: tuple[str, int]) -> None:
    """Bind a transparent socket to the address and port of a client; to another port, if that is taken.

    Raises:
        OSError: As bind(2).
    """
    try:
        sock.bind(client)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        sock.bind((client[0], 0))
