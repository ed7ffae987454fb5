"""MemberForwarder: a `Forwarder` that leads to a member."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from netns_kit.arguments import Address
from netns_kit.forwarder.forwarder import Forwarder
from netns_kit.forwarder.forwards import Forwards
from netns_kit.namespace.namespace import Namespace
from netns_kit.subnet import Subnet
from netns_kit.userstack.userstack import UserStack

T = TypeVar("T")


class MemberForwarder(Forwarder):
    """A forwarder that leads to a member of a network.

    Args:
        stack: The stack of the network.
        namespace: The namespace of the member.
        subnet: Returns the addresses of the network, with those of the member as those of the guest.
        addresses: Returns the addresses that the member has.
    """

    def __init__(
        self,
        stack: UserStack,
        namespace: Namespace,
        subnet: Callable[[], Subnet],
        addresses: Callable[[], tuple[Address, ...]],
    ) -> None:
        self._addresses = addresses
        self._place = _Place(stack, namespace, subnet)
        super().__init__(self._place)

    async def _open(self) -> None:
        await super()._open()
        engines, agents = await self._place.namespace.supply_sockets()
        agents.close()
        with engines:
            number = await self._stack.pass_socket(engines)
            await self._ask(Forwards.settle, number, self._addresses())


class _Place:
    """The stack as the forwarder of a member needs it, which leads to the member."""

    def __init__(self, stack: UserStack, namespace: Namespace, subnet: Callable[[], Subnet]) -> None:
        self._stack = stack
        self._subnet = subnet
        self.namespace = namespace
        self.supervisor = stack.supervisor
        self.pass_socket = stack.pass_socket

    @property
    def subnet(self) -> Subnet:
        return self._subnet()

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        return await self._stack.ask(operation, *arguments)
