"""Steering: which of several stacks on one link a packet is for.

Each stack has a queue of the tap.  The kernel at the other end delivers a flow's packets to the queue that the flow
was last written to.  If the flow is new, or was silent for three seconds, it chooses a queue by addresses and ports.

A connection that the guest opens belongs to the stack that receives its SYN, and its other packets arrive there too,
at any time.  A connection to the guest is opened by a stack of our choice; after a silence its packets may arrive at
another.  Therefore a segment of no known connection is passed from stack to stack, until one of them knows its
connection or the last one answers with a reset.  All other packets, and fragments, are for the first stack: so there
is one mapping of the guest's ports, one DNS server and one DHCP server.

    guest --SYN---> queue 1: stack 1                    stack 1 owns the connection from now on
          --data--> queue 0: stack 0 --frame--> stack 1 ...its answer steers the next packet to queue 1
          --UDP---> queue 1: stack 1 --frame--> stack 0 ...its answer steers the next packet to queue 0

A stack without others on its link is the first of one: `Steering(0, 1)`.
"""

from __future__ import annotations

from collections.abc import Callable

from .wire import flow_key

_GOLDEN = 0x9E3779B1  # 2**32 over the golden ratio (Knuth 6.4): Linux gives clients even ports alone


def _nobody(number: int, hops: int, frame: memoryview) -> None:
    raise AssertionError(f"there is no stack {number} to hand a frame over to")


class Steering:
    """The part of stack number `index` out of `count`.

    `hand_over` is called with the number of another stack, the hops that the frame will have there, and the frame.
    `hops` is the number of times that the frame now being received has been handed over.  It is 0 for a frame from
    the tap, and for one that was given to the first stack.
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
        """Return the number of the stack that opens the connection to the guest with that key."""
        ports = int.from_bytes(flow_key.ports(key), "big")
        return (ports * _GOLDEN & 0xFFFFFFFF) * self.count >> 32

    def give_to_first(self, frame: memoryview) -> bool:
        """Hand a frame over to the first stack.  Return False if this is the first stack."""
        if self.index == 0 or self.hops:
            return False
        self._hand_over(0, 0, frame)
        return True

    def pass_on(self, frame: memoryview) -> bool:
        """Hand a frame over to the next stack, which may know its connection.  Return False if all have had it."""
        if self.hops + 1 >= self.count:
            return False
        self._hand_over((self.index + 1) % self.count, self.hops + 1, frame)
        return True

    def tell(self, frame: memoryview) -> None:
        """Hand a frame from the tap over to all other stacks: it may be the answer to a request of one of them."""
        if not self.hops:
            for number in range(self.count):
                if number != self.index:
                    self._hand_over(number, 1, frame)
