"""Listeners: ports of the host, accepting on the engine's side.

A `Listener` accepts on the host and connects to the guest through the stack, with the client's address, so the
server inside sees who is there.  A client on the host's loopback, whose address would mean the guest itself, comes
from the gateway's address instead.
"""

from __future__ import annotations

import errno
import math
import socket
from dataclasses import replace
from ipaddress import ip_address

from .engine import ERROR, IN, Appetite
from .errors import AddressError, PortInUseError
from .gateway import Gateway
from .ports import PortForward
from .relay.batches import ask_for_runs
from .relay.sockets import (
    Ancillary,
    Marks,
    ask_for_errors,
    ask_for_marks,
    read_errors,
)
from .stack import UdpFlow

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
        self._guest = (forward.guest or gateway.subnet.guest.ip).packed
        if len(self._guest) != 4:
            raise AddressError(
                f"{forward}: the namespace has no IPv6 address", fix="forward to its IPv4 address"
            )
        if not _is_host(self._guest) or self._guest in gateway.stack.addresses:
            raise AddressError(f"{forward}: that cannot be an address of the namespace")
        self._socket = _listen(forward)
        self.forward = replace(forward, host_port=self._socket.getsockname()[1])
        self._engine.add(self._socket.fileno(), self._on_events, IN)

    def _on_events(self, _: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Stop listening: the port is free when this returns."""
        self._engine.remove(self._socket.fileno())
        self._socket.close()

    def _key(self, address: str, port: int) -> bytes:
        """The flow's name on the guest's side, for a client of that address and port."""
        source = self._gateway.subnet.gateway
        client = ip_address(address)
        if client.version == 4 and not client.is_loopback and client not in self._gateway.subnet.network:
            source = client
        ports = self.forward.guest_port.to_bytes(2, "big") + port.to_bytes(2, "big")
        return self._guest + source.packed + ports


class TcpListener(Listener):
    """Accepts, and connects to the guest.  Closed, it leaves the connections it has made alone."""

    def __init__(self, gateway: Gateway, forward: PortForward) -> None:
        self.timer_at = self.timer_entry = math.inf
        super().__init__(gateway, forward)

    def close(self) -> None:
        self.timer_at = math.inf
        super().close()

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
        self._flows: dict[tuple[str, int], UdpFlow] = {}
        self._clients: dict[bytes, tuple[tuple[str, int], Ancillary]] = {}
        super().__init__(gateway, forward)
        level, option = _PKTINFO[self._socket.family]
        self._socket.setsockopt(level, option, 1)
        ask_for_runs(self._socket)
        ask_for_marks(self._socket)
        ask_for_errors(self._socket)
        self._marks = Marks(self._socket)
        self._appetite = Appetite(self._engine)

    def close(self) -> None:
        super().close()
        for flow in list(self._flows.values()):
            flow.close()

    def _on_events(self, events: int) -> None:
        if events & ERROR:
            self._errors()
        self._gateway.inbox.read(self._socket, self._appetite, self._flow_from, self._engine.now)

    def _flow_from(self, client: tuple[str, int], ancillary: Ancillary) -> UdpFlow:
        return self._flows.get(client) or self._open(client, ancillary, self._engine.now)

    def _errors(self) -> None:
        """A client that is there no more, say: the guest's server is told."""
        for each in read_errors(self._socket):
            flow = self._flows.get(each.target)
            if flow is not None:
                flow.refuse(each.for_guest(flow.key), each.quoted)

    def _open(self, client: tuple[str, int], to: Ancillary, now: float) -> UdpFlow:
        stack = self._gateway.stack
        key = self._gateway.free_key(self._key(*client[:2]), stack.udp)
        flow = stack.add_udp(key, now)
        flow.user = self
        self._flows[client] = flow
        self._clients[key] = client, [each for each in to if each[:2] in _PKTINFO_MESSAGES]
        return flow

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        client, sent_to = self._clients[flow.key]
        size = segment_size or len(payload) or 1
        for start in range(0, len(payload) or 1, size):
            self._send(payload[start : start + size], marks, sent_to, client)

    def _send(self, payload: memoryview, marks: int, sent_to: Ancillary, client: tuple[str, int]) -> None:
        for _ in range(2):  # an earlier datagram's error is raised in place of sending this one
            try:
                self._marks.carry(marks)
                self._socket.sendmsg([payload], sent_to, 0, client)
            except BlockingIOError:
                return  # lost, as datagrams are
            except OSError:
                self._errors()
            else:
                return

    def expired(self, flow: UdpFlow) -> None:
        client, _ = self._clients.pop(flow.key)
        self._flows.pop(client, None)


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
        raise
    except BaseException:
        sock.close()
        raise
    return sock


def _is_host(address: bytes) -> bool:
    return address[0] not in (0, 127) and address[0] < 224
