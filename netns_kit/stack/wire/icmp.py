"""ICMP (RFC 792, RFC 1812) and ICMPv6 (RFC 4443): echo and errors."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from .errors import BadPacket

SIZE = 8
HEADER = Struct("!BBHHH")  # type, code, checksum, and two words that depend on the type
CHECKSUM_AT = 2

ECHO_REPLY, UNREACHABLE, ECHO, TIME_EXCEEDED = 0, 3, 8, 11
V6_UNREACHABLE, V6_TOO_BIG, V6_TIME_EXCEEDED, V6_PARAMETER, V6_ECHO, V6_ECHO_REPLY = 1, 2, 3, 4, 128, 129
V6_GROUPS = frozenset({130, 131, 132, 143})  # multicast listeners, MLD: RFC 2710, RFC 3810

NET, HOST, PORT, FRAGMENTATION_NEEDED, PROHIBITED = 0, 1, 3, 4, 13  # codes of UNREACHABLE
V6_BEYOND_SCOPE = 2  # a code of V6_UNREACHABLE; `Family` has the others


class Message(NamedTuple):
    """One message.  `high` is the identifier of an echo.  `low` is its sequence number, or the MTU in an error."""

    type: int
    code: int
    high: int
    low: int
    payload: memoryview


def parse(view: memoryview) -> Message:
    """Parse a message.  The caller verifies the checksum, because that of ICMPv6 covers the addresses.

    Raises:
        BadPacket: The message is truncated.  Nothing else is raised.
    """
    if len(view) < SIZE:
        raise BadPacket("icmp-truncated")
    kind, code, _, high, low = HEADER.unpack_from(view)
    return Message(kind, code, high, low, view[SIZE:])
