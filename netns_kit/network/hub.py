"""Hub: the bridge of a network of several namespaces, in the network's own namespace.

The stack's tap and one end of a pair of veth for each member are the ports of a bridge of the kernel.  Members talk
to each other by that, as fast as this kernel can, and their super-frames stay whole on the way out.  The other end of
a pair is in the member's namespace, which may be owned by any user namespace of this user: see
`netns_kit.host.netlink`.

The bridge learns nothing where there is a guard: it is told the link address of each port, and drops what goes to any
other.  A guard is a table of nftables, see `guard`.

Members and the hub are told each other's link addresses.  Fact: the kernel has one table of neighbours for all
namespaces of the machine, with room for 1024 that were asked for (`net.ipv4.neigh.default.gc_thresh3`), which some 30
members who talk to each other would fill within seconds; entries that were told are not counted.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from ipaddress import IPv4Interface, IPv6Interface, ip_network
from itertools import count
from typing import NamedTuple

import anyio
import anyio.to_thread

from netns_kit.errors import (
    ArgumentError,
    FeatureUnavailable,
    NamespaceGone,
    NetnsKitError,
    NotPrivileged,
    SysctlError,
)
from netns_kit.host import abi
from netns_kit.host.netlink import (
    attribute,
    attributes,
    changed,
    link,
    message,
    nested,
    new_link,
    number,
    text,
    transact,
)
from netns_kit.host.undo import on_error
from netns_kit.namespace.namespace import Namespace
from netns_kit.subnet import Subnet
from netns_kit.tap.device import TapDevice

from . import guard, routing
from .guard import Port

logger = logging.getLogger(__name__)
BRIDGE = "br0"
TABLES = ("iptables", "ip6tables", "arptables")
BEFORE_MAIN = 32765  # priority of a rule; the kernel places those that say none before it
SOURCE_TABLES = 0x6E6C0000  # the first routing table for one link; its number is added
LAST = 200  # priority of the rule that members reach nobody else through the hub
_IFINFOMSG = 16  # bytes
_PAUSE = 1e-3  # seconds between two looks
READY_SECONDS = 5.0  # for a port to be opened; a program in the namespace may have taken its end down again


class Hub:
    """The bridge, once it is open.

    Args:
        tap: The stack's device, which is in the network's namespace.
        isolate: Members reach the stack, and no other member.
        guarded: No member may have the addresses of another.
    """

    def __init__(self, tap: TapDevice, *, isolate: bool, guarded: bool) -> None:
        self._tap = tap
        self._isolate = isolate
        self._guarded = guarded
        self._lock = anyio.Lock()
        self._route: socket.socket | None = None
        self._filter: socket.socket | None = None
        self._bridge = 0  # its number
        self._ends: dict[str, _End] = {}  # inside members, by the names of their ports; and the bridge
        self._ports = 0  # so far
        self._is_closed = False

    @property
    def is_open(self) -> bool:
        return self._bridge != 0

    @property
    def mtu(self) -> int:
        """The MTU of the tap."""
        return self._tap.mtu

    @property
    def tap_name(self) -> str:
        """The name of the tap, which is a port of the bridge."""
        return self._tap.name

    @property
    def mac(self) -> bytes:
        """The link address of the bridge, and of the tap."""
        assert self._tap.mac is not None, "it is open"
        return self._tap.mac

    async def open(self, subnet: Subnet) -> None:
        """Make the bridge, and give it what the tap has been until now: the link address and the addresses.

        Raises:
            ArgumentError: The namespace has a bridge of that name.
            FeatureUnavailable: This kernel has no bridges, or no rules for them.
            NotPrivileged: The caller has no right to change the network's namespace.
        """
        async with self._lock:
            self._check_open()
            if self.is_open:
                return
            with anyio.CancelScope(shield=True):  # a few milliseconds, in which the hub has no address
                self._route = self._route or await self._socket(abi.NETLINK_ROUTE)
                if self._guarded:
                    self._filter = self._filter or await self._socket(abi.NETLINK_NETFILTER)
                    await self._ask(
                        self._filter, guard.batch(guard.ruleset()), "rules of nftables for bridges (nf_tables)",
                        "say guard=False, if no member would take the address of another",
                    )  # fmt: skip
                await self._make_bridge(self._route)
                try:
                    await self._move_to_bridge(self._route, subnet)
                except BaseException:
                    await self._undo(self._route, subnet)
                    raise

    async def _make_bridge(self, route: socket.socket) -> None:
        made = new_link(
            "bridge",
            BRIDGE,
            attribute(abi.IFLA_ADDRESS, self.mac),
            number(abi.IFLA_MTU, self.mtu),
            data=attribute(abi.IFLA_BR_MCAST_SNOOPING, b"\0"),
        )
        try:
            await self._ask(route, [made], "bridges of the kernel (CONFIG_BRIDGE)")
        except FileExistsError as error:
            expected = f"expected a namespace for the network without an interface {BRIDGE}"
            raise ArgumentError(expected, "namespace", repr(self.namespace)) from error

    async def _move_to_bridge(self, route: socket.socket, subnet: Subnet) -> None:
        namespace, tap, ipv6 = self.namespace, self._tap, subnet.ipv6
        for tables in TABLES:  # nothing is in them, and all frames would pass them
            with suppress(SysctlError):
                await namespace.set_sysctl(f"net.bridge.bridge-nf-call-{tables}", 0)
        bridge, tap_index = await self._index(BRIDGE), await self._index(tap.name)
        enslaved = changed(tap_index, number(abi.IFLA_MASTER, bridge))
        moved = [_without(tap_index, each.guest_interface) for each in subnet.families]
        await self._ask(route, [enslaved, *self._settings(tap_index, subnet.mac), *moved])
        if ipv6 is not None:  # its default route would be a second one
            await namespace.set_sysctl(f"net.ipv6.conf.{tap.name}.disable_ipv6", 1)
        for version in (4, 6):  # whatever net.ipv4.ip_forward is, which the host's may be inherited from
            with suppress(OSError):  # where the kernel has no such rules, or no IPv6
                rule = routing.rule(LAST, iifname=BRIDGE, action=abi.FR_ACT_PROHIBIT, version=version)
                await self._ask(route, [rule])
        missing = await self._configure(BRIDGE, subnet)
        addresses = tuple(
            each.guest for each in subnet.families if each.guest.version == 4 or missing is None
        )
        self._ends[BRIDGE] = _End(route, bridge, Port(BRIDGE, self.mac, addresses))
        self._bridge = bridge

    async def _undo(self, route: socket.socket, subnet: Subnet) -> None:
        """Have the tap be what it was."""
        self._ends.clear()
        with suppress(OSError, NetnsKitError):
            await self._ask(route, [deleted(BRIDGE)])
        with suppress(OSError, NetnsKitError):
            if subnet.ipv6 is not None:
                await self.namespace.set_sysctl(f"net.ipv6.conf.{self._tap.name}.disable_ipv6", 0)
            await self._configure(self._tap.name, subnet)

    async def _configure(self, name: str, subnet: Subnet) -> str | None:
        ipv6 = subnet.ipv6
        return await self.namespace.configure_link(
            name,
            address=subnet.guest_interface,
            gateway=subnet.gateway,
            address6=None if ipv6 is None else ipv6.guest_interface,
            gateway6=None if ipv6 is None else ipv6.gateway,
            neighbours=subnet.neighbours,
        )

    def port(self, letter: str = "m") -> str:
        """Return the name of a new port, or of another link, which begins with another letter."""
        self._ports += 1
        return f"{letter}{self._ports}"

    async def change(self, messages: Iterable[bytes], feature: str | None = None) -> None:
        """Change links and routes of the hub.

        Raises:
            FeatureUnavailable: The kernel has no such thing.
            NamespaceGone: The network has ended.
            NotPrivileged, OSError: The kernel refuses it.
        """
        async with self._lock:
            self._check_open()
            assert self._route is not None, "it is open"
            await self._ask(self._route, messages, feature)

    async def filter(self, messages: Iterable[bytes], feature: str | None = None) -> None:
        """Change what becomes of frames at the bridge, all or nothing.

        Raises:
            FeatureUnavailable: The kernel has no nftables.
            NamespaceGone: The network has ended.
            NotPrivileged, OSError: The kernel refuses it.
        """
        async with self._lock:
            self._check_open()
            self._filter = self._filter or await self._socket(abi.NETLINK_NETFILTER)
            await self._ask(self._filter, guard.batch(messages), feature)

    async def add(self, port: Port, namespace: Namespace, ifname: str | None, alias: str) -> str:
        """Make a pair of veth between the bridge and a namespace; the other end is down, and has no address yet.

        Return the name of the other end.

        Args:
            port: Its end here, and what may come from it.
            namespace: The namespace of the other end.
            ifname: The name of the other end; None: eth0, or the next that is free.
            alias: What the end here is for, as `ip link` shows it.

        Raises:
            ArgumentError: The namespace has an interface of that name.
            FeatureUnavailable: This kernel has no veth.
            NotPrivileged: The namespace is another user's.
        """
        async with self._lock:
            self._check_open()
            assert self._route is not None, "it is open"
            try:
                if self._guarded and self._filter is not None:
                    await self._ask(self._filter, guard.batch(guard.added(port)))
                name = await self._make_pair(self._route, port, namespace, ifname)
                index = await self._index(port.name)
                with suppress(OSError):  # where the kernel has no IPv6
                    await self._ask(self._route, [changed(index, NO_ADDRESS)])
                await self._ask(
                    self._route,
                    [
                        *self._settings(index, port.mac, is_member=True),
                        changed(index, text(abi.IFLA_IFALIAS, alias), up=True),
                    ],
                )
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self._remove(port)
                raise
            return name

    async def _make_pair(
        self, route: socket.socket, port: Port, namespace: Namespace, ifname: str | None
    ) -> str:
        target = os.open(f"/proc/{namespace.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for name in (ifname,) if ifname is not None else (f"eth{number}" for number in count()):
                try:
                    await self._ask(route, [self._pair(port, target, name)], "pairs of veth (CONFIG_VETH)")
                except FileExistsError as error:
                    if ifname is not None:
                        expected = "expected the name of an interface that the namespace does not have"
                        raise ArgumentError(expected, "ifname", repr(ifname)) from error
                else:
                    return name
            raise AssertionError("there is a name")
        finally:
            os.close(target)

    async def ready(self, port: Port, namespace: Namespace, ifname: str, guest: Subnet | None = None) -> None:
        """Introduce a member with these addresses to the hub and the others, and wait until frames pass.

        Its end is up.  The kernel opens the port a moment after that.

        Args:
            port: The port, with the addresses that the member has in fact.
            namespace: Its namespace.
            ifname: The name of its end.
            guest: Its addresses, if the namespace has other networks too: what it sends from these leaves by this
                end, wherever the default route leads.
        """
        async with self._lock:
            self._check_open()
            sock = await namespace.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, abi.NETLINK_ROUTE)
            with on_error(sock.close):
                (index,) = struct.unpack_from("=i", await self._link_of(ifname, sock), 4)
            others = [self._ends[BRIDGE]] if self._isolate else list(self._ends.values())
            self._ends[port.name] = end = _End(sock, index, port)
            if guest is not None:
                await anyio.to_thread.run_sync(_route_by_source, end, guest)
            await anyio.to_thread.run_sync(_introduce, end, others)
        await self.wait_up(port.name)
        await self.wait_up(ifname, sock)

    async def wait_up(self, name: str, sock: socket.socket | None = None) -> None:
        """Wait until an interface, by default of the hub, carries packets, but no longer than `READY_SECONDS`.

        The kernel drops what is sent until a work queue of its own has seen that the other end is up.
        """
        with anyio.move_on_after(READY_SECONDS):
            while not await self._is_up(name, sock):  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(_PAUSE)

    async def _is_up(self, name: str, sock: socket.socket | None) -> bool:
        async with self._lock:
            self._check_open()
            answer = await self._link_of(name, sock)
        return dict(attributes(answer[_IFINFOMSG:])).get(abi.IFLA_OPERSTATE) == bytes((abi.IF_OPER_UP,))

    async def remove(self, port: Port) -> None:
        """Remove the pair of a port.  It may have gone with the member's namespace."""
        async with self._lock:
            await self._remove(port)

    async def _remove(self, port: Port) -> None:
        end = self._ends.pop(port.name, None)
        if end is not None:
            await anyio.to_thread.run_sync(_forget, end, list(self._ends.values()))
            end.sock.close()  # it would keep the namespace
        with suppress(OSError, NetnsKitError):
            if self._route is not None:
                await self._ask(self._route, [deleted(port.name)])
        with suppress(OSError, NetnsKitError):
            if self._guarded and self._filter is not None:
                await self._ask(self._filter, guard.batch(guard.removed(port)))

    async def close(self) -> None:
        """Close the sockets.  The bridge ends with the namespace.

        Cancellation: It may be called again.
        """
        async with self._lock:  # a thread may use one of them, and a number that is free is soon another's
            self._is_closed = True
            for sock in (self._route, self._filter, *(end.sock for end in self._ends.values())):
                if sock is not None:
                    sock.close()
            self._ends.clear()

    def _check_open(self) -> None:
        if self._is_closed:
            raise NamespaceGone("the network has ended")

    @property
    def namespace(self) -> Namespace:
        """The network's own namespace."""
        assert self._tap.namespace is not None, "a Network's tap has one"
        return self._tap.namespace

    async def _socket(self, family: int) -> socket.socket:
        try:
            return await self.namespace.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, family)
        except OSError as error:
            if error.errno == errno.EPROTONOSUPPORT:
                raise FeatureUnavailable(
                    "this kernel has no nftables", fix="say guard=False, if no member would take another's address",
                    errno=error.errno,
                ) from error  # fmt: skip
            raise

    async def _ask(
        self,
        sock: socket.socket,
        messages: Iterable[bytes],
        feature: str | None = None,
        fix: str | None = None,
    ) -> list[bytes]:
        try:
            return await anyio.to_thread.run_sync(transact, sock, messages)
        except PermissionError as error:
            raise NotPrivileged(
                "may not change the links of the network and of the member",
                fix="use namespaces that this user owns, or CAP_NET_ADMIN in them", errno=error.errno,
            ) from error  # fmt: skip
        except OSError as error:
            if feature is not None and error.errno in _MISSING:
                raise FeatureUnavailable(
                    f"this kernel lacks {feature}", fix=fix, errno=error.errno
                ) from error
            raise

    async def index(self, name: str) -> int:
        """Return the number of an interface of the hub.

        Raises:
            NamespaceGone: The network has ended.
            OSError: There is none of that name.
        """
        async with self._lock:
            self._check_open()
            return await self._index(name)

    async def _index(self, name: str) -> int:
        (index,) = struct.unpack_from("=i", await self._link_of(name), 4)
        return int(index)

    async def _link_of(self, name: str, sock: socket.socket | None = None) -> bytes:
        """Return what the kernel says of an interface, by default of the hub: struct ifinfomsg, and attributes."""
        sock = sock or self._route
        assert sock is not None, "it is open"
        (answer,) = await self._ask(sock, [message(abi.RTM_GETLINK, 0, link(), text(abi.IFLA_IFNAME, name))])
        return answer

    def _pair(self, port: Port, target: int, ifname: str) -> bytes:
        """Return the message that makes a pair, with one end in the namespace of the descriptor `target`."""
        mtu = number(abi.IFLA_MTU, self._tap.mtu)
        other = nested(
            abi.VETH_INFO_PEER, link(), text(abi.IFLA_IFNAME, ifname), attribute(abi.IFLA_ADDRESS, port.mac), mtu,
            number(abi.IFLA_NET_NS_FD, target),
        )  # fmt: skip
        return new_link("veth", port.name, mtu, number(abi.IFLA_MASTER, self._bridge), data=other)

    def _settings(self, index: int, mac: bytes, *, is_member: bool = False) -> list[bytes]:
        """Return the messages that tell the bridge about a port and the link address behind it."""
        flags = [(abi.IFLA_BRPORT_ISOLATED, is_member and self._isolate)]
        messages = []
        if self._guarded:
            flags += [(abi.IFLA_BRPORT_LEARNING, False), (abi.IFLA_BRPORT_UNICAST_FLOOD, False)]
            neighbour = struct.pack(
                "=BxxxiHBB", socket.AF_BRIDGE, index, abi.NUD_NOARP, abi.NTF_MASTER, 0
            )  # ndmsg
            messages.append(
                message(
                    abi.RTM_NEWNEIGH,
                    abi.NLM_F_CREATE | abi.NLM_F_REPLACE | abi.NLM_F_ACK,
                    neighbour,
                    attribute(abi.NDA_LLADDR, mac),
                )
            )
        data = (attribute(kind, bytes((flag,))) for kind, flag in flags)
        slave = nested(
            abi.IFLA_LINKINFO,
            text(abi.IFLA_INFO_SLAVE_KIND, "bridge"),
            nested(abi.IFLA_INFO_SLAVE_DATA, *data),
        )
        return [changed(index, slave), *messages]


_MISSING = frozenset(
    {errno.EOPNOTSUPP, errno.ENOENT, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOSYS}
)


NO_ADDRESS = nested(
    abi.IFLA_AF_SPEC,
    nested(
        socket.AF_INET6,
        attribute(abi.IFLA_INET6_ADDR_GEN_MODE, bytes((abi.IN6_ADDR_GEN_MODE_NONE,))),
    ),
)
"""What keeps the kernel from giving an interface a link-local address."""


class _End(NamedTuple):
    """A link of a member, or the bridge: a socket of its namespace, its number, and what it has of a port."""

    sock: socket.socket
    link: int
    port: Port


def _introduce(new: _End, others: Sequence[_End]) -> None:
    """Tell a member the link addresses of the others, and them its own.

    Raises:
        OSError: The kernel of a member refuses it.
    """
    for other in others:
        transact(new.sock, _neighbours(new, other, wanted=True))
        with suppress(OSError):  # that one has removed its interface
            transact(other.sock, _neighbours(other, new, wanted=True))


def _forget(gone: _End, others: Sequence[_End]) -> None:
    for each in _rules(gone, wanted=False):
        with suppress(OSError):  # there were none, or the namespace has ended
            transact(gone.sock, [each])
    for other in others:
        with suppress(OSError):  # that one has removed it itself
            transact(other.sock, _neighbours(other, gone, wanted=False))


def _route_by_source(end: _End, guest: Subnet) -> None:
    """Have what a member sends from its addresses leave by this end, also if its default route is another.

    Raises:
        OSError: The kernel of the member refuses it.
    """
    messages = []
    for address in end.port.addresses:
        if address.is_link_local:
            continue
        subnet = guest.of(address)
        assert subnet is not None, "it has an address of that family"
        table = SOURCE_TABLES + end.link
        anywhere = ip_network("0.0.0.0/0" if address.version == 4 else "::/0")
        messages += [
            routing.route(subnet.network, end.link, source=address, table=table),
            routing.route(anywhere, end.link, gateway=subnet.gateway, table=table),
        ]
    try:
        transact(end.sock, [*messages, *_rules(end, wanted=True)])
    except OSError as error:
        if error.errno not in _MISSING:
            raise
        logger.warning(
            "this kernel has no rules of routing: answers leave by the default route of the member"
        )


def _rules(end: _End, *, wanted: bool) -> list[bytes]:
    """Return the messages about a rule for each address of a member, which is asked just before the main table."""
    table = SOURCE_TABLES + end.link
    return [
        routing.rule(BEFORE_MAIN, source=ip_network(each), table=table, wanted=wanted)
        for each in end.port.addresses
        if not each.is_link_local
    ]


def _neighbours(where: _End, who: _End, *, wanted: bool) -> list[bytes]:
    """Return the messages by which one member knows, or does not know, another."""
    spoken = {each.version for each in where.port.addresses}
    return [
        routing.neighbour(address, who.port.mac, where.link, wanted=wanted)
        for address in who.port.addresses
        if address.version in spoken
    ]


def deleted(name: str) -> bytes:
    """Return the message that removes a link."""
    return message(abi.RTM_DELLINK, abi.NLM_F_ACK, link(), text(abi.IFLA_IFNAME, name))


def _without(index: int, interface: IPv4Interface | IPv6Interface) -> bytes:
    """Return the message that takes an address from an interface."""
    family = socket.AF_INET if interface.version == 4 else socket.AF_INET6
    head = struct.pack("=BBBBi", family, interface.network.prefixlen, 0, 0, index)  # struct ifaddrmsg
    return message(abi.RTM_DELADDR, abi.NLM_F_ACK, head, attribute(abi.IFA_LOCAL, interface.packed))
