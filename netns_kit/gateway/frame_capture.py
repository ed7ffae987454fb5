"""FrameCapture: a wrapper of the device that puts what crosses it into a `FrameRing`, as blocks of pcapng.

It stands between the stack and the device only while it captures, so that without it no frame costs more.

Comments.  The first frame of each flow gets a comment about the flow.  When the guest's first packet is read, the
flow does not exist yet.  So a frame of no known flow is kept until the end of the step, with those that follow it; by
then the flow is there, and so are its name and its rule.

Super-frames.  A TCP super-segment is kept whole, as every Linux host captures its own: its bytes are those of the
segments that a wire would have, and cutting it into forty blocks costs more than carrying it.  The checksum in it is
that of the pseudo-header.  A UDP super-datagram is cut into its datagrams, since their number and borders mean
something.  All other checksums that the two kernels have left to each other are filled in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from ipaddress import ip_address, ip_network
from struct import Struct, error
from time import time_ns
from typing import TYPE_CHECKING

from netns_kit.arguments import Address
from netns_kit.stack import EchoFlow, Stack, TcpConnection, Transport, UdpFlow
from netns_kit.stack.wire import arp, ethernet, flow_key, ip, virtio
from netns_kit.stack.wire.family import IPV4, IPV6
from netns_kit.tap import pcapng
from netns_kit.tap.frame_device import DeviceWrapper
from netns_kit.tap.frame_ring import STOPPING, FrameRing
from netns_kit.tap.pcapng import FROM_GUEST, TO_GUEST, packet_ends
from netns_kit.tap.super_frames import cut, summed

if TYPE_CHECKING:
    from .capture_filter import CaptureFilter
    from .gateway import Gateway

KEPT_IN_STEP = 1024  # frames that wait for the end of a step
FLOWS_KNOWN = 1 << 16  # flows whose first frame is over; then all are forgotten, and commented on again
UNNAMED_KEPT = 4096  # addresses without a name that are remembered
_LAYOUT4 = Struct("!HB5xHxB2x12s")  # from the EtherType: version, fragment, protocol, addresses and ports
_LAYOUT6 = Struct("!HB5xBx36s")
_FRAGMENT = 0x3FFF  # mask of the offset, and of "more follow"
_NAMES = {ip.TCP: "tcp", ip.UDP: "udp", IPV4.icmp: "icmp", IPV6.icmp: "icmp"}
_TO_CHANGE = (
    virtio.GSO_NONE,
    virtio.GSO_UDP_L4,
)  # what is no TCP super-segment, and has an unfilled checksum
_DATAGRAM_LENGTH = Struct("!HH")

Frame = tuple[int, int, bytes]
"""A frame that waits: when it crossed, in which direction, its bytes with virtio header."""
Known = TcpConnection | UdpFlow | EchoFlow


class FrameCapture(DeviceWrapper):
    """A capture of the frames of one gateway.

    Args:
        gateway: The gateway.
        ring: The memfd of the ring, which stays the caller's.
        wake: The eventfd that wakes the ring's owner.  It is closed in the end.
        snaplen: The bytes that are kept of a frame at most.
        where: Which frames are kept; None: all.

    Raises:
        OSError: The ring cannot be mapped.  Nothing has changed.
    """

    def __init__(
        self, gateway: Gateway, ring: int, wake: int, snaplen: int, where: CaptureFilter | None
    ) -> None:
        self._ring = FrameRing(ring)
        super().__init__(gateway.device)
        self._gateway = gateway
        self._wake = wake
        self._snaplen = snaplen
        self._where = where
        self._network = None if where is None or where.network is None else ip_network(where.network)
        stack: Stack = gateway.stack
        self._vnet = gateway.device.offloads.vnet_header
        self._at = self._vnet + ethernet.SIZE - 2
        self._needs = self._at + 2 + IPV6.header_size + 4
        self._tables: dict[int, Mapping[bytes, Known]] = {ip.TCP: stack.tcp, ip.UDP: stack.udp}
        self._verdicts: dict[int, bool] = {}  # whether a flow is captured, by its id
        self._keys: dict[bytes, bytes] = {}  # keys of flows by what stands in a frame to the guest
        self._waiting: list[Frame] = []
        self._named: set[tuple[bytes, str]] = set()
        self._unnamed: set[bytes] = set()
        self._is_stopped = False
        self._seen = self._accepted = self._lost = 0
        gateway.device = self
        gateway.engine.after_step = [*gateway.engine.after_step, self._end_of_step]

    def read_into(self, buffer: memoryview | bytearray) -> int | None:
        size = self.device.read_into(buffer)
        if size:
            view = memoryview(buffer)[:size]
            self._crossed(FROM_GUEST, view, size, (view,))
        return size

    def write(self, *buffers: bytes | bytearray | memoryview) -> bool:
        sent = self.device.write(*buffers)
        if sent:
            first = buffers[0]
            if len(first) < self._needs and len(buffers) > 1:
                first = b"".join(buffers)
                buffers = (first,)
            size = len(first) if len(buffers) == 1 else sum(map(len, buffers))
            self._crossed(TO_GUEST, first, size, buffers)
        return sent

    def stop(self) -> tuple[Address, ...]:
        """End the capture, and return addresses of flows whose names are not known.  Calling it again is allowed."""
        if not self._is_stopped:
            self._is_stopped = True
            self._take_away()
            self._end_of_step()
            os.eventfd_write(self._wake, 1)
            os.close(self._wake)
            self._ring.close()
        return tuple(map(ip_address, sorted(self._unnamed, key=lambda each: (len(each), each))))

    def _take_away(self) -> None:
        """Let the gateway have the device again."""
        engine = self._gateway.engine
        engine.after_step = [each for each in engine.after_step if each != self._end_of_step]
        self._gateway.withdraw(self)

    # -- per frame ------------------------------------------------------------------------------------

    def _crossed(
        self,
        direction: int,
        head: bytes | bytearray | memoryview,
        size: int,
        buffers: tuple[bytes | bytearray | memoryview, ...],
    ) -> None:
        """Capture a frame.

        Args:
            direction: `FROM_GUEST` or `TO_GUEST`.
            head: The beginning of the frame, with all of its headers.
            size: The bytes of the frame, virtio header included.
            buffers: The pieces of the frame.
        """
        self._seen += 1
        now = time_ns()
        if not self._waiting:
            flow = self._flow_of(direction, head)
            if flow is not None:
                wanted = self._verdicts.get(flow.id)
                if wanted is not None:
                    if wanted:
                        self._put(now, direction, size, buffers)
                    return
        if len(self._waiting) < KEPT_IN_STEP:
            self._waiting.append((now, direction, b"".join(buffers)))
        else:
            self._accepted += 1
            self._lose()

    def _flow_of(self, direction: int, head: bytes | bytearray | memoryview) -> Known | None:
        """Return the flow of a frame, or None if there is none, or it is not seen at once."""
        at = self._at
        try:
            kind, version, fragment, protocol, parts = _LAYOUT4.unpack_from(head, at)
            if kind != ethernet.IPV4 or version != 0x45 or fragment & _FRAGMENT:
                if kind != ethernet.IPV6:
                    return None
                kind, version, protocol, parts = _LAYOUT6.unpack_from(head, at)
        except error:  # it is too short
            return None
        table: Mapping[bytes, Known] | None = self._tables.get(protocol)
        if table is None:
            return None
        if direction == TO_GUEST:
            key = self._keys.get(parts)
            if key is None:
                if len(self._keys) >= FLOWS_KNOWN:
                    self._keys.clear()
                key = self._keys[parts] = b"".join(flow_key.backwards(parts))
            parts = key
        return table.get(parts)

    def _put(
        self, time: int, direction: int, size: int, buffers: tuple[bytes | bytearray | memoryview, ...]
    ) -> None:
        """Put a frame without a comment into the ring."""
        vnet, ring, first = self._vnet, self._ring, buffers[0]
        rest: tuple[bytes | bytearray | memoryview, ...] = buffers[1:]
        kept = size = size - vnet
        if vnet and first[0] and first[1] in _TO_CHANGE:
            text = b"".join(buffers)
            if first[1]:
                self._put_whole((time, direction, text), "")
                return
            first, rest = summed(text), ()
        if kept > self._snaplen:
            kept = self._snaplen
            left = kept + vnet - len(first)
            if left > 0 and len(rest) == 1:
                rest = (memoryview(rest[0])[:left],)
            elif left <= 0:
                first, rest = memoryview(first)[: kept + vnet], ()
            else:
                first, rest = memoryview(b"".join((first, *rest)))[: kept + vnet], ()
        head, tail = packet_ends(time, kept, size, direction)
        self._accepted += 1
        if not ring.put(len(head) + kept + len(tail), head, memoryview(first)[vnet:], *rest, tail):
            self._lose()

    def _put_whole(self, frame: Frame, comment: str) -> None:
        """Put a frame in one piece into the ring, its checksum filled in, or its datagrams apart."""
        time, direction, text = frame
        self._accepted += 1
        for each in _as_on_a_wire(text, self._vnet):
            kept = min(len(each), self._snaplen)
            head, tail = packet_ends(time, kept, len(each), direction, comment)
            if not self._ring.put(len(head) + kept + len(tail), head, each[:kept], tail):
                self._lose()
                break
            comment = ""

    def _lose(self) -> None:
        if not self._ring.counters[STOPPING]:
            self._lost += 1

    # -- per step -------------------------------------------------------------------------------------

    def _end_of_step(self) -> None:
        """Put the frames that wait into the ring, and let the owner see all."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for frame in waiting:
                self._first_look(frame)
        if self._ring.publish(self._seen, self._accepted, self._lost):
            os.eventfd_write(self._wake, 1)
        if self._ring.counters[STOPPING] and not self._is_stopped:
            self.stop()

    def _first_look(self, frame: Frame) -> None:
        """Decide about a frame of which nothing is known yet, and comment on it if it is the first of its flow."""
        _, direction, text = frame
        transport, flow = self._flow(direction, text)
        if flow is None:
            if self._where is None or self._fits(direction, text, None):
                self._put_whole(frame, "")
            return
        wanted = self._verdicts.get(flow.id)
        comment = ""
        if wanted is None:
            if len(self._verdicts) >= FLOWS_KNOWN:
                self._verdicts.clear()
            info = self._gateway.info(transport, flow, "open")
            wanted = self._where is None or self._fits(direction, text, info.name)
            self._verdicts[flow.id] = wanted
            if wanted:
                comment = f"flow {info.id}: {info.direction} {info.protocol}"
                comment += f", name {info.name}" if info.name else ""
                comment += f", rule {info.rule}" if info.rule else ""
                self._note_name(info.remote.address.packed, info.name)
        if wanted:
            self._put_whole(frame, comment)

    def _flow(self, direction: int, text: bytes) -> tuple[Transport, Known | None]:
        flow = self._flow_of(direction, text)
        if isinstance(flow, TcpConnection):
            return "tcp", flow
        if flow is None:
            return "icmp", self._echo_flow(direction, text)
        return "udp", flow

    def _echo_flow(self, direction: int, text: bytes) -> EchoFlow | None:
        at = self._at + 2
        family = IPV4 if text[at : at + 1] == b"\x45" else IPV6
        start, layer4 = at + family.header_size - 2 * family.address_size, at + family.header_size
        if len(text) < layer4 + 6:
            return None
        source, half = text[start:layer4], family.address_size
        if direction == TO_GUEST:
            source = source[half:] + source[:half]
        return self._gateway.stack.echo.get(source + text[layer4 + 4 : layer4 + 6] + bytes(2))

    def _note_name(self, address: bytes, name: str | None) -> None:
        if name is None:
            if len(self._unnamed) < UNNAMED_KEPT:
                self._unnamed.add(address)
        elif (address, name) not in self._named:
            if len(self._named) >= FLOWS_KNOWN:
                self._named.clear()
            self._named.add((address, name))
            block = pcapng.names([(address, name)])
            self._ring.put(len(block), block)

    def _fits(self, direction: int, text: bytes, name: str | None) -> bool:
        """Return whether a frame fits the filter."""
        where = self._where
        assert where is not None
        protocol, addresses, ports = _look(text[self._vnet :])
        if where.protocol is not None and where.protocol != protocol:
            return False
        if where.port is not None and where.port not in ports:
            return False
        if self._network is not None and not any(ip_address(each) in self._network for each in addresses):
            return False
        if where.name is None:
            return True
        named = [name, *(self._gateway.name_of(ip_address(each)) for each in addresses)]
        return any(_is_below(each, where.name) for each in named if each is not None)


def _is_below(name: str, wanted: str) -> bool:
    name = name.rstrip(".").lower()
    return name.endswith(wanted[1:]) if wanted.startswith("*.") else name == wanted


def _look(frame: bytes) -> tuple[str, tuple[bytes, ...], tuple[int, ...]]:
    """Return a frame's protocol, its addresses and its ports, as far as it has these."""
    kind, at = int.from_bytes(frame[12:14], "big"), ethernet.SIZE
    if kind == ethernet.ARP and len(frame) >= at + arp.SIZE:
        return "arp", (frame[at + 14 : at + 18], frame[at + 24 : at + 28]), ()
    if kind == ethernet.IPV4 and len(frame) >= at + IPV4.header_size:
        protocol, layer4, start, half = frame[at + 9], at + 4 * (frame[at] & 15), at + 12, 4
        is_first = not int.from_bytes(frame[at + 6 : at + 8], "big") & 0x1FFF
    elif kind == ethernet.IPV6 and len(frame) >= at + IPV6.header_size:
        protocol, layer4, start, half, is_first = frame[at + 6], at + IPV6.header_size, at + 8, 16, True
    else:
        return "", (), ()
    addresses = frame[start : start + half], frame[start + half : start + 2 * half]
    ports: tuple[int, ...] = ()
    if protocol in (ip.TCP, ip.UDP) and is_first and len(frame) >= layer4 + 4:
        ports = _DATAGRAM_LENGTH.unpack_from(frame, layer4)
    return _NAMES.get(protocol, ""), addresses, ports


def _as_on_a_wire(text: bytes, vnet: int) -> Iterator[bytes]:
    """Yield the frames that a frame with a virtio header stands for, see the text of this module."""
    if not vnet:
        yield text
        return
    if virtio.datagram_size(memoryview(text)):
        for piece in cut(text):
            yield summed(piece)[vnet:]
    elif virtio.parse(text)[1] == virtio.GSO_NONE:
        yield summed(text)[vnet:]
    else:
        yield text[vnet:]
