"""Header templates: what stands in front of a flow's payload, laid out once.

To send is to patch lengths and sums in place, and to hand header and payload to the link; nothing is built per
packet.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct

from .link import UNKNOWN_MAC, Link
from .wire import checksum, flow_key, ip, virtio
from .wire.family import IPV4

_IPV4_LENGTH = Struct("!HHHHH").pack_into  # total length, identification, fragment, ttl|protocol, checksum
_LENGTH = Struct("!H").pack_into
DEFAULT_TTL = 64


@lru_cache(maxsize=64)
def _ip_header(addresses: bytes, protocol: int, ttl: int, tos: int) -> bytes:
    """Pack an IP header, which is the same for every flow between two addresses; those are few."""
    return ip.pack(addresses, protocol, 0, ttl=ttl, tos=tos)


class FlowHeader:
    """The headers of the packets of one flow to the guest.

    `buffer` is virtio header (if the link has one), Ethernet, IP and layer-4 header; `layer4` is where the last
    begins.  `pseudo` is the pseudo-header's sum with the length left out; `resolved` tells whether the guest's link
    address is in; `mtu` is that of the way to the guest; `marks` are TTL and TOS, eight bits each.

    `length` is what `set_length` was last called with, and `check` the pseudo-header's sum for that: with both that
    and the link's `version` as they were, there is nothing to be done anew.
    """

    __slots__ = (
        "_ip",
        "_ip_sum",
        "_link",
        "_protocol",
        "_ttl_protocol",
        "addresses",
        "buffer",
        "check",
        "family",
        "guest",
        "layer4",
        "length",
        "marks",
        "mtu",
        "pseudo",
        "resolved",
        "version",
    )

    def __init__(self, link: Link, key: bytes, protocol: int, size: int) -> None:
        """Lay out the headers of a flow, with a layer-4 header of `size` bytes that begins with its ports."""
        self.family = flow_key.family_of(key)
        self.guest = guest = flow_key.parse(key).guest
        self.addresses, ports = flow_key.backwards(key)
        self._link, self.version = link, link.version
        self.length = self.check = -1
        prefix = link.prefix(guest)
        self.resolved = link.mac_of(guest) != UNKNOWN_MAC
        self.mtu = link.mtu_to(guest)
        header = _ip_header(self.addresses, protocol, DEFAULT_TTL, 0)
        self.buffer = bytearray(prefix + header + ports + bytes(size - len(ports)))
        self._ip = len(prefix)
        self.layer4 = len(prefix) + len(header)
        self.pseudo = checksum.pseudo_header(self.addresses, protocol)
        self._protocol = protocol
        self.mark(DEFAULT_TTL, 0)

    def mark(self, ttl: int, tos: int) -> None:
        """Set TTL and TOS, or hop limit and traffic class, of what is sent from now on."""
        self.marks = ttl << 8 | tos
        self._ttl_protocol = ttl << 8 | self._protocol
        # for IPv4: the header's sum without length and checksum; 0 tells IPv6, whose header has no sum
        self._ip_sum = 0
        self.length = -1
        header = _ip_header(self.addresses, self._protocol, ttl, tos)
        self.buffer[self._ip : self._ip + len(header)] = header
        if self.family is IPV4:
            self._ip_sum = (0xFFFF - int.from_bytes(header[10:12], "big")) or 0xFFFF

    def set_length(self, length: int) -> None:
        """Set the length, in bytes, of layer-4 header and payload."""
        if self.version != self._link.version:
            self.look_up()
        self.length = length
        self.check = (self.pseudo + length) % 0xFFFF
        if self._ip_sum:
            at = self._ip
            check = 0xFFFF - (self._ip_sum + length) % 0xFFFF
            _IPV4_LENGTH(self.buffer, at + 2, length + 20, 0, ip.DONT_FRAGMENT, self._ttl_protocol, check)
        else:
            _LENGTH(self.buffer, self._ip + 4, length)

    def look_up(self) -> None:
        """Look up the guest's link address and the MTU of the way to it, which may have changed."""
        self.version = self._link.version
        self.mtu = self._link.mtu_to(self.guest)
        mac = self._link.mac_of(self.guest)
        if mac != UNKNOWN_MAC:  # forgotten is not gone
            at = self._ip - 14
            self.buffer[at : at + 6] = mac
            self.resolved = True

    def virtio(self, sum_offset: int, gso_type: int = virtio.GSO_NONE, gso_size: int = 0) -> bytes:
        """Return the virtio header for a packet of this flow whose checksum field lies `sum_offset` into layer 4."""
        start = self.layer4 - virtio.SIZE
        size = len(self.buffer) - virtio.SIZE if gso_type else 0
        return virtio.pack(virtio.NEEDS_CSUM, gso_type, size, gso_size, start, sum_offset)
