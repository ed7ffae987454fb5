"""Wire formats: the layout of headers.  Nothing here keeps state, reads a clock or opens anything.

Each module parses one header into a plain record or tuple, and packs it again: `pack` is the reverse of `parse`.
Parsers get hostile bytes.  They raise `BadPacket` and nothing else, whatever the bytes are.

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
