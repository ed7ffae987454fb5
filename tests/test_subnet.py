"""Subnet: every address from one CIDR."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.errors import AddressError
from netns_kit.subnet import DEFAULT_CIDR, Subnet


def test_the_default_is_slirps() -> None:
    subnet = Subnet.parse(DEFAULT_CIDR)
    assert str(subnet.gateway) == "10.0.2.2"
    assert str(subnet.dns) == "10.0.2.3"
    assert subnet.guest == IPv4Interface("10.0.2.100/24")
    assert subnet.pool == tuple(IPv4Address(f"10.0.2.{last}") for last in range(15, 31))


@pytest.mark.parametrize("cidr", ["10.0.0.0/8", "192.168.7.0/25", "192.168.7.128/25", "172.16.0.0/12"])
def test_every_size(cidr: str) -> None:
    subnet = Subnet.parse(cidr)
    assert str(subnet.network) == cidr
    assert int(subnet.gateway) - int(subnet.network.network_address) == 2
    addresses = {subnet.gateway, subnet.dns, subnet.guest.ip, *subnet.pool}
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
    assert subnet.guest.ip in subnet.network
