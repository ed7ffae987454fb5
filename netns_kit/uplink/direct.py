"""DirectDial: a dial that connects a socket of the host by connect(2)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable
from typing import Literal

from netns_kit.arguments import Address
from netns_kit.stack import IcmpError, Refusal

from .dial import Connected, Dial, Refused
from .sockets import ask_for_errors, family_of, read_errors, refusal_for, set_tos, set_ttl, socket_address


class DirectDial:
    """A `Pending` dial that tries several addresses one after another, until one answers.

    Args:
        open_socket: Makes a socket for a transport and an address; it raises OSError if it cannot.
        candidates: Addresses and ports, in the order in which they are tried.
        dialled: The address that the guest wants to reach.  ICMP errors that the guest is told are about this one.
        ttl, tos: TTL and traffic class of the guest's SYN, which the host's SYN gets too.
    """

    __slots__ = ("_candidates", "_dialled", "_open_socket", "_socket", "_tos", "_ttl")

    def __init__(
        self,
        open_socket: Callable[[Literal["tcp"], Address], socket.socket],
        candidates: Iterable[tuple[Address, int]],
        dialled: Address,
        ttl: int,
        tos: int,
    ) -> None:
        self._open_socket = open_socket
        self._candidates = iter(candidates)
        self._dialled = dialled
        self._ttl, self._tos = ttl, tos
        self._socket: socket.socket | None = None

    def begin(self, why: Refusal | IcmpError = Refusal.NET_UNREACHABLE) -> Dial:
        """Connect to the next candidate.  If none is left, the dial is refused with `why`, as the last one failed."""
        for address, port in self._candidates:
            try:
                sock = self._open_socket("tcp", address)
            except OSError as failure:
                why = refusal_for(failure.errno or errno.EIO)
                continue
            if family_of(sock) == socket.AF_INET6:
                ask_for_errors(sock)
            set_ttl(sock, self._ttl)
            if self._tos:
                set_tos(sock, self._tos)
            try:
                error = sock.connect_ex(socket_address(address, port))
            except OSError as failure:  # the address has a zone that is not an interface of this host
                error = failure.errno or errno.EIO
            if error in (0, errno.EINPROGRESS):
                self._socket = sock
                return self
            sock.close()
            why = refusal_for(error)
        return Refused(why)

    def fileno(self) -> int:
        return -1 if self._socket is None else self._socket.fileno()

    def advance(self, *, failed: bool) -> Dial:
        sock = self._socket
        if sock is None:  # it has been closed
            return self
        if failed:
            told = read_errors(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if told or error:
                why = told[-1].for_guest(self._dialled.packed) if told else refusal_for(error)
                rest = DirectDial(self._open_socket, self._candidates, self._dialled, self._ttl, self._tos)
                return rest.begin(why)
        if family_of(sock) == socket.AF_INET6:
            ask_for_errors(sock, wanted=False)
        self._socket = None
        return Connected(sock)

    def close(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
