"""ICMP (RFC 792, RFC 1812) and ICMPv6 (RFC 4443): echo and errors."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from .errors import BadPacket

SIZE = 8
HEADER = Struct("!BBHHH")  # type, code, checksum, and two words whose meaning the type decides

ECHO_REPLY, UNREACHABLE, ECHO, TIME_EXCEEDED = 0, 3, 8, 11
V6_UNREACHABLE, V6_TOO_BIG, V6_TIME_EXCEEDED, V6_PARAMETER, V6_ECHO, V6_ECHO_REPLY = 1, 2, 3, 4, 128, 129
V6_GROUPS = frozenset({130, 131, 132, 143})  # who listens to which group, MLD: RFC 2710, RFC 3810

NET, HOST, PORT, FRAGMENTATION_NEEDED, PROHIBITED = 0, 1, 3, 4, 13  # codes of UNREACHABLE
V6_CODES = {NET: 0, HOST: 3, PORT: 4, PROHIBITED: 1}  # the same meanings in V6_UNREACHABLE
V6_BEYOND_SCOPE = 2


class Message(NamedTuple):
    type: int
    code: int
    high: int  # echo: the identifier
    low: int  # echo: the sequence number; fragmentation needed: the MTU
    payload: memoryview


def parse(view: memoryview) -> Message:
    """Raises `BadPacket`, and nothing else.  The checksum is the caller's to verify: ICMPv6 needs addresses."""
    if len(view) < SIZE:
        raise BadPacket("icmp-truncated")
    kind, code, _, high, low = HEADER.unpack_from(view)
    return Message(kind, code, high, low, view[SIZE:])
