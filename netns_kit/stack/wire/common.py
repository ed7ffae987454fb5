"""The frame that nearly all are, read at one go: virtio header, Ethernet, IP without options, TCP or UDP.

`Stack.receive` takes the short way with those whose flow it knows, where nothing else is to be considered.  Every
other frame takes the way through the modules of each layer, which would do the same with these too.  The header's
sum is not looked at: whoever leaves the checksum to us (NEEDS_CSUM) is a kernel that has sent it over no cable.
"""

from __future__ import annotations

from struct import Struct

from . import ethernet, virtio

SIZE = 64
"""Bytes that such a frame has at least, but for datagrams of less than twelve bytes."""
IP_AT = virtio.SIZE + ethernet.SIZE
UDP_PAYLOAD = IP_AT + 28
TCP_PAYLOAD = IP_AT + 40
OPTIONS_OR_SYN, NEITHER = 0xF002, 0x5000  # in offset and flags
CONTROL = 0x37  # flags: all but PSH, and those of ECN
SUMMED = virtio.NEEDS_CSUM | virtio.DATA_VALID
VERSION_LENGTH = 0x45
PIECE = 0x3FFF  # of flags and offset: not the whole packet

_COMMON = Struct("!BB8x6s6xHBBHxxHBBxx8s4sIIHHxxH")
parse = _COMMON.unpack_from
"""Virtio flags, GSO type, destination, type, version and header length, TOS, total length, flags and offset, TTL,
protocol, addresses, ports; then sequence and ACK number, offset and flags, window, urgent pointer (of UDP the first
is length and checksum)."""

SIZE6 = 84
"""The same of IPv6, but for datagrams of less than twelve bytes."""
UDP_PAYLOAD6 = IP_AT + 48
TCP_PAYLOAD6 = IP_AT + 60

_COMMON6 = Struct("!BB8x6s6xHIHBB32s4sIIHHxxH")
parse6 = _COMMON6.unpack_from
"""Virtio flags, GSO type, destination, type, version and traffic class and flow label, payload length, next header,
hop limit, addresses, ports; the rest is as above."""
