"""Routes between networks: who reaches whom by one, and who does not, with root in a member that tries."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from ipaddress import ip_address
from typing import Any

import anyio
import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from netns_kit import (
    AddressError,
    ArgumentError,
    GuestStream,
    Member,
    NamespaceGone,
    Network,
    Policy,
    Subnet6,
    Uplink,
)
from netns_kit.gateway.setup import DriverName
from tests.support import needs, needs_ipv6, needs_tun
from tests.support.connections import every_driver, once
from tests.support.members import FIRST, MARK, arrived, ask, carried, network, output, serving, status, wire
from tests.support.servers import SECONDS, bounded, cancelled_at_any_moment, hello, tcp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"

SAY = """
import socket, sys
address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
with socket.socket(*address[:3]) as sock:
    sock.sendto(sys.argv[3].encode(), address[4])
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


@asynccontextmanager
async def two(**options: Any) -> AsyncIterator[tuple[Network, Network, Member, Member]]:
    """Two networks with a member each, `a` and `b`; what is given is for the second."""
    async with (
        network(
            uplink=Uplink(allow_host_loopback=True, any_source=True), policy=Policy.deny().allow("10.0.2.2")
        ) as one,
        network(**{"subnet": "10.9.0.0/16", "policy": Policy.deny(), **options}) as other,
        one.member("a") as a,
        other.member("b") as b,
    ):
        yield one, other, a, b


@asynccontextmanager
async def hearing(place: Member | Network) -> AsyncIterator[socket.socket]:
    """A socket inside for datagrams of both families to port 9."""
    with await place.namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::", 9))
        yield sock


async def reaches(member: Member | Network, address: object, port: int = 80) -> bool:
    return await status(member, sys.executable, "-ISc", CONNECT, str(address), str(port)) == 0


@every_driver
async def test_members_reach_each_other_by_a_route_and_only_by_it(driver: DriverName) -> None:
    async with two(driver=driver) as (one, other, a, b), serving(a, 80), serving(b, 80), serving(other, 80):
        assert not await reaches(a, b.address)
        async with one.route_to(other):
            assert await ask(a, str(b.address), 80) == str(a.address)
            assert await ask(b, str(a.address), 80) == str(b.address)
            assert await ask(one, str(b.address), 80) == "10.0.2.100"
            assert await ask(a, "10.9.0.100", 80) == str(a.address), "the hub is one of them"
            async with one.member("late") as late:
                assert await ask(late, str(b.address), 80) == str(late.address)
        assert not await reaches(a, b.address)
        assert not await reaches(b, a.address)
        for net in (one, other):
            assert {each.name[0] for each in await net.namespace.links()} == {"l", "t", "b", "m"}
        async with other.route_to(one):
            assert await ask(a, str(b.address), 80) == str(a.address)


async def test_the_first_datagrams_over_a_new_route_or_to_a_new_member_arrive() -> None:
    """The kernel drops what is sent over a link before its own work queue has seen that both ends are up."""
    async with two() as (one, other, a, b), AsyncExitStack() as opened:
        socks = {}
        for place in (a, b, one, other):
            sock = await place.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
            socks[place] = opened.enter_context(sock)
        for member in (a, b):
            socks[member].bind((str(member.address), 9000))
        for number in range(30):
            text = str(number).encode()
            async with one.route_to(other):
                for sender, member in ((a, b), (b, a), (one, b), (other, a)):
                    socks[sender].sendto(text, (str(member.address), 9000))
                    with anyio.fail_after(SECONDS):
                        await anyio.wait_readable(socks[member])
                    assert socks[member].recv(100) == text
            async with one.member("late") as late:
                with await late.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.bind((str(late.address), 9000))
                    for source, receiver, to in ((sock, socks[a], a), (socks[a], sock, late)):
                        source.sendto(text, (str(to.address), 9000))
                        with anyio.fail_after(SECONDS):
                            await anyio.wait_readable(receiver)
                        assert receiver.recv(100) == text


async def test_ipv6_has_the_same_route() -> None:
    needs("ping")
    needs_ipv6()
    async with (
        network(ipv6=True, policy=Policy.deny()) as one,
        network(ipv6=Subnet6("fd00:9::/64"), subnet="10.9.0.0/16", policy=Policy.deny()) as other,
        one.member("a") as a,
        other.member("b") as b,
        serving(b, 80, host="::"),
    ):
        assert not await reaches(a, b.address6)
        async with one.route_to(other):
            assert await ask(a, str(b.address6), 80) == str(a.address6)
            assert await ask(a, str(b.address), 80) == str(a.address)
            for ours in (other.subnet.ipv6.gateway, other.subnet.ipv6.dns):  # type: ignore[union-attr]  # it is on
                assert await status(a, "ping", "-c1", "-W1", str(ours)) != 0


async def test_a_route_leads_to_no_stack_and_so_to_no_way_out() -> None:
    """An internal network stays internal, whatever root in a member sends to the hubs."""
    needs("ip", "dig", "ping")
    with tcp_server(hello) as port:
        async with two(policy=None, internal=True) as (one, other, a, b):
            await one.stack.set_policy(None)  # and its stack takes packets from anybody
            async with one.route_to(other):
                assert await ask(a, "10.0.2.2", port) == "hello", "the way out of its own"
                assert await status(b, "ping", "-c1", "-W5", str(a.address)) == 0
                for hub in ("10.9.0.100", "10.9.0.2"):
                    await output(b, "ip", "route", "replace", "default", "via", hub)
                    await output(b, "ip", "route", "replace", "10.0.2.0/24", "via", hub)
                    for address in ("10.0.2.2", "192.0.2.1"):
                        assert not await reaches(b, address, port), (hub, address)
                    assert await status(b, "dig", "@10.0.2.3", "+time=1", "+tries=1", "a") != 0
                assert await status(b, "ping", "-c1", "-W5", str(a.address)) == 0
            assert [each for each in await one.stack.flows() if each.guest.address == b.address] == []


async def test_a_route_leads_to_nothing_that_a_stack_serves() -> None:
    """Also at addresses that it answers ARP for as members do, and where it takes packets from anybody."""
    needs_ipv6()
    at = "10.9.0.50", "fd00:9::50"
    async with (
        network(ipv6=True, policy=Policy.deny()) as one,
        network(subnet="10.9.0.0/16", ipv6=Subnet6("fd00:9::/64"), uplink=Uplink(any_source=True)) as other,
        one.member("a") as a,
        other.member("b") as b,
        one.route_to(other),
        serving(b, 80),
    ):
        for address in at:
            await other.stack.serve_tcp(address, 80, GuestStream.aclose)
            assert await reaches(b, address)
        assert await reaches(a, b.address)
        for address in at:
            assert not await reaches(a, address)


async def test_a_route_without_ipv6_at_one_end_is_no_way_for_it() -> None:
    """Not for who rules that hub either, while the other hub passes IPv6 on for a third network."""
    needs_ipv6()
    needs("ip")
    async with (
        network(policy=Policy.deny()) as one,
        network(subnet="10.9.0.0/16", ipv6=Subnet6("fd00:9::/64"), policy=Policy.deny()) as other,
        network(subnet="10.11.0.0/16", ipv6=Subnet6("fd00:b::/64"), policy=Policy.deny()) as third,
        other.member("b") as b,
        third.member("c") as c,
        other.route_to(third),
        serving(c, 80, host="::"),
        one.route_to(other),
        hearing(b) as heard,
    ):
        assert await ask(b, str(c.address6), 80) == str(b.address6)
        (link,) = [each.name for each in await one.namespace.links() if each.name.startswith("r")]
        (end,) = [each for each in await other.namespace.links() if each.name == "r3"]
        await one.namespace.set_sysctl(f"net.ipv6.conf.{link}.disable_ipv6", 0)
        for words in (
            f"address add fd00:5::1/64 dev {link} nodad",
            f"neighbour replace fd00:5::2 lladdr {end.mac} dev {link}",
            f"route add fd00:9::/64 via fd00:5::2 dev {link}",
        ):
            await output(one, "ip", "-6", *words.split())
        await output(one, sys.executable, "-ISc", SAY, str(b.address6), "9", "by the route")
        await output(other, sys.executable, "-ISc", SAY, str(b.address6), "9", MARK.decode())
        assert await arrived(heard) == []


async def test_names_stay_in_their_network() -> None:
    needs("dig", "getent")
    async with two() as (one, other, a, b), one.route_to(other):
        assert await output(a, "dig", "+short", "b") == ""
        assert await status(b, "getent", "hosts", "a") != 0
        assert "b" not in (await a.files())["/etc/hosts"].split()


async def test_isolated_members_do_not_reach_each_other_by_the_hub() -> None:
    """Also where the hub has been made a router."""
    needs("ip")
    async with (
        two(isolate=True) as (one, other, a, b),
        other.member("c") as c,
        serving(c, 80),
        serving(a, 80),
    ):
        await other.namespace.set_sysctl("net.ipv4.ip_forward", 1)
        await output(b, "ip", "route", "add", str(c.address), "via", "10.9.0.100")
        await output(c, "ip", "route", "add", str(b.address), "via", "10.9.0.100")
        assert not await reaches(b, c.address)
        async with one.route_to(other):
            assert not await reaches(b, c.address)
            assert await ask(b, str(a.address), 80) == str(b.address), "which was asked for"


async def test_a_route_is_no_way_to_a_third_network() -> None:
    needs("ip")
    async with (
        two() as (one, other, a, b),
        network(subnet="10.11.0.0/16", policy=Policy.deny()) as third,
        third.member("c") as c,
        one.route_to(other),
        other.route_to(third),
        serving(c, 80),
    ):
        assert await ask(b, str(c.address), 80) == str(b.address)
        for hub in ("10.0.2.100", "10.0.2.2"):
            await output(a, "ip", "route", "replace", "10.11.0.0/16", "via", hub)
            assert not await reaches(a, c.address)
        await output(one, "ip", "route", "add", "10.11.0.0/16", "via", "10.9.0.100", "dev", "r2", "onlink")
        await output(c, "ip", "route", "add", "10.0.2.0/24", "via", "10.11.0.100")
        assert not await reaches(one, c.address), "nor for who rules a hub"


async def test_nobody_sends_with_an_address_of_another_over_a_route() -> None:
    """Not if the sender's network has a guard; and else not with an address that is none of that network."""
    for guarded in (True, False):
        async with (
            network(policy=Policy.deny(), guard=guarded) as one,
            network(subnet="10.9.0.0/16", policy=Policy.deny()) as other,
            one.member("a") as a,
            one.member("c") as c,
            other.member("b") as b,
            one.route_to(other),
            wire(a) as out,
            wire(b) as heard,
        ):
            first, last = [
                bytes(
                    Ether(src=a.mac, dst=one.subnet.mac.hex(":"))
                    / IP(src=str(a.address), dst=str(b.address))
                    / UDP(sport=1, dport=9)
                    / mark
                )
                for mark in (FIRST, MARK)
            ]
            await carried(out, first, heard)
            sent = [str(a.address), str(c.address), "10.9.0.77", "192.0.2.1", "10.0.2.2"]
            for number, source in enumerate(sent):
                packet = IP(src=source, dst=str(b.address)) / UDP(sport=1, dport=9)
                out.send(
                    bytes(Ether(src=a.mac, dst=one.subnet.mac.hex(":")) / packet / (b"frame %3d" % number))
                )
            out.send(last)
            frames = await arrived(heard)
            got = [
                each for number, each in enumerate(sent) if any(b"frame %3d" % number in f for f in frames)
            ]
            assert got == (sent[:1] if guarded else [*sent[:2], "10.0.2.2"]), guarded


async def test_nobody_sends_to_the_other_hub_with_an_address_of_another_network() -> None:
    needs_ipv6()
    async with (
        network(ipv6=True, policy=Policy.deny(), guard=False) as one,
        network(subnet="10.9.0.0/16", ipv6=Subnet6("fd00:9::/64"), policy=Policy.deny()) as other,
        one.member("a") as a,
        other.member("b") as b,
        one.route_to(other),
        wire(a) as out,
        hearing(other) as heard,
    ):
        hubs = {4: "10.9.0.100", 6: "fd00:9::100"}

        def frame(source: object, data: bytes) -> bytes:
            version = ip_address(str(source)).version
            kind = IP if version == 4 else IPv6
            ether = Ether(src=a.mac, dst=one.subnet.mac.hex(":"))
            return bytes(ether / kind(src=str(source), dst=hubs[version]) / UDP(sport=1, dport=9) / data)

        await carried(out, frame(a.address6, FIRST), heard)
        for source in (b.address, "10.9.0.2", "192.0.2.1", b.address6, "fd00:9::2", "2001:db8::1"):
            out.send(frame(source, str(source).encode()))
        out.send(frame(a.address6, MARK))
        assert [each for each in await arrived(heard) if FIRST not in each] == []


async def test_what_no_route_can_join() -> None:
    one, other = Network(), Network(subnet="10.0.0.0/8")
    with pytest.raises(AddressError, match=r"10.0.2.0/24 and 10.0.0.0/8: .*like subnet='10.0.3.0/24'"):
        one.route_to(other)
    with pytest.raises(AddressError, match=r"ipv6=fd00::/64 and fd00::/64"):
        Network(ipv6=True).route_to(Network(ipv6=True, subnet="10.9.0.0/16"))
    with pytest.raises(ArgumentError, match="expected another network"):
        one.route_to(one)
    with pytest.raises(ArgumentError, match="other=7: expected a Network"):
        one.route_to(7)  # type: ignore[arg-type]  # that is what it is about
    with pytest.raises(ArgumentError, match="configure='link': expected True"):
        one.route_to(Network(configure="link"))
    async with two() as (first, second, _, _), first.route_to(second):
        with pytest.raises(ArgumentError, match="expected a network that there is no route to"):
            await second.route_to(first).open()
        with pytest.raises(NamespaceGone):
            await first.route_to(Network(subnet="10.11.0.0/16")).open()
        assert len([each for each in await first.namespace.links() if each.name.startswith("r")]) == 1


@bounded
@pytest.mark.parametrize("how", ["closed", "killed"])
async def test_a_route_ends_with_either_network(how: str) -> None:
    async with network() as one, one.member("a") as a:
        other = await Network(subnet="10.9.0.0/16").open()
        route = await one.route_to(other).open()
        if how == "closed":
            await other.close()
        else:
            os.kill(other.namespace.pid, signal.SIGKILL)
        with pytest.raises(NamespaceGone) if how == "killed" else nullcontext():
            await route.wait_closed()
        while any(each.name.startswith("r") for each in await one.namespace.links()):  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.01)
        with pytest.raises(NamespaceGone) if how == "killed" else nullcontext():
            await other.close()
        assert await status(a, "true") == 0
        async with (
            network(subnet="10.9.0.0/16") as again,
            again.member("b") as b,
            one.route_to(again),
            serving(b, 80),
        ):
            assert await ask(a, str(b.address), 80) == str(a.address)


@once
@bounded
async def test_routes_of_one_hub_are_made_at_once() -> None:
    async with network() as one, AsyncExitStack() as stack:
        others = [
            await stack.enter_async_context(Network(subnet=f"10.{number}.0.0/16")) for number in range(9, 12)
        ]
        async with one.member("a"), anyio.create_task_group() as tasks:
            for other in others:
                tasks.start_soon(one.route_to(other).open)
        links = {each.name: each.index for each in await one.namespace.links()}
        assert len([name for name in links if name.startswith("r")]) == len(others)
        found = {name: set[int]() for name in links}

        async def look(name: str) -> None:
            found[name] = {await one._hub.index(name) for _ in range(100)}

        async with anyio.create_task_group() as tasks:
            for name in links:
                tasks.start_soon(look, name)
        assert found == {name: {index} for name, index in links.items()}


@bounded
async def test_a_network_that_ends_while_a_route_is_made_says_so() -> None:
    async with network() as one, network(subnet="10.9.0.0/16") as other:
        hub = one._hub
        await hub.open(one.subnet)
        await hub.close()
        with pytest.raises(NamespaceGone):
            await one.route_to(other).open()
        assert not [each for each in await other.namespace.links() if each.name.startswith("r")]


@once
@bounded
async def test_a_route_that_is_cancelled_at_any_moment_leaves_nothing() -> None:
    needs("ip")
    async with two() as (one, other, a, b):
        before = await one.namespace.links(), await other.namespace.links()
        await cancelled_at_any_moment(lambda: one.route_to(other))
        assert (await one.namespace.links(), await other.namespace.links()) == before
        for net in (one, other):
            assert "r" not in {
                line.split()[-3][:1] for line in (await output(net, "ip", "rule")).splitlines()
            }
        async with one.route_to(other), serving(b, 80):
            assert await ask(a, str(b.address), 80) == str(a.address)
