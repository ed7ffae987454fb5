"""Flows beside the stack: those that a kernel inside carries, and no frame of ours.

They are listed, told of and ended as the stack's own are.
"""

from __future__ import annotations

from typing import Literal, Protocol

from netns_kit.stack import Refusal
from netns_kit.stack.user import Transport
from netns_kit.uplink.flow import Endpoint


class FlowBeside(Protocol):
    """A flow that is not the stack's."""

    id: int
    """Number of this flow alone, see `FlowInfo`."""
    opened: float
    """Time at which it began, on the engine's clock."""
    protocol: Transport
    """Transport of the flow."""
    direction: Literal["outbound", "inbound"]
    """Direction of its opening."""

    @property
    def cause(self) -> object:
        """What has let it in, a published port for example."""
        ...

    @property
    def guest(self) -> Endpoint:
        """The namespace's end."""
        ...

    @property
    def remote(self) -> Endpoint:
        """The other end, as the namespace sees it."""
        ...

    @property
    def host(self) -> Endpoint | None:
        """The end of it on the host."""
        ...

    @property
    def state(self) -> str:
        """Its state, as people call it."""
        ...

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes from the namespace, and bytes to it."""
        ...

    def end(self) -> None:
        """End it at once."""
        ...


class Watcher(Protocol):
    """A follower of these flows: as that of a stack, see `netns_kit.stack.user.Watcher`."""

    def opened(self, transport: Transport, flow: FlowBeside) -> None:
        """Note a flow that has begun."""

    def refused(self, transport: Transport, flow: FlowBeside, why: Refusal) -> None:
        """Note that nobody takes a flow; `closed` follows."""

    def closed(self, transport: Transport, flow: FlowBeside) -> None:
        """Note a flow that has ended."""
