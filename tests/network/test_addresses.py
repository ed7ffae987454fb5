"""AddressPool: what members are given, and what they may choose."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from netns_kit import AddressError, Subnet
from netns_kit.network.addresses import AddressPool, address6_of, link_local_of, mac_of

SUBNET = Subnet.parse("10.0.2.0/24", ipv6=True)
FREE = 254 - 3 - 16  # without gateway, DNS, hub and what DHCP leases


def test_every_free_address_is_leased_once() -> None:
    pool = AddressPool(SUBNET)
    leased = [pool.lease() for _ in range(FREE)]
    assert len(set(leased)) == FREE
    assert str(leased[0]) == "10.0.2.101"
    ours = {SUBNET.gateway, SUBNET.dns, SUBNET.guest, *SUBNET.pool}
    assert not ours.intersection(leased)
    assert all(each in SUBNET.network for each in leased)
    assert {IPv4Address("10.0.2.0"), IPv4Address("10.0.2.255")}.isdisjoint(leased)
    with pytest.raises(AddressError, match="choose a larger subnet"):
        pool.lease()
    pool.release(leased[7])
    assert pool.lease() == leased[7]


def test_an_address_that_is_free_again_is_the_last_to_be_leased() -> None:
    pool = AddressPool(SUBNET)
    first = pool.lease()
    pool.release(first)
    assert [pool.lease() for _ in range(FREE)][-1] == first


def test_an_address_is_claimed_by_one() -> None:
    pool = AddressPool(SUBNET)
    assert pool.claim(IPv4Address("10.0.2.20")) == IPv4Address("10.0.2.20"), (
        "one of DHCP's pool may be chosen"
    )
    for taken in ("10.0.2.20", "10.0.2.2", "10.0.2.3", "10.0.2.100", "10.0.2.0", "10.0.2.255"):
        with pytest.raises(AddressError, match="nobody has"):
            pool.claim(IPv4Address(taken))
    with pytest.raises(AddressError, match=r"expected an address of 10\.0\.2\.0/24"):
        pool.claim(IPv4Address("10.0.3.1"))


def test_what_belongs_to_an_address_is_that_of_no_other() -> None:
    large = Subnet.parse("10.0.0.0/16", ipv6=True)
    assert large.ipv6 is not None
    ipv6 = large.ipv6
    addresses = [large.network[number] for number in range(1, 65535)]
    sixes = {address6_of(each, large, ipv6) for each in addresses}
    assert len(sixes) == len(addresses) == len(set(map(mac_of, addresses)))
    assert all(each in ipv6.network for each in sixes)
    assert sixes.isdisjoint({ipv6.gateway, ipv6.dns, ipv6.guest, *ipv6.pool})
    assert str(link_local_of(mac_of(IPv4Address("10.0.2.101")))) == "fe80::5056:aff:fe00:265"
