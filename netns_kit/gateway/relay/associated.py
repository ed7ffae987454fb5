"""AssociatedRelay: the datagrams of one endpoint of the guest, through the UDP relay of a proxy.

A `UdpAssociation` begins with a stream to the proxy.  Datagrams of the guest wait until it is there, a bounded number
of them.  Then each is sent with a header in front that names its destination, and answers come with one that names
their sender.  Only the answers of endpoints that the guest has sent to are passed on.  If the stream ends, so do the
flows; the next datagram of the guest opens a new association.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from netns_kit.gateway.engine import IN, OUT, Engine
from netns_kit.stack import IcmpError, Refusal, UdpFlow
from netns_kit.stack.user import NOBODY
from netns_kit.uplink.dial import Refused
from netns_kit.uplink.flow import Endpoint
from netns_kit.uplink.indirect import UdpAssociation
from netns_kit.uplink.sockets import DATAGRAMS_PER_STEP, MAX_DATAGRAM

from .dialled import Dialled

KEPT_MOST = 64  # datagrams that wait for the association
KEPT_BYTES = 1 << 18
_READ = 4096  # bytes of the stream at once; a proxy has nothing to say there
_READS = 16  # one that says more has no end for us to wait for


class AssociatedRelay(Dialled):
    """The flows of one endpoint of the guest.

    Args:
        engine: The engine that polls the sockets.
        association: The way through the proxy, which `begin` has been told to dial.
        failed: Called with the exception of a dial that raises.
        idle: Called when the relay is over, and closed.
    """

    __slots__ = ("_association", "_flows", "_idle", "_kept", "_room", "_stream", "_targets", "_udp")

    def __init__(
        self,
        engine: Engine,
        association: UdpAssociation,
        failed: Callable[[BaseException], Refused],
        idle: Callable[[], object],
    ) -> None:
        self._engine = engine
        self._association = association
        self._failed = failed
        self._pending = None
        self._idle = idle
        self._stream: socket.socket | None = None
        self._udp: socket.socket | None = None
        self._flows: dict[tuple[bytes, int], UdpFlow] = {}
        self._targets: dict[bytes, tuple[tuple[bytes, int], bytes]] = {}  # and headers, by the keys of flows
        self._kept: list[tuple[UdpFlow, bytes]] = []
        self._room = KEPT_BYTES

    def add(self, flow: UdpFlow, destination: Endpoint) -> None:
        """Carry `flow` to `destination`."""
        sender = destination.address.packed, destination.port
        flow.user = self
        self._flows[sender] = flow
        self._targets[flow.key] = sender, self._association.header(destination)

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        size = segment_size or len(payload) or 1
        for start in range(0, len(payload) or 1, size):
            piece = bytes(payload[start : start + size])
            if self._udp is not None:
                self._send(self._udp, flow, piece)
            elif len(self._kept) < KEPT_MOST and len(piece) <= self._room:
                self._room -= len(piece)
                self._kept.append((flow, piece))

    def _send(self, sock: socket.socket, flow: UdpFlow, payload: bytes) -> None:
        try:
            sock.sendmsg((self._targets[flow.key][1], payload))
        except BlockingIOError:
            pass  # it is lost, as a datagram may be
        except OSError:  # it is too large with the header, or the proxy's end has gone
            flow.refuse(Refusal.HOST_UNREACHABLE, payload)

    def expired(self, flow: UdpFlow) -> None:
        sender, _ = self._targets.pop(flow.key)
        if self._flows.get(sender) is flow:
            del self._flows[sender]
        self._kept = [each for each in self._kept if each[0] is not flow]
        if not self._targets:
            self.close()

    def close(self) -> None:
        """End the flows and close the sockets.  Calling it again is allowed."""
        self._give_up()
        stream, udp = self._stream, self._udp
        self._stream = self._udp = None
        for each in stream, udp:
            if each is not None:
                self._engine.remove(each.fileno())
                each.close()
        for flow in list(self._flows.values()):
            flow.end()
        self._idle()

    # -- the stream -----------------------------------------------------------------------------------

    def _connected(self, sock: socket.socket) -> None:
        self._stream = sock
        try:
            udp = self._association.open()
        except OSError:
            self._refused(Refusal.HOST_UNREACHABLE)
            return
        try:
            self._engine.add(udp.fileno(), self._on_datagrams, IN)
        except OSError:
            udp.close()
            self._refused(Refusal.NET_UNREACHABLE)
            return
        self._udp = udp
        kept, self._kept = self._kept, []
        for flow, payload in kept:
            self._send(udp, flow, payload)

    def _refused(self, why: Refusal | IcmpError) -> None:
        kept, self._kept = self._kept, []
        first = {flow.key: payload for flow, payload in reversed(kept)}
        for flow in list(self._flows.values()):
            flow.user = NOBODY
            if isinstance(why, Refusal):
                flow.turn_away(why)
            else:
                flow.close()
            if flow.key in first:
                flow.refuse(why, first[flow.key])
        self._flows.clear()
        self._targets.clear()
        self.close()

    def _on_events(self, events: int) -> None:
        if events & ~OUT and self._stream is not None:
            try:
                for _ in range(_READS):
                    if not self._stream.recv(_READ):
                        break
            except BlockingIOError:
                return
            except OSError:
                pass
            self.close()

    def _on_datagrams(self, _: int) -> None:
        for _ in range(DATAGRAMS_PER_STEP):
            if self._udp is None:
                return
            try:
                found = self._association.parse(self._udp.recv(MAX_DATAGRAM))
            except BlockingIOError:
                return
            except OSError:  # an ICMP error: what was sent is lost
                continue
            flow = None if found is None else self._flows.get(found[0])
            if found is not None and flow is not None:
                flow.send(found[1], self._engine.now)
