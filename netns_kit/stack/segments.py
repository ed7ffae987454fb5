"""How a connection's segments are built: one header template, patched and sent with its payload.

Where the link has offloads, a payload of up to `MAX_PAYLOAD` bytes leaves as one super-segment at any MTU, and
the checksum field holds only the pseudo-header's sum; where it has none, segments are of the MSS at most, and
summed here.
"""

from __future__ import annotations

from struct import Struct

from .header import FlowHeader
from .link import Link
from .wire import checksum, ip, tcp, virtio

MAX_PAYLOAD = 65535 - 40 - 20 - tcp.STAMP_SIZE  # of one super-segment, either family
SMALLEST_MSS = 48
_PATCH = Struct("!IIHHHH").pack_into  # seq, ack, offset|flags, window, checksum, urgent
_STAMP = Struct("!II").pack_into
_SUM_OFFSET = 16


class SegmentWriter:
    """Writes the segments of the connection named `key` (guest first) to its link."""

    __slots__ = (
        "_family",
        "_gso",
        "_gso_set",
        "_guest",
        "_header",
        "_link",
        "_mss",
        "_offset",
        "_plain",
        "_size",
        "_stamp",
    )

    def __init__(self, link: Link, key: bytes) -> None:
        self._link = link
        self._header = header = FlowHeader(link, key, ip.TCP, tcp.SIZE)
        self._guest, self._family = header.guest, header.family
        self._mss = 0
        self._size = tcp.SIZE  # of the header, with what options each segment has
        self._offset = tcp.SIZE << 10  # as it says so itself
        self._stamp = b""  # those options: the timestamps, if they are spoken
        self._plain = self._gso = b""  # virtio headers: of a segment, of a super-segment
        self._gso_set = False
        if link.offloads.vnet_header and link.offloads.csum:
            self._plain = self._header.virtio(_SUM_OFFSET)
            self._header.buffer[: virtio.SIZE] = self._plain

    def speak_timestamps(self, wanted: bool) -> None:
        """Whether each segment has them.  To be followed by `limit`, and by `stamp`."""
        self._stamp = tcp.pack_stamp(0, 0) if wanted else b""
        self._size = tcp.SIZE + len(self._stamp)
        self._offset = self._size << 10
        self._header.buffer[self._header.layer4 + tcp.SIZE :] = self._stamp
        self._header.length = -1

    def stamp(self, value: int, echo: int) -> None:
        """The timestamps of what is sent from now on, which are spoken."""
        self._stamp = tcp.pack_stamp(value, echo)
        _STAMP(self._header.buffer, self._header.layer4 + tcp.SIZE + len(tcp.STAMP), value, echo)

    def limit(self, mss: int) -> tuple[int, int]:
        """The guest takes segments of `mss`, options included (RFC 6691).  The bytes of a segment, and how many
        `write` takes at once."""
        link, family = self._link, self._family
        most = link.mtu_to(self._guest) - self._headers
        self._mss = min(max(mss, SMALLEST_MSS), most) - len(self._stamp)
        self._header.buffer[: len(self._plain)] = self._plain
        self._gso_set = False
        if not link.tso(family):
            return self._mss, self._mss
        self._gso = self._header.virtio(_SUM_OFFSET, family.gso_tcp, self._mss)
        return self._mss, max(MAX_PAYLOAD // self._mss, 1) * self._mss

    @property
    def _headers(self) -> int:
        """The bytes of the smallest ones."""
        return self._family.header_size + tcp.SIZE

    @property
    def _largest(self) -> int:
        """What fits the MTU beside them."""
        return self._link.mtu - self._headers

    def narrow(self, mtu: int) -> tuple[int, int]:
        """The way behind the guest takes packets of `mtu` at most.  As `limit`."""
        return self.limit(min(mtu - self._headers, self._mss + len(self._stamp)))

    def write(
        self, seq: int, ack: int, flags: int, window: int, payload: bytes | memoryview, urgent: int = 0
    ) -> None:
        """One segment without options but timestamps, or one super-segment."""
        header, link = self._header, self._link
        size = len(payload)
        buffer = header.buffer
        length = self._size + size
        if length != header.length or link.version != header.version:
            header.set_length(length)
        if link.offloads.csum:
            gso = size > self._mss
            if gso is not self._gso_set:
                self._gso_set = gso
                buffer[: virtio.SIZE] = self._gso if gso else self._plain
            _PATCH(buffer, header.layer4 + 4, seq, ack, self._offset | flags, window, header.check, urgent)
        else:
            at = header.layer4
            _PATCH(buffer, at + 4, seq, ack, self._offset | flags, window, 0, urgent)
            parts = checksum.total(memoryview(buffer)[at:]) + checksum.total(payload)
            check = checksum.checksum(header.pseudo, length, parts)
            buffer[at + _SUM_OFFSET : at + _SUM_OFFSET + 2] = check.to_bytes(2, "big")
        if size:
            link.emit(buffer, payload)
        else:
            link.emit(buffer)

    def write_syn(
        self,
        seq: int,
        ack: int,
        flags: int,
        window: int,
        *,
        scale: int | None,
        sack_permitted: bool,
        stamp: tuple[int, int] | None,
    ) -> None:
        """A segment with the options of a SYN.  It waits if the guest's link address is not known yet."""
        options = tcp.pack_options(self._largest, scale, sack_permitted, stamp)
        self._write_options(seq, ack, flags, window, options)

    def write_sack(self, seq: int, ack: int, window: int, blocks: list[tuple[int, int]]) -> None:
        """An ACK that tells what has arrived beyond a hole."""
        fitting = blocks[:3] if self._stamp else blocks  # RFC 2018 3
        self._write_options(seq, ack, tcp.ACK, window, self._stamp + tcp.pack_sack(fitting))

    def _write_options(self, seq: int, ack: int, flags: int, window: int, options: bytes) -> None:
        header, link, guest = self._header, self._link, self._guest
        segment = bytearray(
            tcp.pack(
                src_port=int.from_bytes(header.buffer[header.layer4 : header.layer4 + 2], "big"),
                dst_port=int.from_bytes(header.buffer[header.layer4 + 2 : header.layer4 + 4], "big"),
                seq=seq,
                ack=ack,
                flags=flags,
                window=window,
                options=options,
            )
        )
        check = checksum.checksum(header.pseudo, len(segment), checksum.total(segment))
        segment[_SUM_OFFSET : _SUM_OFFSET + 2] = check.to_bytes(2, "big")
        link.send(guest, link.prefix(guest) + ip.pack(header.addresses, ip.TCP, len(segment)) + segment)
