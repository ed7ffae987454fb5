"""The frame that nearly all are, read at one go: virtio header, Ethernet, IP without options, UDP, or TCP whose only
options are timestamps.

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
OFFSET_OR_SYN = 0xF002  # in offset and flags: not the whole header, or a SYN
PLAIN, STAMPED = 0x5000, 0x8000  # in place of that: a header without options, or with timestamps alone
CONTROL = 0x37  # flags: all but PSH, and those of ECN
SUMMED = virtio.NEEDS_CSUM | virtio.DATA_VALID
IPV6 = ethernet.IPV6.to_bytes(2, "big")
PLAIN_IPV4 = b"\x08\x00\x45"  # EtherType, version and header length
PIECE = 0x3FFF  # of flags and offset: not the whole packet

_COMMON = "!BB8x6s6x3sBHxxHBBxx8s4sIIHHxxH"
parse = Struct(_COMMON + "0s").unpack_from
"""Virtio flags, GSO type, destination, type with version and header length, TOS, total length, flags and offset, TTL,
protocol, addresses, ports; then sequence and ACK number, offset and flags, window, urgent pointer (of UDP the first
is length and checksum); then nothing."""
SIZE_STAMPED = SIZE + 8
parse_stamped = Struct(_COMMON + "8s").unpack_from
"""The same of a frame that long; at the end come the kind and the value of the timestamps, if it has them."""

SIZE6 = 84
"""The same of IPv6, but for datagrams of less than twelve bytes."""
UDP_PAYLOAD6 = IP_AT + 48
TCP_PAYLOAD6 = IP_AT + 60

_COMMON6 = "!BB8x6s6xHIHBB32s4sIIHHxxH"
parse6 = Struct(_COMMON6 + "0s").unpack_from
"""Virtio flags, GSO type, destination, type, version and traffic class and flow label, payload length, next header,
hop limit, addresses, ports; the rest is as above."""
SIZE6_STAMPED = SIZE6 + 8
parse6_stamped = Struct(_COMMON6 + "8s").unpack_from
