"""FlowHeader: the headers of a flow's packets, laid out once as a template.

To send, lengths and sums are patched in place, and the template and the payload are passed to the link.  Nothing is
built per packet.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct

from .link import UNKNOWN_MAC, Link
from .wire import checksum, flow_key, ip, virtio
from .wire.family import IPV4, family_of

_IPV4_LENGTH = Struct("!HHHHH").pack_into  # total length, identification, fragment, ttl|protocol, checksum
_LENGTH = Struct("!H").pack_into
DEFAULT_TTL = 64


@lru_cache(maxsize=64)
def _ip_header(addresses: bytes, protocol: int, ttl: int, tos: int) -> tuple[bytes, int, int]:
    """Return the parts that are the same for all flows between two addresses, which are few.

    They are: the IP header for length 0; the sum of an IPv4 header without length and checksum, 0 for IPv6; and the
    sum of the pseudo-header without the length.
    """
    header = ip.pack(addresses, protocol, 0, ttl=ttl, tos=tos)
    guest = ip.halves(addresses)[1]
    total = (0xFFFF - int.from_bytes(header[10:12], "big") or 0xFFFF) if family_of(guest) is IPV4 else 0
    return header, total, checksum.pseudo_header(addresses, protocol)


@lru_cache(maxsize=64)
def _virtio_header(layer4: int, size: int, sum_offset: int, gso_type: int, gso_size: int) -> bytes:
    """Return the virtio header, which is the same for all flows of a family.  `size` is that of all headers."""
    header_size = size - virtio.SIZE if gso_type else 0
    return virtio.pack(virtio.NEEDS_CSUM, gso_type, header_size, gso_size, layer4 - virtio.SIZE, sum_offset)


class FlowHeader:
    """The headers of a flow's packets to the guest.

    `buffer` has the virtio header (if the link has one), the Ethernet header, the IP header, and the layer-4 header,
    which begins at `layer4`.  `pseudo` is the sum of the pseudo-header without the length.  `resolved` tells whether
    the guest's link address is set.  `mtu` is the MTU to the guest.  `marks` are TTL and TOS, eight bits each.

    `length` is the argument of the last call of `set_length`, and `check` the sum of the pseudo-header with it.  As
    long as the length and the link's `version` have not changed, `set_length` need not be called.
    """

    __slots__ = (
        "_ip", "_ip_sum", "_link", "_protocol", "_ttl_protocol", "addresses", "buffer", "check",
        "family", "guest", "layer4", "length", "marks", "mtu", "pseudo", "resolved", "version"
    )  # fmt: skip

    def __init__(self, link: Link, key: bytes, protocol: int, size: int) -> None:
        """Lay out the headers of a flow, with a layer-4 header of `size` bytes that begins with the ports."""
        self.family = flow_key.family_of(key)
        self.guest = guest = flow_key.parse(key).guest
        self.addresses, ports = flow_key.backwards(key)
        self._link, self.version = link, link.version
        self.length = self.check = -1
        self._protocol = protocol
        mac = link.mac_of(guest)
        self.resolved = mac != UNKNOWN_MAC
        self.mtu = link.mtu_to(guest)
        prefix = link.prefix(guest, mac)
        header, self._ip_sum, self.pseudo = _ip_header(self.addresses, protocol, DEFAULT_TTL, 0)
        self.marks = DEFAULT_TTL << 8
        self._ttl_protocol = DEFAULT_TTL << 8 | protocol
        self.buffer = bytearray(prefix + header + ports + bytes(size - len(ports)))
        self._ip = len(prefix)
        self.layer4 = len(prefix) + len(header)

    def mark(self, ttl: int, tos: int) -> None:
        """Set TTL and TOS (hop limit and traffic class) of the packets from now on."""
        self.marks = ttl << 8 | tos
        self._ttl_protocol = ttl << 8 | self._protocol
        self.length = -1
        header, self._ip_sum, _ = _ip_header(self.addresses, self._protocol, ttl, tos)
        self.buffer[self._ip : self._ip + len(header)] = header

    def set_length(self, length: int) -> None:
        """Set the length of the layer-4 header together with the payload."""
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
        """Look up the guest's link address and MTU again, since a link address or an MTU has changed."""
        self.version = self._link.version
        self.mtu = self._link.mtu_to(self.guest)
        mac = self._link.mac_of(self.guest)
        if mac != UNKNOWN_MAC:  # if it was forgotten, the old one is still good
            at = self._ip - 14
            self.buffer[at : at + 6] = mac
            self.resolved = True

    def virtio(self, sum_offset: int, gso_type: int = virtio.GSO_NONE, gso_size: int = 0) -> bytes:
        """Return the virtio header of packets whose checksum field is `sum_offset` bytes into layer 4."""
        return _virtio_header(self.layer4, len(self.buffer), sum_offset, gso_type, gso_size)
