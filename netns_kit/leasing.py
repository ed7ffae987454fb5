"""Leasing: the DHCP servers of a subnet, as services of its stack.

The servers are pure and know no stack; the stack asks a service and knows no DHCP.  Here they meet, and here people's
questions about leases are answered.  Where a subnet has no server, because nobody wants one, it has no leases.
"""

from __future__ import annotations

from .dhcp import Address, DhcpServer, DhcpSettings, Lease, StaticLease, check_static
from .dhcp.server import SERVER_PORT
from .errors import AddressError
from .stack import Stack
from .subnet import Subnet


def check(settings: DhcpSettings | None, subnet: Subnet) -> None:
    """Raises `AddressError` if the settings do not fit the subnet."""
    for static in () if settings is None else settings.static:
        check_static(static, (subnet.network,), (subnet.gateway, subnet.dns))
    for network, router in () if settings is None else settings.routes:
        if router not in subnet.network:
            raise AddressError(f"the route to {network}: {router} is outside of the subnet {subnet.network}")


class Leasing:
    """Has `stack` give leases of `subnet` as `settings` say; None: it gives none.  Raises what `check` does."""

    def __init__(self, stack: Stack, subnet: Subnet, settings: DhcpSettings | None) -> None:
        check(settings, subnet)
        self._subnet = subnet
        self._servers: dict[int, DhcpServer] = {}  # by the version of IP
        if settings is not None:
            self._servers[4] = stack.services[SERVER_PORT] = DhcpServer(
                settings,
                address=subnet.gateway,
                network=subnet.network,
                pool=subnet.pool,
                dns=subnet.dns,
                mtu=stack.link.mtu,
            )

    def leases(self, now: float) -> tuple[Lease, ...]:
        """Of both families."""
        return tuple(lease for server in self._servers.values() for lease in server.leases.list(now))

    def reserve(self, static: StaticLease) -> None:
        """Keep an address for a client from now on.  Raises `AddressError`."""
        server = self._servers.get(static.address.version)
        if server is None:
            raise AddressError(f"{static.address} cannot be kept for anybody: no DHCP server is running")
        check_static(static, (self._subnet.network,), (self._subnet.gateway, self._subnet.dns))
        server.leases.reserve(static)

    def revoke(self, address: Address, now: float) -> bool:
        """See `Leases.revoke`."""
        server = self._servers.get(address.version)
        return server is not None and server.leases.revoke(address, now)

    def guest(self, mac: bytes | None, now: float) -> Address:
        """The namespace's IPv4 address: the one its interface of that link address was leased last, if any, or any
        client if that is not known; else the configured one."""
        server = self._servers.get(4)
        leased = None if server is None else server.leases.newest(now, mac)
        return self._subnet.guest.ip if leased is None else leased

    def stats(self) -> dict[str, int]:
        """Counters of the servers, by name."""
        return {
            f"dhcp{'' if version == 4 else version}_{name}": count
            for version, server in self._servers.items()
            for name, count in server.stats().items()
        }
