"""Every address from one CIDR, as slirp4netns numbers them; and of IPv6 from one prefix."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from types import NoneType

from . import arguments
from .errors import AddressError
from .frozen import field, frozen

DEFAULT_CIDR = "10.0.2.0/24"
DEFAULT_CIDR6 = "fd00::/64"
SMALLEST_IPV6_MTU = 1280  # RFC 8200 5: no kernel speaks IPv6 on a link with less
FIRST_NOT_UNICAST = 224
MAC_PREFIX = b"\x52\x55"
"""Of the gateway's link address: locally administered, followed by its address, as slirp4netns has it."""
_GATEWAY, _DNS, _POOL, _GUEST, _GUEST6 = 2, 3, 15, 100, 0x100
_POOL6, _POOL6_SIZE = 0x1000, 64
LINK_LOCAL = IPv6Address("fe80::2")
"""The gateway's, on the link."""
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
_NAME_MAX = 253


@frozen
class Subnet6:
    """The namespace's IPv6 network, a /64: gateway ::2 and fe80::2, DNS ::3, configured guest ::100, DHCPv6 pool from
    ::1000.

    Router advertisements tell of it.  `managed` and `other` are their flags M and O (RFC 4861 4.2): a DHCPv6 server
    has addresses, or other things to tell.  `autonomous`: guests may make themselves an address (SLAAC, RFC 4862).
    `search`: the domains that names are looked for in (RFC 8106), None for those of the uplink.

    >>> subnet = Subnet6("fd00:7::/64")
    >>> str(subnet.gateway), str(subnet.dns), str(subnet.guest)
    ('fd00:7::2', 'fd00:7::3', 'fd00:7::100')

    Raises `AddressError` for a prefix that no hosts may have, and for a search domain that is no name;
    `ArgumentTypeError` for what has no such type.
    """

    cidr: str
    managed: bool
    other: bool
    autonomous: bool
    search: tuple[str, ...] | None
    network: IPv6Network = field(init=False, compare=False)
    gateway: IPv6Address = field(init=False, compare=False)
    """Ours; on the host's side, its loopback."""
    dns: IPv6Address = field(init=False, compare=False)
    """Where DNS is answered."""
    gateways: tuple[IPv6Address, ...] = field(init=False, compare=False)
    """What means the gateway: its address, and its link-local one."""

    def __init__(
        self,
        cidr: str | IPv6Network = DEFAULT_CIDR6,
        managed: bool = False,
        other: bool = False,
        autonomous: bool = True,
        search: Iterable[str] | None = None,
    ) -> None:
        network = _network6(cidr)
        for name, flag in (("managed", managed), ("other", other), ("autonomous", autonomous)):
            arguments.boolean(name, flag)
        if search is not None:
            arguments.items("search", search, "a list of domains, or None")
            search = tuple(search)
            for domain in search:
                arguments.text("search", domain, "a list of domains")
                if len(domain) > _NAME_MAX or not _NAME.fullmatch(domain):
                    raise AddressError(f"search domain {domain!r} is no name")
        arguments.fill(
            self,
            cidr=str(cidr),
            managed=managed,
            other=other,
            autonomous=autonomous,
            search=search,
            network=network,
            gateway=network[_GATEWAY],
            dns=network[_DNS],
            gateways=(network[_GATEWAY], LINK_LOCAL),
        )

    @property
    def guest(self) -> IPv6Address:
        """The namespace's address."""
        return self.network[_GUEST6]

    @property
    def guest_interface(self) -> IPv6Interface:
        """The namespace's address with the prefix, as its interface has it."""
        return IPv6Interface((self.guest, self.network.prefixlen))

    @property
    def pool(self) -> tuple[IPv6Address, ...]:
        """The addresses that DHCPv6 gives away."""
        return tuple(self.network[_POOL6 + i] for i in range(_POOL6_SIZE))


def _network6(cidr: str | IPv6Network) -> IPv6Network:
    arguments.instance("cidr", cidr, (str, IPv6Network), f"an IPv6 network, like {DEFAULT_CIDR6!r}")
    try:
        network = IPv6Network(cidr)
        if network.network_address.scope_id is not None:
            raise ValueError(cidr)
    except ValueError as error:
        raise AddressError(
            f"{str(cidr)!r} is no IPv6 network: expected PREFIX/64, like {DEFAULT_CIDR6}"
        ) from error
    if network.prefixlen != 64:
        raise AddressError(
            f"{str(cidr)!r}: expected a /64, of which hosts make addresses, like {DEFAULT_CIDR6}"
        )
    if network.is_multicast or network.is_link_local or network.network_address.packed[0] == 0:
        raise AddressError(
            f"{str(cidr)!r}: no host may have these addresses", fix=f"use a network like {DEFAULT_CIDR6}"
        )
    return network


@frozen
class Subnet:
    """The namespace's IPv4 network: gateway .2, DNS .3, DHCP pool from .15, configured guest .100; `ipv6` is the
    other one, if IPv6 is on.

    >>> subnet = Subnet.parse("10.0.135.128/25")
    >>> str(subnet.gateway), str(subnet.dns), str(subnet.guest)
    ('10.0.135.130', '10.0.135.131', '10.0.135.228')
    >>> str(subnet.guest_interface)
    '10.0.135.228/25'
    """

    network: IPv4Network
    ipv6: Subnet6 | None = None
    gateway: IPv4Address = field(init=False, compare=False)
    """Ours; on the host's side, its loopback."""
    dns: IPv4Address = field(init=False, compare=False)
    """Where DNS is answered."""
    gateways: tuple[IPv4Address, ...] = field(init=False, compare=False)
    """What means the gateway."""

    def __post_init__(self) -> None:
        """Raises `ArgumentTypeError` for what is no network: `parse` makes one of text."""
        given: object = self.network
        fix = f"write Subnet.parse({given!r})" if isinstance(given, str) else None
        arguments.instance("network", given, IPv4Network, "an ipaddress.IPv4Network", fix)
        arguments.instance("ipv6", self.ipv6, (Subnet6, NoneType), "a Subnet6, or None")
        gateway, dns = self.network[_GATEWAY], self.network[_DNS]
        arguments.fill(self, gateway=gateway, dns=dns, gateways=(gateway,))

    def __str__(self) -> str:
        return str(self.network) if self.ipv6 is None else f"{self.network} and {self.ipv6.network}"

    @property
    def mac(self) -> bytes:
        """The gateway's link address."""
        return MAC_PREFIX + self.gateway.packed

    @property
    def neighbours(self) -> dict[IPv4Address | IPv6Address, bytes]:
        """Every address of ours, and its link address."""
        ours: list[IPv4Address | IPv6Address] = [self.gateway, self.dns]
        if self.ipv6 is not None:
            ours += [*self.ipv6.gateways, self.ipv6.dns]
        return dict.fromkeys(ours, self.mac)

    def of(self, address: IPv4Address | IPv6Address) -> Subnet | Subnet6 | None:
        """The network of that address's family; None: IPv6 is off."""
        return self if address.version == 4 else self.ipv6

    @property
    def resolvers(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """Where DNS is answered, in both families."""
        return (self.dns,) if self.ipv6 is None else (self.dns, self.ipv6.dns)

    @classmethod
    def parse(cls, cidr: str | IPv4Network, ipv6: bool | Subnet6 = False) -> Subnet:
        """Return the addresses of the network `cidr`; with `ipv6` True, those of `DEFAULT_CIDR6` too.

        Raises `AddressError` unless `cidr` is a network address with a prefix of 1 to 25, `ArgumentTypeError` for
        what has no such type.
        """
        arguments.instance("subnet", cidr, (str, IPv4Network), f"an IPv4 network, like {DEFAULT_CIDR!r}")
        arguments.instance("ipv6", ipv6, (bool, Subnet6), "True, False or a Subnet6")
        cidr = str(cidr)
        try:
            network = IPv4Network(cidr, strict=False)
        except ValueError as error:
            raise AddressError(
                f"{cidr!r} is no IPv4 network: expected ADDRESS/PREFIX, like {DEFAULT_CIDR}"
            ) from error
        if "/" not in cidr or not 1 <= network.prefixlen <= 25:
            raise AddressError(
                f"{cidr!r}: expected a prefix of 1 to 25, so that .100 lies within, like {DEFAULT_CIDR}"
            )
        if str(network.network_address) != cidr.partition("/")[0]:
            raise AddressError(f"{cidr!r}: expected the network's own address, {network}")
        if (
            network.network_address.packed[0] in {0, 127}
            or network.broadcast_address.packed[0] >= FIRST_NOT_UNICAST
        ):
            raise AddressError(
                f"{cidr!r}: no host may have these addresses", fix=f"use a network like {DEFAULT_CIDR}"
            )
        return cls(network, Subnet6() if ipv6 is True else ipv6 or None)

    @property
    def guest(self) -> IPv4Address:
        """The namespace's address."""
        return self.network[_GUEST]

    @property
    def guest_interface(self) -> IPv4Interface:
        """The namespace's address with the prefix, as its interface has it."""
        return IPv4Interface((self.guest, self.network.prefixlen))

    @property
    def pool(self) -> tuple[IPv4Address, ...]:
        """The addresses that DHCP gives away."""
        return tuple(self.network[_POOL + i] for i in range(16))
