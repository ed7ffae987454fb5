"""Subnet: every address from one CIDR."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, IPv6Network, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.errors import AddressError, DomainNameError
from netns_kit.subnet import DEFAULT_CIDR, Subnet, Subnet6


def test_the_default_is_slirps() -> None:
    subnet = Subnet.parse(DEFAULT_CIDR)
    assert str(subnet.gateway) == "10.0.2.2"
    assert str(subnet.dns) == "10.0.2.3"
    assert subnet.guest == IPv4Address("10.0.2.100")
    assert subnet.guest_interface == IPv4Interface("10.0.2.100/24")
    assert subnet.pool == tuple(IPv4Address(f"10.0.2.{last}") for last in range(15, 31))


@pytest.mark.parametrize("cidr", ["10.0.0.0/8", "192.168.7.0/25", "192.168.7.128/25", "172.16.0.0/12"])
def test_every_size(cidr: str) -> None:
    subnet = Subnet.parse(cidr)
    assert str(subnet.network) == cidr
    assert int(subnet.gateway) - int(subnet.network.network_address) == 2
    addresses = {subnet.gateway, subnet.dns, subnet.guest, *subnet.pool}
    assert len(addresses) == 3 + len(subnet.pool)
    assert all(address in subnet.network for address in addresses)
    assert subnet.network.broadcast_address not in addresses


@pytest.mark.parametrize(
    "cidr",
    [
        "", "10.0.2.0", "10.0.2.0/", "10.0.2.0/26", "10.0.2.0/32", "10.0.2.0/0", "10.0.2.0/33", "10.0.2.0/-1",
        "10.0.2.5/24", "10.0.2.64/25", "10.0.2/24", "fd00::/64", "::/0", "ten/24", "10.0.2.0/24 ", " 10.0.2.0/24",
        "10.0.2.0/24/24", "010.0.2.0/24",
    ],
)  # fmt: skip
def test_what_is_no_subnet(cidr: str) -> None:
    with pytest.raises(AddressError) as caught:
        Subnet.parse(cidr)
    assert repr(cidr) in str(caught.value)


@pytest.mark.parametrize("cidr", ["127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/24", "0.0.0.0/8", "0.0.0.0/1"])
def test_addresses_no_host_may_have(cidr: str) -> None:
    with pytest.raises(AddressError):
        Subnet.parse(cidr)


@given(st.text(alphabet="0123456789./", max_size=20))
def test_only_one_error_is_raised(cidr: str) -> None:
    try:
        subnet = Subnet.parse(cidr)
    except AddressError:
        return
    assert subnet.guest in subnet.network


# -- IPv6 ---------------------------------------------------------------------------------------------


def test_ipv6_is_off_unless_it_is_asked_for() -> None:
    subnet = Subnet.parse(DEFAULT_CIDR)
    assert subnet.ipv6 is None
    assert Subnet.parse(DEFAULT_CIDR, False) == subnet
    assert subnet.resolvers == (subnet.dns,)
    assert subnet.families == (subnet,)
    assert (subnet.of(ip_address("10.0.2.2")), subnet.of(ip_address("::1"))) == (subnet, None)


def test_ipv6_as_slirp_has_it() -> None:
    subnet = Subnet.parse(DEFAULT_CIDR, True)
    ipv6 = subnet.ipv6
    assert ipv6 == Subnet6()
    assert ipv6.network == IPv6Network("fd00::/64")
    assert ipv6.gateways == (IPv6Address("fd00::2"), IPv6Address("fe80::2"))
    assert (ipv6.gateway, ipv6.dns, ipv6.guest) == (
        IPv6Address("fd00::2"),
        IPv6Address("fd00::3"),
        IPv6Address("fd00::100"),
    )
    assert ipv6.guest_interface == IPv6Interface("fd00::100/64")
    assert subnet.resolvers == (subnet.dns, ipv6.dns)
    assert subnet.families == (subnet, ipv6)
    assert subnet.of(ip_address("2001:db8::1")) is ipv6


def test_another_prefix() -> None:
    ipv6 = Subnet6("2001:db8:7:8::/64", search=("example.com", "a-b.example.org."))
    assert str(ipv6.guest_interface) == "2001:db8:7:8::100/64"
    assert Subnet.parse(DEFAULT_CIDR, ipv6).ipv6 is ipv6


@pytest.mark.parametrize(
    "cidr",
    [
        "", "fd00::", "fd00::/48", "fd00::/65", "fd00::/128", "fd00::1/64", "10.0.2.0/24", "::/64", "::ffff:0:0/64",
        "fe80::/64", "ff02::/64", "64:ff9b::/64", "fd00::/64 ", "fd00::%lo/64",
    ],
)  # fmt: skip
def test_what_is_no_ipv6_subnet(cidr: str) -> None:
    with pytest.raises(AddressError) as caught:
        Subnet6(cidr)
    assert repr(cidr) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", ".", "a..b", "-a", "a-", "a b", "a/b", "\u00e4", "a" * 64, ".".join(["a" * 60] * 5)]
)
def test_what_is_no_search_domain(name: str) -> None:
    with pytest.raises(DomainNameError, match=r"search=.*expected a domain name"):
        Subnet6(search=(name,))
