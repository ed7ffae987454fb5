"""What the two ends of a link leave to each other instead of doing it per packet."""

from __future__ import annotations

from netns_kit.frozen import frozen


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
