"""Listeners: ports of the host, accepting on the engine's side.

A `Listener` accepts on the host and connects to the guest through the stack, with the client's address, so the
server inside sees who is there.  A client whose address would mean something else inside comes from the gateway's
address instead: one on the host's loopback, one of the other family, one of IPv6 that is of a link only.
"""

from __future__ import annotations

import errno
import math
import socket
from dataclasses import replace
from ipaddress import ip_address

from . import diagnosis
from .arguments import Address
from .engine import IN
from .errors import AddressError, PortInUseError
from .gateway import Gateway
from .ports import PortForward
from .relay import UdpRelay
from .relay.sockets import Ancillary
from .stack.wire.ip import is_link_local

ACCEPTS_PER_STEP = 64
BACKLOG = 4096
PAUSE = 1.0  # seconds without accepting when the process is out of descriptors or memory
OVERLOADED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PKTINFO = {  # answers leave from the address that was asked (ip(7), IP_PKTINFO): linux/in.h, linux/in6.h
    int(socket.AF_INET): (socket.IPPROTO_IP, 8),
    int(socket.AF_INET6): (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO),
}
_PKTINFO_MESSAGES = frozenset({(socket.IPPROTO_IP, 8), (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO)})


class Listener:
    """One host port, listening.  Made and used on the engine's thread."""

    def __init__(self, gateway: Gateway, forward: PortForward) -> None:
        """Raises `PortInUseError`, `AddressError` or OSError; nothing is left bound then."""
        self._gateway = gateway
        self._engine = gateway.engine
        subnet, guest = gateway.subnet, forward.guest
        local = subnet.of(forward.host) or subnet if guest is None else subnet.of(guest)
        if local is None:
            raise AddressError(
                f"{forward}: the namespace has no IPv6 address",
                fix="forward to its IPv4 address, or turn IPv6 on",
            )
        if guest is not None and (not _is_host(guest.packed) or guest.packed in gateway.stack.addresses):
            raise AddressError(f"{forward}: that cannot be an address of the namespace")
        self._local = local
        self._socket = _listen(forward)
        self.forward = replace(forward, host_port=self._socket.getsockname()[1])

    def close(self) -> None:
        """Stop listening: the port is free when this returns."""
        raise NotImplementedError

    def _key(self, address: str, port: int) -> bytes:
        """The flow's name on the guest's side, for a client of that address and port."""
        local, client = self._local, ip_address(address)
        guest = self.forward.guest or self._gateway.guest(local)
        source: Address = local.gateway
        if (
            client.version == guest.version
            and not client.is_loopback
            and not is_link_local(client.packed)
            and client not in local.network
        ):
            source = client
        ports = self.forward.guest_port.to_bytes(2, "big") + port.to_bytes(2, "big")
        return guest.packed + source.packed + ports


class TcpListener(Listener):
    """Accepts, and connects to the guest.  Closed, it leaves the connections it has made alone."""

    def __init__(self, gateway: Gateway, forward: PortForward) -> None:
        self.timer_at = self.timer_entry = math.inf
        super().__init__(gateway, forward)
        self._engine.add(self._socket.fileno(), self._on_events, IN)

    def close(self) -> None:
        self.timer_at = math.inf
        self._engine.remove(self._socket.fileno())
        self._socket.close()

    def _on_events(self, _: int) -> None:
        for _ in range(ACCEPTS_PER_STEP):
            if not self._gateway.make_room():
                self._pause()
                return
            try:
                sock, client = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in OVERLOADED:
                    self._pause()
                    return
                continue  # that client has gone again
            sock.setblocking(False)
            self._gateway.tcp_accepted(self._key(*client[:2]), sock)

    def _pause(self) -> None:
        self._engine.modify(self._socket.fileno(), 0)
        self._engine.timers.arm(self, self._engine.now + PAUSE)

    def handle_timer(self, now: float) -> None:
        """The pause is over."""
        self._engine.modify(self._socket.fileno(), IN)


class UdpListener(Listener):
    """Hands datagrams to the guest, and its answers back.  Closed, its flows end."""

    def __init__(self, gateway: Gateway, forward: PortForward) -> None:
        super().__init__(gateway, forward)
        self._socket.setsockopt(*_PKTINFO[self._socket.family], 1)
        self._relay = UdpRelay(
            self._engine,
            self._socket,
            gateway.inbox,
            gateway.outbox,
            unsolicited=self._open,
            idle=lambda _: None,
        )

    def close(self) -> None:
        self._relay.close()

    def _open(self, relay: UdpRelay, client: tuple[str, int], ancillary: Ancillary) -> None:
        stack = self._gateway.stack
        try:
            key = self._gateway.free_key(self._key(*client), stack.udp)
        except KeyError:
            stack.dropped["udp-ports"] += 1
            return
        flow = stack.add_udp(key, self._engine.now, client)
        relay.add(flow, client, [each for each in ancillary if each[:2] in _PKTINFO_MESSAGES])


def _listen(forward: PortForward) -> socket.socket:
    family = socket.AF_INET if forward.host.version == 4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if forward.device is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, forward.device.encode())
        if forward.protocol == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(forward.host), forward.host_port))
        if forward.protocol == "tcp":
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"{forward.listens_on}/{forward.protocol} is taken by another socket",
                fix="choose another host port, or 0 for any that is free",
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise AddressError(
                f"{forward.host} is no address of this host", fix="choose one of its own"
            ) from error
        if error.errno == errno.EAFNOSUPPORT:
            raise diagnosis.ipv6(error.errno, {}) from error
        raise
    except BaseException:
        sock.close()
        raise
    return sock


def _is_host(address: bytes) -> bool:
    if len(address) == 16:
        return address[0] not in (0, 0xFF) and not is_link_local(address)
    return address[0] not in (0, 127) and address[0] < 224
