"""UDP (RFC 768)."""

from __future__ import annotations

from struct import Struct

from .errors import BadPacket

SIZE = 8
HEADER = Struct("!HHHH")  # source port, destination port, length, checksum
CHECKSUM_AT = 6


def parse(view: memoryview) -> tuple[int, int, int, memoryview]:
    """Parse a datagram.  Return source port, destination port, checksum and payload.

    Raises:
        BadPacket: The datagram is truncated.  Nothing else is raised.
    """
    if len(view) < SIZE:
        raise BadPacket("udp-truncated")
    source, destination, length, check = HEADER.unpack_from(view)
    if not SIZE <= length <= len(view):
        raise BadPacket("udp-length")
    return source, destination, check, view[SIZE:length]
