"""The most common frames, read at once: virtio header, Ethernet, IP without options, and UDP or TCP.

The *head* of a frame consists of those bytes of its Ethernet and IP headers that are equal in all frames of a flow,
as long as nothing about the flow changes: Ethernet header, version, traffic class and flow label, flags of fragments,
TTL.  A flow keeps the head of the last frame that was received on the long way, which passes the modules of each
layer.  A frame with the same head would pass the same checks, so `netns_kit.stack.Stack` lets it take the short way.

The checksum of the IPv4 header is not verified on the short way: NEEDS_CSUM means that the frame came from the local
kernel.
"""

from __future__ import annotations

from struct import Struct

from . import ethernet, ip, tcp, virtio
from .family import FAMILIES, IPV4, IPV6

IP_AT = virtio.SIZE + ethernet.SIZE
VERSION_4 = 0x45  # the first byte of an IPv4 header without options
LAYER4_AT, LAYER4_AT6 = IP_AT + IPV4.header_size, IP_AT + IPV6.header_size

SIZE, SIZE6 = LAYER4_AT + tcp.SIZE, LAYER4_AT6 + tcp.SIZE
"""Bytes that such a frame has at least, but for datagrams of less than twelve bytes."""
SIZE_STAMPED, SIZE6_STAMPED = SIZE + 8, SIZE6 + 8

_LAYOUT = "!H8x16sHxx3sBxx12sIIHHxxH"
_LAYOUT6 = "!H8x18sHB1s36sIIHHxxH"
parse, parse6 = Struct(_LAYOUT + "0s").unpack_from, Struct(_LAYOUT6 + "0s").unpack_from
"""The fields of such a frame: virtio flags and GSO type; head, length, head and protocol (of IPv6, the other way
round); flow key; sequence and ACK number, offset and flags, window, urgent pointer (of UDP the first is length and
checksum); then nothing."""
parse_stamped, parse6_stamped = Struct(_LAYOUT + "8s").unpack_from, Struct(_LAYOUT6 + "8s").unpack_from
"""The same of a frame of `SIZE_STAMPED` bytes or more, with kind and value of its timestamps at the end, if it has
them."""

SUMMED = virtio.SUMMED << 8
ONE_DATAGRAM = (virtio.NEEDS_CSUM << 8, virtio.DATA_VALID << 8)  # summed, no super-datagram

OFFSET_OR_SYN = 0xF002  # mask of the offset and of SYN
PLAIN_MASK = 0xF037  # mask of the offset and of all flags but PSH and those of ECN
PLAIN, STAMPED = 0x5000 | tcp.ACK, 0x8000 | tcp.ACK
"""What `PLAIN_MASK` leaves of a segment without options, and of one with timestamps alone."""

_HEAD = {IPV4.version: Struct("!10x16s4x3s").unpack_from, IPV6.version: Struct("!10x18s3x1s").unpack_from}
TEXT_AT = {family.version: IP_AT + family.header_size + tcp.SIZE for family in FAMILIES}
"""Where in such a frame the text of a TCP segment without options begins, by the IP version."""


def head_of(packet: ip.Packet) -> bytes:
    """Return the head of a packet's frame.  The link must vouch for the packet's checksum.

    IP options and extension headers need no check: a frame that has some does not fit the layout of the short way.
    """
    link, route = _HEAD[packet.family.version](packet.frame)
    head: bytes = link + route
    return head
