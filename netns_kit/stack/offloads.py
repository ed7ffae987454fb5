"""What the two ends of a link leave to each other instead of doing it per packet."""

from __future__ import annotations

from netns_kit.frozen import frozen

from .wire.family import IPV4, Family


@frozen
class Offloads:
    """What the other end of a device accepts from us and may send us.  The default is a plain wire.

    `vnet_header` is the size in bytes of the `struct virtio_net_hdr` before each frame, 0 or 10.
    `csum`: checksums may cover only the pseudo-header.  `tso4`, `tso6`: TCP super-segments, over IPv4
    and IPv6; `tso_ecn`: these with ECN's CWR.  `uso4`, `uso6`: UDP super-datagrams.
    """

    vnet_header: int = 0
    csum: bool = False
    tso4: bool = False
    tso6: bool = False
    tso_ecn: bool = False
    uso4: bool = False
    uso6: bool = False

    def tso(self, family: Family) -> bool:
        """Return whether TCP super-segments of that family may be sent, whose checksum is left to the other end."""
        return self.csum and (self.tso4 if family is IPV4 else self.tso6)

    def uso(self, family: Family) -> bool:
        """Return the same of UDP super-datagrams."""
        return self.csum and self.vnet_header > 0 and (self.uso4 if family is IPV4 else self.uso6)
