"""Home: the namespace that published ports lead to, on the engine's side: the stack's own, or that of a member."""

from __future__ import annotations

import socket
from typing import Protocol

from netns_kit.arguments import Address
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.inside import Inside
from netns_kit.subnet import Subnet, Subnet6


class Home(Protocol):
    """A namespace that ports lead to: a `Gateway` is that of the stack's own."""

    @property
    def inside(self) -> Inside:
        """The sockets of the namespace.

        Raises:
            FeatureUnavailable: There is no agent.
        """
        ...

    def guest(self, network: Subnet | Subnet6) -> Address:
        """Return the address of the namespace in a network.

        Args:
            network: The network.
        """
        ...


class MemberHome:
    """The namespace of a member.

    Args:
        gateway: The gateway of the network.
        supply: The socket on which sockets of the namespace are ordered.
        addresses: The member's addresses, one of each family.
    """

    def __init__(self, gateway: Gateway, supply: socket.socket, addresses: tuple[Address, ...]) -> None:
        self.inside = Inside(gateway.engine, supply, gateway.router.admission.is_free)
        self._addresses = {each.version: each for each in addresses}

    def guest(self, network: Subnet | Subnet6) -> Address:
        return self._addresses[network.network.version]

    def close(self) -> None:
        """Close the sockets that nobody has taken."""
        self.inside.close()
