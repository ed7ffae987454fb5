"""What callers give: one kind of address everywhere, and a typed error for what cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, ip_interface

import anyio
import pytest

from netns_kit import (
    DhcpSettings,
    Endpoint,
    Network,
    PortForward,
    Record,
    StaticLease,
    Subnet,
    Subnet6,
    Uplink,
)
from netns_kit.arguments import AddressLike, address
from tests.support import needs_tun, needs_userns

V4, V6 = IPv4Address("10.0.2.100"), IPv6Address("fd00::100")


def ways(given: IPv4Address | IPv6Address, prefix: int) -> list[AddressLike]:
    """One address, in every way that people have it."""
    return [str(given), given, ip_interface(f"{given}/{prefix}")]


ALIKE = [*ways(V4, 24), *ways(V6, 64)]


@pytest.mark.parametrize("given", ALIKE, ids=repr)
def test_text_addresses_and_interfaces_are_alike(given: AddressLike) -> None:
    found = address(given)
    assert found in (V4, V6)
    assert type(found) in (IPv4Address, IPv6Address), "an interface equals no address"
    assert Endpoint(given, 80) == (found, 80)
    assert Record("db.internal", given).value == str(found)
    assert StaticLease(given, client_id="0102").address == found
    forward = PortForward("tcp", given, 80, given, 80)
    assert (forward.host, forward.guest) == (found, found)
    assert Uplink(dns=[given, Endpoint(given, 5353)]).resolvers() == (
        Endpoint(found, 53),
        Endpoint(found, 5353),
    )
    assert Uplink(dns_domains={"corp.example": [given]}).dns_domains == {
        "corp.example": (Endpoint(found, 53),)
    }
    if found.version == 4:
        assert repr(Uplink(bind4=given)) == "Uplink(bind4='10.0.2.100')"
        assert DhcpSettings(routes=[("192.0.2.0/24", given)]).routes == ((IPv4Network("192.0.2.0/24"), V4),)
    else:
        assert repr(Uplink(bind6=given)) == "Uplink(bind6='fd00::100')"


def test_the_addresses_of_a_subnet_are_of_one_kind() -> None:
    subnet = Subnet.parse("10.0.2.0/24", ipv6=True)
    assert subnet.ipv6
    for each in (subnet, subnet.ipv6):
        assert len({type(one) for one in (each.gateway, each.dns, each.guest, *each.pool)}) == 1
        assert each.guest in each.network
        assert each.guest_interface.ip == each.guest
        assert each.guest_interface.network == each.network
    assert Subnet.parse(subnet.network) == Subnet.parse("10.0.2.0/24")
    assert Subnet6(subnet.ipv6.network) == subnet.ipv6


@pytest.mark.anyio
@pytest.mark.parametrize("way", [str, IPv4Address, lambda text: IPv4Interface(f"{text}/24")])
async def test_calls_that_reach_the_guest_take_any_address(way: Callable[[str], AddressLike]) -> None:
    needs_userns()
    needs_tun()
    with anyio.fail_after(30):
        async with Network() as net:
            guest = way(str(net.subnet.guest))
            async with await net.namespace.listen_tcp(guest) as listener:
                port = listener.extra(anyio.abc.SocketAttribute.local_port)
                async with await net.namespace.connect_tcp(guest, port):
                    pass
            await net.stack.reserve(StaticLease(way("10.0.2.50"), mac="02:00:00:00:00:01"))
            assert await net.stack.revoke(way("10.0.2.50"))
            await net.stack.add_record(Record("db.internal", way("10.0.2.50")))
            await net.stack.remove_record("db.internal", value=way("10.0.2.50"))
