"""Blocks of a pcapng file (draft-ietf-opsawg-pcapng), in the byte order of this machine.

Every block is its type, its length, its content and its length again, a multiple of four bytes:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-------------------------------+-------------------------------+
    |                            block type                         |
    |                        block total length                     |
    |               content, options, padded to 32 bits             |
    |                        block total length                     |
    +---------------------------------------------------------------+
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from ipaddress import ip_address
from struct import Struct, error

from netns_kit.frozen import frozen
from netns_kit.stack.wire.family import FAMILIES, IPV4, family_of

ETHERNET = 1
FROM_GUEST, TO_GUEST = 2, 1
"""Directions of a frame, as the interface inside has them: outbound, inbound."""
NOT_SUMMED = 1 << 9
"""A flag of a frame beside its direction: its checksum is that of the pseudo-header alone."""
SUPER_SEGMENT = NOT_SUMMED | 1 << 11
"""Flags of a TCP super-segment, whose checksum is that too."""
TEXT_MAX = 4096  # bytes of an option's text

_SECTION, _INTERFACE, _NAMES, _STATISTICS, PACKET = 0x0A0D0D0A, 1, 4, 5, 6
_ORDER = 0x1A2B3C4D
_COMMENT, _END = 1, Struct("=HH").pack(0, 0)
_OPTION = Struct("=HH").pack
_BLOCK = Struct("=II").pack
_read_block, _read_option = Struct("=II").unpack_from, Struct("=HH").unpack_from
_read_interface, _read_head = Struct("=HHI").unpack_from, Struct("=IIIII").unpack_from
_LENGTH, _read_length = Struct("=I").pack, Struct("=I").unpack
_SECTION_HEAD = Struct("=IHHq").pack
_INTERFACE_HEAD = Struct("=HHI").pack
_STATISTICS_HEAD = Struct("=III").pack
PACKET_HEAD = 28  # bytes before the frame
packet_head = Struct("=IIIIIII").pack
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")  # by length modulo 4


def section(hardware: str, system: str, program: str, comment: str = "") -> bytes:
    """Return a section header block: the beginning of a file, of unknown length."""
    named = _text(_COMMENT, comment) if comment else b""
    named += _text(2, hardware) + _text(3, system) + _text(4, program) + _END
    return _block(_SECTION, _SECTION_HEAD(_ORDER, 1, 0, -1), named)


def interface(
    name: str, snaplen: int, *, mac: bytes | None, system: str, hardware: str, comment: str
) -> bytes:
    """Return an interface description block: Ethernet, times in nanoseconds."""
    options = _text(_COMMENT, comment) + _text(2, name)
    if mac is not None:
        options += _option(6, mac)
    options += _option(9, b"\x09") + _text(12, system) + _text(15, hardware) + _END
    return _block(_INTERFACE, _INTERFACE_HEAD(ETHERNET, 0, snaplen), options)


def packet_ends(time: int, kept: int, size: int, flags: int, comment: str = "") -> tuple[bytes, bytes]:
    """Return what stands before and behind a frame in its enhanced packet block.

    Args:
        time: Nanoseconds since the epoch.
        kept: The bytes of the frame that are kept.
        size: The bytes that the frame has.
        flags: `FROM_GUEST` or `TO_GUEST`, and perhaps `NOT_SUMMED` or `SUPER_SEGMENT`.
        comment: A comment on the frame.
    """
    total, tail = plain_tail(kept, flags)
    if comment:
        tail = tail[:-8] + _text(_COMMENT, comment) + _END
        total = PACKET_HEAD + kept + len(tail) + 4
        tail += _LENGTH(total)
    return packet_head(PACKET, total, 0, time >> 32, time & 0xFFFFFFFF, kept, size), tail


@lru_cache(maxsize=1024)
def plain_tail(kept: int, flags: int) -> tuple[int, bytes]:
    """Return the length of a packet's block without a comment, and what stands behind the frame."""
    tail = _PADDING[kept & 3] + _OPTION(2, 4) + _LENGTH(flags) + _END
    total = PACKET_HEAD + kept + len(tail) + 4
    return total, tail + _LENGTH(total)


def names(pairs: Iterable[tuple[bytes, str]]) -> bytes:
    """Return a name resolution block: packed addresses and what they are called."""
    records = []
    for address, name in pairs:
        value = address + name.encode("utf-8", "replace")[:TEXT_MAX] + b"\0"
        records.append(_option(1 if family_of(address) is IPV4 else 2, value))
    return _block(_NAMES, *records, _END)


def statistics(time: int, began: int, *, received: int, accepted: int, dropped: int) -> bytes:
    """Return an interface statistics block.

    Args:
        time: The end of the capture, in nanoseconds since the epoch.
        began: Its beginning.
        received: Frames that have crossed the interface.
        accepted: Those that were to be captured.
        dropped: Those of them that were lost.
    """
    counted = [(2, _time(began)), (3, _time(time))]
    counted += [(code, Struct("=Q").pack(n)) for code, n in ((4, received), (5, dropped), (6, accepted))]
    options = b"".join(_option(code, value) for code, value in counted) + _END
    return _block(_STATISTICS, _STATISTICS_HEAD(0, time >> 32, time & 0xFFFFFFFF), options)


def whole_blocks(data: Sequence[memoryview], room: int) -> int | None:
    """Return how many bytes at the beginning of `data`, at most `room`, are whole blocks; None: these are no blocks.

    Args:
        data: One piece, or two, the second of which continues the first.
    """
    size, at = sum(map(len, data)), 0
    while at + 12 <= size:
        length = _read_length(_part(data, at + 4, 4))[0]
        if length < 12 or length & 3 or at + length > size:
            return None
        if at + length > room:
            return at
        at += length
    return at if at == size else None


@frozen
class Frame:
    """A frame in a file."""

    time: int
    """Nanoseconds since the epoch."""
    data: bytes
    size: int
    flags: int
    """See `packet_ends`."""
    comment: str


def read(data: bytes) -> tuple[list[Frame], dict[str, str]]:
    """Return the frames of a file, and the names of addresses.  A block that is cut at the end is not there yet.

    Args:
        data: The file, in the byte order of this machine.

    Raises:
        ValueError: It is no such file.
    """
    if data[:4] != _LENGTH(_SECTION):
        raise ValueError("a pcapng file begins with a section header")
    frames: list[Frame] = []
    named: dict[str, str] = {}
    at, tick = 0, 1000
    while at + 12 <= len(data):
        kind, length = _read_block(data, at)
        if length < 12 or length & 3:
            raise ValueError(f"a block of {length} bytes at {at}")
        content, at = data[at + 8 : at + length - 4], at + length
        if at > len(data):
            break
        try:
            if kind == _SECTION and content[:4] != _LENGTH(_ORDER):
                raise ValueError("the byte order is not that of this machine")
            if kind == _INTERFACE:
                link, _, _ = _read_interface(content)
                if link != ETHERNET:
                    raise ValueError(f"links of type {link}, not of Ethernet")
                told = dict(_options(content[8:]))
                tick = 10 ** (9 - told.get(9, b"\6")[0])
            elif kind == PACKET:
                frames.append(_read_packet(content, tick))
            elif kind == _NAMES:
                for code, value in _options(content):
                    size = FAMILIES[code - 1].address_size
                    named[str(ip_address(value[:size]))] = (
                        value[size:].rstrip(b"\0").decode("utf-8", "replace")
                    )
        except (error, IndexError) as cut:
            raise ValueError(f"a block of type {kind} is too short") from cut
    return frames, named


def _read_packet(content: bytes, tick: int) -> Frame:
    _, high, low, kept, size = _read_head(content)
    told = dict(_options(content[20 + (kept + 3 & ~3) :]))
    flags = _read_length(told[2])[0] if 2 in told else 0
    comment = told.get(_COMMENT, b"").decode("utf-8", "replace")
    return Frame((high << 32 | low) * tick, content[20 : 20 + kept], size, flags, comment)


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        code, length = _read_option(data, at)
        if not code:
            return
        yield code, data[at + 4 : at + 4 + length]
        at += 4 + (length + 3 & ~3)


def _part(data: Sequence[memoryview], at: int, size: int) -> bytes:
    first = len(data[0])
    if at >= first and len(data) > 1:
        return bytes(data[1][at - first : at - first + size])
    found = bytes(data[0][at : at + size])
    return found if len(found) == size else found + bytes(data[1][: size - len(found)])


def _block(kind: int, *content: bytes) -> bytes:
    text = b"".join(content)
    return _BLOCK(kind, 12 + len(text)) + text + _LENGTH(12 + len(text))


def _option(code: int, value: bytes) -> bytes:
    return _OPTION(code, len(value)) + value + _PADDING[len(value) & 3]


def _text(code: int, text: str) -> bytes:
    return _option(code, text.encode("utf-8", "replace")[:TEXT_MAX])


def _time(time: int) -> bytes:
    return Struct("=II").pack(time >> 32, time & 0xFFFFFFFF)
