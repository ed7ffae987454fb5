"""Super-frames cut into the frames that they stand for; and checksums filled in that were left to others.

A frame that is cut out of a super-frame leaves its checksum to others, as the super-frame has done, so cutting sums
no payload.

Law of this file: hostile bytes raise nothing.  What makes no sense stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from netns_kit.stack.wire import checksum, ethernet, ip, tcp, virtio
from netns_kit.stack.wire.family import IPV6

PIECES_MAX = 128
"""Frames that are made of one.  TCP segments become larger than asked for if there would be more; datagrams cannot,
and stay whole."""

_ECN = 0x80  # flag of gso_type: the first segment alone has CWR
_CWR = 0x80
_ONLY_LAST = tcp.FIN | tcp.PSH
_TCP_HEADER = 20
_UDP_HEADER = 8
_LENGTHS = Struct("!HH")  # of an IPv4 header: total length, identification
_SHORT = Struct("!H")
_SEQUENCE = Struct("!I")


def cut(text: bytes) -> Iterator[bytes]:
    """Yield the frames that a frame with a virtio header stands for, each with a virtio header."""
    _, kind, _, size, start, offset = virtio.parse(text)
    at = virtio.SIZE + start
    kind &= ~_ECN
    if kind == virtio.GSO_UDP_L4 and len(text) >= at + _UDP_HEADER:
        header, protocol = at + _UDP_HEADER, ip.UDP
    elif kind in (virtio.GSO_TCPV4, virtio.GSO_TCPV6) and len(text) >= at + _TCP_HEADER:
        header, protocol = at + (text[at + 12] >> 4 << 2), ip.TCP
    else:
        yield text
        return
    rest = len(text) - header
    network = virtio.SIZE + ethernet.SIZE
    if not size or rest <= 0 or at < network + 20 or (protocol == ip.TCP and header < at + _TCP_HEADER):
        yield text
        return
    if protocol == ip.TCP:
        size = max(size, -(-rest // PIECES_MAX))
    elif rest > PIECES_MAX * size:
        yield text
        return
    ipv4 = text[network] >> 4 == 4
    if not ipv4 and at < network + IPV6.header_size:
        yield text
        return
    addresses = text[network + 12 : network + 20] if ipv4 else text[network + 8 : network + 40]
    fresh = bytearray(text[:header])
    fresh[: virtio.SIZE] = virtio.pack(virtio.NEEDS_CSUM, virtio.GSO_NONE, 0, 0, start, offset)
    identification = _SHORT.unpack_from(text, network + 4)[0]
    sequence = _SEQUENCE.unpack_from(text, at + 4)[0] if protocol == ip.TCP else 0
    view = memoryview(text)
    for number, begin in enumerate(range(header, len(text), size)):
        part = view[begin : begin + size]
        head = bytearray(fresh)
        length = header - at + len(part)
        if ipv4:
            _LENGTHS.pack_into(head, network + 2, at - network + length, identification + number & 0xFFFF)
            head[network + 10 : network + 12] = b"\0\0"
            _SHORT.pack_into(head, network + 10, checksum.checksum(checksum.total(head[network:at])))
        else:
            _SHORT.pack_into(head, network + 4, at - network - IPV6.header_size + length)
        if protocol == ip.TCP:
            _SEQUENCE.pack_into(head, at + 4, sequence + begin - header & 0xFFFFFFFF)
            if begin + size < len(text):
                head[at + 13] &= ~_ONLY_LAST
            if number:
                head[at + 13] &= ~_CWR
            field = at + 16
        else:
            _SHORT.pack_into(head, at + 4, length)
            field = at + 6
        _SHORT.pack_into(head, field, checksum.pseudo_header(addresses, protocol, length))
        yield bytes(head) + part


def summed(text: bytes) -> bytes:
    """Return a frame with its virtio header, and its checksum filled in if that was left to others."""
    flags, _, _, _, start, offset = virtio.parse(text)
    start += virtio.SIZE
    at = start + offset
    if not flags & virtio.NEEDS_CSUM or at + 2 > len(text):
        return text
    filled = checksum.checksum(checksum.total(text[start:]))
    return virtio.NONE + text[virtio.SIZE : at] + filled.to_bytes(2, "big") + text[at + 2 :]
