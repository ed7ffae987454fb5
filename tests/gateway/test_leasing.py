"""Leases, asked for and changed from Python, on every driver; and what they mean for forwarded ports."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import get_args

import anyio
import pytest

from netns_kit import (
    AddressError,
    DhcpSettings,
    DnsSettings,
    Lease,
    StaticLease,
    TapDevice,
    Uplink,
    UserStack,
)
from netns_kit.arguments import Address
from netns_kit.dhcp import message as m
from netns_kit.dhcp import message6 as m6
from netns_kit.dhcp.message import Message, parse
from netns_kit.dhcp.server import SERVER_PORT
from netns_kit.domain_names import pack_compressed, to_wire
from netns_kit.frozen import replace
from netns_kit.gateway.endpoints import Endpoints
from netns_kit.gateway.engine import Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.leasing import Leasing, check
from netns_kit.gateway.setup import DriverName, Setup
from netns_kit.stack import LinkDatagram, Stack
from netns_kit.stack.wire import ethernet, ip, udp
from netns_kit.subnet import Subnet, Subnet6
from netns_kit.tap.frame_device import FRAME_MAX
from tests.support.servers import SECONDS
from tests.support.stack import Users, pseudo_header, rfc1071

pytestmark = pytest.mark.usefixtures("leaks")

SUBNET = Subnet.parse("10.0.2.0/24")
MAC, OTHER_MAC = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02"


def host(number: int) -> IPv4Address:
    return SUBNET.network[number]


def frame(message: Message) -> bytes:
    """From a client without an address, to all."""
    payload = message.pack()
    datagram = udp.HEADER.pack(68, 67, 8 + len(payload), 0) + payload
    header = ip.pack(bytes(4) + b"\xff" * 4, ip.UDP, len(datagram))
    return ethernet.pack(ethernet.BROADCAST, message.chaddr, ethernet.IPV4) + header + datagram


def request(kind: int, mac: bytes = MAC) -> Message:
    return Message(m.REQUEST, 7, mac, options={m.TYPE: bytes((kind,)), m.RAPID_COMMIT: b""})


async def answer(guest: TapDevice, asked: Message) -> Message:
    guest.write(frame(asked))
    await anyio.wait_readable(guest.fileno())
    buffer = memoryview(bytearray(2048))
    size = guest.read_into(buffer)
    return parse(bytes(buffer[ethernet.SIZE + ip.IPV4_SIZE + udp.SIZE : size]))


@pytest.mark.anyio
@pytest.mark.parametrize("driver", get_args(DriverName))
async def test_leases_are_seen_and_changed_on_every_driver(driver: DriverName) -> None:
    settings = DhcpSettings(lease_seconds=600, static=(StaticLease(host(60), client_id="0102"),))
    guest, tap = TapDevice.pair(vnet_header=False)
    with anyio.fail_after(SECONDS):
        async with guest, tap, UserStack(tap, dhcp=settings, driver=driver) as stack:
            reserved = Lease(host(60), "reserved", "01:02", "", "", None)
            assert await stack.leases() == (reserved,)

            assert (await answer(guest, request(m.DISCOVER))).yiaddr == host(15)
            bound, *rest = await stack.leases()
            assert (bound.address, bound.state, bound.mac) == (host(15), "bound", MAC.hex(":"))
            assert bound.seconds is not None
            assert 0 < bound.seconds <= 600
            assert rest == [reserved]

            await stack.reserve(StaticLease(host(61), mac=MAC.hex(":"), hostname="web"))
            renewing = replace(request(m.REQUEST_ADDRESS), ciaddr=host(15))
            assert (await answer(guest, renewing)).type == m.NAK
            ack = await answer(guest, request(m.DISCOVER))
            assert (ack.yiaddr, ack.options[m.HOSTNAME]) == (host(61), b"web")

            assert await stack.revoke(host(61))
            assert not await stack.revoke(host(61))
            assert not await stack.revoke(IPv6Address("fd00::15"))
            assert [each.state for each in await stack.leases()] == ["revoked", "reserved"]
            with pytest.raises(AddressError, match="expected an address within the subnet"):
                await stack.reserve(StaticLease(IPv4Address("10.0.3.1"), mac=MAC.hex(":")))
            stats = await stack.stats()
            assert (stats["dhcp_sent_ack"], stats["dhcp_sent_nak"]) == (2, 1)


# -- the namespace's address ----------------------------------------------------------------------------


class Link:
    """A stack with leases, and clients without a sound."""

    def __init__(self, settings: DhcpSettings | None, subnet: Subnet = SUBNET) -> None:
        ours: list[Address] = [subnet.gateway, subnet.dns]
        if subnet.ipv6 is not None:
            ours += [*subnet.ipv6.gateways, subnet.ipv6.dns]
        self.stack = Stack(
            Users(),
            lambda *_: None,
            addresses=tuple(each.packed for each in ours),
            mac=bytes(6),
            mtu=1500,
            secret=bytes(16),
        )
        endpoints = Endpoints()
        self.leasing = Leasing(self.stack, endpoints, subnet, settings)
        self.stack.services = endpoints.link

    def lease(self, mac: bytes, now: float) -> None:
        self.stack.receive(memoryview(frame(request(m.DISCOVER, mac))), now)


def test_the_namespace_is_where_its_interface_was_leased_an_address_last() -> None:
    link = Link(DhcpSettings(lease_seconds=100))
    assert link.leasing.guest(SUBNET, MAC, 0) == SUBNET.guest
    link.lease(OTHER_MAC, 0)
    assert link.leasing.guest(SUBNET, MAC, 0) == SUBNET.guest
    assert link.leasing.guest(SUBNET, None, 0) == host(15)
    link.lease(MAC, 1)
    assert link.leasing.guest(SUBNET, MAC, 1) == link.leasing.guest(SUBNET, None, 1) == host(16)
    link.lease(OTHER_MAC, 2)
    assert link.leasing.guest(SUBNET, MAC, 2) == host(16)
    assert link.leasing.guest(SUBNET, None, 2) == host(15)
    assert link.leasing.guest(SUBNET, MAC, 101) == SUBNET.guest
    assert link.leasing.guest(SUBNET, None, 102) == SUBNET.guest


def test_an_offer_is_no_lease() -> None:
    link = Link(DhcpSettings())
    discover = request(m.DISCOVER)
    del discover.options[m.RAPID_COMMIT]
    link.stack.receive(memoryview(frame(discover)), 0)
    assert [each.state for each in link.leasing.leases(0)] == ["offered"]
    assert link.leasing.guest(SUBNET, MAC, 0) == SUBNET.guest


def test_ipv6_has_leases_of_its_own() -> None:
    both = Subnet.parse("10.0.2.0/24", ipv6=True)
    assert both.ipv6 is not None
    link = Link(DhcpSettings(static=(StaticLease(IPv6Address("fd00::50"), mac=MAC.hex(":")),)), both)
    asked = m6.pack_association(m6.Association(m6.IA_NA, b"1234", ()), [])
    duid = (m6.CLIENT_ID, b"\0\x03\0\x01" + MAC)
    payload = m6.Message6(m6.SOLICIT, b"xid", [duid, asked, (m6.RAPID_COMMIT, b"")]).pack()
    addresses = IPv6Address("fe80::1").packed + IPv6Address("ff02::1:2").packed
    datagram = udp.HEADER.pack(546, 547, 8 + len(payload), 0) + payload
    check = rfc1071(pseudo_header(addresses, ip.UDP, len(datagram)) + datagram)
    datagram = datagram[:6] + check.to_bytes(2, "big") + datagram[8:]
    head = ethernet.pack(bytes.fromhex("333300010002"), MAC, ethernet.IPV6)
    assert link.leasing.guest(both.ipv6, MAC, 0) == IPv6Address("fd00::100")
    link.stack.receive(memoryview(head + ip.pack(addresses, ip.UDP, len(datagram), ttl=1) + datagram), 0)
    assert [each.address for each in link.leasing.leases(0)] == [IPv6Address("fd00::50")]
    assert link.leasing.guest(both.ipv6, MAC, 0) == IPv6Address("fd00::50")
    assert link.leasing.guest(SUBNET, MAC, 0) == SUBNET.guest
    assert link.leasing.stats()["dhcp6_sent_reply"] == 1
    assert link.leasing.revoke(IPv6Address("fd00::50"), 0)
    link.leasing.reserve(StaticLease(IPv6Address("fd00::51"), mac=MAC.hex(":")))
    for ours in "fd00::2", "fd00::3", "fe80::2", "fd01::1":
        with pytest.raises(AddressError):
            link.leasing.reserve(StaticLease(IPv6Address(ours), mac=MAC.hex(":")))


def test_leases_of_ipv6_wait_where_a_namespace_turns_out_to_have_none() -> None:
    link = Link(DhcpSettings(static=(StaticLease(IPv6Address("fd00::50"), mac=MAC.hex(":")),)))
    assert link.leasing.leases(0) == ()
    link.lease(MAC, 0)
    assert [each.address for each in link.leasing.leases(0)] == [host(15)]


def test_without_a_server() -> None:
    link = Link(None)
    link.lease(MAC, 0)
    assert link.stack.dropped == {"udp-broadcast": 1}
    assert link.leasing.leases(0) == ()
    assert link.leasing.stats() == {}
    assert link.leasing.guest(SUBNET, MAC, 0) == SUBNET.guest
    assert not link.leasing.revoke(host(15), 0)
    with pytest.raises(AddressError, match="family with a DHCP server"):
        link.leasing.reserve(StaticLease(host(50), client_id="0102"))


@pytest.mark.anyio
async def test_settings_that_do_not_fit_raise_at_once() -> None:
    guest, tap = TapDevice.pair()
    async with guest, tap:
        settings = DhcpSettings(static=(StaticLease(IPv4Address("10.0.3.1"), client_id="0102"),))
        with pytest.raises(AddressError, match=r"expected a.* within the subnet"):
            UserStack(tap, dhcp=settings)
        UserStack(tap, dhcp=settings, subnet="10.0.3.0/24")


# -- settings that do not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2, 3, 255])
def test_addresses_that_nobody_can_have(number: int) -> None:
    settings = DhcpSettings(static=(StaticLease(host(number), client_id="0102"),))
    with pytest.raises(AddressError, match="expected an address that a client can have"):
        check(settings, SUBNET)


@pytest.mark.parametrize(
    "settings",
    [
        DhcpSettings(static=(StaticLease(IPv4Address("10.0.3.1"), client_id="0102"),)),
        DhcpSettings(static=(StaticLease(IPv6Address("fd00::50"), client_id="0102"),)),
        DhcpSettings(routes=((IPv4Network("192.0.2.0/24"), IPv4Address("10.0.3.1")),)),
    ],
)
def test_addresses_elsewhere(settings: DhcpSettings) -> None:
    with pytest.raises(AddressError, match=r"expected a.* within the subnet"):
        check(settings, SUBNET)


# -- search domains -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "given6", "told", "told6"),
    [
        (None, None, ("corp.example", "example.com"), ("corp.example", "example.com")),
        (("a.example",), ("b.example",), ("a.example",), ("b.example",)),
        ((), (), (), ()),
    ],
)
def test_search_domains_are_the_uplinks_unless_others_are_given(
    given: tuple[str, ...] | None,
    given6: tuple[str, ...] | None,
    told: tuple[str, ...],
    told6: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is no name of a host's, such as a command in a shell, is told to nobody."""
    near, far = TapDevice.pair()
    engine, uplink = Engine(), Uplink(dns=DnsSettings(search=["corp.example", "$(reboot)", "example.com"]))
    subnet = Subnet.parse("10.0.2.0/24", Subnet6(search=given6))
    gateway = Gateway(engine, Setup(near, uplink, subnet, dhcp=DhcpSettings(search=given)))
    try:
        discover = request(m.DISCOVER)
        discover.options[m.WANTED] = bytes((m.SEARCH,))
        everybody = b"\xff" * 4
        asked = LinkDatagram(discover.pack(), bytes(4), 68, everybody, SERVER_PORT, MAC)
        sent: list[LinkDatagram] = []
        monkeypatch.setattr(gateway.stack, "send_datagram", sent.append)
        assert gateway.stack.services[SERVER_PORT].datagram(asked, 0.0)
        assert parse(sent[0].payload).options.get(m.SEARCH, b"") == pack_compressed(told)
        for now in (0.0, 10.0):
            gateway.stack.handle_timers(now)
        advertised = memoryview(bytearray(FRAME_MAX))
        assert far.read_into(advertised)
        assert all(to_wire(name) in bytes(advertised) for name in told6)
        assert [to_wire(name) in bytes(advertised) for name in ("corp.example", "a.example")] == [
            given6 is None,
            False,
        ]
    finally:
        gateway.close()
        engine.close()
        near.release()
        far.release()
