"""Leasing: the DHCP servers of a subnet, as services of its stack.

The servers are pure and know no stack; the stack asks a service and knows no DHCP.  Here they meet, and here people's
questions about leases are answered.  Where a subnet has no server, because nobody wants one, it has no leases.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

from netns_kit.arguments import Address
from netns_kit.dhcp import Dhcp6Server, DhcpServer, DhcpSettings, Lease, StaticLease, check_static
from netns_kit.dhcp.server import SERVER_PORT
from netns_kit.dhcp.server6 import SERVER_PORT as SERVER_PORT6
from netns_kit.errors import AddressError
from netns_kit.stack import Stack
from netns_kit.subnet import LINK_LOCAL, Subnet, Subnet6


def check(settings: DhcpSettings | None, subnet: Subnet) -> None:
    """Raises `AddressError` if the settings do not fit the subnet."""
    for static in () if settings is None else settings.static:
        _check_static(static, subnet)
    for network, router in () if settings is None else settings.routes:
        if router not in subnet.network:
            raise AddressError(f"the route to {network}: {router} is outside of the subnet {subnet.network}")


def _check_static(static: StaticLease, subnet: Subnet) -> None:
    ours: list[Address] = [subnet.gateway, subnet.dns]
    networks: list[IPv4Network | IPv6Network] = [subnet.network]
    if subnet.ipv6 is not None:
        ours += [subnet.ipv6.gateway, subnet.ipv6.dns]
        networks.append(subnet.ipv6.network)
    check_static(static, networks, ours)


class Leasing:
    """Has `stack` give leases of `subnet` as `settings` say, which `check` has passed; None: it gives none."""

    def __init__(self, stack: Stack, subnet: Subnet, settings: DhcpSettings | None) -> None:
        self._subnet = subnet
        self._servers: dict[int, DhcpServer | Dhcp6Server] = {}  # by the version of IP
        if settings is not None:
            self._servers[4] = stack.services[SERVER_PORT] = DhcpServer(
                settings,
                address=subnet.gateway,
                network=subnet.network,
                pool=subnet.pool,
                dns=subnet.dns,
                mtu=stack.link.mtu,
            )
        if settings is not None and subnet.ipv6 is not None:
            self._servers[6] = stack.services[SERVER_PORT6] = Dhcp6Server(
                settings,
                address=LINK_LOCAL,
                mac=stack.link.mac,
                network=subnet.ipv6.network,
                pool=subnet.ipv6.pool,
                dns=subnet.ipv6.dns,
            )

    def leases(self, now: float) -> tuple[Lease, ...]:
        """Of both families."""
        return tuple(lease for server in self._servers.values() for lease in server.leases.list(now))

    def reserve(self, static: StaticLease) -> None:
        """Keep an address for a client from now on.  Raises `AddressError`."""
        server = self._servers.get(static.address.version)
        if server is None:
            raise AddressError(f"{static.address} cannot be kept for anybody: no DHCP server is running")
        _check_static(static, self._subnet)
        server.leases.reserve(static)

    def revoke(self, address: Address, now: float) -> bool:
        """See `Leases.revoke`."""
        server = self._servers.get(address.version)
        return server is not None and server.leases.revoke(address, now)

    def guest(self, network: Subnet | Subnet6, mac: bytes | None, now: float) -> Address:
        """The namespace's address in one of the networks: the one its interface of that link address was leased last,
        if any, or any client if that is not known; else the configured one."""
        configured = network.guest
        server = self._servers.get(configured.version)
        leased = None if server is None else server.leases.newest(now, mac)
        return configured if leased is None else leased

    def stats(self) -> dict[str, int]:
        """Counters of the servers, by name."""
        return {
            f"dhcp{'' if version == 4 else version}_{name}": count
            for version, server in self._servers.items()
            for name, count in server.stats().items()
        }
