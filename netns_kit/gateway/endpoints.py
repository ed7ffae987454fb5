"""Endpoints: the addresses and ports at which this process answers the guest itself.

    a flow           a handler may claim it; if Uplink.route lets it pass, the handler gets it, else the uplink
    carries it a datagram       one to us, to a group or to all, and of no flow, is for a link service, or opens a
    flow

A handler is looked up by the destination of a flow, when the flow is opened.  The uplink's policy is asked about
every flow, also about one that a handler claims, and is told of the claim (`Flow.served`).  If the policy refuses the
flow, the handler does not get it.  A flow without a handler is carried by the uplink.

DHCP needs a *link service*.  Its clients have no address yet and send to everybody on the link, so there is no flow.
The policy is not asked, as it is not for ARP: the datagram does not leave the link.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Literal, TypeVar

from netns_kit.arguments import Address
from netns_kit.errors import PortInUseError
from netns_kit.stack import LinkService, Refusal, TcpConnection, UdpFlow
from netns_kit.stack.wire import flow_key
from netns_kit.uplink.flow import Target

Handler = TypeVar("Handler")

TcpHandler = Callable[[TcpConnection, Target], None]
"""Called with a connection and what the uplink has returned for it.  It sets the connection's user, and accepts or
refuses the connection, now or later.
"""
UdpHandler = Callable[[UdpFlow, Target], "Refusal | None"]
"""Called with a flow and what the uplink has returned for it.  It sets the flow's user, or returns how the flow is
refused.
"""


Destination = tuple[bytes, int]
"""A packed address and a port."""


class Endpoints:
    """The registry of the handlers and link services of one gateway.

    Attributes:
        link: The link services by UDP port, for `Stack.services`.
    """

    def __init__(self) -> None:
        self.link: dict[int, LinkService] = {}
        self._tcp: dict[Destination, TcpHandler] = {}
        self._udp: dict[Destination, UdpHandler] = {}
        self._redirected: dict[int, dict[int, bytes]] = {}  # by port: addresses by their version of IP

    def serve_tcp(self, address: Address, port: int, handler: TcpHandler) -> None:
        """Register a handler for the connections that the guest opens to an address and port.

        Raises:
            PortInUseError: There is a handler for that address and port.
        """
        _register(self._tcp, "tcp", address.packed, port, handler)

    def serve_udp(self, address: Address, port: int, handler: UdpHandler) -> None:
        """Register a handler for the UDP flows that the guest opens to an address and port.

        Raises:
            PortInUseError: There is a handler for that address and port.
        """
        _register(self._udp, "udp", address.packed, port, handler)

    def add(self, transport: Literal["tcp", "udp"], address: bytes, port: int, handler: Any) -> None:
        """Register a handler for a while, for the flows of a transport to a packed address and port.

        Args:
            transport: The transport.
            address: The address; empty: any.  A handler of one address has its flows rather than this one.
            port: The port.
            handler: A `TcpHandler` or a `UdpHandler`.

        Raises:
            PortInUseError: There is a handler for that address and port.
        """
        if not address:  # nobody else pays for looking twice
            self._tcp, self._udp = ByPort(self._tcp), ByPort(self._udp)
        _register(self._tcp if transport == "tcp" else self._udp, transport, address, port, handler)

    def discard(self, transport: Literal["tcp", "udp"], address: bytes, port: int) -> None:
        """Undo `add`."""
        del (self._tcp if transport == "tcp" else self._udp)[address, port]

    def addresses(self) -> frozenset[bytes]:
        """Return the packed addresses that have a handler."""
        return frozenset(address for address, _ in (*self._tcp, *self._udp) if address)

    def serve_link(self, port: int, service: LinkService) -> None:
        """Register a service for the datagrams to a UDP port of ours, of a group or of all.  They open no flow."""
        self.link[port] = service

    def redirect(self, port: int, addresses: tuple[Address, ...]) -> None:
        """Redirect flows to a port of any address to that port of the address of the same family in `addresses`."""
        self._redirected[port] = {each.version: each.packed for each in addresses}

    def redirected(self, key: bytes) -> bytes:
        """Return the key of the flow that `key` is redirected to, or `key` itself."""
        if not self._redirected:
            return key
        names = flow_key.parse(key)
        address = self._redirected.get(names.remote_port, {}).get(flow_key.family_of(key).version)
        return key if address is None else names._replace(remote=address).pack()

    def claim_tcp(self, key: bytes) -> TcpHandler | None:
        """Return the handler of the connection with that key, or None if there is none."""
        return self._tcp.get(destination_of(key))

    def claim_udp(self, key: bytes) -> UdpHandler | None:
        """Return the handler of the UDP flow with that key, or None if there is none."""
        return self._udp.get(destination_of(key))


def destination_of(key: bytes) -> Destination:
    """Return the destination of a flow of the guest, by its key."""
    names = flow_key.parse(key)
    return names.remote, names.remote_port


class ByPort(dict[Destination, Handler]):
    """Handlers, some of which have a port of any address."""

    def get(self, at: Destination, default: Any = None) -> Any:
        """Return the handler of an address and port, or that of the port."""
        return super().get(at) or super().get((b"", at[1]), default)


def _register(
    handlers: dict[Destination, Handler], protocol: str, address: bytes, port: int, handler: Handler
) -> None:
    at = address, port
    if at in handlers:
        where = ip_address(address) if address else "any address,"
        raise PortInUseError(
            f"{where} port {port}/{protocol} has a handler already", fix="choose another port"
        )
    handlers[at] = handler
