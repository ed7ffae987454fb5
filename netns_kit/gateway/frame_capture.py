"""FrameCapture: a wrapper of the device that puts what crosses it into a `FrameRing`, as blocks of pcapng.

It stands between the stack and the device only while it captures, so that without it no frame costs more.

Comments.  The first frame of each flow gets a comment about the flow.  When the guest's first packet is read, the
flow does not exist yet.  So a frame of no known flow is kept until the end of the step, with those that follow it; by
then the flow is there, and so are its name and its rule.

Super-frames.  A TCP super-segment is kept whole, as every Linux host captures its own: its bytes are those of the
segments that a wire would have, and cutting it into forty blocks costs more than carrying it.  The checksum in it is
that of the pseudo-header.  A UDP super-datagram is cut into its datagrams, since their number and borders mean
something.  Other checksums that the two kernels have left to each other are filled in where the frame is short and
whole: a sum over 64 KiB costs more than all the rest.  Flags of the block say which are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from struct import Struct, error
from time import time_ns
from typing import TYPE_CHECKING, TypeVar

from netns_kit.arguments import Address
from netns_kit.domain_names import is_among, to_text
from netns_kit.policy.addresses import PortRanges, canonical
from netns_kit.policy.index import parts_of
from netns_kit.policy.rules import is_name
from netns_kit.stack import EchoFlow, TcpConnection, Transport, UdpFlow
from netns_kit.stack.wire import arp, ethernet, flow_key, ip, tcp, virtio
from netns_kit.stack.wire.family import IPV4, IPV6
from netns_kit.tap import pcapng
from netns_kit.tap.frame_device import DeviceWrapper
from netns_kit.tap.frame_ring import STOPPING, FrameRing
from netns_kit.tap.pcapng import (
    FROM_GUEST,
    NOT_SUMMED,
    PACKET,
    SUPER_SEGMENT,
    TO_GUEST,
    packet_ends,
    packet_head,
    plain_tail,
)
from netns_kit.tap.super_frames import cut, summed

if TYPE_CHECKING:
    from .capture_filter import CaptureFilter
    from .gateway import FlowInfo, Gateway

KEPT_IN_STEP = 1024  # frames that wait for the end of a step
FLOWS_KNOWN = 1 << 16  # flows whose first frame is over; then all are forgotten, and commented on again
UNNAMED_KEPT = 4096  # addresses without a name that are remembered
_LAYOUT4 = Struct("!HB5xHxB2x12s")  # from the EtherType: version, fragment, protocol, addresses and ports
_LAYOUT6 = Struct("!HB5xBx36s")
_TCP_FLAGS = 9  # bytes between the ports and the flags
LONG = 128  # bytes of a frame that has all headers that are looked at
SMALL = 2048  # bytes of a block that is joined with others
_FRAGMENT = 0x3FFF  # mask of the offset, and of "more follow"
_NAMES = {ip.TCP: "tcp", ip.UDP: "udp", IPV4.icmp: "icmp", IPV6.icmp: "icmp"}
_DATAGRAM_LENGTH = Struct("!HH")

Frame = tuple[int, int, bytes]
"""A frame that waits: when it crossed, in which direction, its bytes with virtio header."""
K = TypeVar("K")
V = TypeVar("V")
Known = TcpConnection | UdpFlow | EchoFlow


class FrameCapture(DeviceWrapper):
    """A capture of the frames of one gateway.

    Args:
        gateway: The gateway.
        ring: The memfd of the ring, which stays the caller's.
        wake: The eventfd that wakes the ring's owner.  It is closed in the end.
        snaplen: The bytes that are kept of a frame at most.
        where: Which frames are kept; None: all.
        mac: The link address of the guest whose frames are kept; empty: those of all.

    Raises:
        OSError: The ring cannot be mapped.  Nothing has changed.
    """

    def __init__(
        self, gateway: Gateway, ring: int, wake: int, snaplen: int, where: CaptureFilter | None, mac: str = ""
    ) -> None:
        self._ring = FrameRing(ring)
        super().__init__(gateway.device)
        self._gateway = gateway
        self._wake = wake
        self._snaplen = snaplen
        self._where = where
        self._vnet = gateway.device.offloads.vnet_header
        self._at = self._vnet + ethernet.SIZE - 2
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self._datagrams: Mapping[bytes, UdpFlow] = gateway.stack.udp
        self._verdicts: dict[int, bool] = {}  # whether a flow is captured, by its id
        # the same of TCP, by what stands in a frame: addresses and ports
        self._segments: dict[bytes, bool] = {}
        self._keys: dict[bytes, bytes] = {}  # keys of flows by what stands in a frame to the guest
        self._waiting: list[Frame] = []
        self._named: set[tuple[bytes, str]] = set()
        self._unnamed: set[bytes] = set()
        self._more: dict[int, str] = {}  # what the next comment on a flow says besides, by its id
        self._small: list[bytes] = []  # blocks that were not put into the ring yet, in three pieces each
        self._small_size = 0
        self._is_stopped = False
        names = () if where is None else tuple(filter(is_name, where.targets))
        self._has_names = bool(names)
        self._seen = self._accepted = self._lost = 0
        gateway.device = self
        if self._has_names:
            gateway.want_names(self, names)
        gateway.engine.after_step = [*gateway.engine.after_step, self._end_of_step]

    def read_into(self, buffer: memoryview | bytearray) -> int | None:
        size = self.device.read_into(buffer)
        if size:
            self._seen += 1
            head = buffer if size > LONG else buffer[:size]
            wanted = None if self._waiting else self._verdict(FROM_GUEST, head)
            if wanted:
                self._put(FROM_GUEST, size, buffer, ())
            elif wanted is None:
                self._keep(FROM_GUEST, (memoryview(buffer)[:size],))
        return size

    def write(self, *buffers: bytes | bytearray | memoryview) -> bool:
        sent = self.device.write(*buffers)
        if sent:
            self._seen += 1
            first, *rest = buffers
            wanted = None if self._waiting else self._verdict(TO_GUEST, first)
            if wanted:
                self._put(TO_GUEST, len(first) + sum(map(len, rest)) if rest else len(first), first, rest)
            elif wanted is None:
                self._keep(TO_GUEST, buffers)
        return sent

    def stop(self) -> None:
        """End the capture.  Calling it again is allowed."""
        if not self._is_stopped:
            self._is_stopped = True
            self._take_away()
            self._end_of_step()
            os.eventfd_write(self._wake, 1)
            os.close(self._wake)
            self._ring.close()

    def unnamed(self) -> tuple[Address, ...]:
        """Return addresses of flows whose names are not known."""
        return tuple(map(ip_address, sorted(self._unnamed, key=lambda each: (len(each), each))))

    def named(self) -> tuple[tuple[Address, str], ...]:
        """Return addresses of flows, and their names, which are in the ring once each."""
        return tuple((ip_address(address), name) for address, name in self._named)

    def comment(self, number: int, text: str) -> None:
        """Comment on the next frame of a flow, if it is captured.

        Args:
            number: The flow's id.
            text: What the comment says besides.
        """
        if self._verdicts.pop(number, False):
            _remember(self._more, number, f", {text}")
            self._segments.clear()

    def _take_away(self) -> None:
        """Let the gateway have the device again."""
        engine = self._gateway.engine
        if self._has_names:
            self._gateway.want_names(self, ())
        engine.after_step = [each for each in engine.after_step if each != self._end_of_step]
        self._gateway.withdraw(self)

    # -- per frame ------------------------------------------------------------------------------------

    def _keep(self, direction: int, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """Keep a frame for the end of the step."""
        if len(self._waiting) < KEPT_IN_STEP:
            self._waiting.append((time_ns(), direction, b"".join(buffers)))
        else:
            self._accepted += 1
            self._lose(1)

    def _verdict(self, direction: int, head: bytes | bytearray | memoryview) -> bool | None:
        """Return whether a frame is captured; None: that takes a closer look, as the first frame of each flow does.

        Args:
            direction: `FROM_GUEST` or `TO_GUEST`.
            head: The beginning of the frame.
        """
        if self._mac and not self._is_of_guest(direction, head):
            return False
        at = self._at
        try:
            kind, version, fragment, protocol, parts = _LAYOUT4.unpack_from(head, at)
            if kind == ethernet.IPV4 and version == 0x45 and not fragment & _FRAGMENT:
                at += _LAYOUT4.size + _TCP_FLAGS
            elif kind == ethernet.IPV6:
                kind, version, protocol, parts = _LAYOUT6.unpack_from(head, at)
                at += _LAYOUT6.size + _TCP_FLAGS
            else:
                return None
            if protocol == ip.TCP:
                # another flow between the same ends begins with a SYN
                return None if head[at] & tcp.SYN else self._segments.get(parts)
        except (error, IndexError):  # it is too short
            return None
        if protocol == ip.UDP:
            if direction == TO_GUEST:
                parts = self._turned(parts)
            flow = self._datagrams.get(parts)
            return None if flow is None else self._verdicts.get(flow.id)
        return None

    def _is_of_guest(self, direction: int, head: bytes | bytearray | memoryview) -> bool:
        """Return whether the guest has sent a frame, or whether it gets there."""
        at = self._vnet
        if direction == TO_GUEST:
            return head[at : at + 6] == self._mac or bool(head[at] & 1)  # or everybody gets it
        return head[at + 6 : at + 12] == self._mac

    def _turned(self, parts: bytes) -> bytes:
        """Return the key of the flow to which a frame to the guest with these addresses and ports belongs."""
        key = self._keys.get(parts)
        if key is None:
            key = b"".join(flow_key.backwards(parts))
            _remember(self._keys, parts, key)
        return key

    def _put(
        self,
        direction: int,
        size: int,
        first: bytes | bytearray | memoryview,
        rest: Sequence[bytes | bytearray | memoryview],
    ) -> None:
        """Put a frame without a comment into the ring.

        Args:
            direction: `FROM_GUEST` or `TO_GUEST`.
            size: The bytes of the frame, virtio header included.
            first: Its beginning, and perhaps more.
            rest: What belongs to it besides.
        """
        now, vnet = time_ns(), self._vnet
        if vnet and first[0] & virtio.NEEDS_CSUM:
            flags = self._unfilled(first[1], size)
            if flags:
                direction |= flags
            elif first[1] == virtio.GSO_NONE:
                text = b"".join((first, *rest)) if rest else bytes(first[:size])
                first, rest = summed(text), ()
            else:
                text = b"".join((first, *rest)) if rest else bytes(first[:size])
                self._put_whole((now, direction, text), "")
                return
        size -= vnet
        kept = min(size, self._snaplen)
        end = vnet + kept
        total, tail = plain_tail(kept, direction)
        head = packet_head(PACKET, total, 0, now >> 32, now & 0xFFFFFFFF, kept, size)
        self._accepted += 1
        left = end - len(first)
        if total < SMALL:
            if left > 0:
                first = b"".join((first, *rest) if len(rest) > 1 else (first, rest[0][:left]))
            self._small += head, bytes(first[vnet:end]), tail
            self._small_size += total
            return
        if self._small:
            self._put_small()
        if left <= 0:
            done = self._ring.put(total, head, first[vnet:end], tail)
        elif len(rest) == 1:
            done = self._ring.put(total, head, first[vnet:], rest[0][:left], tail)
        else:
            done = self._ring.put(total, head, b"".join((first, *rest))[vnet:end], tail)
        if not done:
            self._lose(1)

    def _unfilled(self, kind: int, size: int) -> int:
        """Return the flags of a frame whose checksum is left as it is; 0: it is to be filled in, or the frame cut.

        Args:
            kind: The virtio header's gso_type.
            size: The bytes of the frame with that header.
        """
        if kind == virtio.GSO_NONE:
            return NOT_SUMMED if size > SMALL or size - self._vnet > self._snaplen else 0
        return 0 if kind == virtio.GSO_UDP_L4 else SUPER_SEGMENT

    def _put_small(self) -> None:
        """Put small frames into the ring, all at a time."""
        small, self._small, size, self._small_size = self._small, [], self._small_size, 0
        if not self._ring.put(size, b"".join(small)):
            self._lose(len(small) // 3)

    def _put_whole(self, frame: Frame, comment: str) -> None:
        """Put a frame in one piece into the ring, its checksum filled in, or its datagrams apart."""
        time, direction, text = frame
        if len(text) < self._vnet:  # no kernel sends that
            return
        self._accepted += 1
        if self._small:
            self._put_small()
        flags = 0
        if self._vnet and text[0] & virtio.NEEDS_CSUM:
            flags = self._unfilled(text[1], len(text))
        pieces = (text[self._vnet :],) if flags else _as_on_a_wire(text, self._vnet)
        for each in pieces:
            kept = min(len(each), self._snaplen)
            head, tail = packet_ends(time, kept, len(each), direction | flags, comment)
            if not self._ring.put(len(head) + kept + len(tail), head, each[:kept], tail):
                self._lose(1)
                break
            comment = ""

    def _lose(self, count: int) -> None:
        if not self._ring.counters[STOPPING]:
            self._lost += count

    # -- per step -------------------------------------------------------------------------------------

    def _end_of_step(self) -> None:
        """Put the frames that wait into the ring, and let the owner see all."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for frame in waiting:
                self._first_look(frame)
        if self._small:
            self._put_small()
        if self._ring.publish(self._seen, self._accepted, self._lost):
            os.eventfd_write(self._wake, 1)
        if self._ring.counters[STOPPING] and not self._is_stopped:
            self.stop()

    def _first_look(self, frame: Frame) -> None:
        """Decide about a frame of which nothing is known yet, and comment on it if it is the first of its flow."""
        _, direction, text = frame
        if self._mac and not self._is_of_guest(direction, text):
            return
        parts, flow = self._flow(direction, text)
        if flow is None:
            if self._where is None or self._fits(direction, text, None):
                self._put_whole(frame, "")
            return
        wanted = self._verdicts.get(flow.id)
        comment = ""
        if wanted is None:
            transport: Transport = "tcp" if isinstance(flow, TcpConnection) else "udp" if parts else "icmp"
            info = self._gateway.info(transport, flow, "open")
            wanted = self._where is None or self._fits(direction, text, info.name)
            _remember(self._verdicts, flow.id, wanted)
            if wanted:
                comment = _comment(info) + self._more.pop(flow.id, "")
                self._note_name(info.remote.address.packed, info.name)
        if isinstance(flow, TcpConnection):
            _remember(self._segments, parts, wanted)
        if wanted:
            self._put_whole(frame, comment)

    def _flow(self, direction: int, text: bytes) -> tuple[bytes, Known | None]:
        """Return the flow of a frame, and its addresses and ports as they stand in it, if it has ports."""
        stack, parts = self._gateway.stack, b""
        with suppress(error):  # it is too short
            kind, version, fragment, protocol, parts = _LAYOUT4.unpack_from(text, self._at)
            if kind != ethernet.IPV4 or version != 0x45 or fragment & _FRAGMENT:
                kind, version, protocol, parts = _LAYOUT6.unpack_from(text, self._at)
                if kind != ethernet.IPV6:
                    return b"", None
            key = self._turned(parts) if direction == TO_GUEST else parts
            if protocol == ip.TCP:
                return parts, stack.tcp.get(key)
            if protocol == ip.UDP:
                return parts, stack.udp.get(key)
        return b"", self._echo_flow(direction, text)

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
        protocol, addresses, ports = look(text[self._vnet :])
        if where.protocol is not None and where.protocol != protocol:
            return False
        if not addresses:
            return not where.targets and not where.ports
        remote = int(direction == FROM_GUEST)  # which of the two ends has that name
        return any(
            self._end_fits(address, ports[number] if ports else None, name if number == remote else None)
            for number, address in enumerate(addresses)
        )

    def _end_fits(self, address: bytes, port: int | None, name: str | None) -> bool:
        """Return whether an end of a frame is one of the filter's targets, at one of its ports."""
        where = self._where
        assert where is not None
        if not _is_in(port, where.ports):
            return False
        plain = ip_address(canonical(address))
        for target in where.targets:
            if is_name(target):
                known = [*map(to_text, self._gateway.answered(address)), *([] if name is None else [name])]
                if any(is_among(each.rstrip(".").lower(), [target]) for each in known):
                    return True
            elif any(plain in network and _is_in(port, ranges) for network, ranges in parts_of(target)):
                return True
        return not where.targets


def _is_in(port: int | None, ranges: PortRanges) -> bool:
    """Return whether a port is in ranges; all are if there are none."""
    return not ranges or (port is not None and any(first <= port <= last for first, last in ranges))


def _comment(flow: FlowInfo) -> str:
    text = f"flow {flow.id}: {flow.direction} {flow.protocol}"
    text += f", name {flow.name}" if flow.name else ""
    return text + (f", rule {flow.rule}" if flow.rule else "")


def _remember(known: dict[K, V], key: K, value: V) -> None:
    if len(known) >= FLOWS_KNOWN:
        known.clear()
    known[key] = value


def look(frame: bytes) -> tuple[str, tuple[bytes, ...], tuple[int, ...]]:
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
