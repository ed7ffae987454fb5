"""NamespaceSockets, AwaitedDial: sockets of another namespace for an uplink.

A socket belongs to the namespace that it was made in, wherever it is used.  The agent of that namespace makes them,
and a `SocketSource` of the engine keeps a few.  So a dial begins at once, or as soon as a socket has come.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Container
from typing import Protocol, TypeAlias

from netns_kit.arguments import Address
from netns_kit.stack import Transport

from .dial import Dial, Refused
from .flow import Endpoint
from .sockets import leave_from, refusal_for

SocketTaker: TypeAlias = "Callable[[socket.socket | OSError], None]"


class SocketSource(Protocol):
    """A source of sockets of another namespace, see `netns_kit.uplink.elsewhere`."""

    def fileno(self) -> int:
        """Return the descriptor that is ready when sockets have come; -1: there will be none."""
        ...

    def has(self, protocol: Transport, version: int) -> bool:
        """Return whether a socket is here, so that `take` gives it now.

        Args:
            protocol: The transport.
            version: The version of IP.
        """
        ...

    def take(self, protocol: Transport, version: int, taker: SocketTaker) -> None:
        """Give a socket to `taker`, now or when one has come, or the error that there is none.

        Args:
            protocol: The transport.
            version: The version of IP.
            taker: Called with it.
        """
        ...

    def give_back(self, protocol: Transport, version: int, sock: socket.socket) -> None:
        """Take back a socket that was not used: whoever is next gets it.

        Args:
            protocol: The transport.
            version: The version of IP.
            sock: The socket.
        """
        ...

    def receive(self) -> None:
        """Take all sockets that have come, now."""
        ...


class NamespaceSockets:
    """The sockets of the other namespace, for one stack.

    Args:
        source: The source of the sockets.
        leaves_from: Returns the source address and the interface that sockets to an address are bound to.
        kept_ports: The source ports of the guest that sockets of UDP have too, if these are free.
    """

    def __init__(
        self,
        source: SocketSource,
        leaves_from: Callable[[Address], tuple[str | None, str | None]],
        kept_ports: Container[int],
    ) -> None:
        self.source = source
        self._leaves_from = leaves_from
        self._kept_ports = kept_ports

    def open(self, protocol: Transport, target: Address, port: int = 0) -> socket.socket:
        """Return a socket of the namespace that can reach an address, as `Uplink.open` does.

        Args:
            protocol: The transport of the socket.
            target: The address to reach.
            port: The local port wanted for a UDP socket.

        Raises:
            OSError: The kernel refuses; or there is no socket here, see `SocketSource.has`.
        """
        found: list[socket.socket | OSError] = []
        if not self.source.has(protocol, target.version):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.source.take(protocol, target.version, found.append)
        sock = found[0]
        if isinstance(sock, OSError):
            raise sock
        return leave_from(sock, protocol, *self._leaves_from(target), port if port in self._kept_ports else 0)


class AwaitedDial:
    """A `Pending` dial that waits for a socket of the other namespace, and is another one then.

    Args:
        sockets: The sockets of the namespace.
        target: Where the stream is to lead.
        dial: Begins the dial, when there is a socket.
    """

    __slots__ = ("_dial", "_fd", "_found", "_is_over", "_sockets", "_target")

    def __init__(self, sockets: NamespaceSockets, target: Endpoint, dial: Callable[[], Dial]) -> None:
        self._sockets = sockets
        self._target = target
        self._dial = dial
        self._fd = -1
        self._found: socket.socket | OSError | None = None
        self._is_over = False

    def begin(self) -> Dial:
        """Begin, with a socket that is here, or by waiting for one."""
        source, version = self._sockets.source, self._target.address.version
        if source.has("tcp", version):
            return self._dial()
        source.take("tcp", version, self._take)
        dial = self.advance(failed=False)
        if dial is self:  # else nobody closes this object
            try:
                self._fd = os.dup(source.fileno())
            except OSError as error:
                self._is_over = True
                return Refused(refusal_for(error.errno or errno.EIO))
        return dial

    def _take(self, found: socket.socket | OSError) -> None:
        if not self._is_over:
            self._found = found
        elif not isinstance(found, OSError):
            found.close()

    def fileno(self) -> int:
        return self._fd

    def advance(self, *, failed: bool) -> Dial:
        if self._found is None and not self._is_over:
            self._sockets.source.receive()
        found = self._found
        if found is None:
            return self
        self._found = None
        if isinstance(found, OSError):
            return Refused(refusal_for(found.errno or errno.EIO))
        self._sockets.source.give_back("tcp", self._target.address.version, found)
        return self._dial()

    def close(self) -> None:
        self._is_over = True
        found, self._found = self._found, None
        if isinstance(found, socket.socket):
            found.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
