"""Routes, rules of routing and neighbours of a namespace, as messages for the kernel (rtnetlink(7)).

>>> from ipaddress import IPv4Network
>>> len(rule(100, IPv4Network("192.0.2.0/24"), action=abi.FR_ACT_PROHIBIT, iifname="r1"))
52
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from netns_kit.host import abi
from netns_kit.host.netlink import attribute, message, number, text

Prefix = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_NEW = abi.NLM_F_CREATE | abi.NLM_F_ACK


def route(
    to: Prefix,
    link: int,
    *,
    gateway: Address | None = None,
    source: Address | None = None,
    table: int = abi.RT_TABLE_MAIN,
) -> bytes:
    """Return the message that makes a route.

    Args:
        to: Where it leads.
        link: The number of the interface.
        gateway: The next router, which is on the link whatever the addresses there say; None: `to` is.
        source: The address that packets of the namespace's own have, unless they choose.
        table: The routing table.
    """
    flags = 0 if gateway is None else abi.RTNH_F_ONLINK
    scope = abi.RT_SCOPE_UNIVERSE if gateway is not None or to.version == 6 else abi.RT_SCOPE_LINK
    head = struct.pack(  # struct rtmsg
        "=BBBBBBBBI", _FAMILY[to.version], to.prefixlen, 0, 0, 0, abi.RTPROT_BOOT, scope, abi.RTN_UNICAST, flags
    )  # fmt: skip
    addresses = ((abi.RTA_DST, to.network_address), (abi.RTA_GATEWAY, gateway), (abi.RTA_PREFSRC, source))
    given = (attribute(kind, each.packed) for kind, each in addresses if each is not None)
    way = number(abi.RTA_OIF, link), number(abi.RTA_TABLE, table)
    return message(abi.RTM_NEWROUTE, _NEW | abi.NLM_F_REPLACE, head, *given, *way)


def rule(
    priority: int,
    to: Prefix | None = None,
    *,
    source: Prefix | None = None,
    iifname: str | None = None,
    table: int = abi.RT_TABLE_MAIN,
    action: int = abi.FR_ACT_TO_TBL,
    version: int = 4,
    wanted: bool = True,
) -> bytes:
    """Return the message that makes a rule, or removes it.

    Args:
        priority: Its place: the lowest is asked first.
        to: Where packets go.
        source: Where they come from.
        iifname: The name of the interface that they have come by.
        table: The routing table that decides about them.
        action: What becomes of them, if it is something else.
        version: The family, where no network tells it.
        wanted: False: the rule is removed.
    """
    for each in (to, source):
        version = version if each is None else each.version
    head = struct.pack(  # struct fib_rule_hdr
        "=BBBBBBBBI", _FAMILY[version], to.prefixlen if to else 0, source.prefixlen if source else 0,
        0, 0, 0, 0, action, 0,
    )  # fmt: skip
    networks = ((abi.FRA_DST, to), (abi.FRA_SRC, source))
    given = [attribute(kind, each.network_address.packed) for kind, each in networks if each is not None]
    given += [number(abi.FRA_PRIORITY, priority)]
    given += [] if iifname is None else [text(abi.FRA_IIFNAME, iifname)]
    given += [number(abi.FRA_TABLE, table)] if action == abi.FR_ACT_TO_TBL else []
    kind, flags = (abi.RTM_NEWRULE, _NEW) if wanted else (abi.RTM_DELRULE, abi.NLM_F_ACK)
    return message(kind, flags, head, *given)


def neighbour(address: Address, mac: bytes, link: int, *, wanted: bool = True) -> bytes:
    """Return the message by which the kernel knows a link address for good and asks nobody, or does not.

    Args:
        address: The address.
        mac: Its link address.
        link: The number of the interface that it is on.
        wanted: False: it is not known any more.
    """
    kind, flags = (
        (abi.RTM_NEWNEIGH, _NEW | abi.NLM_F_REPLACE) if wanted else (abi.RTM_DELNEIGH, abi.NLM_F_ACK)
    )
    head = struct.pack("=BxxxiHBB", _FAMILY[address.version], link, abi.NUD_PERMANENT, 0, 0)  # struct ndmsg
    known = attribute(abi.NDA_DST, address.packed) + attribute(abi.NDA_LLADDR, mac)
    return message(kind, flags, head, known)
