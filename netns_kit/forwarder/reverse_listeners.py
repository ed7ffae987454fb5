"""Listeners of reverse forwards: sockets of the namespace that lead to sockets of the host.

A reverse forward is one of the mode "socket" with its sides exchanged: the clients are inside, and what they are
joined to is a socket of the host, which connects when a client is there.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from ipaddress import IPv4Address
from typing import Any, Literal

from netns_kit.gateway.inside import Kind, Source, Taker
from netns_kit.uplink.flow import Endpoint

from .arrivals import Place
from .listeners import Listener
from .ports import PortForward, ReverseForward, UnixSocket
from .socket_listeners import (
    Answer,
    DatagramFlow,
    DatagramListener,
    Published,
    SocketListeners,
    SpliceListener,
    StreamFlow,
)

NOWHERE = Endpoint(IPv4Address(0), 0)  # the end of a unix socket, which has no address


class Outside:
    """The sockets of the host, as `Inside` has those of the namespace."""

    def take(self, kind: Kind, taker: Taker) -> None:
        """Give a new socket to `taker`, or the error that there is none."""
        try:
            sock = socket.socket(kind.family, kind.type | socket.SOCK_NONBLOCK)
        except OSError as error:
            taker(error)
            return
        if kind.type == socket.SOCK_STREAM:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        taker(sock)

    def waiting(self) -> int:
        """Return how many wait for a socket: nobody does."""
        return 0

    def connect_unix(self, address: str, taker: Taker) -> None:
        """Give `taker` a socket that is connected to a unix socket, or the error that there is none."""
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            taker(error)
            return
        try:
            sock.connect(address)
        except OSError as error:
            sock.close()
            taker(error)
        else:
            taker(sock)


class _Leaving(Published):
    """A client inside of a port that leads out, as people see the flow."""

    direction: Literal["outbound", "inbound"] = "outbound"

    @property
    def host(self) -> Endpoint | None:
        """The end on the host: what the client is joined to sees it."""
        sock = self._inner()
        if sock is not None and not isinstance(self._forward.guest, UnixSocket):
            with suppress(OSError):
                return Endpoint(*sock.getsockname()[:2])
        return None

    def ends(self) -> tuple[Endpoint, Endpoint]:
        """Return both ends of the connection inside."""
        host, (address, port) = self._forward.host, self._client
        if isinstance(host, UnixSocket):
            return NOWHERE, NOWHERE
        return Endpoint(address, port), Endpoint(host, self._forward.host_port)


class _LeavingStream(_Leaving, StreamFlow):
    @property
    def carried(self) -> tuple[int, int]:
        return super().carried[::-1]


class _LeavingDatagrams(_Leaving, DatagramFlow):
    @property
    def carried(self) -> tuple[int, int]:
        return super().carried[::-1]


class ReverseListeners(SocketListeners):
    """What the listeners of reverse forwards share in one stack: the sockets of the host, pipes and a buffer."""

    def _source(self) -> Source:
        return Outside()

    def lead_out(self, reverse: ReverseForward, sock: socket.socket) -> Listener:
        """Return the listener of a reverse forward, whose socket is `sock`.

        Raises:
            OSError: A unix socket cannot be had here, or the listener cannot be watched.
        """
        if isinstance(reverse.to, UnixSocket):
            socket.socket(socket.AF_UNIX).close()  # which the sandbox of a worker does not let it have
        sides = (reverse.inside, reverse.inside_port, reverse.to, reverse.to_port)
        forward = PortForward(reverse.protocol, *sides, mode="socket")
        listener = (_Streams if reverse.protocol == "tcp" else _Datagrams)(self, forward, sock)
        listener.reverse = reverse
        return listener


class _Streams(SpliceListener):
    reverse: ReverseForward

    def _flow(self, client: tuple[str, int], sock: socket.socket, places: list[Place]) -> StreamFlow:
        flow = _LeavingStream(self._shared, self.forward, client, sock, places)
        flow.cause = self.reverse
        return flow


class _Datagrams(DatagramListener):
    reverse: ReverseForward

    def _flow(self, client: Any, places: list[Place], answer: Answer) -> DatagramFlow:
        flow = _LeavingDatagrams(self._shared, self.forward, client, places, answer)
        flow.cause = self.reverse
        return flow
