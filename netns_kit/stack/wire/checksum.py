"""The Internet checksum (RFC 1071), by arithmetic instead of a loop.

The ones' complement sum of 16-bit words equals the whole number that the bytes spell, modulo 65535.  So one division
of a large integer replaces a loop over the words.  A checksum of zero is written as 0xFFFF: UDP requires that (RFC
768), and for other protocols every receiver accepts it.
"""

from __future__ import annotations


def total(data: bytes | bytearray | memoryview) -> int:
    """Return the ones' complement sum of `data`, 0..65534, an odd last byte padded with zero.

    >>> hex(total(bytes.fromhex("0001 f203 f4f5 f6f7")))  # the example of RFC 1071 section 3
    '0xddf2'
    """
    value = int.from_bytes(data, "big")
    if len(data) & 1:
        value <<= 8
    return value % 0xFFFF


def checksum(*sums: int) -> int:
    """Return the checksum field for the given partial sums: their complement."""
    return 0xFFFF - sum(sums) % 0xFFFF


def pseudo_header(addresses: bytes | bytearray, protocol: int, length: int = 0) -> int:
    """Return the sum of the pseudo-header of RFC 9293 3.1 (IPv4) or RFC 8200 8.1 (IPv6).

    `addresses` are source and destination, 8 or 32 bytes.  Both layouts have the same sum.
    """
    return (int.from_bytes(addresses, "big") + protocol + length) % 0xFFFF
