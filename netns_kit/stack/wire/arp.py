"""ARP for IPv4 over Ethernet (RFC 826)."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from .errors import BadPacket

if TYPE_CHECKING:
    from typing_extensions import Buffer

REQUEST, REPLY = 1, 2
_PACKET = Struct("!HHBBH6s4s6s4s")
SIZE = _PACKET.size
_ETHERNET_IPV4 = (1, 0x0800, 6, 4)


class Arp(NamedTuple):
    """One ARP packet: link addresses and packed IPv4 addresses."""

    operation: int
    sender_mac: bytes
    sender: bytes
    target_mac: bytes
    target: bytes


def parse(data: Buffer) -> Arp:
    """Parse a packet.  Padding after it is ignored.

    Raises:
        BadPacket: The bytes are not ARP for IPv4 over Ethernet.  Nothing else is raised.
    """
    view = memoryview(data)
    if len(view) < _PACKET.size:
        raise BadPacket("arp-truncated")
    *kind, operation, sender_mac, sender, target_mac, target = _PACKET.unpack_from(view)
    if tuple(kind) != _ETHERNET_IPV4:
        raise BadPacket("arp-not-ethernet-ipv4")
    return Arp(operation, sender_mac, sender, target_mac, target)


def pack(arp: Arp) -> bytes:
    """Pack a packet, the reverse of `parse`."""
    return _PACKET.pack(*_ETHERNET_IPV4, *arp)
