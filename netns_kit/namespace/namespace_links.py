"""NamespaceLinks: links, addresses, routes and sysctls of a namespace, seen and set from outside."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import anyio.to_thread

from netns_kit import arguments
from netns_kit.errors import (
    NetnsKitError,
    NotPrivileged,
)
from netns_kit.frozen import frozen
from netns_kit.host import diagnosis
from netns_kit.host.abi import IFLA_NET_NS_FD, NETLINK_ROUTE, RT_TABLE_MAIN, TUN_MAJOR, TUN_MINOR

from .namespace_sockets import NamespaceSockets

if TYPE_CHECKING:
    from .added_links import AddedLink


@frozen
class Interface:
    """A network interface."""

    index: int
    """Number of the interface in its namespace."""
    name: str
    """Name of the interface."""
    mtu: int
    """Size in bytes of the largest packet that it sends."""
    mac: str
    """Hardware address; empty if the interface has none."""
    up: bool
    """True if the interface is up."""


@frozen
class InterfaceAddress:
    """An address of an interface."""

    index: int
    """Number of the interface that has the address."""
    interface: IPv4Interface | IPv6Interface
    """Address with its prefix."""


@frozen
class Route:
    """A route of the main routing table."""

    destination: IPv4Network | IPv6Network
    """Network that the route leads to."""
    gateway: IPv4Address | IPv6Address | None
    """Address of the next router; None if the network is on the link itself."""
    index: int | None
    """Number of the interface that packets leave by; None if the route has none, as an unreachable one."""
    metric: int
    """Cost of the route.  Of several to one network, that with the lowest is used."""


@frozen
class OpenedTap:
    """A tap device that was opened in the namespace."""

    fds: tuple[int, ...]
    """Descriptors, one for each queue.  The caller closes them."""
    name: str
    """Name of the interface."""
    flags: int
    """Flags that the kernel has set (IFF_TAP and others)."""
    existed: bool
    """True if the device existed before: a persistent one that was made by somebody else."""

    @property
    def fd(self) -> int:
        """The descriptor of the first queue."""
        return self.fds[0]


@frozen
class _Tap:
    """The agent's answer, beside descriptors: the tap that was opened."""

    name: str
    flags: int
    existed: bool


@frozen
class _Configured:
    """The agent's answer: why a link that was configured has no IPv6, if it was to have it."""

    without_ipv6: str | None


class NamespaceLinks(NamespaceSockets):
    """The links of a namespace, and what else of it is configured."""

    async def links(self) -> tuple[Interface, ...]:
        """Return the network interfaces of the namespace.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It changes nothing.
        """
        return tuple(
            Interface(
                message["index"],
                message.get_attr("IFLA_IFNAME"),
                message.get_attr("IFLA_MTU"),
                message.get_attr("IFLA_ADDRESS") or "",
                bool(message["flags"] & 1),
            )
            for message in await self._dump(lambda route: route.get_links())
        )

    async def addresses(self) -> tuple[InterfaceAddress, ...]:
        """Return the addresses of its interfaces, of both families.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It changes nothing.
        """
        return tuple(map(_interface, await self._dump(lambda route: route.get_addr())))

    async def routes(self) -> tuple[Route, ...]:
        """Return the unicast routes of its main table, of both families.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It changes nothing.
        """
        messages = await self._dump(lambda route: route.get_routes(table=RT_TABLE_MAIN))
        return tuple(map(_route, messages))

    async def _dump(self, question: Callable[[Any], Any]) -> list[Any]:
        """Ask the namespace's kernel by netlink, in a thread: pyroute2 runs an event loop of its own."""
        sock = await self.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_ROUTE)

        def ask() -> list[Any]:
            from pyroute2 import IPRoute

            with IPRoute(fileno=sock.fileno()) as route:
                sock.detach()
                return list(question(route))

        try:
            return await anyio.to_thread.run_sync(ask)
        finally:
            sock.close()

    async def move_link_in(self, name: str) -> None:
        """Move an interface of the caller's namespace into this one.

        Args:
            name: Its name.

        Raises:
            ArgumentTypeError: The name is not text.
            NotPrivileged: The caller has not CAP_NET_ADMIN in both.
            OSError: ENODEV: there is no such interface.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The interface may or may not have been moved.
        """
        arguments.text("name", name, "the name of an interface")
        from netns_kit.host import netlink

        target = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with _socket_here() as sock:
                there = netlink.number(IFLA_NET_NS_FD, target)
                moved = netlink.changed(netlink.index_of(sock, name), there)
                await anyio.to_thread.run_sync(netlink.transact, sock, [moved])
        except PermissionError as exc:
            raise NotPrivileged(
                f"may not move {name} into the namespace",
                fix="run with CAP_NET_ADMIN, or give the namespace a TapDevice instead",
            ) from exc
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, name) from exc
        finally:
            os.close(target)

    async def add_link(self, name: str, link: AddedLink) -> None:
        """Make a link of this namespace that leads past the stack, or a VLAN on one that it has.

        It is down, and has no address: `configure_link` is next.  It ends with the namespace.  No policy, capture or
        flow knows what passes by it.

        Args:
            name: Its name.
            link: What it is: a `Macvlan` or `Ipvlan` on an interface of the caller's namespace, one end of a `Veth`
                whose other end is there, or a `Vlan` on a link of this namespace.

        Raises:
            ArgumentError, ArgumentTypeError: A name or an option that cannot be used, or one that is taken.
            FeatureUnavailable: This kernel makes no such links.
            NotPrivileged: The caller has not CAP_NET_ADMIN in this namespace; or not in its own, where the link
                is on one of its interfaces.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The link may or may not have been made.
        """
        from netns_kit.host import netlink

        from . import added_links

        added_links.check(name, link)
        target = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if isinstance(link, added_links.Vlan):
                sock = await self.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_ROUTE)
            else:
                sock = _socket_here()
            with sock:
                parent = 0
                if not isinstance(link, added_links.Veth):
                    parent = netlink.index_of(sock, link.parent)
                message = added_links.request(name, link, parent, target)
                await anyio.to_thread.run_sync(netlink.transact, sock, [message])
        except OSError as error:
            if isinstance(error, NetnsKitError) or not (why := added_links.explain(error, name, link)):
                raise
            raise why from error
        finally:
            os.close(target)

    async def open_tap(self, name: str, flags: Sequence[int], queues: int = 1) -> OpenedTap:
        """Open a tap device.  A persistent device of that name is joined.

        Args:
            name: Its name.
            flags: Words for TUNSETIFF; the first that the kernel accepts is used.
            queues: How often it is opened: more than once only with IFF_MULTI_QUEUE.

        Raises:
            TunUnavailable: The kernel refuses it.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no device but a persistent one.
        """
        try:
            tap, fds = await self._ask(
                _Tap, "open_tap", descriptors=queues, name=name, flags=list(flags), queues=queues
            )
        except OSError as exc:
            raise diagnosis.tun(exc, name) from exc
        if not all(map(_is_tap, fds)):
            for fd in fds:
                os.close(fd)
            raise self._agent.betrayed("a descriptor that is no tap")
        return OpenedTap(tuple(fds), tap.name, tap.flags, tap.existed)

    async def configure_link(
        self,
        name: str,
        *,
        mtu: int | None = None,
        mac: str | None = None,
        queue: int | None = None,
        address: IPv4Interface | None = None,
        gateway: IPv4Address | None = None,
        address6: IPv6Interface | None = None,
        gateway6: IPv6Address | None = None,
        neighbours: Mapping[IPv4Address | IPv6Address, bytes] | None = None,
    ) -> str | None:
        """Set what is given, bring the link and the loopback up, and add the default routes.

        It can be done again.  Addresses are usable when this returns.  Return why there is no IPv6, if it was asked
        for and this namespace or its kernel has none; all else is done then.

        Args:
            name: The name of the link.
            mtu: Its MTU.
            mac: Its link address.
            queue: The length of its transmit queue, in packets.
            address, gateway: An IPv4 address with its network, and the default gateway.
            address6, gateway6: The same of IPv6.  The link accepts no router advertisements then.
            neighbours: Addresses on the link with their link addresses, six bytes each.  The kernel asks nobody for
                them, so that no first burst is lost meanwhile.

        Raises:
            NotPrivileged: Commands have not CAP_NET_ADMIN in the namespace.
            OSError: The kernel refuses something; it names the link.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            Any part may or may not have been done.
        """
        try:
            answer, _ = await self._ask(
                _Configured,
                "configure_link",
                name=name,
                mtu=mtu,
                mac=None if mac is None else mac.replace(":", ""),
                queue=queue,
                address=None if address is None else str(address.ip),
                netmask=None if address is None else str(address.netmask),
                gateway=None if gateway is None else str(gateway),
                ipv6=None
                if address6 is None
                else (str(address6.ip), address6.network.prefixlen, str(gateway6)),
                neighbours={str(each): link.hex() for each, link in (neighbours or {}).items()},
            )
        except PermissionError as exc:
            raise NotPrivileged(
                f"may not configure {name}",
                fix="use a namespace made by create(), or CAP_NET_ADMIN in this one",
            ) from exc
        return answer.without_ipv6


def _socket_here() -> socket.socket:
    """Return a socket for links of the caller's namespace."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, NETLINK_ROUTE)


def _is_tap(fd: int) -> bool:
    """Whether the descriptor is of /dev/net/tun."""
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(TUN_MAJOR, TUN_MINOR)


def _interface(message: Any) -> InterfaceAddress:
    address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    return InterfaceAddress(message["index"], ipaddress.ip_interface(f"{address}/{message['prefixlen']}"))


def _route(message: Any) -> Route:
    anywhere = "0.0.0.0" if message["family"] == socket.AF_INET else "::"
    gateway = message.get_attr("RTA_GATEWAY")
    return Route(
        ipaddress.ip_network(f"{message.get_attr('RTA_DST') or anywhere}/{message['dst_len']}"),
        None if gateway is None else ipaddress.ip_address(gateway),
        message.get_attr("RTA_OIF"),
        message.get_attr("RTA_PRIORITY") or 0,
    )
