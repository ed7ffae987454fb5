"""The guard of a bridge: rules of nftables by which no member can be another, written as messages for the kernel.

What comes from the port of a member is let in only from that member's link address together with one of its
addresses: in the header of the frame, in IP, and in what ARP and neighbour discovery say of it.  A member is no
router and no DHCP server: what only those send is dropped, and so is every other kind of frame.  Neighbour discovery
has to be in one piece (RFC 6980), and the first fragment of a packet of IPv6 has to have all headers (RFC 7112): else
what the rules look for would be in another.  Frames to all or to a group, which every port gets, are limited: a flood
of them would fill the queue of the stack's tap, which all share.  What comes from other ports, the stack's above all,
is not looked at.

The rules are made once.  The members are elements of sets, so that a frame costs the same with two and with hundreds.
A key is the name of the port, the link address and the address, each padded to whole words.

>>> port = Port("m1", b"\\x52\\x56\\x0a\\x00\\x02\\x65", (IPv4Address("10.0.2.101"),))
>>> [(name, len(keys)) for name, keys in elements(port).items()]
[('ports', 1), ('group_frames', 1), ('ipv4', 2), ('ipv6', 0), ('targets', 0)]
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

from netns_kit.host import abi
from netns_kit.host.netlink import attribute, message, nested, text

TABLE = "netns_kit"
ARRIVED, MEMBER = "arrived", "member"  # the chains
ARP, IPV4, IPV6 = b"\x08\x06", b"\x08\x00", b"\x86\xdd"  # as a frame has them
ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT, SOLICITATION, ADVERTISEMENT, REDIRECT = range(133, 138)  # RFC 4861
UDP, FRAGMENT, ICMPV6 = 17, 44, 58  # protocols of IP
DHCP_SERVER, DHCPV6_SERVER = 67, 547
BEFORE_ALL = -300  # priority in the hook
NAME = 16  # bytes of the name of an interface
KEYS = {
    "ports": NAME,
    "group_frames": NAME,
    "ipv4": NAME + 8 + 4,
    "ipv6": NAME + 8 + 16,
    "targets": NAME + 16,
}
"""The sets, each with the length of its keys: the ports of members, twice, of which the second counts their frames to
groups; port, link address and address of each family; port and address that neighbour discovery may tell of."""
GROUP_FRAMES = 10_000  # to all or to a group that a member may send in a second, and as many at once
_NUMBERS = {name: number for number, name in enumerate(KEYS, start=1)}
_LL, _NET, _TRANSPORT = (
    *(abi.NFT_PAYLOAD_LL_HEADER, abi.NFT_PAYLOAD_NETWORK_HEADER, abi.NFT_PAYLOAD_TRANSPORT_HEADER),
)
_FIRST, _FIFTH, _SEVENTH = (
    abi.NFT_REG32_00,
    abi.NFT_REG32_00 + 4,
    abi.NFT_REG32_00 + 6,
)  # registers, of a word each


class Port(NamedTuple):
    """The port of a member: its name, the member's link address, and its addresses."""

    name: str
    mac: bytes
    addresses: tuple[IPv4Address | IPv6Address, ...]


def elements(port: Port) -> dict[str, list[bytes]]:
    """Return the keys that a member has in each set.

    The unspecified address is for those who have none yet: clients of DHCP, and probes.
    """
    name, mac = port.name.encode().ljust(NAME, b"\0"), port.mac + bytes(2)
    six = [each.packed for each in port.addresses if each.version == 6]
    four = [each.packed for each in port.addresses if each.version == 4]
    return {
        "ports": [name],
        "group_frames": [name],
        "ipv4": [name + mac + each for each in (*four, bytes(4))],
        "ipv6": [name + mac + each for each in (*six, bytes(16))] if six else [],
        "targets": [name + each for each in six],
    }


def batch(messages: Iterable[bytes]) -> list[bytes]:
    """Return messages as one change, which is made as a whole or not at all."""

    def limit(kind: int) -> bytes:
        return message(kind, 0, struct.pack("=Bx", abi.NFPROTO_UNSPEC) + _u16(abi.NFNL_SUBSYS_NFTABLES))

    return [limit(abi.NFNL_MSG_BATCH_BEGIN), *messages, limit(abi.NFNL_MSG_BATCH_END)]


def ruleset() -> Iterator[bytes]:
    """Yield the messages that make the table, its sets and its rules."""
    yield _message(abi.NFT_MSG_NEWTABLE, text(abi.NFTA_TABLE_NAME, TABLE))
    for name, length in KEYS.items():
        yield _message(
            abi.NFT_MSG_NEWSET,
            text(abi.NFTA_SET_TABLE, TABLE),
            text(abi.NFTA_SET_NAME, name),
            _u32(abi.NFTA_SET_FLAGS, 0),
            _u32(abi.NFTA_SET_KEY_TYPE, 0),
            _u32(abi.NFTA_SET_KEY_LEN, length),
            _u32(abi.NFTA_SET_ID, _NUMBERS[name]),
            *([nested(abi.NFTA_SET_EXPR, *_LIMIT)] if name == "group_frames" else []),
        )
    yield _message(abi.NFT_MSG_NEWCHAIN, text(abi.NFTA_CHAIN_TABLE, TABLE), text(abi.NFTA_CHAIN_NAME, MEMBER))
    yield _base_chain(ARRIVED, BEFORE_ALL)
    yield _rule(ARRIVED, _PORT, _lookup("ports"), _verdict(abi.NFT_GOTO, MEMBER))
    yield from (_rule(MEMBER, *rule) for rule in _rules())


def _base_chain(name: str, priority: int, hook_number: int = abi.NF_BR_PRE_ROUTING) -> bytes:
    """Return the message that makes a chain which every frame passes that comes to the bridge, or to another hook."""
    hook = _u32(abi.NFTA_HOOK_HOOKNUM, hook_number), _u32(abi.NFTA_HOOK_PRIORITY, priority)
    return _message(
        abi.NFT_MSG_NEWCHAIN,
        text(abi.NFTA_CHAIN_TABLE, TABLE),
        text(abi.NFTA_CHAIN_NAME, name),
        nested(abi.NFTA_CHAIN_HOOK, *hook),
        text(abi.NFTA_CHAIN_TYPE, "filter"),
    )


def _rules() -> Iterator[tuple[bytes, ...]]:
    """Yield the rules about what a member sends, as lists of expressions."""
    sender, accept, drop = _payload(_LL, 6, 6, _FIFTH), _verdict(abi.NF_ACCEPT), _verdict(abi.NF_DROP)
    to_group = (
        *_is(_meta(abi.NFT_META_PKTTYPE), bytes((abi.PACKET_BROADCAST,)), abi.NFT_CMP_GTE),
        _compared(bytes((abi.PACKET_MULTICAST,)), abi.NFT_CMP_LTE),
    )
    yield (*to_group, _PORT, _lookup("group_frames"), drop)
    yield (
        *(*_is(_payload(_LL, 12, 2), ARP), _PORT, sender, _payload(_NET, 14, 4, _SEVENTH), _lookup("ipv4")),
        *(_payload(_NET, 8, 6, _FIFTH), _lookup("ipv4"), accept),
    )
    yield (*_is_transport(IPV4, UDP), *_is(_payload(_TRANSPORT, 0, 2), _u16(DHCP_SERVER)), drop)
    source = _payload(_NET, 12, 4, _SEVENTH)
    yield (*_is(_payload(_LL, 12, 2), IPV4), _PORT, sender, source, _lookup("ipv4"), accept)
    yield (*_is_transport(IPV6, UDP), *_is(_payload(_TRANSPORT, 0, 2), _u16(DHCPV6_SERVER)), drop)
    icmp = _is_transport(IPV6, ICMPV6)
    for kind in (ROUTER_ADVERTISEMENT, REDIRECT):
        yield (*icmp, *_is(_payload(_TRANSPORT, 0, 1), bytes((kind,))), drop)
    target = _PORT, _payload(_TRANSPORT, 8, 16, _FIFTH), _lookup("targets", inverted=True), drop
    yield (*icmp, *_is(_payload(_TRANSPORT, 0, 1), bytes((ADVERTISEMENT,))), *target)
    is_probe = (
        *icmp,
        *_is(_payload(_TRANSPORT, 0, 1), bytes((SOLICITATION,))),
        *_is(_payload(_NET, 8, 16), bytes(16)),
    )
    yield (
        *is_probe,
        *target,
    )  # else it could say that it wants an address too, which another is about to have
    first, last = bytes((ROUTER_SOLICITATION,)), bytes((REDIRECT,))
    discovery = *_is(_payload(_TRANSPORT, 0, 1), first, abi.NFT_CMP_GTE), _compared(last, abi.NFT_CMP_LTE)
    yield (*icmp, *discovery, _FRAGMENT, drop)
    own = _PORT, sender, _payload(_NET, 8, 16, _SEVENTH), _lookup("ipv6")
    begins = [_payload(_TRANSPORT, 0, 2)]
    goes_on = [*_is(_FRAGMENT, _u16(8), abi.NFT_CMP_GTE), _L4PROTO]
    for part in begins, goes_on:
        yield (*_is(_payload(_LL, 12, 2), IPV6), *own, *part, accept)
    yield (drop,)


def added(port: Port) -> Iterator[bytes]:
    """Yield the messages by which a member's frames are let in."""
    return _elements(abi.NFT_MSG_NEWSETELEM, port)


def removed(port: Port) -> Iterator[bytes]:
    """Yield the messages by which they are not any more."""
    return _elements(abi.NFT_MSG_DELSETELEM, port)


def diverted(name: str, network: IPv4Network | IPv6Network, mac: bytes) -> Iterator[bytes]:
    """Yield the messages by which frames to addresses of another network go to a link address.

    They were let in before, if there is a guard.

    Args:
        name: The name of the chain, which is new.
        network: The addresses.
        mac: The link address, that of the bridge itself.
    """
    yield _message(abi.NFT_MSG_NEWTABLE, text(abi.NFTA_TABLE_NAME, TABLE))
    yield _base_chain(name, BEFORE_ALL + 1)
    destination = _payload(_NET, 16, 4) if network.version == 4 else _payload(_NET, 24, 16)
    yield _rule(
        name,
        *_is_within(network, destination),
        *_set_to(mac, _payload(_LL, 0, 6, direction=abi.NFTA_PAYLOAD_SREG)),
        *_set_to(bytes((abi.PACKET_HOST,)), _meta(abi.NFT_META_PKTTYPE, direction=abi.NFTA_META_SREG)),
    )


def withheld(name: str, network: IPv4Network | IPv6Network, port: str) -> Iterator[bytes]:
    """Yield the messages by which the hub sends nothing to a port that comes from another network.

    Args:
        name: The name of the chain, which is new.
        network: The addresses.
        port: The name of the port.
    """
    yield _message(abi.NFT_MSG_NEWTABLE, text(abi.NFTA_TABLE_NAME, TABLE))
    yield _base_chain(name, BEFORE_ALL, abi.NF_BR_LOCAL_OUT)
    source = _payload(_NET, 12, 4) if network.version == 4 else _payload(_NET, 8, 16)
    to_port = _is(_meta(abi.NFT_META_OIFNAME), port.encode().ljust(NAME, b"\0"))
    yield _rule(name, *to_port, *_is_within(network, source), _verdict(abi.NF_DROP))


def _is_within(network: IPv4Network | IPv6Network, loaded: bytes) -> tuple[bytes, ...]:
    """Return the expressions that load an address of IP and go on only if it is of a network."""
    return (
        *_is(_payload(_LL, 12, 2), IPV4 if network.version == 4 else IPV6),
        *_is(loaded, network[0].packed, abi.NFT_CMP_GTE),
        _compared(network[-1].packed, abi.NFT_CMP_LTE),
    )


def removed_chain(name: str) -> Iterator[bytes]:
    """Yield the messages that remove a chain of `diverted` or `withheld`."""
    yield _message(abi.NFT_MSG_DELRULE, text(abi.NFTA_RULE_TABLE, TABLE), text(abi.NFTA_RULE_CHAIN, name))
    yield _message(abi.NFT_MSG_DELCHAIN, text(abi.NFTA_CHAIN_TABLE, TABLE), text(abi.NFTA_CHAIN_NAME, name))


def _elements(kind: int, port: Port) -> Iterator[bytes]:
    for name, keys in elements(port).items():
        if keys:
            listed = (
                nested(abi.NFTA_LIST_ELEM, nested(abi.NFTA_SET_ELEM_KEY, attribute(abi.NFTA_DATA_VALUE, key)))
                for key in keys
            )
            yield _message(
                kind,
                text(abi.NFTA_SET_ELEM_LIST_TABLE, TABLE),
                text(abi.NFTA_SET_ELEM_LIST_SET, name),
                nested(abi.NFTA_SET_ELEM_LIST_ELEMENTS, *listed),
            )


_REMOVING = {abi.NFT_MSG_DELSETELEM, abi.NFT_MSG_DELRULE, abi.NFT_MSG_DELCHAIN}


def _message(kind: int, *attributes: bytes) -> bytes:
    flags = abi.NLM_F_ACK | (0 if kind in _REMOVING else abi.NLM_F_CREATE)
    if kind == abi.NFT_MSG_NEWRULE:
        flags |= abi.NLM_F_APPEND
    family = struct.pack("=BxH", abi.NFPROTO_BRIDGE, 0)
    return message(abi.NFNL_SUBSYS_NFTABLES << 8 | kind, flags, family, *attributes)


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">i", value))


def _rule(chain: str, *expressions: bytes) -> bytes:
    return _message(
        abi.NFT_MSG_NEWRULE,
        text(abi.NFTA_RULE_TABLE, TABLE),
        text(abi.NFTA_RULE_CHAIN, chain),
        nested(abi.NFTA_RULE_EXPRESSIONS, *expressions),
    )


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(abi.NFTA_LIST_ELEM, *_named(name, *attributes))


def _named(name: str, *attributes: bytes) -> tuple[bytes, bytes]:
    return text(abi.NFTA_EXPR_NAME, name), nested(abi.NFTA_EXPR_DATA, *attributes)


_LIMIT = _named(
    "limit",
    attribute(abi.NFTA_LIMIT_RATE, struct.pack(">Q", GROUP_FRAMES)),
    attribute(abi.NFTA_LIMIT_UNIT, struct.pack(">Q", 1)),
    _u32(abi.NFTA_LIMIT_BURST, GROUP_FRAMES),
    _u32(abi.NFTA_LIMIT_FLAGS, abi.NFT_LIMIT_F_INV),
)
"""What each element of a set counts for itself: a lookup finds one only when its port sends more."""


def _meta(key: int, register: int = _FIRST, direction: int = abi.NFTA_META_DREG) -> bytes:
    return _expression("meta", _u32(abi.NFTA_META_KEY, key), _u32(direction, register))


_PORT, _L4PROTO = _meta(abi.NFT_META_IIFNAME), _meta(abi.NFT_META_L4PROTO)


def _payload(
    base: int, offset: int, length: int, register: int = _FIRST, direction: int = abi.NFTA_PAYLOAD_DREG
) -> bytes:
    return _expression(
        "payload",
        _u32(direction, register),
        _u32(abi.NFTA_PAYLOAD_BASE, base),
        _u32(abi.NFTA_PAYLOAD_OFFSET, offset),
        _u32(abi.NFTA_PAYLOAD_LEN, length),
    )


_FRAGMENT = _expression(
    "exthdr",
    _u32(abi.NFTA_EXTHDR_DREG, _FIRST),
    attribute(abi.NFTA_EXTHDR_TYPE, bytes((FRAGMENT,))),
    _u32(abi.NFTA_EXTHDR_OFFSET, 2),
    _u32(abi.NFTA_EXTHDR_LEN, 2),
)
"""Load the offset of a fragment, in bytes, with flags in its three bits; go on only if the packet is one."""


def _is(loaded: bytes, value: bytes, how: int = abi.NFT_CMP_EQ) -> tuple[bytes, bytes]:
    """Return the expressions that load something and go on only if it has that value, or is so beside it."""
    return loaded, _compared(value, how)


def _compared(value: bytes, how: int) -> bytes:
    """Return the expression that goes on if what was loaded last is so beside a value."""
    return _expression(
        "cmp",
        _u32(abi.NFTA_CMP_SREG, _FIRST),
        _u32(abi.NFTA_CMP_OP, how),
        nested(abi.NFTA_CMP_DATA, attribute(abi.NFTA_DATA_VALUE, value)),
    )


def _set_to(value: bytes, where: bytes) -> tuple[bytes, bytes]:
    """Return the expressions that set something to a value."""
    return _immediate(_FIRST, attribute(abi.NFTA_DATA_VALUE, value)), where


def _is_transport(ether_type: bytes, protocol: int) -> tuple[bytes, ...]:
    return (*_is(_payload(_LL, 12, 2), ether_type), *_is(_L4PROTO, bytes((protocol,))))


def _u16(number: int) -> bytes:
    return struct.pack(">H", number)


def _lookup(name: str, *, inverted: bool = False) -> bytes:
    """Return the expression that goes on if the key that begins in the first register is in the set, or is not."""
    return _expression(
        "lookup",
        text(abi.NFTA_LOOKUP_SET, name),
        _u32(abi.NFTA_LOOKUP_SREG, _FIRST),
        _u32(abi.NFTA_LOOKUP_SET_ID, _NUMBERS[name]),
        *([_u32(abi.NFTA_LOOKUP_FLAGS, abi.NFT_LOOKUP_F_INV)] if inverted else []),
    )


def _verdict(code: int, chain: str | None = None) -> bytes:
    where = [] if chain is None else [text(abi.NFTA_VERDICT_CHAIN, chain)]
    verdict = nested(abi.NFTA_DATA_VERDICT, _u32(abi.NFTA_VERDICT_CODE, code), *where)
    return _immediate(abi.NFT_REG_VERDICT, verdict)


def _immediate(register: int, data: bytes) -> bytes:
    return _expression(
        "immediate", _u32(abi.NFTA_IMMEDIATE_DREG, register), nested(abi.NFTA_IMMEDIATE_DATA, data)
    )
