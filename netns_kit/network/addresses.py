"""AddressPool: which address of a subnet, and which link address, each member of a network has."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from netns_kit.errors import AddressError
from netns_kit.subnet import Subnet, Subnet6

Prefix = IPv4Network | IPv6Network
MAC_PREFIX = b"\x52\x56"
"""First bytes of the link address of a member, which is locally administered; its IPv4 address follows."""
_FIRST6 = 1 << 16  # number of the first IPv6 address, behind those that are fixed or leased by DHCP
_UNIVERSAL = 0x02  # bit that is inverted in an interface identifier (RFC 4291 appendix A)


class AddressPool:
    """The addresses of a subnet that members may have: all but those of the stack, of the hub and of DHCP.

    They are leased in order, and one that is free again last of all: whoever talks to a member that has gone does not
    at once talk to another.

    >>> pool = AddressPool(Subnet.parse("10.0.2.0/24"))
    >>> str(pool.lease()), str(pool.claim(IPv4Address("10.0.2.102"))), str(pool.lease())
    ('10.0.2.101', '10.0.2.102', '10.0.2.103')
    """

    def __init__(self, subnet: Subnet) -> None:
        network = subnet.network
        self._subnet = subnet
        self._fixed = {
            network.network_address, network.broadcast_address, subnet.gateway, subnet.dns, subnet.guest,
        }  # fmt: skip
        self._leased_by_dhcp = frozenset(subnet.pool)
        self._taken: set[IPv4Address] = set()
        self._next = int(subnet.guest) - int(network.network_address) + 1

    def lease(self) -> IPv4Address:
        """Take the next free address.

        Raises:
            AddressError: There is none.
        """
        network = self._subnet.network
        for _ in range(network.num_addresses):
            address = network[self._next % network.num_addresses]
            self._next += 1
            if address not in self._taken | self._fixed and address not in self._leased_by_dhcp:
                self._taken.add(address)
                return address
        fix = f"choose a larger subnet: in {network} all are taken"
        raise AddressError("expected a network with a free address", "subnet", str(network), fix)

    def claim(self, address: IPv4Address) -> IPv4Address:
        """Take a certain address.

        Raises:
            AddressError: It is not of the subnet, or is taken.
        """
        if address not in self._subnet.network:
            raise AddressError(f"expected an address of {self._subnet.network}", "address", str(address))
        if address in self._fixed or address in self._taken:
            fix = "leave it out, and a free one is chosen"
            raise AddressError("expected an address that nobody has", "address", str(address), fix)
        self._taken.add(address)
        return address

    def release(self, address: IPv4Address) -> None:
        """Let others have the address."""
        self._taken.discard(address)


def check_apart(one: Subnet, other: Subnet) -> None:
    """Check that two networks have no address in common.

    Raises:
        AddressError: They have.
    """
    _check_apart("subnet", one.network, other.network, "'10.0.3.0/24'")
    if one.ipv6 is not None and other.ipv6 is not None:
        _check_apart("ipv6", one.ipv6.network, other.ipv6.network, "Subnet6('fd00:3::/64')")


def _check_apart(knob: str, ours: Prefix, theirs: Prefix, example: str) -> None:
    if ours.overlaps(theirs):
        expected = "expected networks without an address in common"
        raise AddressError(expected, knob, f"{ours} and {theirs}", f"give one another, like {knob}={example}")


def mac_of(address: IPv4Address) -> bytes:
    """Return the link address that a member with this address has, unless another is chosen.

    >>> mac_of(IPv4Address("10.0.2.101")).hex(":")
    '52:56:0a:00:02:65'
    """
    return MAC_PREFIX + address.packed


def address6_of(address: IPv4Address, subnet: Subnet, ipv6: Subnet6) -> IPv6Address:
    """Return the IPv6 address that belongs to an address: its number in the network, in decimal digits.

    >>> subnet = Subnet.parse("10.0.2.0/24", ipv6=True)
    >>> str(address6_of(IPv4Address("10.0.2.101"), subnet, subnet.ipv6))
    'fd00::1:101'
    """
    number = int(address) - int(subnet.network.network_address)
    return ipv6.network[_FIRST6 + int(str(number), 16)]


def link_local_of(mac: bytes) -> IPv6Address:
    """Return the link-local address that kernels make of a link address (RFC 4291 appendix A).

    >>> str(link_local_of(bytes.fromhex("52560a000265")))
    'fe80::5056:aff:fe00:265'
    """
    identifier = bytes((mac[0] ^ _UNIVERSAL,)) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return IPv6Address(b"\xfe\x80" + bytes(6) + identifier)
