"""Peers: the sockets between the workers that share a namespace.

Each worker has an inbox, one end of a SOCK_SEQPACKET pair, and the other end of everybody else's.  A message is a
byte that says how often it was handed over, and a frame as the tap gives it; or such a byte, the name of a flow, and
a descriptor: a connection accepted on the host that is to be that flow.  What finds an inbox full is lost, as on a
wire, and counted.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Callable
from contextlib import ExitStack

_ROOM = 8 << 20  # bytes of an inbox: less, where wmem_max says so
_RIGHTS = socket.CMSG_SPACE(4)


class Peers:
    """Of worker number `index`.  `inbox` is its own, `outboxes` lead to all, itself included.

    `hops` is how often the frame read last was handed over, see `netns_kit.stack.Steering`.
    """

    def __init__(self, index: int, inbox: socket.socket, outboxes: tuple[socket.socket, ...]) -> None:
        self.index = index
        self.count = len(outboxes)
        self.handed_over = self.lost = 0  # messages
        self._inbox = inbox
        self._outboxes = outboxes
        self._hops = bytearray(1)

    @property
    def hops(self) -> int:
        return self._hops[0]

    def stats(self) -> dict[str, int]:
        """Messages since the beginning."""
        return {"handed_over": self.handed_over, "handed_over_lost": self.lost}

    def fileno(self) -> int:
        """The inbox's."""
        return self._inbox.fileno()

    def hand_over(self, number: int, hops: int, frame: memoryview) -> None:
        """A frame, to worker `number`."""
        self._send(number, hops, frame, [])

    def hand_over_connection(self, number: int, key: bytes, accepted: socket.socket) -> None:
        """A connection, to worker `number`: closed here; reset, if its inbox is full."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [accepted.fileno()]))
        self._send(number, 0, key, [rights])
        accepted.close()

    def _send(
        self,
        number: int,
        hops: int,
        content: bytes | memoryview,
        rights: list[tuple[int, int, array.array[int]]],
    ) -> None:
        self.handed_over += 1
        try:
            self._outboxes[number].sendmsg([bytes((hops,)), content], rights, socket.MSG_NOSIGNAL)
        except OSError:  # it is full, or that worker has ended, and then all do
            self.lost += 1

    def read_into(self, buffer: memoryview, accepted: Callable[[bytes, socket.socket], object]) -> int | None:
        """The next frame's length, or None if there is none; 0 for a connection, which `accepted` has had."""
        try:
            size, ancillary, _, _ = self._inbox.recvmsg_into(
                [self._hops, buffer], _RIGHTS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        for _, _, data in ancillary:
            (fd,) = array.array("i", data)
            accepted(bytes(buffer[: size - 1]), socket.socket(fileno=fd))
            return 0
        return size - 1


def pairs(count: int, stack: ExitStack) -> tuple[list[socket.socket], list[socket.socket]]:
    """Inboxes and outboxes for so many workers, closed by `stack`."""
    made = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    for ends in made:
        ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        for end in ends:
            end.setblocking(False)
            stack.callback(end.close)
    return [inbox for inbox, _ in made], [outbox for _, outbox in made]
