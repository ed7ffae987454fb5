"""What a DHCP server is told: settings, and leases kept for somebody."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias

from netns_kit.errors import AddressError
from netns_kit.frozen import frozen

from . import names

Address: TypeAlias = IPv4Address | IPv6Address
INFINITE = 0xFFFFFFFF  # seconds, RFC 2131 3.3
CLIENT_ID_MAX = 255  # bytes: of option 61; a DUID has 130 at most
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@frozen
class StaticLease:
    """An address kept for one client: whoever has that `mac`, or that `client_id`.

    `client_id` is DHCPv4's client identifier (option 61, its type first) or DHCPv6's DUID, in hexadecimal, with or
    without colons.  `hostname` is the name that the client is told.  Raises `AddressError` for what is no MAC, no
    identifier or no name, and for none of the two.
    """

    address: Address
    mac: str | None = None
    client_id: str | None = None
    hostname: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", _address(self.address))
        if (self.mac is None) == (self.client_id is None):
            raise AddressError(f"a lease of {self.address} is for whom?", fix="give either mac or client_id")
        if self.mac is not None:
            object.__setattr__(self, "mac", self.mac.lower())
            if not _MAC.fullmatch(self.mac):
                raise AddressError(f"{self.mac!r} is no MAC address", fix="write it like 52:54:00:12:34:56")
        if self.client_id is not None:
            object.__setattr__(self, "client_id", _identifier(self.client_id))
        if self.hostname is not None:
            object.__setattr__(self, "hostname", names.check(self.hostname))


@frozen
class DhcpSettings:
    """What the DHCP server of a namespace gives its clients, beside what the subnet says.

    `lease_seconds`: how long a lease is; a client that asks for less has less, a minute or more; `INFINITE`
    (0xffffffff) never ends.  `domain`: of the client.  `search`: the domains in which it looks up names; None: those
    of the uplink.  `routes`: networks, and through which address of the namespace's subnet they are reached; the
    default route goes without saying.  `static`: who always gets which address, within the subnet, in the pool or
    not.  Raises `AddressError` for what is none, ValueError for seconds out of range.
    """

    lease_seconds: int = 86400
    domain: str = ""
    search: tuple[str, ...] | None = None
    routes: tuple[tuple[IPv4Network, IPv4Address], ...] = ()
    static: tuple[StaticLease, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.lease_seconds <= INFINITE:
            raise ValueError(f"lease_seconds={self.lease_seconds!r}: expected 1 to {INFINITE}")
        if isinstance(self.search, str):
            raise TypeError(f"search {self.search!r} is not a list of domains: write [{self.search!r}]")
        if self.domain:
            object.__setattr__(self, "domain", names.check(self.domain))
        if self.search is not None:
            object.__setattr__(self, "search", tuple(map(names.check, self.search)))
        object.__setattr__(self, "routes", tuple(_route(*each) for each in self.routes))
        object.__setattr__(self, "static", tuple(self.static))
        if len({each.address for each in self.static}) < len(self.static):
            raise AddressError("an address is kept for two clients")


DEFAULT = DhcpSettings()


def _address(address: Address | str) -> Address:
    try:
        return ip_address(address)
    except ValueError as error:
        raise AddressError(f"{address!r} is no address", fix="write it like 10.0.2.50") from error


def _route(network: IPv4Network | str, router: IPv4Address | str) -> tuple[IPv4Network, IPv4Address]:
    try:
        return IPv4Network(network), IPv4Address(router)
    except ValueError as error:
        raise AddressError(f"the route to {network} through {router}: {error}") from error


def check_static(
    lease: StaticLease, networks: Iterable[IPv4Network | IPv6Network], ours: Iterable[Address]
) -> None:
    """Raises `AddressError` for an address that no client of these networks can have."""
    address = lease.address
    for network in networks:
        if address in network:
            ends = {network.network_address, network.broadcast_address}
            if address in ours or address in ends:
                raise AddressError(f"{address} cannot be an address of the namespace")
            return
    raise AddressError(
        f"{address} is outside of the namespace's subnet", fix="choose an address within the subnet"
    )


def _identifier(text: str) -> str:
    """Colons between the bytes, in lower case."""
    try:
        identifier = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        identifier = b""
    if not 2 <= len(identifier) <= CLIENT_ID_MAX:
        raise AddressError(
            f"{text!r} is no client identifier", fix=f"write 2 to {CLIENT_ID_MAX} bytes in hexadecimal"
        )
    return identifier.hex(":")
