"""SegmentWriter: sends a connection's segments, by one header template that is patched for each.

If the link has offloads, a payload of up to `MAX_PAYLOAD` bytes is sent as one super-segment at any MTU, and its
checksum field has only the sum of the pseudo-header.  Otherwise a segment is no larger than the MSS, and its checksum
is computed here.
"""

from __future__ import annotations

from struct import Struct

from .header import FlowHeader
from .link import Link
from .wire import checksum, ip, tcp, virtio

MAX_PAYLOAD = 65535 - 40 - 20 - tcp.STAMP_SIZE  # of one super-segment, either family
SMALLEST_MSS = 48
_PATCH = Struct("!IIHHHH").pack_into  # seq, ack, offset|flags, window, checksum, urgent
_PATCHED_AT = 4  # behind the ports
_STAMP = Struct("!II").pack_into
_SUM_OFFSET = 16


class SegmentWriter(FlowHeader):
    """The header template of the connection with that key.  It writes segments to its link."""

    __slots__ = ("_gso", "_gso_set", "_headers", "_mss", "_offset", "_plain", "_size", "_stamp")

    def __init__(self, link: Link, key: bytes) -> None:
        FlowHeader.__init__(self, link, key, ip.TCP, tcp.SIZE)
        self._headers = self.family.header_size + tcp.SIZE  # bytes, at least
        self._mss = 0
        self._size = tcp.SIZE  # of the header, with the options that each segment has
        self._offset = tcp.SIZE << 10  # the header's field for that size
        self._stamp = b""  # those options: the timestamps, if they are used
        self._plain = self._gso = b""  # virtio headers of segments and super-segments, if checksums are left
        self._gso_set = False
        if link.offloads.vnet_header and link.offloads.csum:
            self._plain = self.virtio(_SUM_OFFSET)
            self.buffer[: virtio.SIZE] = self._plain

    def speak_timestamps(self, wanted: bool) -> None:
        """Set whether segments have timestamps.  Call `limit` and `stamp` afterwards."""
        self._stamp = tcp.pack_stamp(0, 0) if wanted else b""
        self._size = tcp.SIZE + len(self._stamp)
        self._offset = self._size << 10
        self.buffer[self.layer4 + tcp.SIZE :] = self._stamp
        self.length = -1

    def stamp(self, value: int, echo: int) -> None:
        """Set the timestamps of the segments from now on."""
        self._stamp = tcp.pack_stamp(value, echo)
        _STAMP(self.buffer, self.layer4 + tcp.SIZE + len(tcp.STAMP), value, echo)

    def limit(self, mss: int) -> tuple[int, int]:
        """Set the MSS, options included (RFC 6691); the MTU to the guest may limit it further.

        Returns:
            The bytes of text in a segment, and the number of bytes that `write` takes at once.
        """
        most = self._link.mtu_to(self.guest) - self._headers
        self._mss = min(max(mss, SMALLEST_MSS), most) - len(self._stamp)
        self._gso_set = False
        self.length = -1
        if not self._plain:
            return self._mss, self._mss
        self.buffer[: virtio.SIZE] = self._plain
        if not self._link.tso(self.family):
            return self._mss, self._mss
        self._gso = self.virtio(_SUM_OFFSET, self.family.gso_tcp, self._mss)
        return self._mss, max(MAX_PAYLOAD // self._mss, 1) * self._mss

    def narrow(self, mtu: int) -> tuple[int, int]:
        """Reduce the MSS for a path with packets of `mtu` bytes.  Return the same as `limit`."""
        return self.limit(min(mtu - self._headers, self._mss + len(self._stamp)))

    def write(
        self, seq: int, ack: int, flags: int, window: int, payload: bytes | memoryview, urgent: int = 0
    ) -> None:
        """Send a segment, or a super-segment, that has no options but timestamps."""
        link, buffer, size = self._link, self.buffer, len(payload)
        length = self._size + size
        if length != self.length or link.version != self.version:
            self.set_length(length)
            gso = size > self._mss
            if gso is not self._gso_set and self._plain:
                self._gso_set = gso
                buffer[: virtio.SIZE] = self._gso if gso else self._plain
        if self._plain:
            _PATCH(
                buffer, self.layer4 + _PATCHED_AT, seq, ack, self._offset | flags, window, self.check, urgent
            )
        else:
            _PATCH(buffer, self.layer4 + _PATCHED_AT, seq, ack, self._offset | flags, window, 0, urgent)
            self._sum(buffer, checksum.total(payload))
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
        """Send a segment with the options of a SYN.  It waits if the guest's link address is unknown."""
        options = tcp.pack_options(self._link.mtu - self._headers, scale, sack_permitted, stamp)
        self._write_options(seq, ack, flags, window, options)

    def write_sack(self, seq: int, ack: int, window: int, blocks: list[tuple[int, int]]) -> None:
        """Send an ACK with a SACK option of these blocks."""
        fitting = blocks[:3] if self._stamp else blocks  # RFC 2018 3
        self._write_options(seq, ack, tcp.ACK, window, self._stamp + tcp.pack_sack(fitting))

    def _write_options(self, seq: int, ack: int, flags: int, window: int, options: bytes) -> None:
        """Send a segment without payload.  `options` are all of its options, timestamps included."""
        size = tcp.SIZE + len(options)
        self.set_length(size)
        frame = self.buffer[: self.layer4 + tcp.SIZE] + options
        if self._plain:
            frame[: virtio.SIZE] = self._plain
            _PATCH(frame, self.layer4 + _PATCHED_AT, seq, ack, size << 10 | flags, window, self.check, 0)
        else:
            _PATCH(frame, self.layer4 + _PATCHED_AT, seq, ack, size << 10 | flags, window, 0, 0)
            self._sum(frame, 0)
        self.length = -1  # the template has another length now
        if self.resolved:
            self._link.emit(frame)
        else:
            self._link.send(self.guest, frame)

    def _sum(self, frame: bytearray, payload: int) -> None:
        """Write the checksum of a header whose length is set.  `payload` is the sum of the payload."""
        at = self.layer4
        check = checksum.checksum(self.pseudo, self.length, checksum.total(memoryview(frame)[at:]), payload)
        frame[at + _SUM_OFFSET : at + _SUM_OFFSET + 2] = check.to_bytes(2, "big")
