"""Neighbour discovery for IPv6 (RFC 4861), with the DNS options of RFC 8106, over Ethernet (RFC 2464)."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from .errors import BadPacket

ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT, SOLICITATION, ADVERTISEMENT = 133, 134, 135, 136
TYPES = frozenset(range(133, 138))  # those four, and redirects
HOP_LIMIT = 255  # of every message, which proves that it has crossed no router
UNSPECIFIED = bytes(16)
ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")

ROUTER, SOLICITED, OVERRIDE = 0x80, 0x40, 0x20  # flags of a neighbour's advertisement
_SOLICITED_NODE = bytes.fromhex("ff0200000000000000000001ff")
_SOURCE_LINK, _TARGET_LINK, _PREFIX, _MTU, _DNS, _SEARCH = 1, 2, 3, 5, 25, 31
_ON_LINK, _AUTONOMOUS = 0x80, 0x40  # flags of a prefix
_MANAGED, _OTHER = 0x80, 0x40  # flags of a router's advertisement

_NEIGHBOUR = Struct("!BBHB3x16s")  # type, code, checksum, flags, target
_SOLICIT = Struct("!BBH4x")
# type, code, checksum, hop limit, flags, lifetime, reachable, retransmission
_ADVERTISE = Struct("!BBHBBHII")
_PREFIX_OPTION = Struct("!BBBBII4x16s")
_MTU_OPTION = Struct("!BBHI")
_LIST_OPTION = Struct("!BBHI")  # RFC 8106: lifetime; then follows the list
_LINK_SIZE = 8
_LIST_MAX = 500  # bytes of search domains, so that the message fits into the smallest MTU


class Neighbour(NamedTuple):
    """A solicitation or an advertisement.  A router solicitation has no target.

    `mac` is the link address of the sender or target, from an option; it is empty if there is no such option.
    """

    type: int
    flags: int = 0
    target: bytes = b""
    mac: bytes = b""


def parse(view: memoryview) -> Neighbour:
    """Parse a message of one of the three types that hosts send.  Unknown options are skipped.

    Raises:
        BadPacket: The bytes are not such a message.  Nothing else is raised.
    """
    if len(view) < _SOLICIT.size:
        raise BadPacket("ndp-truncated")
    kind = view[0]
    if kind == ROUTER_SOLICITATION:
        return Neighbour(kind, mac=_option(view, _SOLICIT.size, _SOURCE_LINK))
    if kind not in (SOLICITATION, ADVERTISEMENT):
        raise BadPacket("ndp-type")
    if len(view) < _NEIGHBOUR.size:
        raise BadPacket("ndp-truncated")
    _, _, _, flags, target = _NEIGHBOUR.unpack_from(view)
    wanted = _SOURCE_LINK if kind == SOLICITATION else _TARGET_LINK
    return Neighbour(kind, flags, target, _option(view, _NEIGHBOUR.size, wanted))


def _option(view: memoryview, at: int, wanted: int) -> bytes:
    found = b""
    while at < len(view):
        if at + 2 > len(view):
            raise BadPacket("ndp-option")
        kind, size = view[at], view[at + 1] << 3
        if not 0 < size <= len(view) - at:
            raise BadPacket("ndp-option")
        if kind == wanted and size == _LINK_SIZE and not found:
            found = bytes(view[at + 2 : at + 8])
        at += size
    return found


def pack(message: Neighbour) -> bytes:
    """Pack a message.  The caller sets the checksum, which covers the addresses."""
    link = b""
    if message.mac:
        kind = _TARGET_LINK if message.type == ADVERTISEMENT else _SOURCE_LINK
        link = bytes((kind, 1)) + message.mac
    if message.type == ROUTER_SOLICITATION:
        return _SOLICIT.pack(message.type, 0, 0) + link
    return _NEIGHBOUR.pack(message.type, 0, 0, message.flags, message.target) + link


class Advertisement(NamedTuple):
    """The content of a router advertisement.  Times are in seconds.

    `prefix` is the /64 of the link, and `autonomous` tells that hosts may make addresses from it (RFC 4862).
    `managed` tells that a DHCPv6 server assigns addresses, and `other` that it has other settings.
    """

    prefix: bytes
    managed: bool = False
    other: bool = False
    autonomous: bool = True
    resolvers: tuple[bytes, ...] = ()
    search: tuple[bytes, ...] = ()
    hop_limit: int = 64
    lifetime: int = 1800
    valid: int = 86400
    preferred: int = 14400


def pack_advertisement(said: Advertisement, mac: bytes, mtu: int) -> bytes:
    """Pack a router advertisement.  The caller sets the checksum."""
    flags = said.managed * _MANAGED | said.other * _OTHER
    message = _ADVERTISE.pack(ROUTER_ADVERTISEMENT, 0, 0, said.hop_limit, flags, said.lifetime, 0, 0)
    message += bytes((_SOURCE_LINK, 1)) + mac + _MTU_OPTION.pack(_MTU, 1, 0, mtu)
    flags = _ON_LINK | said.autonomous * _AUTONOMOUS
    message += _PREFIX_OPTION.pack(_PREFIX, 4, 64, flags, said.valid, said.preferred, said.prefix)
    message += _list(_DNS, said.lifetime, b"".join(said.resolvers))
    domains = b""
    for name in said.search:
        if len(domains) + len(name) > _LIST_MAX:
            break  # the first ones are the most important
        domains += name
    return message + _list(_SEARCH, said.lifetime, domains)


def _list(kind: int, lifetime: int, content: bytes) -> bytes:
    if not content:
        return b""
    content += bytes(-len(content) % 8)
    return _LIST_OPTION.pack(kind, 1 + len(content) // 8, 0, lifetime) + content


def solicited_node(target: bytes) -> bytes:
    """Return the multicast group of the hosts that may have an address (RFC 4291 2.7.1)."""
    return _SOLICITED_NODE + target[13:]


def group_mac(group: bytes) -> bytes:
    """Return the link address of a multicast group (RFC 2464 7)."""
    return b"\x33\x33" + group[12:]
