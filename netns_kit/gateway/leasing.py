"""Leasing: the DHCP servers of a subnet, as link services of its gateway.

The DHCP servers are pure and know no stack.  The stack has link services and knows no DHCP.  This module connects
them, and answers questions about leases.  Without DHCP servers there are no leases.
"""

from __future__ import annotations

from netns_kit.arguments import Address
from netns_kit.dhcp import Dhcp6Server, DhcpServer, DhcpSettings, Lease, StaticLease, check_static
from netns_kit.dhcp.server import SERVER_PORT
from netns_kit.dhcp.server6 import SERVER_PORT as SERVER_PORT6
from netns_kit.errors import AddressError
from netns_kit.operations import operation
from netns_kit.stack import LinkDatagram, Stack
from netns_kit.subnet import ROUTER_ADDRESS, Subnet, Subnet6

from .endpoints import Endpoints


def check(settings: DhcpSettings | None, subnet: Subnet) -> None:
    """Check that DHCP settings fit their subnet.

    Raises:
        AddressError: An address in the settings is outside the subnet, or is one of the gateway's.
    """
    for static in () if settings is None else settings.static:
        _check_static(static, subnet)
    for network, router in () if settings is None else settings.routes:
        if router not in subnet.network:
            expected = f"expected a router within the subnet, {subnet.network}"
            raise AddressError(expected, "routes", f"{network} by {router}")


def _check_static(static: StaticLease, subnet: Subnet) -> None:
    ours: list[Address] = [address for each in subnet.families for address in (each.gateway, each.dns)]
    check_static(static, [each.network for each in subnet.families], ours)


class _DhcpEndpoint:
    """A DHCP server as a `LinkService`."""

    def __init__(self, stack: Stack, server: DhcpServer | Dhcp6Server, port: int) -> None:
        self._stack, self._server, self._port = stack, server, port

    def datagram(self, asked: LinkDatagram, now: float) -> bool:
        payload, source, source_port, destination, _, mac = asked
        for reply in self._server.answer(payload, source, source_port, mac, destination, now):
            self._stack.send_datagram(
                LinkDatagram(
                    reply.payload, reply.source, self._port, reply.destination, reply.port, reply.mac
                )
            )
        return True


class Leasing:
    """The leases of a subnet.

    Args:
        stack: The stack that sends the answers.
        endpoints: The registry of link services.
        subnet: The subnet.
        settings: Settings that `check` has passed; None: there are no servers.
    """

    def __init__(
        self, stack: Stack, endpoints: Endpoints, subnet: Subnet, settings: DhcpSettings | None
    ) -> None:
        self._subnet = subnet
        self._servers: dict[int, DhcpServer | Dhcp6Server] = {}  # by version of IP
        if settings is not None:
            self._servers[4] = server = DhcpServer(
                settings,
                address=subnet.gateway,
                network=subnet.network,
                pool=subnet.pool,
                dns=subnet.dns,
                mtu=stack.link.mtu,
            )
            endpoints.serve_link(SERVER_PORT, _DhcpEndpoint(stack, server, SERVER_PORT))
        if settings is not None and subnet.ipv6 is not None:
            self._servers[6] = server6 = Dhcp6Server(
                settings,
                address=ROUTER_ADDRESS,
                mac=stack.link.mac,
                network=subnet.ipv6.network,
                pool=subnet.ipv6.pool,
                dns=subnet.ipv6.dns,
            )
            endpoints.serve_link(SERVER_PORT6, _DhcpEndpoint(stack, server6, SERVER_PORT6))

    @operation()
    def leases(self, now: float) -> tuple[Lease, ...]:
        """Return the leases of both address families."""
        return tuple(lease for server in self._servers.values() for lease in server.leases.list(now))

    @operation()
    def reserve(self, static: StaticLease) -> None:
        """Reserve an address for a client.

        Raises:
            AddressError: No server can assign that address.
        """
        server = self._servers.get(static.address.version)
        if server is None:
            expected = "expected an address of a family with a DHCP server"
            raise AddressError(expected, "static", str(static.address))
        _check_static(static, self._subnet)
        server.leases.reserve(static)

    @operation()
    def revoke(self, address: Address, now: float) -> bool:
        """Revoke a lease, as `Leases.revoke` does.  Return whether there was one."""
        server = self._servers.get(address.version)
        return server is not None and server.leases.revoke(address, now)

    def guest(self, network: Subnet | Subnet6, mac: bytes | None, now: float) -> Address:
        """Return the namespace's address in one of its networks.

        It is the address of the newest lease to the interface with link address `mac`, or to anybody if `mac` is
        None.  Without a lease it is the configured address.
        """
        configured = network.guest
        server = self._servers.get(configured.version)
        leased = None if server is None else server.leases.newest(now, mac)
        return configured if leased is None else leased

    def stats(self) -> dict[str, int]:
        """Return the counters of the servers, by name."""
        return {
            f"dhcp{'' if version == 4 else version}_{name}": count
            for version, server in self._servers.items()
            for name, count in server.stats().items()
        }
