"""WorkerLinks: the sockets between the workers that share a namespace.

Each worker has an inbox, which is one end of a SOCK_SEQPACKET pair.  Every worker has the other ends of all pairs,
and sends by them.  A message hands over a frame or a connection.  Its first byte is the number of times that it has
been handed over.  Then follows a frame, as the tap delivers it; or the key of a flow, with one descriptor: the
connection of a client, accepted on the host, that is to become this flow.

Pins have an inbox of their own, so that they can be read at any moment, before the frames that have come earlier: by
a worker that is about to refuse a flow because it does not know the address.  Whoever answers a DNS query sends them
before the answer, so they are there when the flow comes.  A message says whose they are: those of the common policy,
of a member's own, or of those who note names beside the policies; or that the addresses stand for the names.

A message is lost, as a frame is on a wire, if the inbox is full.  A connection is also lost if its receiver has no
descriptor left for it: the kernel then closes the descriptor that the message had (MSG_CTRUNC).  Losses are counted,
and a lost connection is closed: nobody keeps a copy.  A flow to a pin that was lost is refused.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from struct import Struct
from typing import TYPE_CHECKING

from netns_kit.domain_names import suffixes

if TYPE_CHECKING:
    from netns_kit.policy.pins import Pin

_ROOM = 8 << 20  # bytes of an inbox: less, where wmem_max says so
_PINS_MAX = 1 << 16  # bytes of a message of pins; those of one answer are fewer
_RIGHTS = socket.CMSG_LEN(4)  # room for one descriptor; of a longer message the kernel keeps the rest
COMMON, NOTED, STANDING = 0, 0xFFFFFFFF, 0xFFFFFFFE  # whose pins they are; else it is the number of a member
_WHOSE = Struct("!I")
# until when; whether it is ours; the lengths of the address and the name, which follow
_PIN = Struct("!d?BB")


class WorkerLinks:
    """The links of one worker to the others.

    Args:
        index: The number of this worker.
        inbox: The socket that this worker receives from.
        outboxes: The sockets that lead to the inboxes of all workers, this one included, by their numbers.
        pins_inbox: The socket that this worker receives pins from.
        pins_outboxes: The sockets that pins for the workers are sent by, by their numbers.
    """

    def __init__(
        self,
        index: int,
        inbox: socket.socket,
        outboxes: tuple[socket.socket, ...],
        pins_inbox: socket.socket,
        pins_outboxes: tuple[socket.socket, ...],
    ) -> None:
        self.index = index
        self.count = len(outboxes)
        self.handed_over = self.lost = self.pins_lost = 0  # messages
        self._inbox = inbox
        self._outboxes = outboxes
        self._pins_inbox = pins_inbox
        self._pins_outboxes = pins_outboxes
        self._hops = bytearray(1)

    @property
    def hops(self) -> int:
        """Number of times that the last frame was handed over: see `netns_kit.stack.Steering`."""
        return self._hops[0]

    def stats(self) -> dict[str, int]:
        """Return the counters of messages, by name."""
        return {
            "handed_over": self.handed_over,
            "handed_over_lost": self.lost,
            "policy_pins_lost": self.pins_lost,
        }

    def fileno(self) -> int:
        """Return the descriptor to poll for incoming messages."""
        return self._inbox.fileno()

    def pins_fileno(self) -> int:
        """Return the descriptor to poll for pins."""
        return self._pins_inbox.fileno()

    def filenos(self) -> list[int]:
        """Return the descriptors of all its sockets."""
        sockets = (self._inbox, *self._outboxes, self._pins_inbox, *self._pins_outboxes)
        return [each.fileno() for each in sockets]

    def hand_over(self, number: int, hops: int, frame: memoryview) -> None:
        """Hand a frame over to worker `number`."""
        self._send(number, hops, frame, [])

    def hand_over_connection(self, number: int, key: bytes, accepted: socket.socket) -> None:
        """Hand the connection that is to become flow `key` over to worker `number`, and close it here."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [accepted.fileno()]))
        self._send(number, 0, key, [rights])
        accepted.close()

    def send_pins(self, pins: Iterable[Pin], whose: int = COMMON) -> None:
        """Send pins to all other workers.  Call it before the answer that they were made from leaves.

        A worker whose inbox is full does not get them, and refuses flows to them.  That is counted.

        Args:
            pins: The pins.
            whose: The number of the member whose policy has made them, or `COMMON`, `NOTED` or `STANDING`.
        """
        message = _WHOSE.pack(whose) + b"".join(
            _PIN.pack(until, ours, len(address), len(name)) + address + name
            for name, address, until, ours in pins
        )
        for number, outbox in enumerate(self._pins_outboxes):
            if number != self.index:
                try:
                    outbox.send(message, socket.MSG_NOSIGNAL)
                except OSError:
                    self.pins_lost += 1

    def read_pins(self) -> Iterator[tuple[int, list[Pin]]]:
        """Yield whose pins other workers have sent, and the pins.  Whatever a message holds, nothing is raised.

        The gateway reads them when `pins_fileno` is readable, and again when it is about to refuse a flow because no
        name is known for its address.
        """
        while True:
            try:
                message = self._pins_inbox.recv(_PINS_MAX)
            except BlockingIOError:
                return
            if len(message) < _WHOSE.size:
                continue
            (whose,) = _WHOSE.unpack_from(message)
            pins: list[Pin] = []
            at = _WHOSE.size
            while at + _PIN.size <= len(message):
                until, ours, address_size, name_size = _PIN.unpack_from(message, at)
                at += _PIN.size
                name_at = at + address_size
                end = name_at + name_size
                name, address = message[name_at:end], message[at:name_at]
                if _is_pin(name, address):
                    pins.append((name, address, until, ours))
                at = end
            yield whose, pins

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
        except OSError:  # it is full; or that worker has ended, and soon all do
            self.lost += 1

    def read_into(self, buffer: memoryview, accepted: Callable[[bytes, socket.socket], object]) -> int | None:
        """Read the next message: a frame into `buffer`, or a connection.

        Returns the length of the frame; 0 after a connection, which `accepted` is called with; None if there is no
        message.
        """
        try:
            size, ancillary, flags, _ = self._inbox.recvmsg_into(
                [self._hops, buffer], _RIGHTS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        for _, _, data in ancillary:
            (fd,) = array.array("i", data)
            accepted(bytes(buffer[: size - 1]), socket.socket(fileno=fd))
            return 0
        if flags & socket.MSG_CTRUNC:
            self.lost += 1
            return 0
        return size - 1


def _is_pin(name: bytes, address: bytes) -> bool:
    """Return whether these are a name and an address: a worker that was taken over may send anything."""
    try:
        return len(address) in (4, 16) and all(suffixes(name))
    except IndexError:
        return False


def connect(count: int, stack: ExitStack) -> list[WorkerLinks]:
    """Return the links of `count` workers.  `stack` closes their sockets."""
    made = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2 * count)]
    for ends in made:
        ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        for end in ends:
            end.setblocking(False)
            stack.callback(end.close)
    inboxes, outboxes = zip(*made, strict=True)
    return [
        WorkerLinks(index, inboxes[index], outboxes[:count], inboxes[count + index], outboxes[count:])
        for index in range(count)
    ]
