"""InMemoryListener: a published port of a stack whose uplink is in memory.  It has no socket.

Clients are those that a `FakeHost` makes, which asks where the port leads and connects there.
"""

from __future__ import annotations

from collections.abc import Container

from netns_kit.arguments import Address
from netns_kit.errors import FeatureUnavailable, PortInUseError
from netns_kit.frozen import replace
from netns_kit.gateway.flow_router import EPHEMERAL
from netns_kit.gateway.gateway import Gateway

from .homes import Home
from .listeners import ThroughStack
from .ports import PortForward


class InMemoryListener(ThroughStack):
    """A TCP port that clients of the internet in memory can connect to.

    Args:
        gateway: The gateway.
        forward: What leads where.
        home: The namespace that it leads to.
        taken: The ports that there are already.

    Raises:
        FeatureUnavailable: The port cannot be without a socket of the host.
        PortInUseError: The port is taken.
        AddressError: The namespace cannot have the address.
    """

    def __init__(self, gateway: Gateway, forward: PortForward, home: Home, taken: Container[int]) -> None:
        if forward.mode != "stack" or forward.protocol != "tcp":
            raise FeatureUnavailable(
                f"{forward} needs a socket of the host, which an uplink in memory has not",
                fix='publish TCP ports with mode="stack"',
            )
        self._gateway, self._home = gateway, home
        self._check(forward)
        if forward.host_port in taken:
            raise PortInUseError(
                f"{forward.listens_on}/tcp is published already",
                fix="choose another host port, or 0 for any that is free",
            )
        port = forward.host_port or next(each for each in EPHEMERAL if each not in taken)
        self.forward = replace(forward, host_port=port)

    def close(self) -> None:
        pass

    @property
    def target(self) -> tuple[Address, int]:
        """The address and port inside that it leads to."""
        return self._guest(), self.forward.guest_port
