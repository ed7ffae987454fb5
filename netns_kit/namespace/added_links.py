"""Links of a namespace that somebody asks for: to the caller's namespace, or on a link inside.

They are made by messages of this process, see `netns_kit.host.netlink`.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Literal, NamedTuple

from netns_kit import arguments
from netns_kit.errors import ArgumentError, FeatureUnavailable, NetnsKitError, NotPrivileged
from netns_kit.frozen import frozen
from netns_kit.host import abi, netlink
from netns_kit.host.netlink import attribute, nested, number, text

__all__ = ["AddedLink", "Ipvlan", "Macvlan", "Veth", "Vlan"]

_MACVLAN_MODES = {"private": 1, "vepa": 2, "bridge": 4}
_IPVLAN_MODES = {"l2": 0, "l3": 1, "l3s": 2}


@frozen
class Macvlan:
    """A link with a link address of its own on an interface of the caller's namespace."""

    parent: str
    """Name of the interface."""
    mode: Literal["bridge", "private", "vepa"] = "bridge"
    """Mode, which says what links on the same interface reach each other: all, none, or what a switch leads back."""


@frozen
class Ipvlan:
    """A link that shares the link address of an interface of the caller's namespace."""

    parent: str
    """Name of the interface."""
    mode: Literal["l2", "l3", "l3s"] = "l2"
    """Mode, by which frames are switched by IP address (l2), or routed in the caller's namespace (l3, l3s)."""


@frozen
class Veth:
    """A pair of links: one end is inside, the other in the caller's namespace."""

    host: str
    """Name of the other end, which is up, and has no address yet."""


@frozen
class Vlan:
    """A VLAN (802.1Q) on a link of the namespace itself."""

    parent: str
    """Name of the link."""
    tag: int
    """Number of the VLAN, 1 to 4094."""


AddedLink = Macvlan | Ipvlan | Veth | Vlan
"""What `Namespace.add_link` makes."""


class _Kind(NamedTuple):
    """A kind of links: its name, which is that of its module too but for VLANs, and the kernel's option."""

    name: str
    option: str
    module: str


_KINDS = {
    Macvlan: _Kind("macvlan", "CONFIG_MACVLAN", "macvlan"),
    Ipvlan: _Kind("ipvlan", "CONFIG_IPVLAN", "ipvlan"),
    Veth: _Kind("veth", "CONFIG_VETH", "veth"),
    Vlan: _Kind("vlan", "CONFIG_VLAN_8021Q", "8021q"),
}


def check(name: str, link: AddedLink) -> None:
    """Check what was given.

    Raises:
        ArgumentError, ArgumentTypeError: It cannot be used.
    """
    _check_name("name", name)
    arguments.instance("link", link, (Macvlan, Ipvlan, Veth, Vlan), "Macvlan, Ipvlan, Veth or Vlan")
    if isinstance(link, Veth):
        _check_name("host", link.host)
        return
    _check_name("parent", link.parent)
    if isinstance(link, Vlan):
        arguments.whole_number("tag", link.tag, 1, 4094)
    else:
        arguments.one_of("mode", link.mode, _MACVLAN_MODES if isinstance(link, Macvlan) else _IPVLAN_MODES)


def _check_name(knob: str, given: str) -> None:
    expected = "the name of an interface, of 1 to 15 bytes without a slash or a space"
    arguments.text(knob, given, expected)
    if not 0 < len(os.fsencode(given)) < abi.IFNAMSIZ or any(c.isspace() or c in "/:\0" for c in given):
        raise ArgumentError(f"expected {expected}", knob, repr(given))


def request(name: str, link: AddedLink, parent: int, target: int) -> bytes:
    """Return the message that makes a link.

    Args:
        name: Its name.
        link: What it is.
        parent: The number of the interface that it is on; 0 if there is none.
        target: A descriptor of the namespace that it shall be in.
    """
    kind = _KINDS[type(link)].name
    there = number(abi.IFLA_NET_NS_FD, target)
    if isinstance(link, Veth):
        peer = nested(abi.VETH_INFO_PEER, netlink.link(), text(abi.IFLA_IFNAME, name), there)
        return netlink.new_link(kind, link.host, data=peer, up=True)
    if isinstance(link, Macvlan):
        data = number(abi.IFLA_MACVLAN_MODE, _MACVLAN_MODES[link.mode])
    elif isinstance(link, Ipvlan):
        data = attribute(abi.IFLA_IPVLAN_MODE, struct.pack("=H", _IPVLAN_MODES[link.mode]))
    else:
        data = attribute(abi.IFLA_VLAN_ID, struct.pack("=H", link.tag))
    return netlink.new_link(kind, name, there, number(abi.IFLA_LINK, parent), data=data)


def explain(error: OSError, name: str, link: AddedLink) -> NetnsKitError | None:
    """Return what the kernel's refusal means; None if that is not known."""
    code = error.errno or 0
    inside = isinstance(link, Vlan)
    kind = _KINDS[type(link)]
    if code == errno.EPERM:
        cause = f"may not make {name}, a {kind.name} {_place(link)}"
        fix = "use a namespace made by create(), or CAP_NET_ADMIN in this one"
        if not inside:
            fix = "run as root, or in a user namespace that owns the interface; by the stack all can go out"
        return NotPrivileged(cause, "CAP_NET_ADMIN", "missing", fix, code)
    if code == errno.EOPNOTSUPP:
        fix = f"load its module, `modprobe {kind.module}`, or use a kernel that has it"
        return FeatureUnavailable(f"this kernel makes no {kind.name}", kind.option, "missing", fix, code)
    if code == errno.EEXIST:
        if isinstance(link, Vlan):
            return ArgumentError(
                f"expected a name and a tag on {link.parent} that are free", "name", repr(name)
            )
        if isinstance(link, Veth):
            return ArgumentError(
                f"expected a name that is free in the namespace, and {link.host} to be free here", "name", repr(name)
            )  # fmt: skip
        return ArgumentError(
            "expected the name of an interface that the namespace does not have", "name", repr(name)
        )
    if isinstance(link, Veth):
        return None
    if code == errno.ENODEV:
        where = "the namespace" if inside else "the caller's namespace"
        return ArgumentError(f"expected the name of an interface of {where}", "parent", repr(link.parent))
    if code in {errno.EBUSY, errno.EINVAL}:
        return ArgumentError(
            f"expected an Ethernet interface that may carry a {kind.name}", "parent", repr(link.parent),
            "take one that is no loopback, no port of a bridge or a bond, and has no other kind of such links",
        )  # fmt: skip
    return None


def _place(link: AddedLink) -> str:
    if isinstance(link, Veth):
        return f"with its other end {link.host} here"
    return f"on {link.parent}"
