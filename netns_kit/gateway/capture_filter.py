"""CaptureFilter: which frames a capture keeps, as plain data."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Literal

from netns_kit import arguments
from netns_kit.arguments import AddressLike
from netns_kit.domain_names import to_text, to_wire
from netns_kit.errors import AddressError, ArgumentTypeError
from netns_kit.frozen import frozen

CaptureProtocol = Literal["tcp", "udp", "icmp", "arp"]
"""The protocol of captured frames; "icmp" is ICMP and ICMPv6, with neighbour discovery."""


@frozen
class CaptureFilter:
    """The frames that a capture keeps: those that fit every field that is given.

    Args:
        protocol: The protocol.
        network: An address or a network, like "192.0.2.0/24".  The source or the destination is in it.
        port: A port.  The source or the destination has it.
        name: A name that our DNS has given for the source or the destination, or `*.` and a domain for those below.

    Raises:
        AddressError: The network is none.
        ArgumentError, ArgumentTypeError: Another value that cannot be used.
        DomainNameError: The name is none.
    """

    protocol: CaptureProtocol | None = None
    network: str | None = None
    port: int | None = None
    name: str | None = None

    def __init__(
        self,
        protocol: CaptureProtocol | None = None,
        network: AddressLike | IPv4Network | IPv6Network | None = None,
        port: int | None = None,
        name: str | None = None,
    ) -> None:
        if protocol is not None:
            arguments.one_of("protocol", protocol, ("tcp", "udp", "icmp", "arp"))
        if network is not None:
            if isinstance(network, int | bytes):
                expected = "expected an address or a network, as text"
                raise ArgumentTypeError(expected, "network", arguments.shown(network))
            try:
                network = str(ip_network(network, strict=False))
            except ValueError as error:
                raise AddressError(
                    f"expected an address or a network ({error})", "network", arguments.shown(network)
                ) from error
        if port is not None:
            arguments.port("port", port, 1)
        if name is not None:
            arguments.text("name", name, 'a name, or one like "*.example.org"')
            below = name.startswith("*.")
            name = ("*." if below else "") + to_text(to_wire(name[2:] if below else name)).rstrip(".").lower()
        arguments.fill(self, protocol=protocol, network=network, port=port, name=name)
