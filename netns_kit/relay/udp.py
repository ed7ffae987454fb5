"""One guest endpoint beside one datagram socket of the host (RFC 4787: endpoint-independent mapping)."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable

from netns_kit.engine import ERROR, IN, Engine
from netns_kit.stack import UdpFlow
from netns_kit.uplink import Endpoint

from .sockets import (
    ANCILLARY_SPACE,
    DATAGRAMS_PER_STEP,
    MAX_DATAGRAM,
    Ancillary,
    Marks,
    ask_for_errors,
    ask_for_marks,
    marks_of,
    read_errors,
    refusal_for,
)

UDP_SEGMENT = 103  # linux/udp.h
ATTEMPTS = 8
QUOTED = 1280  # bytes of a datagram: no ICMP error quotes more
_NO_SEGMENTATION = frozenset({errno.EIO, errno.EINVAL, errno.EMSGSIZE})  # what UDP_SEGMENT meets at times

Address = tuple[str, int]


class UdpRelay:
    """A socket, and the flows of the guest endpoint it stands for.

    A datagram from an address that none of the flows goes to is for `unsolicited` to decide: it adds a flow, or
    does not.
    """

    __slots__ = ("_arrived", "_engine", "_flows", "_forget", "_marks", "_socket", "_targets", "_unsolicited")

    def __init__(
        self,
        engine: Engine,
        sock: socket.socket,
        *,
        unsolicited: Callable[[UdpRelay, Address], None],
        forget: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._socket = sock
        self._unsolicited = unsolicited
        self._forget = forget
        self._flows: dict[Address, UdpFlow] = {}
        self._targets: dict[bytes, Address] = {}
        self._marks = Marks(sock)
        self._arrived: tuple[Ancillary, tuple[int, int]] = (
            [],
            (64, 0),
        )  # of the last datagram: mostly the same
        ask_for_errors(sock)
        ask_for_marks(sock)
        engine.add(sock.fileno(), self._on_events, IN)

    @property
    def flow_count(self) -> int:
        return len(self._targets)

    def add(self, flow: UdpFlow, target: Endpoint) -> None:
        """`flow` goes to `target`; what comes from there is an answer to it."""
        address = (str(target.address), target.port)
        flow.user = self
        self._flows[address] = flow
        self._targets[flow.key] = address

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        error = self._send(flow, payload, marks, segment_size)
        if not error:
            return
        if segment_size and error in _NO_SEGMENTATION:
            for start in range(0, len(payload), segment_size):
                self.datagram(flow, payload[start : start + segment_size], marks, 0)
            return
        for _ in range(ATTEMPTS):  # that was an earlier one's error; more of them may come in meanwhile
            if self._errors(flow, payload):
                return
            error = self._send(flow, payload, marks, segment_size)
            if not error:
                return
        flow.refuse(refusal_for(error), payload)

    def _send(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> int:
        """The errno, or 0: also when the host's queue is full.  Then it is lost, as datagrams are."""
        target = self._targets[flow.key]
        try:
            self._marks.carry(marks)
            if segment_size:
                size = struct.pack("=H", segment_size)
                self._socket.sendmsg([payload], [(socket.SOL_UDP, UDP_SEGMENT, size)], 0, target)
            else:
                self._socket.sendto(payload, target)
        except BlockingIOError:
            return 0
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def expired(self, flow: UdpFlow) -> None:
        target = self._targets.pop(flow.key)
        if self._flows.get(target) is flow:  # two of the guest's destinations may be one target
            del self._flows[target]
        if not self._targets:
            self.close()

    def close(self) -> None:
        """Close the socket.  Again is fine."""
        if self._socket.fileno() >= 0:
            self._engine.remove(self._socket.fileno())
            self._socket.close()
            self._forget()

    def _on_events(self, events: int) -> None:
        now = self._engine.now
        if events & ERROR:
            self._errors()
        for _ in range(DATAGRAMS_PER_STEP):
            try:
                payload, ancillary, _, sender = self._socket.recvmsg(MAX_DATAGRAM, ANCILLARY_SPACE)
            except OSError:
                return  # nothing more, or an error that the next event tells of
            if sender[:2] not in self._flows:
                self._unsolicited(self, sender[:2])
            flow = self._flows.get(sender[:2])
            if flow is not None:
                if ancillary != self._arrived[0]:
                    self._arrived = ancillary, marks_of(ancillary)
                ttl, tos = self._arrived[1]
                flow.send(payload, now, ttl=ttl, tos=tos)

    def _errors(self, sending: UdpFlow | None = None, payload: bytes | memoryview = b"") -> bool:
        """Tell the guest of what is in the socket's error queue.  Whether that was about what is being sent."""
        is_about_this = False
        for each in read_errors(self._socket):
            flow, quoted = self._flows.get(each.target), each.quoted
            if each.is_local:  # the kernel would not take it; it does not say whose it was
                flow, quoted, is_about_this = sending, bytes(payload[:QUOTED]), True
            if flow is not None:
                flow.refuse(each.for_guest(flow.key), quoted)
        return is_about_this
