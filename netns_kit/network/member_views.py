"""MemberViews: what the stack carries of one member, to be seen and disturbed: flows, events, captures and faults."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, TextIO

import anyio
from anyio.abc import TaskStatus
from typing_extensions import Self, Unpack

from netns_kit import arguments
from netns_kit.arguments import Address
from netns_kit.errors import NamespaceGone, StackClosed
from netns_kit.userstack.answers import Flows
from netns_kit.userstack.capture import Capture, CaptureOptions
from netns_kit.userstack.events import Event
from netns_kit.userstack.userstack import Follower, UserStack

from .place import Place

if TYPE_CHECKING:
    from netns_kit.gateway.faults import FaultOptions, Faults
    from netns_kit.userstack.faults import FaultsBlock


class MemberViews(Place):
    """The traffic between a member and the stack of its network.

    Args:
        stack: The stack.
    """

    def __init__(self, stack: UserStack) -> None:
        self._stack = stack
        self._blocks: set[Capture | FaultsBlock] = set()  # that end with the member

    @property
    @abstractmethod
    def mac(self) -> str:
        """The link address of its interface.

        Raises:
            NamespaceGone: The member has not been opened.
        """

    @property
    @abstractmethod
    def _guests(self) -> tuple[Address, ...]:
        """All addresses that the member may send with, that of its link included."""

    async def flows(self) -> Flows:
        """Return the flows of this member that the stack carries, see `UserStack.flows`.

        Those between members are the kernel's, and not among them.

        Raises:
            NamespaceGone, StackClosed: The member or the network is not open.

        Cancellation: Nothing is changed.
        """
        with self.supervisor.guarding():
            flows = await self._stack.flows()
        return Flows.of((flow for flow in flows if flow.guest.address in self._guests), flows.names)

    async def events(self, *, processes: bool = False) -> AsyncGenerator[Event, None]:
        """Yield what happens to the flows of this member, and what its policy refuses, see `UserStack.events`.

        The end of the member ends the generator.

        Args:
            processes: Whether to find out which process in the member has opened each flow.

        Raises:
            NamespaceGone, StackClosed: The member or the network is not open yet, or was closed.

        Cancellation: The generator has ended, and keeps no more events.
        """
        self.supervisor.check()
        with suppress(NamespaceGone, StackClosed):
            async with Follower(self._stack, processes, self._guests, self.supervisor) as follower:
                while True:
                    await follower.wait()
                    for event in await follower.take():
                        yield event

    async def log_events(
        self,
        target: str | os.PathLike[str] | TextIO,
        *,
        processes: bool = False,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Write the events of this member to a file, as `UserStack.log_events` does with all.

        The end of the member ends it.

        Args:
            target: The path of a file that is made or appended to; or a file that is open for text, which stays open.
            processes: Whether to find out which process in the member has opened each flow.
            task_status: What a task group is told by when no event is missed any more: `await tasks.start(...)`.

        Raises:
            EventLogError: The file cannot be opened or written.
            ArgumentTypeError: The target is neither a path nor a file for text.
            NamespaceGone, StackClosed: The member or the network is not open yet, or was closed.

        Cancellation: As for `UserStack.log_events`.
        """
        self.supervisor.check()
        with suppress(NamespaceGone):
            follower = Follower(self._stack, processes, self._guests, self.supervisor)
            await follower.log(target, task_status)

    @arguments.spelled_out(UserStack.capture)
    def capture(
        self, target: str | os.PathLike[str] | BinaryIO | None, **options: Unpack[CaptureOptions]
    ) -> Capture:
        """Return a capture of the frames between this member and the stack: see `UserStack.capture`.

        These are the frames that have its link address, and those that go to everybody.  Those between members are
        the kernel's, and not among them.

        Args:
            target: The file; None: memory.
            options: As for `UserStack.capture`.

        Raises:
            ArgumentError, ArgumentTypeError, PolicyError: An argument that cannot be used.
            CaptureError, OSError: As for `UserStack.capture`.
            NamespaceGone, StackClosed: On entering, the member or the network is not open.

        Cancellation: The file is complete.
        """
        return Capture(_Seen(self._stack, self), target, lambda it: self._with(it).mac, **options)

    def faults(
        self,
        faults: Faults | None = None,
        *,
        script: Iterable[tuple[float, Faults]] | None = None,
        **options: Unpack[FaultOptions],
    ) -> FaultsBlock:
        """Return faults on the way between this member and the stack, to be used in `async with`.

        They are as `UserStack.faults` has them, the queries that this member sends to our DNS included.  Packets
        between members are the kernel's, and pass without.

        Args:
            faults: The faults.
            script: Faults over time, instead.
            options: The fields of `Faults`, instead.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
            NamespaceGone, StackClosed: On entering, the member or the network is not open.

        Cancellation: The faults are over.
        """
        from netns_kit.userstack.faults import FaultsBlock  # few need it

        return FaultsBlock(self._stack, faults, script, options, lambda it: self._with(it)._guests)

    def _with(self, block: Capture | FaultsBlock) -> Self:
        """Have a block end with the member at the latest, and return the member.

        Raises:
            NamespaceGone, StackClosed: The member or the network is not open.
        """
        self.supervisor.check()
        self._blocks = {each for each in self._blocks if not each.is_over} | {block}
        return self

    async def _end_blocks(self) -> None:
        for block in self._blocks:
            await block.end_with_member()


class _Seen:
    """The stack as a capture of a member needs it, which sees the flows of the member alone."""

    def __init__(self, stack: UserStack, member: MemberViews) -> None:
        self._member = member
        self.tap = stack.tap
        self.supervisor = stack.supervisor
        self.ask, self.hand = stack.ask, stack.hand
        self.events, self.flows = member.events, member.flows
