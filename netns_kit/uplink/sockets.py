"""What the host's sockets are asked beside carrying bytes: errors, TTL, traffic class, not to fragment.

Facts, each held by a test in tests/laws/test_facts.py or tests/system:

- A socket's error queue tells of ICMP errors with type, code, who sent it, and what it quotes of our packet
  (ip(7), IP_RECVERR).  A TCP socket that is connecting has one, of IPv4 without asking.  It is read before SO_ERROR:
  in between the kernel may take the error back and go on trying.
- An error that waits is raised by the next send, which then sends nothing.
- What the kernel itself refuses for its size, it reports as of local origin, with the MTU and no offender.
- IP_PMTUDISC_PROBE sends every datagram with DF, so each that is too big draws its own error; IP_PMTUDISC_DONT
  never does; the default fragments at home what the path is known not to take.
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
    IP_PMTUDISC_DONT,
    IP_PMTUDISC_PROBE,
    IP_PMTUDISC_WANT,
    SO_EE_ORIGIN_ICMP,
    SO_EE_ORIGIN_ICMP6,
    SO_EE_ORIGIN_LOCAL,
)
from netns_kit.stack import IcmpError, Refusal
from netns_kit.stack.wire import family as addresses

DATAGRAMS_PER_STEP = 64
MAX_DATAGRAM = 65536
ANCILLARY_SPACE = 128
ERROR_SPACE = 512
ERRORS_AT_ONCE = 1024  # more than a receive buffer holds
PROBE_TTL = 32  # what leaves with fewer hops is a traceroute's probe, and wants to know about its size too

_EXTENDED_ERROR = struct.Struct("=IBBBxII")  # struct sock_extended_err: errno, origin, type, code, info, data

_REFUSALS = {
    # who was called has said so
    errno.ECONNREFUSED: Refusal.RESET,
    errno.ECONNRESET: Refusal.RESET,
    errno.ECONNABORTED: Refusal.RESET,
    errno.EPIPE: Refusal.RESET,
    # there is no way to it, as a route or a router says
    errno.ENETUNREACH: Refusal.NET_UNREACHABLE,
    errno.ENETDOWN: Refusal.NET_UNREACHABLE,
    errno.EHOSTUNREACH: Refusal.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Refusal.HOST_UNREACHABLE,
    errno.ENONET: Refusal.HOST_UNREACHABLE,
    errno.ENOPROTOOPT: Refusal.HOST_UNREACHABLE,
    errno.EPROTO: Refusal.HOST_UNREACHABLE,
    errno.EOPNOTSUPP: Refusal.HOST_UNREACHABLE,
    # a firewall, a sandbox or a sysctl is against it
    errno.EACCES: Refusal.PROHIBITED,
    errno.EPERM: Refusal.PROHIBITED,
    errno.ETIMEDOUT: Refusal.DROP,
    errno.EMSGSIZE: Refusal.DROP,  # larger than any datagram
    # what the host lacks, for now or altogether: a port, a descriptor, memory, a family, an address, an interface
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
    """Return what connect(2) takes for an address, which may have a zone.

    Raises:
        OSError: the zone is no interface of this host (ENETUNREACH).
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
    """Return what the guest is told when a call of the host's socket fails with this errno.

    A fault of ours is never "refused": nobody was asked.  Here, as with what is not in the table, the guest's network
    has no way out for the moment.
    """
    return _REFUSALS.get(error, Refusal.NET_UNREACHABLE)


class _Options(NamedTuple):
    """The socket options of one address family, each as (level, option)."""

    errors: tuple[int, int]
    ttl: tuple[int, int]
    tos: tuple[int, int]
    mtu_discover: tuple[int, int]
    receive: tuple[tuple[int, int], ...]
    offender: slice  # where the address lies in a sockaddr


_OPTIONS = {  # linux/in.h, linux/in6.h
    int(socket.AF_INET): _Options((0, 11), (0, 2), (0, 1), (0, 10), ((0, 12), (0, 13)), slice(4, 8)),
    int(socket.AF_INET6): _Options(
        (41, 25), (41, 16), (41, 67), (41, 23), ((41, 51), (41, 66)), slice(8, 24)
    ),
}
_TTLS, _TOSES = frozenset({(0, 2), (41, 52)}), frozenset({(0, 1), (41, 67)})  # what comes with a datagram

Ancillary = list[tuple[int, int, bytes]]

family_of: Callable[[socket.socket], int] = vars(socket.SocketType)["family"].__get__
"""Returns the address family of a socket as a number.  `socket.socket.family` makes an enum of it, which takes longer
than a system call."""


def is_internet(sock: socket.socket) -> bool:
    """Return whether what `sock` sends leaves in packets; else it is a pair's, in memory."""
    return family_of(sock) in _OPTIONS


def prepare_stream(sock: socket.socket) -> bool:
    """Have a stream socket send what it is given at once, and keep urgent data in line.

    Returns whether it `is_internet`; any other kind knows neither.
    """
    if family_of(sock) not in _OPTIONS:
        return False
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the guest's kernel has done Nagle's part
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    return True


def ask_for_marks(sock: socket.socket) -> None:
    """Have TTL and traffic class come with each datagram, for `marks_of`."""
    for option in _OPTIONS[family_of(sock)].receive:
        sock.setsockopt(*option, 1)


def marks_of(ancillary: Ancillary) -> tuple[int, int]:
    """Return TTL and traffic class of a datagram that has arrived, as a router passes them on: one hop fewer."""
    ttl, tos = 64, 0
    for level, kind, data in ancillary:
        if (level, kind) in _TTLS:
            ttl = max(int.from_bytes(data, sys.byteorder) - 1, 1)
        elif (level, kind) in _TOSES:
            tos = int.from_bytes(data, sys.byteorder)
    return ttl, tos


class Marks:
    """TTL, traffic class and DF of the guest's packets, as options of a host's socket that are set when they change.

    We are a router: TTL goes down by one.  `exact`: whether a packet may be fragmented is always as the guest
    says.  Otherwise only for probes: a kernel sets DF by default, and its first large datagram is not to be lost
    because the host's MTU is smaller than the guest's.
    """

    __slots__ = ("_carried", "_exact", "_mode", "_options", "_socket", "_tos", "_ttl")

    def __init__(self, sock: socket.socket, *, exact: bool = False) -> None:
        self._socket = sock
        self._options = _OPTIONS[family_of(sock)]
        self._exact = exact
        self._carried = self._ttl = self._tos = self._mode = -1

    def carry(self, marks: int) -> None:
        """Give these marks to what is sent from now on (see `netns_kit.stack.wire.ip.Packet`)."""
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


def set_tos(sock: socket.socket, tos: int) -> None:
    """Set the traffic class of what `sock` sends from now on, if it sends packets."""
    options = _OPTIONS.get(family_of(sock))
    if options is not None:
        sock.setsockopt(*options.tos, tos)


def set_ttl(sock: socket.socket, ttl: int) -> None:
    """Set the TTL of what `sock` sends from now on, for packets that came to us with `ttl`."""
    sock.setsockopt(*_OPTIONS[family_of(sock)].ttl, max(ttl - 1, 1))


class HostError(NamedTuple):
    """One entry of an error queue: about a packet to `target`, of which `quoted` is known."""

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
        """True when the host's own kernel refused to send it."""
        return self.origin == SO_EE_ORIGIN_LOCAL

    def for_guest(self, other: bytes) -> Refusal | IcmpError:
        """Return what the guest is told whose flow goes to the packed address `other`.

        Where the flow's target stands for that address, as loopback does for the gateway's, `other` is put in its
        place.
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
    """Have ICMP errors queued for `read_errors`, those too that do not end what the socket does; or not."""
    sock.setsockopt(*_OPTIONS[family_of(sock)].errors, wanted)


def read_errors(sock: socket.socket) -> list[HostError]:
    """Return what is in the error queue of `sock`.  Once read, no send raises it."""
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
