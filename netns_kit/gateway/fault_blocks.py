"""FaultBlocks: the faults of one stack, for whoever asks for them while it runs.

What they do is in `netns_kit.gateway.faulty_path`, which nobody else pays for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netns_kit.arguments import Address
from netns_kit.operations import operation, same, summed

if TYPE_CHECKING:
    from .faulty_path import FaultyPath
    from .gateway import Gateway


class FaultBlocks:
    """The blocks of faults of one stack.

    Args:
        gateway: The gateway whose flows are disturbed.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._path: FaultyPath | None = None

    @operation(same)
    def begin(self, number: int, text: str, guests: tuple[Address, ...] = ()) -> None:
        """Begin a block.

        Args:
            number: The number of the block.
            text: Its `Script`, as `netns_kit.child.codec.dump` has it.
            guests: The addresses of the guests that it is about; none: all.

        Raises:
            DecodeError: The text is no script.
        """
        from netns_kit.child.codec import load  # without faults nobody has these

        from .faults import Script
        from .faulty_path import FaultyPath

        script = load(Script, text.encode())
        if self._path is None or self._path.is_over:
            self._path = FaultyPath(self._gateway)
        self._path.begin(number, script, frozenset(each.packed for each in guests))

    @operation(summed)
    def counts(self, number: int) -> dict[str, int]:
        """Return what a block has done so far by name; nothing if it has ended."""
        return {} if self._path is None else self._path.counts(number)

    @operation(summed)
    def end(self, number: int) -> dict[str, int]:
        """End a block, and return what it has done by name."""
        return {} if self._path is None else self._path.end(number)

    def close(self) -> None:
        """End all blocks, so that what is said to the guest in the end is not held."""
        if self._path is not None:
            self._path.end_all()
