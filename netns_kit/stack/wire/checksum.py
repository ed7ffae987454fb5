"""The Internet checksum (RFC 1071), by arithmetic instead of a loop.

The ones' complement sum of 16-bit words is the number they spell modulo 65535, so one big-integer
remainder does what a loop over the words would.  A sum of minus zero is written 0xFFFF, which UDP
demands (RFC 768) and every receiver accepts elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


def total(data: Buffer) -> int:
    """The ones' complement sum of `data`, 0..65534, an odd last byte padded with zero.

    >>> hex(total(bytes.fromhex("0001 f203 f4f5 f6f7")))  # the example of RFC 1071 section 3
    '0xddf2'
    """
    view = memoryview(data)
    value = int.from_bytes(view, "big")
    if len(view) & 1:
        value <<= 8
    return value % 0xFFFF


def checksum(*sums: int) -> int:
    """The checksum field for the given partial sums: their complement."""
    return 0xFFFF - sum(sums) % 0xFFFF


def pseudo_header(addresses: Buffer, protocol: int, length: int = 0) -> int:
    """The sum of the pseudo-header of RFC 9293 3.1 (IPv4) or RFC 8200 8.1 (IPv6).

    `addresses` is source and destination, 8 or 32 bytes; both forms sum alike.
    """
    return (total(addresses) + protocol + length) % 0xFFFF
