"""Endpoints: the addresses and ports at which this process answers the guest itself.

    a flow           a handler may claim it; Uplink.route: may it pass?  Then the handler has it, or the uplink
    a datagram       to us, to a group or to all, of no flow: a link service has it, or it becomes a flow

A handler is looked up by the destination of a flow when the flow is opened.  The uplink's policy comes first: it is
asked about a flow that a handler claims as about any other, and told of the claim (`Flow.served`).  A flow that it
refuses reaches no handler.  What no handler claims leaves by the uplink.

DHCP needs a *link service*: its clients have no address yet and speak to everybody on the link, which no flow does.
No policy is asked, as for ARP: the datagram never leaves the link.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from netns_kit.arguments import Address
from netns_kit.errors import PortInUseError
from netns_kit.stack import LinkService, Refusal, TcpConnection, UdpFlow
from netns_kit.stack.wire import flow_key
from netns_kit.uplink.flow import Target

Handler = TypeVar("Handler")

TcpHandler = Callable[[TcpConnection, Target], None]
"""Sets the user of a connection and accepts it, or refuses it, now or later.  `Target` is what the uplink said."""
UdpHandler = Callable[[UdpFlow, Target], "Refusal | None"]
"""Sets the user of a flow, or returns why not."""


Destination = tuple[bytes, int]
"""A packed address and a port."""


class Endpoints:
    """The registry of one gateway.

    Attributes:
        link: The link services by UDP port, for `Stack.services`.
    """

    def __init__(self) -> None:
        self.link: dict[int, LinkService] = {}
        self._tcp: dict[Destination, TcpHandler] = {}
        self._udp: dict[Destination, UdpHandler] = {}
        self._redirected: dict[int, dict[int, bytes]] = {}  # by port: addresses by their version of IP

    def serve_tcp(self, address: Address, port: int, handler: TcpHandler) -> None:
        """Hand `handler` the connections that the guest opens to that address and port.

        Raises:
            PortInUseError: Another handler has them.
        """
        _register(self._tcp, "tcp", address, port, handler)

    def serve_udp(self, address: Address, port: int, handler: UdpHandler) -> None:
        """Hand `handler` the flows of datagrams that the guest opens to that address and port.

        Raises:
            PortInUseError: Another handler has them.
        """
        _register(self._udp, "udp", address, port, handler)

    def serve_link(self, port: int, service: LinkService) -> None:
        """Hand `service` the datagrams to that UDP port of ours, of a group or of all, before they are flows."""
        self.link[port] = service

    def redirect(self, port: int, addresses: tuple[Address, ...]) -> None:
        """Treat flows to that port of any address as flows to the one of its family among `addresses`."""
        self._redirected[port] = {each.version: each.packed for each in addresses}

    def redirected(self, key: bytes) -> bytes:
        """Return `key`, or what it stands for where its destination is redirected."""
        if not self._redirected:
            return key
        names = flow_key.parse(key)
        address = self._redirected.get(names.remote_port, {}).get(flow_key.family_of(key).version)
        return key if address is None else names._replace(remote=address).pack()

    def claim_tcp(self, key: bytes) -> TcpHandler | None:
        """Return the handler of a connection of that key; None: nobody here answers."""
        return self._tcp.get(destination_of(key))

    def claim_udp(self, key: bytes) -> UdpHandler | None:
        """Return the handler of a UDP flow of that key; None: nobody here answers."""
        return self._udp.get(destination_of(key))


def destination_of(key: bytes) -> Destination:
    """Return the other end of a flow of that key."""
    names = flow_key.parse(key)
    return names.remote, names.remote_port


def _register(
    handlers: dict[Destination, Handler], protocol: str, address: Address, port: int, handler: Handler
) -> None:
    at = address.packed, port
    if at in handlers:
        raise PortInUseError(
            f"{address} port {port}/{protocol} has a handler already", fix="choose another port"
        )
    handlers[at] = handler
