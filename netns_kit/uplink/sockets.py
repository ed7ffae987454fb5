"""Options of the host's sockets: ICMP errors, TTL, traffic class, and the "don't fragment" bit (DF).

Facts about Linux, each held by a test in tests/laws/test_facts.py or tests/system:

- The error queue of a socket has ICMP errors with their type, code and sender, and the part of our packet that they
  quote (ip(7), IP_RECVERR).  A connecting TCP socket has such a queue: with IPv4 always, with IPv6 if asked for.  It
  must be read before SO_ERROR, because the kernel may clear the error in between and go on trying.
- A pending error is raised by the next send, which then sends nothing.
- When the kernel itself refuses a datagram for its size, the error has a local origin, the MTU, and no offender.
- With IP_PMTUDISC_PROBE every datagram has DF, so each that is too big causes an error.  With IP_PMTUDISC_DONT none
  has DF.  By default the kernel fragments a datagram that is larger than the known MTU of the path.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from netns_kit.host.abi import (
    IP_BIND_ADDRESS_NO_PORT,
    IP_PMTUDISC_DONT,
    IP_PMTUDISC_PROBE,
    IP_PMTUDISC_WANT,
    SO_EE_ORIGIN_ICMP,
    SO_EE_ORIGIN_ICMP6,
    SO_EE_ORIGIN_LOCAL,
)
from netns_kit.stack import IcmpError, Refusal, Transport
from netns_kit.stack.wire import family as addresses

DATAGRAMS_PER_STEP = 64
MAX_DATAGRAM = 65536
ANCILLARY_SPACE = 128
ERROR_SPACE = 512
ERRORS_AT_ONCE = 1024  # more than a receive buffer holds
PROBE_TTL = 32  # with so few hops a packet is taken for a traceroute's probe, which may test sizes too

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST and drops unsent data
_EXTENDED_ERROR = struct.Struct("=IBBBxII")  # struct sock_extended_err: errno, origin, type, code, info, data

_REFUSALS = {
    # the destination refused
    errno.ECONNREFUSED: Refusal.RESET,
    errno.ECONNRESET: Refusal.RESET,
    errno.ECONNABORTED: Refusal.RESET,
    errno.EPIPE: Refusal.RESET,
    # there is no route, says the host's kernel or a router
    errno.ENETUNREACH: Refusal.NET_UNREACHABLE,
    errno.ENETDOWN: Refusal.NET_UNREACHABLE,
    errno.EHOSTUNREACH: Refusal.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Refusal.HOST_UNREACHABLE,
    errno.ENONET: Refusal.HOST_UNREACHABLE,
    errno.ENOPROTOOPT: Refusal.HOST_UNREACHABLE,
    errno.EPROTO: Refusal.HOST_UNREACHABLE,
    errno.EOPNOTSUPP: Refusal.HOST_UNREACHABLE,
    # a firewall, a sandbox or a sysctl forbids it
    errno.EACCES: Refusal.PROHIBITED,
    errno.EPERM: Refusal.PROHIBITED,
    errno.ETIMEDOUT: Refusal.DROP,
    errno.EMSGSIZE: Refusal.DROP,  # larger than any datagram
    # the host lacks something: a port, a descriptor, memory, an address family, an address, an interface
    **dict.fromkeys(
        (
            errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS,
            errno.ENOMEM, errno.ENOSPC, errno.ENOSR, errno.EUSERS, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT,
            errno.ESOCKTNOSUPPORT, errno.EPFNOSUPPORT, errno.ENODEV, errno.ENXIO, errno.ENETRESET, errno.EINVAL,
            errno.EINTR, errno.EIO, errno.ENOSYS,
        ),
        Refusal.NET_UNREACHABLE,
    ),
}  # fmt: skip


def socket_address(
    address: IPv4Address | IPv6Address, port: int
) -> tuple[str, int] | tuple[str, int, int, int]:
    """Return the argument of connect(2) for an address and a port.  The address may have a zone.

    Raises:
        OSError: The zone is not an interface of this host (ENETUNREACH).
    """
    zone = address.scope_id if isinstance(address, IPv6Address) else None
    if zone is None:
        return str(address), port
    try:
        index = int(zone) if zone.isdecimal() else socket.if_nametoindex(zone)
    except OSError as error:
        raise OSError(errno.ENETUNREACH, f"no interface {zone}") from error
    return str(address).partition("%")[0], port, 0, index


def refusal_for(error: int) -> Refusal:
    """Return what the guest is told when a call on the host's socket fails with this errno.

    An error of this host, and any error that is not in the table, is "network unreachable".  It is never "connection
    refused", because the destination was not asked.
    """
    return _REFUSALS.get(error, Refusal.NET_UNREACHABLE)


class _Options(NamedTuple):
    """The socket options of one address family, as pairs of level and option."""

    errors: tuple[int, int]
    ttl: tuple[int, int]
    tos: tuple[int, int]
    mtu_discover: tuple[int, int]
    receive: tuple[tuple[int, int], ...]
    offender: slice  # the bytes of a sockaddr that are the address


_OPTIONS = {  # linux/in.h, linux/in6.h
    int(socket.AF_INET): _Options((0, 11), (0, 2), (0, 1), (0, 10), ((0, 12), (0, 13)), slice(4, 8)),
    int(socket.AF_INET6): _Options(
        (41, 25), (41, 16), (41, 67), (41, 23), ((41, 51), (41, 66)), slice(8, 24)
    ),
}
_ANY = {int(socket.AF_INET): "0.0.0.0", int(socket.AF_INET6): "::"}
_TTLS, _TOSES = frozenset({(0, 2), (41, 52)}), frozenset({(0, 1), (41, 67)})  # ancillary data of a datagram

Ancillary = list[tuple[int, int, bytes]]

family_of: Callable[[socket.socket], int] = vars(socket.SocketType)["family"].__get__
"""Return the address family of a socket, as a plain int.  `socket.socket.family` makes an enum member of it, which
takes longer than a system call."""


def is_internet(sock: socket.socket) -> bool:
    """Return whether `sock` sends IP packets.  If not, it is of AF_UNIX."""
    return family_of(sock) in _OPTIONS


def prepare_stream(sock: socket.socket) -> bool:
    """Make a TCP socket send without delay and keep urgent data in line.  Return whether it is a TCP socket.

    A stream socket of AF_UNIX has neither option and is left as it is.
    """
    if family_of(sock) not in _OPTIONS:
        return False
    # the guest's kernel has applied Nagle's algorithm
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    return True


def ask_for_marks(sock: socket.socket) -> None:
    """Make the socket deliver TTL and traffic class with each datagram, for `marks_of`."""
    for option in _OPTIONS[family_of(sock)].receive:
        sock.setsockopt(*option, 1)


def marks_of(ancillary: Ancillary) -> tuple[int, int]:
    """Return TTL and traffic class of a received datagram.  The TTL is one less, as after a router."""
    ttl, tos = 64, 0
    for level, kind, data in ancillary:
        if (level, kind) in _TTLS:
            ttl = max(int.from_bytes(data, sys.byteorder) - 1, 1)
        elif (level, kind) in _TOSES:
            tos = int.from_bytes(data, sys.byteorder)
    return ttl, tos


class Marks:
    """The TTL, traffic class and DF that a socket of the host sends with.  Options are only set when they change.

    The TTL is one less than that of the guest's packet, as after a router.

    Args:
        sock: The socket.
        exact: True: DF is always as in the guest's packet.  False: DF is only taken over for packets with a small
            TTL.  Kernels set DF by default, and the first large datagram should not be lost because the host's MTU
            is smaller than the guest's.
    """

    __slots__ = ("_carried", "_exact", "_mode", "_options", "_socket", "_tos", "_ttl")

    def __init__(self, sock: socket.socket, *, exact: bool = False) -> None:
        self._socket = sock
        self._options = _OPTIONS[family_of(sock)]
        self._exact = exact
        self._carried = self._ttl = self._tos = self._mode = -1

    def carry(self, marks: int) -> None:
        """Set the marks of what is sent from now on.  See `netns_kit.stack.wire.ip.Packet` for their encoding."""
        if marks == self._carried:
            return
        self._carried = marks
        ttl, tos = marks >> 16, marks >> 8 & 0xFF
        if ttl != self._ttl:
            self._ttl = ttl
            self._socket.setsockopt(*self._options.ttl, max(ttl - 1, 1))
        if tos != self._tos:
            self._tos = tos
            self._socket.setsockopt(*self._options.tos, tos)
        if not marks & 1:
            mode = IP_PMTUDISC_DONT
        else:
            mode = IP_PMTUDISC_PROBE if self._exact or ttl <= PROBE_TTL else IP_PMTUDISC_WANT
        if mode != self._mode:
            self._mode = mode
            self._socket.setsockopt(*self._options.mtu_discover, mode)


def leave_from(
    sock: socket.socket, protocol: Transport, address: str | None, device: str | None, port: int
) -> socket.socket:
    """Return a new socket, bound to what its packets are to leave from.  It is closed if that fails.

    Args:
        sock: The socket.
        protocol: Its transport.
        address: The source address; None: the kernel chooses.
        device: The interface; None: any.
        port: The local port wanted for a UDP socket.  It gets another port if this one is not free.

    Raises:
        OSError: The kernel refuses.
    """
    try:
        if protocol == "udp" and family_of(sock) == socket.AF_INET6:  # it would have that port of IPv4 too
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if device is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        if protocol == "udp":
            address = address or _ANY[family_of(sock)]
            try:
                sock.bind((address, port))
            except OSError:
                sock.bind((address, 0))
        elif address is not None:
            if protocol == "tcp":
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((address, 0))
    except BaseException:
        sock.close()
        raise
    return sock


def set_tos(sock: socket.socket, tos: int) -> None:
    """Set the traffic class of what `sock` sends from now on.  A socket of AF_UNIX is left as it is."""
    options = _OPTIONS.get(family_of(sock))
    if options is not None:
        sock.setsockopt(*options.tos, tos)


def set_ttl(sock: socket.socket, ttl: int) -> None:
    """Set the TTL of what `sock` sends from now on to one less than `ttl`, the TTL of the guest's packet."""
    sock.setsockopt(*_OPTIONS[family_of(sock)].ttl, max(ttl - 1, 1))


class HostError(NamedTuple):
    """One entry of a socket's error queue.  It is about a packet to `target`, which begins with `quoted`."""

    target: tuple[str, int]
    error: int
    origin: int
    type: int
    code: int
    mtu: int
    offender: bytes
    ttl: int
    quoted: bytes

    @property
    def is_local(self) -> bool:
        """True if the host's own kernel refused to send the packet."""
        return self.origin == SO_EE_ORIGIN_LOCAL

    def for_guest(self, other: bytes) -> Refusal | IcmpError:
        """Return what the guest is told of this error.

        Args:
            other: The packed address that the guest sends to.  It may differ from `target`, as the gateway's address
                differs from the loopback that it stands for.  An error from `target` is then reported as from
                `other`.
        """
        family = addresses.family_of(other)
        if self.is_local and self.error == errno.EMSGSIZE:
            return IcmpError(family.too_big, family.too_big_code, mtu=self.mtu)
        if len(self.offender) != family.address_size:
            return refusal_for(self.error)
        offender = self.offender
        if ip_address(offender) == ip_address(self.target[0].partition("%")[0]):
            offender = other
        mtu = self.mtu if self.error == errno.EMSGSIZE else 0
        return IcmpError(self.type, self.code, mtu, offender, self.ttl)


def ask_for_errors(sock: socket.socket, *, wanted: bool = True) -> None:
    """Make the socket queue all ICMP errors for `read_errors`, not only fatal ones; or make it stop."""
    sock.setsockopt(*_OPTIONS[family_of(sock)].errors, wanted)


def read_errors(sock: socket.socket) -> list[HostError]:
    """Empty the error queue of `sock` and return its entries.  The next send does not raise them any more."""
    options, found = _OPTIONS[family_of(sock)], list[HostError]()
    for _ in range(ERRORS_AT_ONCE):
        try:
            quoted, ancillary, _, target = sock.recvmsg(MAX_DATAGRAM, ERROR_SPACE, socket.MSG_ERRQUEUE)
        except OSError:
            break
        for level, kind, data in ancillary:
            if (level, kind) == options.errors:
                error, origin, type_, code, info, _ = _EXTENDED_ERROR.unpack_from(data)
                offender = b""
                if origin in (SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6):
                    offender = data[_EXTENDED_ERROR.size :][options.offender]
                ttl, _ = marks_of(ancillary)
                found.append(HostError(target[:2], error, origin, type_, code, info, offender, ttl, quoted))
    return found
