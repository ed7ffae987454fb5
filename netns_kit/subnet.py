"""Every address from one CIDR, as slirp4netns numbers them."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from .errors import AddressError

DEFAULT_CIDR = "10.0.2.0/24"
FIRST_NOT_UNICAST = 224
_GATEWAY, _DNS, _POOL, _GUEST = 2, 3, 15, 100


@dataclass(frozen=True, slots=True)
class Subnet:
    """The namespace's IPv4 network: gateway .2, DNS .3, DHCP pool from .15, configured guest .100.

    >>> subnet = Subnet.parse("10.0.135.128/25")
    >>> str(subnet.gateway), str(subnet.dns), str(subnet.guest)
    ('10.0.135.130', '10.0.135.131', '10.0.135.228/25')
    """

    network: IPv4Network
    gateway: IPv4Address = field(init=False, compare=False)
    """Ours; on the host's side, its loopback."""
    dns: IPv4Address = field(init=False, compare=False)
    """Where DNS is answered."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gateway", self.network[_GATEWAY])
        object.__setattr__(self, "dns", self.network[_DNS])

    @classmethod
    def parse(cls, cidr: str) -> Subnet:
        """Raises `AddressError` unless `cidr` is a network address with a prefix of 1 to 25."""
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
        return cls(network)

    @property
    def guest(self) -> IPv4Interface:
        """The namespace's, with the prefix."""
        return IPv4Interface((self.network[_GUEST], self.network.prefixlen))

    @property
    def pool(self) -> tuple[IPv4Address, ...]:
        """The addresses that DHCP gives away."""
        return tuple(self.network[_POOL + i] for i in range(16))
