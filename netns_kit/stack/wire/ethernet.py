"""Ethernet II framing."""

from __future__ import annotations

from struct import Struct

SIZE = 14
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD
BROADCAST = b"\xff" * 6

pack = Struct("!6s6sH").pack
"""Pack a header: destination, source, type."""
parse = Struct("!6s6sH").unpack_from
"""Parse a header: the mirror of `pack`."""
