"""NetworkRoute: a way between the members of two networks, by a pair of veth between their hubs.

    member -- br0, hub -- r1 ======= r1 -- hub, br0 -- member

A bridge gives the hub what goes to an address of the other network, so that members need no route of their own: they
send it to their gateway as all else.  The hubs pass it on by a rule of routing for each direction, and everything
else is refused there: what goes to the stack of the other network, which is that one's way out, also by an address
that something is served at; from a third network; and from a member to another one of the same network.  Each hub
checks what comes from the other, and what its own network sends there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_network

from netns_kit.errors import ArgumentError, NamespaceGone, NetnsKitError, SysctlError
from netns_kit.host import abi
from netns_kit.host.netlink import attribute, changed, link, nested, new_link, number, text
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.subnet import Subnet, Subnet6

from . import guard, routing
from .addresses import check_apart
from .hub import BRIDGE, NO_ADDRESS, Hub, deleted
from .members import Members

MAC_PREFIX = b"\x52\x57"
"""First bytes of the link address of an end, which is locally administered; the hub's IPv4 address follows."""
REFUSED, PASSED, REST = 100, 101, 102  # priorities of rules; those of the hub come later
_RULES = "rules of routing (CONFIG_IP_MULTIPLE_TABLES, CONFIG_IPV6_MULTIPLE_TABLES)"
_FRAMES = "rules of nftables for bridges (nf_tables)"


class NetworkRoute(Openable):
    """A way between the members of two networks, while the object is open.

    `Network.route_to` makes one.  It ends with either network too.

    Args:
        one, other: The members of the two, for parts of this library.

    Raises:
        AddressError: The networks have addresses in common.
        ArgumentError: They are one.
    """

    def __init__(self, one: Members, other: Members) -> None:
        if one is other:
            raise ArgumentError("expected another network", "other", "the same")
        check_apart(one.stack.subnet, other.stack.subnet)
        self._sides = _Side(one), _Side(other)
        self.supervisor = Supervisor(
            type(self).__name__, NamespaceGone, one.supervisor, other.supervisor, one_loop=True
        )

    def __repr__(self) -> str:
        one, other = (str(each.subnet) for each in self._sides)
        return f"<NetworkRoute {one} to {other}: {self.supervisor.condition}>"

    async def _open(self) -> None:
        one, other = self._sides
        for side in self._sides:
            side.members.supervisor.check()
            await side.hub.open(side.subnet)
        if other.members in one.members.routes:
            raise ArgumentError("expected a network that there is no route to", "other", str(other.subnet))
        for side, far in ((one, other), (other, one)):
            side.members.routes[far.members] = self
            side.name = side.hub.port("r")
        target = os.open(f"/proc/{other.hub.namespace.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = number(abi.IFLA_NET_NS_FD, target)
            peer = nested(
                abi.VETH_INFO_PEER, link(), text(abi.IFLA_IFNAME, other.name), *other.link(one), there
            )
            pair = new_link("veth", one.name, *one.link(other), data=peer)
            await one.hub.change([pair], "pairs of veth (CONFIG_VETH)")
        finally:
            os.close(target)
        for side, far in ((one, other), (other, one)):
            await side.open(far)
            self.supervisor.start(self._watch, side)
        for side in self._sides:
            await side.hub.wait_up(side.name)

    async def _watch(self, gone: _Side) -> None:
        """End when that network does, whoever holds this object."""
        with suppress(NetnsKitError):
            await gone.hub.namespace.wait_closed()
        for side in self._sides:
            if side is not gone:
                side.members.supervisor.start(self.supervisor.end)
        raise NamespaceGone(f"the network {gone.subnet} has ended")

    async def _close(self) -> None:
        for side, far in zip(self._sides, reversed(self._sides), strict=True):
            await side.close(far)
            if side.members.routes.get(far.members) is self:
                del side.members.routes[far.members]


class _Side:
    """What a route has at one of its networks."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self.name = ""  # of the end of the pair, once there may be one

    @property
    def hub(self) -> Hub:
        return self.members.hub

    @property
    def subnet(self) -> Subnet:
        return self.members.stack.subnet

    @property
    def mac(self) -> bytes:
        return MAC_PREFIX + self.subnet.guest.packed

    def link(self, far: _Side) -> tuple[bytes, ...]:
        mtu = min(self.hub.mtu, far.hub.mtu)
        return (
            attribute(abi.IFLA_ADDRESS, self.mac),
            number(abi.IFLA_MTU, mtu),
        )

    async def open(self, far: _Side) -> None:
        hub = self.hub
        index = await hub.index(self.name)
        with suppress(OSError):  # where the kernel has no IPv6
            await hub.change([changed(index, NO_ADDRESS)])
        await hub.namespace.set_sysctl(f"net.ipv4.conf.{self.name}.rp_filter", 1)
        if len(list(_both(self.subnet, far.subnet))) == 1:  # the other hub would have a way here by IPv6
            with suppress(SysctlError):
                await hub.namespace.set_sysctl(f"net.ipv6.conf.{self.name}.disable_ipv6", 1)
        await hub.change(self._rules(far, wanted=True), _RULES)
        await hub.change([changed(index, text(abi.IFLA_IFALIAS, str(far.subnet)), up=True)])
        for own, other in _both(self.subnet, far.subnet):
            router = other.guest
            await hub.change(
                [
                    routing.neighbour(router, far.mac, index),
                    routing.route(other.network, index, gateway=router, source=own.guest),
                ]
            )
            if own.network.version == 4:
                for name in (self.name, BRIDGE):
                    await hub.namespace.set_sysctl(f"net.ipv4.conf.{name}.forwarding", 1)
            else:
                await hub.namespace.set_sysctl("net.ipv6.conf.all.forwarding", 1)
        for (inwards, outwards), network in self._chains(far):
            chains = (
                guard.withheld(outwards, network, hub.tap_name),
                guard.diverted(inwards, network, hub.mac),
            )
            await hub.filter([each for chain in chains for each in chain], _FRAMES)

    async def close(self, far: _Side) -> None:
        if not self.name:
            return
        removed = [
            *([each] for each in self._rules(far, wanted=False)),
            [deleted(self.name)],  # and its routes
        ]
        for messages in removed:
            with suppress(
                OSError, NetnsKitError
            ):  # the other side has removed the link, or the hub has ended
                await self.hub.change(messages)
        for names, _ in self._chains(far):
            with suppress(OSError, NetnsKitError):
                await self.hub.filter([each for name in names for each in guard.removed_chain(name)])
        self.name = ""

    def _rules(self, far: _Side, *, wanted: bool) -> Iterator[bytes]:
        for own, other in _both(self.subnet, far.subnet):
            for ours in (own.gateway, own.dns):
                yield routing.rule(
                    REFUSED, ip_network(ours), iifname=self.name, action=abi.FR_ACT_PROHIBIT, wanted=wanted
                )
            yield routing.rule(PASSED, own.network, source=other.network, iifname=self.name, wanted=wanted)
            yield routing.rule(PASSED, other.network, source=own.network, iifname=BRIDGE, wanted=wanted)
            version = own.network.version
            yield routing.rule(
                REST, iifname=self.name, action=abi.FR_ACT_PROHIBIT, version=version, wanted=wanted
            )

    def _chains(self, far: _Side) -> Iterator[tuple[tuple[str, str], IPv4Network | IPv6Network]]:
        """Yield the names of two chains for each network: of what goes there, and of what comes from there."""
        for _, other in _both(self.subnet, far.subnet):
            name = f"{self.name}-ipv{other.network.version}"
            yield (f"{name}-to", f"{name}-from"), other.network


def _both(own: Subnet, other: Subnet) -> Iterator[tuple[Subnet | Subnet6, Subnet | Subnet6]]:
    """Return the networks of each family that both have."""
    return zip(own.families, other.families, strict=False)
