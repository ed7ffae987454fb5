"""Steering: which of several stacks on one link a packet is for.

Each stack has a queue of the tap.  The kernel at the other end sends a flow's packets by the queue that the flow was
last written to; those of a flow that is new, or was silent for three seconds, by a queue that their addresses and
ports give.

A connection that the guest opens belongs to the stack that its SYN comes to; its other packets come there as well, at
any time.  A connection to the guest is opened at a stack of our choice; after a silence its packets may come in
elsewhere.  A segment for no known connection therefore goes round, until a stack knows its connection or the last one
answers with a reset.  All other packets, and fragments, are for the first stack: there is one mapping of a guest's
port, one DNS, one DHCP.

    guest --SYN---> queue 1: stack 1                    it is its own from now on
          --data--> queue 0: stack 0 --frame--> stack 1 ...whose answer steers the next to queue 1
          --UDP---> queue 1: stack 1 --frame--> stack 0 ...queue 0

A stack that has the link to itself is the first of one: `Steering(0, 1)`.
"""

from __future__ import annotations

from collections.abc import Callable

from .wire import flow_key

_GOLDEN = 0x9E3779B1  # 2**32 over the golden ratio (Knuth 6.4): Linux gives clients even ports alone


def _nobody(number: int, hops: int, frame: memoryview) -> None:
    raise AssertionError(f"there is no stack {number} to hand a frame over to")


class Steering:
    """The part of stack number `index` out of `count`.

    `hand_over` is called with the number of a stack, the hops of the frame there, and the frame.  `hops` tells how
    often the frame being received has been handed over; it is 0 for one from the tap, and for one that is for the
    first stack.
    """

    __slots__ = ("_hand_over", "count", "hops", "index")

    def __init__(
        self, index: int, count: int, hand_over: Callable[[int, int, memoryview], object] = _nobody
    ) -> None:
        self.index = index
        self.count = count
        self.hops = 0
        self._hand_over = hand_over

    def owner(self, key: bytes) -> int:
        """Return the number of the stack that is to open the connection of that key to the guest."""
        ports = int.from_bytes(flow_key.ports(key), "big")
        return (ports * _GOLDEN & 0xFFFFFFFF) * self.count >> 32

    def give_to_first(self, frame: memoryview) -> bool:
        """Hand a frame over to the first stack.  Return whether it has it now: False where this is the first."""
        if self.index == 0 or self.hops:
            return False
        self._hand_over(0, 0, frame)
        return True

    def pass_on(self, frame: memoryview) -> bool:
        """Hand a frame over to the next stack, which may know its connection.  Return False if there is none left."""
        if self.hops + 1 >= self.count:
            return False
        self._hand_over((self.index + 1) % self.count, self.hops + 1, frame)
        return True

    def tell(self, frame: memoryview) -> None:
        """Hand a frame from the tap over to all other stacks: it may answer what one of them has asked."""
        if not self.hops:
            for number in range(self.count):
                if number != self.index:
                    self._hand_over(number, 1, frame)
