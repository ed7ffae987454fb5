"""FlowKey: the key of a flow, as its bytes lie on the wire.

A key is guest address, other address, guest port, other port: one slice of a packet of the guest's, or two.  Tables
use these bytes as keys, and per packet they stay bytes.  Code that needs a part of a key asks this module, so that
nothing above `netns_kit.stack.wire` knows how long an address is.

>>> key = FlowKey(bytes((10, 0, 2, 100)), bytes((192, 0, 2, 7)), 40000, 80).pack()
>>> parse(key).remote_port, family_of(key).version
(80, 4)
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import NamedTuple

from .errors import BadPacket
from .family import FAMILIES, IPV4, Family

_PORTS = 4  # bytes of both ports
_FAMILY = {2 * family.address_size + _PORTS: family for family in FAMILIES}  # by the length of a key
_LAYOUT = {
    size: Struct(f"!{family.address_size}s{family.address_size}sHH") for size, family in _FAMILY.items()
}


class FlowKey(NamedTuple):
    """The parts of a key: packed addresses, and ports.  In an ICMP echo flow `guest_port` is the identifier."""

    guest: bytes
    remote: bytes
    guest_port: int
    remote_port: int

    def pack(self) -> bytes:
        """Return the key's bytes."""
        size = len(self.guest) + len(self.remote) + _PORTS
        return _LAYOUT[size].pack(*self)


@lru_cache(maxsize=64)
def parse(key: bytes) -> FlowKey:
    """Return the parts of a key.  They are cached, because they are asked for several times when a flow is opened."""
    return FlowKey(*_LAYOUT[len(key)].unpack(key))


def family_of(key: bytes) -> Family:
    """Return the address family that a key belongs to."""
    return _FAMILY[len(key)]


def addresses(key: bytes) -> bytes:
    """Return the addresses of the guest's packets: guest, other."""
    return key[:-_PORTS]


def ports(key: bytes) -> bytes:
    """Return the ports of the guest's packets: guest, other."""
    return key[-_PORTS:]


def backwards(key: bytes) -> tuple[bytes, bytes]:
    """Return the addresses and the ports of packets to the guest: other, guest."""
    half = (len(key) - _PORTS) // 2
    return key[half:-_PORTS] + key[:half], key[-2:] + key[-_PORTS:-2]


def of_sent(family: Family, view: memoryview) -> tuple[int, bytes, int]:
    """Return protocol, flow key and sequence number of a packet to the guest that an ICMP error quotes.

    Raises:
        BadPacket: The quoted part is too short.
    """
    at, size = family.header_size, family.address_size
    if len(view) < at + 8:
        raise BadPacket("icmp-quoted")
    protocol = view[9 if family is IPV4 else 6]
    if protocol == family.icmp:  # an echo reply: its identifier
        ports = bytes(view[at + 4 : at + 6]) + bytes(2)
    else:
        ports = bytes(view[at + 2 : at + 4]) + bytes(view[at : at + 2])
    guest, remote = bytes(view[at - size : at]), bytes(view[at - 2 * size : at - size])
    return protocol, guest + remote + ports, int.from_bytes(view[at + 4 : at + 8], "big")
