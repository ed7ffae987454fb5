"""Batches: datagrams that are sent or received together, since many small datagrams cost as much as one large one.

Towards the host, consecutive datagrams of one flow that have the same length and marks are sent by one call
(UDP_SEGMENT, udp(7)).  They lie in the buffer of the frames, so `Outbox.flush` must send them before that buffer is
reused: at the latest at the end of each batch of frames.  So no datagram waits for a later batch.

Towards the guest, consecutive datagrams of one sender that have the same length and marks become one super-datagram.
What the host's kernel delivers as one (UDP_GRO) stays one.  The guest's kernel splits it.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from netns_kit.gateway.engine import ReadBudget
from netns_kit.host.abi import UDP_GRO
from netns_kit.stack import UdpFlow
from netns_kit.uplink.sockets import ANCILLARY_SPACE, DATAGRAMS_PER_STEP, MAX_DATAGRAM, Ancillary, marks_of

MOST = DATAGRAMS_PER_STEP  # datagrams in one call; UDP_MAX_SEGMENTS is 64 in kernels before 6.9
RUN = 65000  # bytes of one super-datagram, at most
ROOM = 1 << 20  # bytes of a receive buffer
LARGEST = 1472  # bytes of a datagram that is sent together with others, so that no path has to fragment it

Sender = tuple[str, int]


class Sending(Protocol):
    """A relay that has datagrams waiting."""

    def flush(self) -> None: ...


class Outbox:
    """The relays that have datagrams waiting, so that they can be sent together with the next ones."""

    __slots__ = ("relays",)

    def __init__(self) -> None:
        self.relays: list[Sending] = []

    def flush(self) -> None:
        """Send all waiting datagrams.  The buffer that they lie in is about to be reused."""
        relays, self.relays = self.relays, []
        for relay in relays:
            relay.flush()


class Inbox:
    """The buffer that datagrams of the host's sockets are read into.  All sockets of a gateway share it."""

    __slots__ = ("_arrived", "_buffer", "_marks")

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(MAX_DATAGRAM + RUN))
        self._arrived: Ancillary = []  # of the last datagram, and mostly of the next one too
        self._marks = (64, 0)

    def read(
        self,
        sock: socket.socket,
        budget: ReadBudget,
        flow_of: Callable[[Sender, Ancillary], UdpFlow | None],
        now: float,
    ) -> None:
        """Read the datagrams of a socket, and pass them to the flows that `flow_of` returns.

        The flows must not call this method while they take a datagram.
        """
        buffer, receive = self._buffer, sock.recvmsg_into
        start = at = size = 0  # of the run: its first byte, one past its last, the length of its datagrams
        run: UdpFlow | None = None
        run_marks = self._marks
        for _ in range(budget.size(DATAGRAMS_PER_STEP)):
            try:
                length, ancillary, _, sender = receive((buffer[at : at + MAX_DATAGRAM],), ANCILLARY_SPACE)
            except OSError:  # there is no more, or an error that the next event reports
                budget.exhausted()
                break
            flow = flow_of(sender[:2], ancillary)
            if ancillary != self._arrived:
                self._arrived, self._marks = ancillary, marks_of(ancillary)
            if (
                run is flow
                and run is not None
                and length == size
                and run_marks is self._marks
                and at + length <= RUN
            ):
                at += length
                continue
            if run is not None:
                run.send(buffer[start:at], now, ttl=run_marks[0], tos=run_marks[1], segment_size=size)
            run, run_marks, size = flow, self._marks, length
            together = _segment_size(ancillary)
            if run is None:
                start = at = 0
            elif together or not length:
                run.send(
                    buffer[at : at + length], now, ttl=run_marks[0], tos=run_marks[1], segment_size=together
                )
                run, start, at = None, 0, 0
            else:
                start, at = at, at + length
                if at > RUN:
                    run.send(buffer[start:at], now, ttl=run_marks[0], tos=run_marks[1])
                    run, start, at = None, 0, 0
        if run is not None:
            run.send(buffer[start:at], now, ttl=run_marks[0], tos=run_marks[1], segment_size=size)


def ask_for_runs(sock: socket.socket) -> None:
    """Let the kernel deliver several datagrams of one sender as one, if it can (UDP_GRO)."""
    with suppress(OSError):  # Linux before 5.0
        sock.setsockopt(socket.SOL_UDP, UDP_GRO, 1)


def ask_for_room(sock: socket.socket) -> None:
    """Make the receive buffer of a socket large enough for a burst.

    The kernel's default has room for 25 datagrams of 8 KiB, or for 270 small ones.  The kernel gives no more than
    net.core.rmem_max.  A larger default is kept.
    """
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < ROOM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM)


def _segment_size(ancillary: Ancillary) -> int:
    for level, kind, data in ancillary:
        if level == socket.SOL_UDP and kind == UDP_GRO:
            return int.from_bytes(data, sys.byteorder)
    return 0
