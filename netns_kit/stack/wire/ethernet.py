"""Ethernet II framing."""

from __future__ import annotations

from struct import Struct

SIZE = 14
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD
BROADCAST = b"\xff" * 6

_HEADER = Struct("!6s6sH")
parse = _HEADER.unpack_from  # destination, source, type
pack = _HEADER.pack
