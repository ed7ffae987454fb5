"""What passes the tap of a namespace, seen from inside, and segments put on it of which its kernel knows nothing."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import anyio

from netns_kit import Namespace
from netns_kit.stack.wire import checksum, ethernet, ip, tcp, virtio
from netns_kit.stack.wire.tcp import Segment
from netns_kit.subnet import MAC_PREFIX
from tests.support.connections import GATEWAY, GUEST, TAP

ETH_P_ALL = 3  # linux/if_ether.h
SOL_PACKET, PACKET_VNET_HDR, PACKET_OUTGOING = 263, 15, 4  # linux/if_packet.h
FRAME_MAX = 1 << 17


class Frame(NamedTuple):
    """One frame that has passed the guest's tap.  `segment` is None where it is not TCP."""

    from_guest: bool
    gso_size: int  # of a super-segment, else 0
    packet: ip.Packet
    segment: Segment | None

    @property
    def ports(self) -> tuple[int, int]:
        """The guest's and the other."""
        first, second = struct.unpack_from("!HH", self.packet.payload)
        return (first, second) if self.from_guest else (second, first)

    @property
    def options(self) -> dict[int, bytes]:
        """TCP's, by kind."""
        found, left = {}, bytes(self.segment.options or b"") if self.segment else b""
        while left and left[0]:
            size = 1 if left[0] == 1 else left[1]
            found[left[0]] = left[2:size]
            left = left[size:]
        return found


Wanted = Callable[[Frame, Segment], object]
MSS, WINDOW_SCALE, SACK_PERMITTED, SACK, TIMESTAMPS = 2, 3, 4, 5, 8


class Wire:
    """What passes the guest's tap, both ways, from now on; and a way to put a frame of one's own on it."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.seen: list[Frame] = []

    async def next(self, wanted: Wanted) -> tuple[Frame, Segment]:
        """The next TCP segment that is `wanted`.  Those before it are in `seen`, as it is."""
        while True:
            for frame in self._read():
                if frame.segment is not None and wanted(frame, frame.segment):
                    return frame, frame.segment
            await anyio.wait_readable(self._socket)

    def tcp(self, wanted: Wanted) -> list[tuple[Frame, Segment]]:
        """The TCP segments until now that are `wanted`."""
        for _ in self._read():
            pass
        return [
            (frame, frame.segment)
            for frame in self.seen
            if frame.segment is not None and wanted(frame, frame.segment)
        ]

    def _read(self) -> Iterator[Frame]:
        while True:
            try:
                data, address = self._socket.recvfrom(FRAME_MAX)
            except BlockingIOError:
                return
            _, _, _, gso_size, _, _ = virtio.parse(memoryview(data))
            if address[1] == ethernet.IPV4:
                packet = ip.parse_ipv4(memoryview(data)[virtio.SIZE + ethernet.SIZE :])
                segment = tcp.parse(packet.payload) if packet.protocol == ip.TCP else None
                self.seen.append(Frame(address[2] == PACKET_OUTGOING, gso_size, packet, segment))
                yield self.seen[-1]

    def put(
        self,
        source: int,
        target: int,
        *,
        seq: int,
        ack: int,
        flags: int,
        data: bytes = b"",
        host: str = GATEWAY,
        stamp: bytes = b"",
    ) -> None:
        """A segment as from the guest, that its kernel knows nothing of; at that time of the guest's clock."""
        addresses = socket.inet_aton(GUEST) + socket.inet_aton(host)
        options = tcp.pack_stamp(int.from_bytes(stamp, "big"), 0) if stamp else b""
        header = tcp.pack(
            src_port=source, dst_port=target, seq=seq, ack=ack, flags=flags, window=1000, options=options
        )
        segment = header + data
        pseudo = checksum.pseudo_header(addresses, ip.TCP, len(segment))
        check = checksum.checksum(pseudo, checksum.total(segment))
        segment = segment[:16] + check.to_bytes(2, "big") + segment[18:]
        mac = self._socket.getsockname()[4]
        head = ethernet.pack(MAC_PREFIX + socket.inet_aton(GATEWAY), mac, ethernet.IPV4)
        self._socket.send(virtio.NONE + head + ip.pack(addresses, ip.TCP, len(segment)) + segment)


@asynccontextmanager
async def watching(namespace: Namespace) -> AsyncIterator[Wire]:
    """The guest's tap, as packet(7) shows it."""
    with await namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.bind((TAP, ETH_P_ALL))
        yield Wire(sock)


def is_answer(_: Frame, segment: Segment) -> bool:
    """A SYN|ACK."""
    return segment.flags & (tcp.SYN | tcp.ACK) == tcp.SYN | tcp.ACK
