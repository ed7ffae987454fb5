"""UdpRelay: connects flows of the stack to one datagram socket of the host.

They are the flows of one endpoint of the guest (endpoint-independent mapping, RFC 4787), or those of the clients of a
forwarded port.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Sequence

from netns_kit.gateway.engine import ERROR, IN, Engine, ReadBudget
from netns_kit.host.abi import UDP_SEGMENT
from netns_kit.stack import UdpFlow
from netns_kit.stack.wire import flow_key
from netns_kit.uplink.sockets import Ancillary, Marks, ask_for_errors, ask_for_marks, read_errors, refusal_for

from .batches import LARGEST, MOST, Inbox, Outbox, ask_for_room, ask_for_runs

ATTEMPTS = 8
QUOTED = 1280  # bytes of a datagram that an ICMP error quotes at most
_NO_SEGMENTATION = frozenset({errno.EIO, errno.EINVAL, errno.EMSGSIZE})  # of UDP_SEGMENT: send singly

NOTHING: Ancillary = []

Address = tuple[str, int]


class UdpRelay:
    """One socket and its flows.  Each flow has another address on the host's side.

    Args:
        engine: The engine that polls the socket.
        sock: The socket.
        inbox: The buffer that datagrams are read into.
        outbox: The list of relays with waiting datagrams.
        unsolicited: Called with a datagram's sender and ancillary data if no flow goes to the sender.  It may add a
            flow.
        idle: Called when the last flow has ended.
    """

    __slots__ = (
        "_budget", "_engine", "_flows", "_idle", "_inbox", "_marks", "_outbox", "_socket", "_targets",
        "_unsolicited", "_waiting", "_waiting_flow", "_waiting_marks"
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        sock: socket.socket,
        inbox: Inbox,
        outbox: Outbox,
        *,
        unsolicited: Callable[[UdpRelay, Address, Ancillary], None],
        idle: Callable[[UdpRelay], None],
    ) -> None:
        self._engine = engine
        self._socket = sock
        self._inbox, self._outbox = inbox, outbox
        self._budget = ReadBudget(engine)
        self._unsolicited = unsolicited
        self._idle = idle
        self._flows: dict[Address, UdpFlow] = {}
        self._targets: dict[bytes, tuple[Address, Ancillary, UdpFlow]] = {}
        self._marks = Marks(sock)
        # datagrams of one flow with the same length and marks, which are sent together
        self._waiting: list[memoryview] = []
        self._waiting_flow: UdpFlow | None = None
        self._waiting_marks = 0
        ask_for_errors(sock)
        ask_for_marks(sock)
        ask_for_room(sock)
        ask_for_runs(sock)
        engine.add(sock.fileno(), self._on_events, IN)

    @property
    def flow_count(self) -> int:
        return len(self._targets)

    def local(self) -> Address:
        """Return the address and port of the host's socket."""
        address, port, *_ = self._socket.getsockname()
        return address, port

    @property
    def port(self) -> int:
        """Port number of the host's socket."""
        port: int = self._socket.getsockname()[1]
        return port

    def add(self, flow: UdpFlow, address: Address, ancillary: Ancillary = NOTHING) -> None:
        """Carry `flow` to `address`.  `ancillary` data goes with each datagram.  Datagrams from `address` are its
        answers.
        """
        flow.user = self
        self._flows[address] = flow
        self._targets[flow.key] = address, ancillary, flow

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        waiting, size = self._waiting, len(payload)
        if waiting and (
            flow is not self._waiting_flow
            or marks != self._waiting_marks
            or size != len(waiting[0])
            or len(waiting) == MOST
            or segment_size
        ):
            self.flush()
            waiting = self._waiting
        if segment_size or not 0 < size <= LARGEST:
            self._datagrams(flow, (payload,), marks, segment_size)
            return
        if not waiting:
            self._outbox.relays.append(self)
            self._waiting_flow, self._waiting_marks = flow, marks
        waiting.append(payload)

    def flush(self) -> None:
        """Send the waiting datagrams together."""
        waiting, flow = self._waiting, self._waiting_flow
        if waiting and flow is not None:
            self._waiting, self._waiting_flow = [], None
            segment_size = len(waiting[0]) if len(waiting) > 1 else 0
            self._datagrams(flow, waiting, self._waiting_marks, segment_size)

    def _datagrams(self, flow: UdpFlow, pieces: Sequence[memoryview], marks: int, segment_size: int) -> None:
        """Send `pieces` as datagrams of `segment_size` bytes; if that is 0, the one piece as one datagram."""
        error = 0
        for _ in range(ATTEMPTS):
            error = self._send(flow, pieces, marks, segment_size)
            if not error:
                return
            if segment_size and error in _NO_SEGMENTATION:
                for piece in pieces:
                    for start in range(0, len(piece), segment_size):
                        self._datagrams(flow, (piece[start : start + segment_size],), marks, 0)
                return
            if self._errors(flow, pieces[0]):
                return
            # the error belonged to an earlier datagram, and there may be more of these
        flow.refuse(refusal_for(error), pieces[0])

    def _send(self, flow: UdpFlow, pieces: Sequence[memoryview], marks: int, segment_size: int) -> int:
        """Send, and return the errno or 0.  If the host's queue is full the datagrams are lost, which is no error."""
        address, ancillary, _ = self._targets[flow.key]
        try:
            self._marks.carry(marks)
            if segment_size:
                size = struct.pack("=H", segment_size)
                self._socket.sendmsg(pieces, [*ancillary, (socket.SOL_UDP, UDP_SEGMENT, size)], 0, address)
            elif ancillary:
                self._socket.sendmsg(pieces, ancillary, 0, address)
            else:
                self._socket.sendto(pieces[0], address)
        except BlockingIOError:
            return 0
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def expired(self, flow: UdpFlow) -> None:
        self.flush()
        address, _, _ = self._targets.pop(flow.key)
        if self._flows.get(address) is flow:  # two destinations of the guest may have the same address here
            del self._flows[address]
        if not self._targets:
            self._idle(self)

    def close(self) -> None:
        """End the flows and close the socket.  Calling it again is allowed."""
        for _, _, flow in list(self._targets.values()):
            flow.end()
        if self._socket.fileno() >= 0:
            self._engine.remove(self._socket.fileno())
            self._socket.close()

    def _on_events(self, events: int) -> None:
        if events & ERROR:
            self._errors()
        self._inbox.read(self._socket, self._budget, self._flow_from, self._engine.now)

    def _flow_from(self, sender: Address, ancillary: Ancillary) -> UdpFlow | None:
        flow = self._flows.get(sender)
        if flow is None:
            self._unsolicited(self, sender, ancillary)
            flow = self._flows.get(sender)
        return flow

    def _errors(self, sending: UdpFlow | None = None, payload: bytes | memoryview = b"") -> bool:
        """Tell the guest the errors in the socket's queue.  Return whether one was about the datagram that is being
        sent.
        """
        is_about_this = False
        for each in read_errors(self._socket):
            flow, quoted = self._flows.get(each.target), each.quoted
            if each.is_local:  # the kernel has refused the datagram that is being sent
                flow, quoted, is_about_this = sending, bytes(payload[:QUOTED]), True
            if flow is not None:
                flow.refuse(each.for_guest(flow_key.parse(flow.key).remote), quoted)
        return is_about_this
