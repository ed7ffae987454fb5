"""Offloads: the work that the two ends of a link leave to each other instead of doing it per packet."""

from __future__ import annotations

from netns_kit.frozen import frozen


@frozen
class Offloads:
    """The work that the two ends of a device may leave to each other.  By default it is none.

    Args:
        vnet_header: The size in bytes of the `struct virtio_net_hdr` before each frame: 0 or 10.
        csum: A checksum may cover only the pseudo-header.
        tso4, tso6: TCP super-segments are allowed, over IPv4 and over IPv6.
        tso_ecn: TCP super-segments may have ECN's CWR flag.
        uso4, uso6: UDP super-datagrams are allowed, over IPv4 and over IPv6.
    """

    vnet_header: int = 0
    csum: bool = False
    tso4: bool = False
    tso6: bool = False
    tso_ecn: bool = False
    uso4: bool = False
    uso6: bool = False
