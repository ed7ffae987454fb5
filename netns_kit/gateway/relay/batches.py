"""Datagrams that cross together: many small ones cost as much as one large one does.

Towards the host, consecutive datagrams of one flow, equal in length and marks, leave by one call (UDP_SEGMENT,
udp(7)).  They lie in the buffer that frames are read into, so `Outbox.flush` sends what waits before that is used
again, at the end of each batch of frames at the latest: nothing is ever kept for later.

Towards the guest, consecutive datagrams of one sender, equal in length and marks, become one super-datagram, and what
the host's kernel hands over as one (UDP_GRO) stays one.  The guest's kernel takes it apart.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from netns_kit.gateway.engine import Appetite
from netns_kit.stack import UdpFlow

from .sockets import ANCILLARY_SPACE, DATAGRAMS_PER_STEP, MAX_DATAGRAM, Ancillary, marks_of

UDP_SEGMENT, UDP_GRO = 103, 104  # linux/udp.h
MOST = DATAGRAMS_PER_STEP  # together: no more than UDP_MAX_SEGMENTS, 64 in kernels before 6.9
RUN = 65000  # bytes together
ROOM = 1 << 20  # bytes that have arrived and are not read yet
LARGEST = 1472  # bytes of a datagram that is sent together with others: no path splits it

Sender = tuple[str, int]


class Sending(Protocol):
    """A relay that has datagrams waiting."""

    def flush(self) -> None: ...


class Outbox:
    """`relays`: those that have datagrams waiting for more of their kind."""

    __slots__ = ("relays",)

    def __init__(self) -> None:
        self.relays: list[Sending] = []

    def flush(self) -> None:
        """Send what waits: what the datagrams lie in is about to be used again."""
        relays, self.relays = self.relays, []
        for relay in relays:
            relay.flush()


class Inbox:
    """Where datagrams of the host's sockets are read to.  One will do for all of them."""

    __slots__ = ("_arrived", "_buffer", "_marks")

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(MAX_DATAGRAM + RUN))
        self._arrived: Ancillary = []  # with the last datagram: mostly the same as with this one
        self._marks = (64, 0)

    def read(
        self,
        sock: socket.socket,
        appetite: Appetite,
        flow_of: Callable[[Sender, Ancillary], UdpFlow | None],
        now: float,
    ) -> None:
        """Hand what `sock` has to the flows that `flow_of` names, which must not be called back from there."""
        buffer, receive = self._buffer, sock.recvmsg_into
        start = at = size = 0  # of the run: its first byte, one past its last, the length of its datagrams
        run: UdpFlow | None = None
        run_marks = self._marks
        for _ in range(appetite.size(DATAGRAMS_PER_STEP)):
            try:
                length, ancillary, _, sender = receive((buffer[at : at + MAX_DATAGRAM],), ANCILLARY_SPACE)
            except OSError:  # nothing more, or an error that the next event tells of
                appetite.is_sated()
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
    """Have the kernel hand over what it has together, for `Inbox`; without, if it cannot."""
    with suppress(OSError):  # Linux before 5.0
        sock.setsockopt(socket.SOL_UDP, UDP_GRO, 1)


def ask_for_room(sock: socket.socket) -> None:
    """Have the kernel keep a burst until it is read: its default holds 25 datagrams of 8 KiB, or 270 small ones.

    It gives no more than net.core.rmem_max.  A default that is larger stays.
    """
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < ROOM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM)


def _segment_size(ancillary: Ancillary) -> int:
    for level, kind, data in ancillary:
        if level == socket.SOL_UDP and kind == UDP_GRO:
            return int.from_bytes(data, sys.byteorder)
    return 0
