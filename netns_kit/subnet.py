"""Every address of a network from one CIDR, numbered as slirp4netns does; those of IPv6 from one prefix."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from types import NoneType

from . import arguments
from .domain_names import search_list
from .errors import AddressError
from .frozen import field, frozen, replace

DEFAULT_CIDR = "10.0.2.0/24"
DEFAULT_CIDR6 = "fd00::/64"
SMALLEST_IPV6_MTU = 1280  # RFC 8200 5: no kernel speaks IPv6 on a link with less
FIRST_NOT_UNICAST = 224
MAC_PREFIX = b"\x52\x55"
"""First bytes of the gateway's link address, which is locally administered; its IPv4 address follows, as with
slirp4netns."""
_FOR_HOSTS = "a network whose addresses hosts may have"
_GATEWAY, _DNS, _POOL, _GUEST, _GUEST6 = 2, 3, 15, 100, 0x100
_POOL6, _POOL6_SIZE = 0x1000, 64
ROUTER_ADDRESS = IPv6Address("fe80::2")
"""The gateway's link-local address."""


@frozen
class Subnet6:
    """The namespace's IPv6 network, a /64.

    The gateway has ::2 and fe80::2, DNS ::3, the configured guest ::100; the DHCPv6 pool begins at ::1000.  Router
    advertisements announce the prefix.

    Args:
        cidr: The network, as text or as an `ipaddress.IPv6Network`.
        managed: The advertisements' flag M: a DHCPv6 server has addresses (RFC 4861 4.2).
        other: Their flag O: a DHCPv6 server has other settings.
        autonomous: Guests may make themselves an address from the prefix (SLAAC, RFC 4862).
        search: Search domains in the advertisements (RFC 8106).  None: those of the uplink.

    Raises:
        AddressError: The network is no /64, or hosts may not have its addresses.
        DomainNameError: A search domain cannot be one.
        ArgumentTypeError: An argument has another type.

    >>> subnet = Subnet6("fd00:7::/64")
    >>> str(subnet.gateway), str(subnet.dns), str(subnet.guest)
    ('fd00:7::2', 'fd00:7::3', 'fd00:7::100')
    """

    cidr: str
    managed: bool
    other: bool
    autonomous: bool
    search: tuple[str, ...] | None
    network: IPv6Network = field(init=False, compare=False)
    gateway: IPv6Address = field(init=False, compare=False)
    """The gateway's address; it leads to the host's loopback where that is allowed."""
    dns: IPv6Address = field(init=False, compare=False)
    """The address of the DNS server."""
    guest: IPv6Address = field(init=False, compare=False)
    """The namespace's address."""
    gateways: tuple[IPv6Address, ...] = field(init=False, compare=False)
    """The gateway's addresses: the global one and the link-local one."""

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
        gateway, dns, guest = (network[at] for at in (_GATEWAY, _DNS, _GUEST6))
        gateways = gateway, ROUTER_ADDRESS
        arguments.fill(self, locals(), cidr=str(cidr), search=search_list(search))

    @property
    def guest_interface(self) -> IPv6Interface:
        """The namespace's address with the prefix length, as its interface has it."""
        return IPv6Interface((self.guest, self.network.prefixlen))

    @property
    def pool(self) -> tuple[IPv6Address, ...]:
        """The addresses that DHCPv6 assigns."""
        return tuple(self.network[_POOL6 + i] for i in range(_POOL6_SIZE))


def _network6(cidr: str | IPv6Network) -> IPv6Network:
    arguments.instance("cidr", cidr, (str, IPv6Network), f"an IPv6 network, like {DEFAULT_CIDR6!r}")
    try:
        network = IPv6Network(cidr)
        if network.network_address.scope_id is not None:
            raise ValueError(cidr)
    except ValueError as error:
        raise _unusable(cidr, "an IPv6 network, PREFIX/64", DEFAULT_CIDR6) from error
    if network.prefixlen != 64:
        raise _unusable(cidr, "a /64, of which hosts make addresses", DEFAULT_CIDR6)
    if network.is_multicast or network.is_link_local or network.network_address.packed[0] == 0:
        raise _unusable(cidr, _FOR_HOSTS, DEFAULT_CIDR6)
    return network


def _unusable(cidr: str | IPv4Network | IPv6Network, expected: str, example: str) -> AddressError:
    return AddressError(f"expected {expected}, like {example}", "cidr", arguments.shown(str(cidr)))


@frozen
class Subnet:
    """The namespace's IPv4 network, and its IPv6 network if there is one.

    The gateway has .2, DNS .3, the configured guest .100; the DHCP pool begins at .15.  `Subnet.parse` makes one from
    text.

    Raises:
        ArgumentTypeError: An argument has another type.

    >>> subnet = Subnet.parse("10.0.135.128/25")
    >>> str(subnet.gateway), str(subnet.dns), str(subnet.guest)
    ('10.0.135.130', '10.0.135.131', '10.0.135.228')
    >>> str(subnet.guest_interface)
    '10.0.135.228/25'
    """

    network: IPv4Network
    """The IPv4 network."""
    ipv6: Subnet6 | None = None
    """The IPv6 network, None if IPv6 is off."""
    gateway: IPv4Address = field(init=False, compare=False)
    """The gateway's address; it leads to the host's loopback where that is allowed."""
    dns: IPv4Address = field(init=False, compare=False)
    """The address of the DNS server."""
    guest: IPv4Address = field(init=False, compare=False)
    """The namespace's address."""
    gateways: tuple[IPv4Address, ...] = field(init=False, compare=False)
    """The gateway's addresses: the one that it has."""

    def __post_init__(self) -> None:
        given: object = self.network
        fix = f"write Subnet.parse({given!r})" if isinstance(given, str) else None
        arguments.instance("network", given, IPv4Network, "an ipaddress.IPv4Network", fix)
        arguments.instance("ipv6", self.ipv6, (Subnet6, NoneType), "a Subnet6, or None")
        gateway, dns, guest = (self.network[at] for at in (_GATEWAY, _DNS, _GUEST))
        arguments.fill(self, gateway=gateway, dns=dns, guest=guest, gateways=(gateway,))

    def __str__(self) -> str:
        return str(self.network) if self.ipv6 is None else f"{self.network} and {self.ipv6.network}"

    @property
    def mac(self) -> bytes:
        """The gateway's link address."""
        return MAC_PREFIX + self.gateway.packed

    @property
    def neighbours(self) -> dict[IPv4Address | IPv6Address, bytes]:
        """All addresses of the stack, each with its link address."""
        return {address: self.mac for each in self.families for address in (*each.gateways, each.dns)}

    def of(self, address: IPv4Address | IPv6Address) -> Subnet | Subnet6 | None:
        """Return the network of an address's family, None if IPv6 is off.

        Args:
            address: The address.
        """
        return self if address.version == 4 else self.ipv6

    def with_guest(self, guest: IPv4Address, guest6: IPv6Address | None) -> Subnet:
        """Return the same addresses as another guest of the network has them.

        Args:
            guest: The guest's address.
            guest6: Its IPv6 address, None if IPv6 is off.
        """
        ipv6 = self.ipv6
        if ipv6 is not None and guest6 is not None:
            ipv6 = replace(ipv6)
            arguments.fill(ipv6, guest=guest6)
        subnet = Subnet(self.network, ipv6)
        arguments.fill(subnet, guest=guest)
        return subnet

    @property
    def families(self) -> tuple[Subnet | Subnet6, ...]:
        """The network of each family, that of IPv4 first."""
        return (self,) if self.ipv6 is None else (self, self.ipv6)

    @property
    def resolvers(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """The addresses of the DNS server, in both families."""
        return tuple(each.dns for each in self.families)

    @classmethod
    def parse(cls, cidr: str | IPv4Network, ipv6: bool | Subnet6 = False) -> Subnet:
        """Return the addresses of a network.

        Args:
            cidr: The IPv4 network, as text or as an `ipaddress.IPv4Network`, with a prefix length of 1 to 25.
            ipv6: The IPv6 network, True for that of `DEFAULT_CIDR6`, False for none.

        Raises:
            AddressError: The network cannot be used.
            ArgumentTypeError: An argument has another type.
        """
        arguments.instance("subnet", cidr, (str, IPv4Network), f"an IPv4 network, like {DEFAULT_CIDR!r}")
        arguments.instance("ipv6", ipv6, (bool, Subnet6), "True, False or a Subnet6")
        cidr = str(cidr)
        try:
            network = IPv4Network(cidr, strict=False)
        except ValueError as error:
            raise _unusable(cidr, "an IPv4 network, ADDRESS/PREFIX", DEFAULT_CIDR) from error
        first, last = network.network_address, network.broadcast_address
        if "/" not in cidr or not 1 <= network.prefixlen <= 25:
            raise _unusable(cidr, "a prefix of 1 to 25, so that .100 lies within", DEFAULT_CIDR)
        if str(first) != cidr.partition("/")[0]:
            raise _unusable(cidr, "the network's own address", str(network))
        if first.packed[0] in {0, 127} or last.packed[0] >= FIRST_NOT_UNICAST:
            raise _unusable(cidr, _FOR_HOSTS, DEFAULT_CIDR)
        return cls(network, Subnet6() if ipv6 is True else ipv6 or None)

    @property
    def guest_interface(self) -> IPv4Interface:
        """The namespace's address with the prefix length, as its interface has it."""
        return IPv4Interface((self.guest, self.network.prefixlen))

    @property
    def pool(self) -> tuple[IPv4Address, ...]:
        """The addresses that DHCP assigns."""
        return tuple(self.network[_POOL + i] for i in range(16))
