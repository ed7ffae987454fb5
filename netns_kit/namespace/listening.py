"""Listening: which TCP and UDP sockets of a namespace wait for clients, by the kernel's socket diagnostics.

A *dump* is the kernel's answer to a request of sock_diag(7), one for each protocol and family; it has a message for
each socket:

     0  uint32 length | uint16 type | uint16 flags      struct nlmsghdr, netlink(7)
     8  uint32 sequence number | uint32 port id         the number is that of the request: the protocol's
    16  uint8 family, state, timer, retransmissions     struct inet_diag_msg, linux/inet_diag.h
    20  uint16 source port | uint16 destination port    big endian
    24  source address | destination address            16 bytes each; IPv4 has the first 4
    56  interface, cookie, expiry, queues, uid, inode   the receive queue of a listener counts who waits for accept(2)
    88  attributes, among them INET_DIAG_SKV6ONLY

Programs inside decide how many messages there are, and nothing else of them but the port and the address.  So a dump
has a bound, and between two pieces of it, of 32 KiB at most, the event loop runs other tasks.

These messages are not read by pyroute2, as those of links and routes are: it needs 25 us for each, holds the
interpreter meanwhile, and takes 170 ms to import.  This module needs 2 us, and nothing where a dump is repeated and
nothing has changed.  tests/namespace/test_listening.py holds its layout against pyroute2's.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from struct import Struct, error
from typing import Literal

import anyio
import anyio.lowlevel

from netns_kit.child.codec import DecodeError
from netns_kit.frozen import frozen
from netns_kit.host import diagnosis
from netns_kit.host.abi import (
    INET_DIAG_SKV6ONLY,
    NLM_F_DUMP,
    NLM_F_MULTI,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOCK_DIAG_BY_FAMILY,
    TCP_CLOSE,
    TCP_LISTEN,
)

DUMP_MAX = 8 << 20  # bytes: about 65,000 sockets
PIECE = 1 << 16  # bytes; the kernel's pieces have 32 KiB at most

Protocol = Literal["tcp", "udp"]

_NUMBERS: dict[Protocol, int] = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_PROTOCOLS: dict[int, Protocol] = {number: name for name, number in _NUMBERS.items()}
_STATES: dict[Protocol, int] = {
    "tcp": 1 << TCP_LISTEN,
    "udp": 1 << TCP_CLOSE,
}  # so is a UDP socket without a peer
_HEADER = Struct("=IHHII")
_REQUEST = Struct("=IHHII BBxxI 48x")  # and struct inet_diag_req_v2: any ports, addresses and interface
_MESSAGE = Struct("=Bxxx 2sxx 16s")  # not the other address, nor what follows
_ATTRIBUTE = Struct("=HH")
_ATTRIBUTES_AT = 88
_DONE_SIZE = 20  # a header and the errno of the dump


@frozen
class ListeningSocket:
    """A socket that waits for clients: TCP in the state LISTEN, or UDP that is bound and has no peer."""

    protocol: Literal["tcp", "udp"]
    """The protocol, "tcp" or "udp"."""
    address: IPv4Address | IPv6Address
    """The address; an unspecified one (0.0.0.0 or `::`) means all of the namespace's."""
    port: int
    """The port."""
    v6only: bool | None = None
    """True for an IPv6 socket that IPv4 clients do not reach; None for an IPv4 one, or where the kernel is silent."""


class SocketDiagnostics:
    """A netlink socket by which a namespace tells of its sockets.  It is used by one task at a time.

    Args:
        sock: A socket of the namespace, of AF_NETLINK and NETLINK_SOCK_DIAG.  It is this object's to close.
        betrayed: Makes the error of what no kernel says.
    """

    def __init__(self, sock: socket.socket, betrayed: Callable[[str], Exception]) -> None:
        self._betrayed = betrayed
        self._socket = sock
        sock.bind((0, 0))
        self._port_id: int = sock.getsockname()[0]

    def close(self) -> None:
        """Close the socket.  Calling it again is fine."""
        self._socket.close()

    async def dump(self, protocols: Iterable[Protocol]) -> list[bytes]:
        """Return what the kernel says of the sockets that listen, as `parse` takes it.

        Two dumps are equal if nothing has changed, and almost never otherwise; comparing them is cheap.

        Args:
            protocols: Which are asked for.

        Raises:
            FeatureUnavailable: This kernel has no diagnostics of that protocol.
            OSError: EMSGSIZE: more listen than `DUMP_MAX` allows.  Close the object then.

        Cancellation:
            Close the object: the kernel is still answering.
        """
        pieces: list[bytes] = []
        for protocol in protocols:
            for family in (socket.AF_INET, socket.AF_INET6):
                await self._dump_one(family, protocol, pieces)
        return pieces

    async def parse(self, pieces: Iterable[bytes]) -> list[ListeningSocket]:
        """Return the sockets in a dump.  Raises what `betrayed` makes."""
        sockets: list[ListeningSocket] = []
        for data in pieces:
            await anyio.lowlevel.checkpoint()
            try:
                sockets += parse(data)
            except DecodeError as exc:
                raise self._betrayed(str(exc)) from exc
        return sockets

    async def _dump_one(self, family: int, protocol: Protocol, pieces: list[bytes]) -> None:
        number = _NUMBERS[protocol]
        flags, states = NLM_F_REQUEST | NLM_F_DUMP, _STATES[protocol]
        request = (_REQUEST.size, SOCK_DIAG_BY_FAMILY, flags, number, 0, family, number, states)
        done = _HEADER.pack(_DONE_SIZE, NLMSG_DONE, NLM_F_MULTI, number, self._port_id)
        size = sum(map(len, pieces))
        self._socket.send(
            _REQUEST.pack(*request)
        )  # the first piece is made meanwhile, later ones by each read
        while True:
            try:
                pieces.append(data := self._socket.recv(PIECE))
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
                continue
            _, kind, *_ = _HEADER.unpack_from(data)
            if kind == NLMSG_ERROR:
                raise _failure(data[_HEADER.size :])
            if data[-_DONE_SIZE:-4] == done:
                if any(data[-4:]):
                    raise _failure(data[-4:])
                return
            size += len(data)
            if size > DUMP_MAX:
                raise OSError(errno.EMSGSIZE, "more sockets listen in the namespace than can be listed")
            await anyio.lowlevel.checkpoint()


def parse(data: bytes) -> Iterator[ListeningSocket]:
    """Yield the sockets in a piece of a dump.  Raises `DecodeError`, and nothing else, whatever the bytes are."""
    at = 0
    while at < len(data):
        try:
            size, kind, _, number, _ = _HEADER.unpack_from(data, at)
            if kind == SOCK_DIAG_BY_FAMILY:
                family, port, packed = _MESSAGE.unpack_from(data, at + _HEADER.size)
                v6only = _v6only(data, at + _ATTRIBUTES_AT, at + size) if family == socket.AF_INET6 else None
                address = _address(family, packed)
                yield ListeningSocket(_PROTOCOLS[number], address, int.from_bytes(port, "big"), v6only)
        except (error, KeyError) as exc:
            raise DecodeError(f"no message of socket diagnostics: {data[at : at + 100]!r}") from exc
        at += max(size + 3 & ~3, _HEADER.size)


@lru_cache
def _address(family: int, packed: bytes) -> IPv4Address | IPv6Address:
    """Return an address: the IPv4 one of an IPv6 socket that serves IPv4 clients alone (::ffff:0:0/96)."""
    if family == socket.AF_INET:
        return IPv4Address(packed[:4])
    address = IPv6Address(packed)
    return address.ipv4_mapped or address


def _v6only(data: bytes, at: int, end: int) -> bool | None:
    while at + _ATTRIBUTE.size < end:
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if kind == INET_DIAG_SKV6ONLY:
            return data[at + _ATTRIBUTE.size] != 0
        at += max(size + 3 & ~3, _ATTRIBUTE.size)
    return None


def _failure(data: bytes) -> OSError:
    number = -int.from_bytes(data[:4], sys.byteorder, signed=True)
    refusal = OSError(number, os.strerror(number))
    if number in (errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL):  # a kernel without this part
        return diagnosis.feature("socket diagnostics", refusal, "3.3")
    return refusal
