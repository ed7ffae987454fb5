"""The settings of a DHCP server, and the leases that are reserved for one client each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.domain_names import check_host_name, search_list
from netns_kit.errors import AddressError, ArgumentError, ArgumentTypeError
from netns_kit.frozen import frozen

INFINITE = 0xFFFFFFFF  # seconds, RFC 2131 3.3
CLIENT_ID_MAX = 255  # bytes: of option 61; a DUID has 130 at most
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_ROUTES = "a list of pairs: a network, and the address of its router"


@frozen
class StaticLease:
    """An address that is reserved for one client, known by its MAC or by its client identifier.

    Args:
        address: The address.
        mac: The client's MAC address, like 52:54:00:12:34:56.  Either this or `client_id` is given.
        client_id: DHCPv4's client identifier (option 61, its type first) or DHCPv6's DUID, in hexadecimal digits,
            with or without colons.
        hostname: The name that the client is told, None for none.

    Raises:
        AddressError: The address or the MAC cannot be read.
        DomainNameError: The host name cannot be one.
        ArgumentError: The client identifier cannot be read; or both or none of MAC and identifier are given.
        ArgumentTypeError: An argument has another type.
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
        for name, given in (("mac", mac), ("client_id", client_id)):
            if given is not None:
                arguments.text(name, given)
        if (mac is None) == (client_id is None):
            fix = f"of the client that {address} is for, give either `mac` or `client_id`"
            raise ArgumentError("expected one of MAC and client identifier", "mac", repr(mac), fix)
        if mac is not None:
            mac = mac.lower()
            if not _MAC.fullmatch(mac):
                raise AddressError(
                    "expected a MAC address, like 52:54:00:12:34:56", "mac", arguments.shown(mac)
                )
        if client_id is not None:
            client_id = _identifier(client_id)
        if hostname is not None:
            hostname = check_host_name(hostname, "hostname")
        arguments.fill(self, locals())


@frozen
class DhcpSettings:
    """The settings of a namespace's DHCP server, beside those that follow from the subnet.

    Args:
        lease_seconds: Length of a lease, from 1 to `INFINITE` (0xffffffff), which never ends.  A client may ask for a
            shorter one, down to a minute.
        domain: The domain name that clients are told, "" for none.
        search: The search domains that clients are told.  None: those of the uplink.
        routes: Pairs of a network and the address of its router, in the namespace's subnet.  The default route is
            always there.
        static: The leases that are reserved for one client each, within the subnet, inside or outside of the pool.

    Raises:
        AddressError: A network or an address cannot be read, or two reservations have the same address.
        DomainNameError: A domain cannot be one.
        ArgumentError: The seconds are out of range.
        ArgumentTypeError: An argument has another type.
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
        arguments.items("routes", routes, _ROUTES)
        arguments.items("static", static, "a list of StaticLease")
        static = tuple(static)
        seen = set[Address]()
        for each in static:
            arguments.instance("static", each, StaticLease, "a list of StaticLease")
            if each.address in seen:
                raise AddressError("expected one client for each address", "static", str(each.address))
            seen.add(each.address)
        domain = check_host_name(domain, "domain") if domain else ""
        arguments.fill(self, locals(), search=search_list(search), routes=tuple(map(_route, routes)))


def _route(route: tuple[str | IPv4Network, AddressLike]) -> tuple[IPv4Network, IPv4Address]:
    arguments.instance("routes", route, tuple, _ROUTES)
    if len(route) != 2:
        raise ArgumentTypeError(f"expected {_ROUTES}", "routes", arguments.shown(route))
    network, router = route
    arguments.instance("routes", network, (str, IPv4Network), _ROUTES)
    address = arguments.address(router, "routes", version=4)
    assert isinstance(address, IPv4Address)
    try:
        return IPv4Network(network), address
    except ValueError as error:
        raise AddressError(f"expected a network ({error})", "routes", arguments.shown(network)) from error


def check_static(
    lease: StaticLease, networks: Iterable[IPv4Network | IPv6Network], ours: Iterable[Address]
) -> None:
    """Raise `AddressError` unless a client in these networks can have the lease's address."""
    address = lease.address
    networks = tuple(networks)
    for network in networks:
        if address in network:
            ends = {network.network_address, network.broadcast_address}
            if address in ours or address in ends:
                raise AddressError("expected an address that a client can have", "address", str(address))
            return
    subnet = " or ".join(map(str, networks))
    raise AddressError(f"expected an address within the subnet, {subnet}", "address", str(address))


def _identifier(text: str) -> str:
    """Return the identifier in lower case, with colons between the bytes."""
    try:
        identifier = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        identifier = b""
    if not 2 <= len(identifier) <= CLIENT_ID_MAX:
        raise ArgumentError(
            f"expected 2 to {CLIENT_ID_MAX} bytes in hexadecimal digits", "client_id", arguments.shown(text)
        )
    return identifier.hex(":")


DEFAULT = DhcpSettings()
