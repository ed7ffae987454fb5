"""WorkerLinks: the sockets between the workers that share a namespace.

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


class WorkerLinks:
    """The links of one worker to the others.

    Args:
        index: The number of this worker.
        inbox: Its own socket, where the others send.
        outboxes: The sockets that lead to all workers, itself included.
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
        """How often the frame read last was handed over, see `netns_kit.stack.Steering`."""
        return self._hops[0]

    def stats(self) -> dict[str, int]:
        """Return the numbers of messages since the beginning, by name."""
        return {"handed_over": self.handed_over, "handed_over_lost": self.lost}

    def fileno(self) -> int:
        """Return the descriptor to poll for incoming messages."""
        return self._inbox.fileno()

    def filenos(self) -> list[int]:
        """Return the descriptors of all its sockets."""
        return [each.fileno() for each in (self._inbox, *self._outboxes)]

    def hand_over(self, number: int, hops: int, frame: memoryview) -> None:
        """Hand a frame to worker `number`."""
        self._send(number, hops, frame, [])

    def hand_over_connection(self, number: int, key: bytes, accepted: socket.socket) -> None:
        """Hand a connection to worker `number` and close it here.  Where the inbox is full, the peer gets a reset."""
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
        """Read the next frame into `buffer` and return its length; None if nothing waits.

        A connection goes to `accepted`, with the name of its flow, and counts as a frame of length 0.
        """
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


def connect(count: int, stack: ExitStack) -> list[WorkerLinks]:
    """Return the links of so many workers, each with sockets to all of them, which `stack` closes."""
    made = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    for ends in made:
        ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        for end in ends:
            end.setblocking(False)
            stack.callback(end.close)
    outboxes = tuple(outbox for _, outbox in made)
    return [WorkerLinks(index, inbox, outboxes) for index, (inbox, _) in enumerate(made)]
