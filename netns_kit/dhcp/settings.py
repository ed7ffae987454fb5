"""What a DHCP server is told: settings, and leases kept for somebody."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.errors import AddressError, ArgumentTypeError
from netns_kit.frozen import frozen

from . import names

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

    address: IPv4Address | IPv6Address
    mac: str | None
    client_id: str | None
    hostname: str | None

    def __init__(
        self,
        address: AddressLike,
        mac: str | None = None,
        client_id: str | None = None,
        hostname: str | None = None,
    ) -> None:
        address = arguments.address(address)
        for name, given in (("mac", mac), ("client_id", client_id), ("hostname", hostname)):
            if given is not None:
                arguments.text(name, given)
        if (mac is None) == (client_id is None):
            raise AddressError(
                f"a lease of {address} needs to know its client", fix="give either mac or client_id"
            )
        if mac is not None:
            mac = mac.lower()
            if not _MAC.fullmatch(mac):
                raise AddressError(f"{mac!r} is no MAC address", fix="write it like 52:54:00:12:34:56")
        if client_id is not None:
            client_id = _identifier(client_id)
        if hostname is not None:
            hostname = names.check(hostname)
        arguments.fill(self, address=address, mac=mac, client_id=client_id, hostname=hostname)


@frozen
class DhcpSettings:
    """What the DHCP server of a namespace gives its clients, beside what the subnet says.

    `lease_seconds`: how long a lease is; a client that asks for less has less, a minute or more; `INFINITE`
    (0xffffffff) never ends.  `domain`: of the client.  `search`: the domains in which it looks up names; None: those
    of the uplink.  `routes`: networks, and through which address of the namespace's subnet they are reached; the
    default route goes without saying.  `static`: who always gets which address, within the subnet, in the pool or
    not.  Raises `AddressError` for what is none, `ArgumentError` for seconds
    out of range, `ArgumentTypeError` for what has no such type.
    """

    lease_seconds: int
    domain: str
    search: tuple[str, ...] | None
    routes: tuple[tuple[IPv4Network, IPv4Address], ...]
    static: tuple[StaticLease, ...]

    def __init__(
        self,
        lease_seconds: int = 86400,
        domain: str = "",
        search: Iterable[str] | None = None,
        routes: Iterable[tuple[str | IPv4Network, AddressLike]] = (),
        static: Iterable[StaticLease] = (),
    ) -> None:
        arguments.whole_number("lease_seconds", lease_seconds, 1, INFINITE)
        arguments.text("domain", domain)
        arguments.items("routes", routes, "a list of pairs: a network, and an address that leads there")
        arguments.items("static", static, "a list of StaticLease")
        if search is not None:
            arguments.items("search", search, "a list of domains, or None")
            search = tuple(map(names.check, search))
        static = tuple(static)
        for each in static:
            arguments.instance("static", each, StaticLease, "a list of StaticLease")
        if len({each.address for each in static}) < len(static):
            raise AddressError(
                "an address is kept for two clients", fix="give each client an address of its own"
            )
        arguments.fill(
            self,
            lease_seconds=lease_seconds,
            domain=names.check(domain) if domain else "",
            search=search,
            routes=tuple(map(_route, routes)),
            static=static,
        )


def _route(route: tuple[str | IPv4Network, AddressLike]) -> tuple[IPv4Network, IPv4Address]:
    expected = "a list of pairs: a network, and an address that leads there"
    arguments.instance("routes", route, tuple, expected)
    if len(route) != 2:
        raise ArgumentTypeError(f"expected {expected}", "routes", arguments.shown(route))
    network, router = route
    arguments.instance("routes", network, (str, IPv4Network), expected)
    address = arguments.address(router, f"the router to {network}", version=4)
    assert isinstance(address, IPv4Address)
    try:
        return IPv4Network(network), address
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


DEFAULT = DhcpSettings()
