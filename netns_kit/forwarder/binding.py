"""Binding: the host's listening sockets, and what keeps a port from being had."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Literal, TypeVar

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.errors import AddressError, ArgumentError, PortInUseError
from netns_kit.host import activation, diagnosis
from netns_kit.host.abi import IP_FREEBIND, IPV6_FREEBIND
from netns_kit.host.paths import NOTHING_MADE, Made, bind
from netns_kit.host.undo import on_error
from netns_kit.uplink.sockets import prepare_stream

from .ports import PortForward, UnixSocket

BACKLOG = 4096
FAMILIES = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}  # by the version of IP
_NOT_TO_BE_HAD = frozenset({errno.EADDRINUSE, errno.EACCES})  # errors that leave an optional port out
_IFNAMSIZ = 16  # bytes of a device's name, with its null (linux/if.h)
_FREEBIND = {4: (socket.IPPROTO_IP, IP_FREEBIND), 6: (socket.IPPROTO_IPV6, IPV6_FREEBIND)}

T = TypeVar("T")


def all_or_none(
    forwards: Iterable[PortForward], listen: Callable[[PortForward], T], undo: Callable[[T], object]
) -> list[T]:
    """Listen by each of these forwards, or by none if one fails.

    An optional one whose port cannot be had is left out.  Raises what `listen` raises.
    """
    made: list[T] = []
    with on_error(lambda: list(map(undo, made))):
        for forward in forwards:
            try:
                made.append(listen(forward))
            except OSError as error:
                if not forward.optional or error.errno not in _NOT_TO_BE_HAD:
                    raise
    return made


def listen(forward: PortForward) -> socket.socket:
    """Return a socket that listens as `forward` says, on a port; it is the caller's.

    Raises:
        PortInUseError: Another socket has the port.
        AddressError: The address is none of the host's.
        OSError: As the host's kernel says.
    """
    host = forward.host
    assert not isinstance(host, UnixSocket)
    family = FAMILIES[host.version]
    kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
    place = f"{forward.listens_on}/{forward.protocol}"
    try:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            raise diagnosis.ipv6(error.errno, {}) from error
        raise OSError(error.errno, error.strerror, place) from error
    with on_error(sock.close):
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if forward.device is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, forward.device.encode())
            if forward.freebind:
                sock.setsockopt(*_FREEBIND[host.version], 1)
            if forward.protocol == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(host), forward.host_port))
            if forward.protocol == "tcp":
                prepare_stream(sock)  # what it accepts has these options from it
                sock.listen(BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(
                    f"{place} is taken by another socket",
                    fix="choose another host port, or 0 for any that is free",
                ) from error
            if error.errno == errno.EADDRNOTAVAIL:
                raise AddressError("expected an address of this host", "port", str(forward)) from error
            raise OSError(error.errno, error.strerror, place) from error
    return sock


def listen_unix(where: UnixSocket, sock: socket.socket | None = None) -> tuple[socket.socket, Made]:
    """Return a unix stream socket that listens, and the file that was made for it.

    Args:
        where: The path, or the name in the namespace of the socket.
        sock: The socket that is to listen, which is closed if it cannot; None for a new one.

    Raises:
        PortInUseError: Something is there.
        OSError: As the host's kernel says.
    """
    sock = sock or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    made = NOTHING_MADE
    with on_error(sock.close):
        try:
            if where.path.startswith("@"):
                sock.bind(where.address)
            else:
                made = bind(sock, where.path)
            sock.listen(BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(
                    f"{where} is taken", fix="choose another path, or remove what is there"
                ) from error
            raise OSError(error.errno, error.strerror, str(where)) from error
    return sock, made


def described(
    sock: socket.socket, guest_port: int | None, guest: AddressLike | UnixSocket | None
) -> PortForward:
    """Return the forward that says where a socket listens, and that it leads to the guest, to the same port if it is
    given none.

    Raises:
        ArgumentTypeError: It is no socket.
        ArgumentError: It is none that listens, or none that can be published.
        PortSpecError: It cannot lead there.
    """
    arguments.instance("sock", sock, socket.socket, "a socket")
    expected = "expected a TCP socket that listens, a UDP socket, or a unix stream socket that listens"
    wrong = activation.problem(sock.fileno())
    if wrong is None and sock.family == socket.AF_UNIX and sock.type != socket.SOCK_STREAM:
        wrong = "carries no streams"
    if wrong is not None:
        raise ArgumentError(expected, "sock", arguments.shown(sock), f"this one {wrong}")
    name = sock.getsockname()
    device = None
    if sock.family == socket.AF_UNIX:
        host, port = UnixSocket(f"@{name[1:].decode()}" if isinstance(name, bytes) else name), 0
    else:
        host, port = name[0].partition("%")[0], name[1]
        bound = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _IFNAMSIZ)
        device = os.fsdecode(bound.partition(b"\0")[0]) or None
    if guest_port is None:
        guest_port = 0 if isinstance(guest, UnixSocket) else port
    protocol: Literal["tcp", "udp"] = "tcp" if sock.type == socket.SOCK_STREAM else "udp"
    return PortForward(protocol, host, port, guest, guest_port, device)


def client_address(text: str) -> Address:
    """Return a client's address, as the kernel tells it.  A socket of both families tells IPv4's inside of IPv6's."""
    address = ip_address(text)
    return address if address.version == 4 else address.ipv4_mapped or address
