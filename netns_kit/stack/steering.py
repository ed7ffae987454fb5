"""Several stacks on one link, and how each packet finds the one that it is for.

Each has a queue of the tap.  The kernel at the other end sends a flow's packets by the queue that the flow was last
written to; those of a flow that is new, or was silent for three seconds, by one that their addresses and ports give.

So a connection that the guest opens is the stack's that its SYN comes to: the rest comes there as well, at any time.
One that is opened to the guest, at a stack of our choice, may after a silence have its packets come in elsewhere;
what no connection is known for goes round, until one knows it, or the last has to answer it with a reset.  All that
is no TCP, and fragments, are the first's: there is one mapping of a guest's port, one
DNS, one DHCP.

    guest --SYN---> queue 1: stack 1                    it is its own from now on
          --data--> queue 0: stack 0 --frame--> stack 1 ...whose answer steers the next to queue 1
          --UDP---> queue 1: stack 1 --frame--> stack 0 ...queue 0
"""

from __future__ import annotations

from collections.abc import Callable

_GOLDEN = 0x9E3779B1  # 2**32 over the golden ratio (Knuth 6.4): Linux gives clients even ports alone


class Steering:
    """Of stack number `index` out of `count`; `hand_over` is called with a number, with `hops` there, and a frame.

    `hops` is how often the frame being received has been handed over; 0 is from the tap, or for the first.
    """

    __slots__ = ("_hand_over", "count", "hops", "index")

    def __init__(self, index: int, count: int, hand_over: Callable[[int, int, memoryview], object]) -> None:
        self.index = index
        self.count = count
        self.hops = 0
        self._hand_over = hand_over

    def owner(self, key: bytes) -> int:
        """The number of the stack that is to open the connection of that name to the guest."""
        ports = int.from_bytes(key[-4:], "big")
        return (ports * _GOLDEN & 0xFFFFFFFF) * self.count >> 32

    def give_to_first(self, frame: memoryview) -> bool:
        """Whether it is not here: the first has it now."""
        if self.index == 0 or self.hops:
            return False
        self._hand_over(0, 0, frame)
        return True

    def pass_on(self, frame: memoryview) -> bool:
        """Whether somebody else may know it, who has it now."""
        if self.hops + 1 >= self.count:
            return False
        self._hand_over((self.index + 1) % self.count, self.hops + 1, frame)
        return True

    def tell(self, frame: memoryview) -> None:
        """All the others, unless they know: it may answer what one of them has asked."""
        if not self.hops:
            for number in range(self.count):
                if number != self.index:
                    self._hand_over(number, 1, frame)
