"""TCP segments (RFC 9293 3.1), and the options that we use.

These are MSS, window scale and timestamps (RFC 7323), and SACK (RFC 2018).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from struct import Struct
from typing import NamedTuple

from .errors import BadPacket

SIZE = 20
CHECKSUM_AT = 16
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
_HEADER = Struct("!HHIIHHHH")
_END, _NOP, _MSS, _WINDOW_SCALE, _SACK_PERMITTED, _SACK, _TIMESTAMPS = 0, 1, 2, 3, 4, 5, 8
_BLOCK = Struct("!II")
_STAMP = Struct("!II")
STAMP = bytes((_NOP, _NOP, _TIMESTAMPS, 10))
"""The beginning of the timestamps option, laid out as in RFC 7323 appendix A."""
TICKS = 1000  # of our timestamps, per second
STAMP_SIZE = len(STAMP) + _STAMP.size
MAX_WINDOW_SCALE = 14
# the options of a SYN as Linux lays them: MSS, SACK permitted (or with it timestamps), window scale
_SYN_PLAIN, _PLAIN_KINDS = Struct("!2sH4s3sB"), (b"\x02\x04", b"\x01\x01\x04\x02", b"\x01\x03\x03")
_SYN_STAMPED, _STAMPED_KINDS = Struct("!2sH4sII3sB"), (b"\x02\x04", b"\x04\x02\x08\x0a", b"\x01\x03\x03")


class Segment:
    """A segment.  `payload` and `options` are views that the caller of `parse` lends."""

    __slots__ = ("ack", "flags", "options", "payload", "seq", "urgent", "window")

    def __init__(
        self,
        seq: int,
        ack: int,
        flags: int,
        window: int,
        payload: memoryview,
        options: memoryview | None = None,
        urgent: int = 0,
    ) -> None:
        self.seq = seq
        self.ack = ack
        self.flags = flags
        self.window = window
        self.payload = payload
        self.options = options
        self.urgent = urgent

    @property
    def length(self) -> int:
        """SEG.LEN: the number of sequence numbers that it occupies, SYN and FIN included."""
        return len(self.payload) + (self.flags & SYN != 0) + (self.flags & FIN != 0)


def parse(view: memoryview) -> Segment:
    """Parse a TCP segment.

    Raises:
        BadPacket: The bytes are not a segment.  Nothing else is raised.
    """
    if len(view) < SIZE:
        raise BadPacket("tcp-truncated")
    _, _, seq, ack, offset_flags, window, _, urgent = _HEADER.unpack_from(view)
    size = offset_flags >> 12 << 2
    if size == SIZE:
        return Segment(seq, ack, offset_flags & 0xFF, window, view[SIZE:], None, urgent)
    if not SIZE < size <= len(view):
        raise BadPacket("tcp-offset")
    return Segment(seq, ack, offset_flags & 0xFF, window, view[size:], view[SIZE:size], urgent)


class Options(NamedTuple):
    """The options of a segment.  A missing option is None, False or empty."""

    mss: int | None = None
    scale: int | None = None
    sack_permitted: bool = False
    sack: tuple[tuple[int, int], ...] = ()  # blocks: first number, number after the last
    stamp: tuple[int, int] | None = None  # TSval and TSecr


NO_OPTIONS = Options()


def parse_options(options: memoryview | None) -> Options:
    """Parse options.

    An option with an impossible length ends the list, as in kernels; the segment stays valid.
    """
    if options is None:
        return NO_OPTIONS
    end = len(options)
    if end == _SYN_STAMPED.size:
        first, mss, second, value, echo, third, scale = _SYN_STAMPED.unpack(options)
        if (first, second, third) == _STAMPED_KINDS:
            return Options(mss, min(scale, MAX_WINDOW_SCALE), True, (), (value, echo))
    elif end == _SYN_PLAIN.size:
        first, mss, second, third, scale = _SYN_PLAIN.unpack(options)
        if (first, second, third) == _PLAIN_KINDS:
            return Options(mss, min(scale, MAX_WINDOW_SCALE), True)
    return _parse_each(options, end)


def _parse_each(options: memoryview, end: int) -> Options:
    """Parse options in any layout."""
    mss: int | None = None
    scale: int | None = None
    stamp: tuple[int, int] | None = None
    permitted = False
    blocks: tuple[tuple[int, int], ...] = ()
    at = 0
    while at < end and options[at] != _END:
        if options[at] == _NOP:
            at += 1
            continue
        if at + 2 > end or not 2 <= options[at + 1] <= end - at:
            break
        kind, size = options[at], options[at + 1]
        if kind == _MSS and size == 4:
            mss = int.from_bytes(options[at + 2 : at + 4], "big")
        elif kind == _WINDOW_SCALE and size == 3:
            scale = min(options[at + 2], MAX_WINDOW_SCALE)
        elif kind == _SACK_PERMITTED and size == 2:
            permitted = True
        elif kind == _SACK and size & 7 == 2:
            blocks = tuple(_BLOCK.iter_unpack(options[at + 2 : at + size]))
        elif kind == _TIMESTAMPS and size == 10:
            value, echo = _STAMP.unpack_from(options, at + 2)
            stamp = value, echo
        at += size
    return Options(mss, scale, permitted, blocks, stamp)


def pack_options(
    mss: int | None, scale: int | None, sack_permitted: bool = False, stamp: tuple[int, int] | None = None
) -> bytes:
    """Return the options of a SYN, laid out as Linux does, padded to a multiple of four."""
    before, after = _pack_around_stamp(mss, scale, sack_permitted, stamp is not None)
    return before + after if stamp is None else before + _STAMP.pack(*stamp) + after


@lru_cache(maxsize=64)
def _pack_around_stamp(
    mss: int | None, scale: int | None, sack_permitted: bool, stamped: bool
) -> tuple[bytes, bytes]:
    """Return the bytes before and after the timestamps, which are the same for all connections of a link."""
    before = b"" if mss is None else bytes((_MSS, 4)) + mss.to_bytes(2, "big")
    padding = bytes((_SACK_PERMITTED, 2)) if sack_permitted else bytes((_NOP, _NOP))
    if stamped:
        before += padding + STAMP[2:]
    elif sack_permitted:
        before += bytes((_NOP, _NOP)) + padding
    return before, b"" if scale is None else bytes((_NOP, _WINDOW_SCALE, 3, scale))


def ticks(now: float) -> int:
    """Return the value of our timestamps at a time in seconds (RFC 7323 5.4)."""
    return int(now * TICKS) & 0xFFFFFFFF


def pack_stamp(value: int, echo: int) -> bytes:
    """Return the timestamps option, padded to a multiple of four."""
    return STAMP + _STAMP.pack(value, echo)


def pack_sack(blocks: Iterable[tuple[int, int]]) -> bytes:
    """Return the SACK option with these blocks, at most four, padded to a multiple of four."""
    packed = b"".join(_BLOCK.pack(*block) for block in blocks)
    return bytes((_NOP, _NOP, _SACK, 2 + len(packed))) + packed


def pack(
    *, src_port: int, dst_port: int, seq: int, ack: int, flags: int, window: int, options: bytes = b""
) -> bytes:
    """Pack a header with a checksum of zero.  The caller sets the checksum, which covers the addresses."""
    offset_flags = (SIZE + len(options)) << 10 | flags
    return _HEADER.pack(src_port, dst_port, seq, ack, offset_flags, window, 0, 0) + options
