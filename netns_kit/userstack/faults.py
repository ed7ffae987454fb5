"""FaultsBlock: faults of a stack that runs, as long as a block does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from itertools import count
from typing import TYPE_CHECKING, Literal, Protocol

import anyio

from netns_kit import arguments
from netns_kit.child.codec import dump
from netns_kit.errors import AlreadyOpened, ArgumentError, NetnsKitError
from netns_kit.forwarder.forwarder import CLOSING_SECONDS
from netns_kit.gateway.fault_blocks import FaultBlocks
from netns_kit.gateway.faults import FaultOptions, Faults, read_script
from netns_kit.operations import Asked
from netns_kit.tap.frame_device import Device

if TYPE_CHECKING:
    from typing_extensions import Self

_numbers = count()


class Disturbed(Asked, Protocol):
    """What a block of faults needs of a stack."""

    @property
    def tap(self) -> Device: ...


class FaultsBlock:
    """A block in which a stack has faults.  It is made by `UserStack.faults`, and can be entered once.

    Args:
        stack: The stack.
        faults: The faults; None: those of the script, or of the options.
        script: Faults over time.
        options: Fields of `Faults`.
        guests: Called with this on entering; returns the addresses of the guests that they are about; none: all.

    Raises:
        ArgumentError, ArgumentTypeError: An argument that cannot be used.
    """

    script: tuple[tuple[float, Faults], ...]
    """The faults over time: seconds from the beginning of the block, and what is bad from then on."""
    ended: Literal["member"] | None = None
    """Why the faults have ended before their block: the member has that they are about."""

    def __init__(
        self,
        stack: Disturbed,
        faults: Faults | None,
        script: Iterable[tuple[float, Faults]] | None,
        options: FaultOptions,
        guests: Callable[[FaultsBlock], tuple[IPv4Address | IPv6Address, ...]] = lambda _: (),
    ) -> None:
        if (faults is not None) + (script is not None) + bool(options) != 1:
            raise ArgumentError(
                "expected one of these: Faults, a script, or the fields of Faults",
                "faults",
                arguments.shown(faults),
                "write faults(loss=0.01), faults(Faults(loss=0.01)) or faults(script=[(0, Faults(loss=0.01))])",
            )
        if script is not None:
            self.script = read_script(script)
        else:
            arguments.instance("faults", faults, (Faults, type(None)), "Faults, like Faults(loss=0.01)")
            self.script = ((0.0, Faults(**options) if faults is None else faults),)
        self._stack = stack
        self._guests = guests
        self._number = next(_numbers)
        self._counts: dict[str, int] | None = None
        self._is_entered = False

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise AlreadyOpened("the block of faults has been entered before", fix="make a new one")
        self._is_entered = True
        with anyio.CancelScope(shield=True):
            text = dump(self.script).decode()
            await self._stack.ask(FaultBlocks.begin, self._number, text, self._guests(self))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    @property
    def is_over(self) -> bool:
        """True if the faults have ended."""
        return self._counts is not None

    async def end_with_member(self) -> None:
        """End the faults before their block, since the member ends that they are about.

        Cancellation: They have ended.
        """
        if not self.is_over:
            self.ended = "member"
            await self._end()

    async def _end(self) -> None:
        if self.is_over:
            return
        self._counts = {}
        # or its end ends them
        with anyio.move_on_after(CLOSING_SECONDS, shield=True), suppress(NetnsKitError):
            self._counts = await self._stack.ask(FaultBlocks.end, self._number)

    async def counts(self) -> dict[str, int]:
        """Return what the block has done so far, or has done until its end, by name: see docs/faults.md.

        Raises:
            StackClosed: The block runs, and the stack is not open.

        Cancellation: Nothing is changed.
        """
        if self._counts is not None:
            return dict(self._counts)
        return await self._stack.ask(FaultBlocks.counts, self._number)
