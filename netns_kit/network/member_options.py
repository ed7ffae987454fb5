"""MemberOptions and MemberSetup: what a caller says about a member, and that checked."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from types import NoneType
from typing import TypedDict, get_args

from netns_kit import arguments
from netns_kit.arguments import AddressLike
from netns_kit.domain_names import check_host_name
from netns_kit.errors import ArgumentError, DomainNameError
from netns_kit.forwarder.ports import Follow, PortForward
from netns_kit.forwarder.specs import parse_all
from netns_kit.frozen import frozen
from netns_kit.gateway.setup import check_policy
from netns_kit.namespace.namespace import Ids, Namespace
from netns_kit.policy.policy import Policy
from netns_kit.tap.device import check_name, parse_mac


class MemberOptions(TypedDict, total=False):
    """The settings of a member, as keyword arguments of `Network.member` and `Network.add_member`."""

    aliases: Iterable[str]
    """More names.  Several members may have an alias in common: then it has the addresses of all of them."""
    address: AddressLike | None
    """The IPv4 address; None: the next that is free.  That of IPv6 follows from it."""
    mac: str | None
    """The link address of its interface; None: one that is made of its address."""
    ports: Iterable[str | PortForward | Follow]
    """The host ports that lead to it from the start, see `netns_kit.forwarder.specs`."""
    policy: Policy | None
    """The policy about its flows and names, which decides in place of the network's; None: that of the network."""
    ifname: str | None
    """The name of its interface; None: eth0, or the next that the namespace does not have."""
    ids: Ids
    """The ids that commands have in a new namespace, see `Namespace.create`.  Default: "root"."""
    namespace: Namespace | None
    """The namespace; None: a new one, see `Namespace.create`.  One that is not open is the member's from now on.  One
    that is open stays whose it is: then only the interface ends with the member.  That of a member of another network
    is in both then."""


def _checked_name(name: str, knob: str) -> str:
    """Return a name in lower case.

    Raises:
        DomainNameError: It is no name of a host, or programs read it as an address, so that nobody would ask for it.
    """
    found = check_host_name(name, knob).lower()
    with suppress(OSError):
        socket.inet_aton(found)  # as getaddrinfo does: also "123"
        raise DomainNameError("expected a name that is no address", knob, repr(name))
    return found


@frozen
class MemberSetup:
    """The settings of one member, checked by `MemberSetup.of`."""

    name: str
    aliases: tuple[str, ...]
    address: IPv4Address | None
    mac: bytes | None
    ports: tuple[PortForward | Follow, ...]
    policy: Policy | None
    ifname: str | None
    ids: Ids
    namespace: Namespace | None

    def place(self) -> Namespace:
        """Return the namespace that was given, or a new one."""
        return self.namespace or Namespace.create(ids=self.ids)

    @classmethod
    def of(
        cls,
        name: str,
        *,
        aliases: Iterable[str] = (),
        address: AddressLike | None = None,
        mac: str | None = None,
        ports: Iterable[str | PortForward | Follow] = (),
        policy: Policy | None = None,
        ifname: str | None = None,
        ids: Ids = "root",
        namespace: Namespace | None = None,
    ) -> MemberSetup:
        """Check the settings that a caller gives, and return them as a record.

        Raises:
            AddressError, ArgumentError, ArgumentTypeError, DomainNameError, PortSpecError: As `Network.member` says.
        """
        arguments.items("aliases", aliases, "a list of names")
        arguments.items("ports", ports, "a list of ports")
        if policy is not None:
            check_policy(policy, asks=True)  # whether the network has somebody to ask, it knows itself
        if ifname is not None:
            check_name(ifname, "ifname")
        arguments.instance(
            "namespace", namespace, (Namespace, NoneType), "a Namespace, or None for a new one"
        )
        arguments.one_of("ids", ids, get_args(Ids))
        if namespace is not None and ids != "root":
            raise ArgumentError(
                'expected "root" for a namespace that is given, which has ids', "ids", repr(ids)
            )
        wanted = None if address is None else arguments.address(address, version=4)
        assert not isinstance(wanted, IPv6Address)
        return cls(
            _checked_name(name, "name"),
            tuple(_checked_name(alias, "aliases") for alias in aliases),
            wanted,
            None if mac is None else parse_mac(mac),
            tuple(parse_all(ports)),
            policy,
            ifname,
            ids,
            namespace,
        )
