"""Wire formats: how the bytes lie.  Nothing here keeps state, reads a clock or opens anything.

Each module parses one header into a plain record or tuple and packs it back; `pack` is the mirror of
`parse`.  Parsers are given hostile bytes: they raise `BadPacket`, and nothing else, whatever comes.

>>> from netns_kit.stack.wire import tcp
>>> header = tcp.pack(src_port=40000, dst_port=80, seq=1, ack=2, flags=tcp.SYN | tcp.ACK, window=1024)
>>> segment = tcp.parse(memoryview(header))
>>> segment.seq, segment.ack, segment.flags == tcp.SYN | tcp.ACK, segment.window
(1, 2, True, 1024)
>>> tcp.parse(memoryview(header[:19]))
Traceback (most recent call last):
    ...
netns_kit.stack.wire.errors.BadPacket: tcp-truncated
"""

from .errors import BadPacket, BadParameter

__all__ = ["BadPacket", "BadParameter"]
