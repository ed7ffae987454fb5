"""Flows beside the stack: those that a kernel inside carries, and no frame of ours.

They are listed, told of and ended as the stack's own are.
"""

from __future__ import annotations

from typing import Literal, Protocol

from netns_kit.stack import AnyFlow, IcmpError, Refusal
from netns_kit.stack.user import Ending, Transport
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

    @property
    def guest(self) -> Endpoint:
        """The namespace's end."""

    @property
    def remote(self) -> Endpoint:
        """The other end, as the namespace sees it."""

    @property
    def host(self) -> Endpoint | None:
        """The end of it on the host."""

    @property
    def state(self) -> str:
        """Its state, as people call it."""

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes from the namespace, and bytes to it."""

    ending: Ending
    """How it has ended, once it has."""

    def end(self, ending: Ending = "ended") -> None:
        """End it at once."""


class Watcher(Protocol):
    """A follower of these flows and of what a policy does.

    It is one of a stack too, see `netns_kit.stack.user.Watcher`.
    """

    def opened(self, transport: Transport, flow: AnyFlow | FlowBeside) -> None:
        """Note a flow that has begun."""

    def refused(self, transport: Transport, flow: AnyFlow | FlowBeside, why: Refusal | IcmpError) -> None:
        """Note that nobody takes a flow; `closed` follows."""

    def closed(self, transport: Transport, flow: AnyFlow | FlowBeside) -> None:
        """Note a flow that has ended.  Its `ending` tells how."""

    def let_pass(self, transport: Transport, flow: AnyFlow, why: Refusal) -> None:
        """Note a flow that passes although a rule refuses it, because the policy only audits."""

    def query_refused(
        self, name: bytes, kind: int, client: bytes, rule: str | None, rcode: int, *, audit: bool
    ) -> None:
        """Note a DNS query that the policy refuses; with `audit` it is answered all the same.

        Args:
            name: The name, on the wire.
            kind: The number of the type.
            client: The packed address of who has asked.
            rule: The rule, as text.
            rcode: The result code of the answer.
            audit: Whether the policy only audits.
        """
