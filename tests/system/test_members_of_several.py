"""Members of several networks: an interface, an address, names and ports in each, which no other network knows."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import anyio
import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from netns_kit import DnsSettings, Member, Namespace, Network, Policy, Subnet6, Uplink
from netns_kit.gateway.setup import DriverName
from tests.support import needs, needs_ipv6, needs_tun
from tests.support.connections import every_driver, once
from tests.support.members import MARK, arrived, ask, network, output, serving, status, wire
from tests.support.servers import bounded, cancelled_at_any_moment, hello, tcp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]
RESOLVE = """
import socket, sys
try:
    print(*sorted({each[4][0] for each in socket.getaddrinfo(sys.argv[1], 80, type=socket.SOCK_STREAM)}))
except socket.gaierror:
    print("-")
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


class Two(NamedTuple):
    """Two networks, a member of each, and one of both: `web` in the first, `web` in the second."""

    front: Network
    back: Network
    client: Member
    db: Member
    web: Member
    twin: Member


@asynccontextmanager
async def two(**options: Any) -> AsyncIterator[Two]:
    uplink = Uplink(dns=DnsSettings([], search=["front.test"], unknown="nxdomain"), allow_host_loopback=True)
    async with (
        network(uplink=uplink, **options) as front,
        network(subnet="10.9.0.0/16", internal=True, **options) as back,
        front.member("client") as client,
        back.member("db", aliases=["store"]) as db,
        front.member("web") as web,
        back.member("web", namespace=web.namespace, ports=["127.0.0.1:0:80"]) as twin,
    ):
        yield Two(front, back, client, db, web, twin)


async def resolved(member: Member | Network, name: str) -> str:
    """What a program inside finds for a name."""
    return await output(member, sys.executable, "-ISc", RESOLVE, name)


@every_driver
async def test_a_member_of_two_networks_has_the_names_of_both(driver: DriverName) -> None:
    needs("dig")
    async with (
        two(driver=driver) as (front, back, client, db, web, twin),
        serving(db, 80),
        serving(client, 80),
    ):
        assert (web.ifname, twin.ifname) == ("eth0", "eth1")
        assert await ask(web, "db", 80) == str(twin.address)
        assert await ask(web, "client", 80) == str(web.address)
        for member in (web, twin):
            assert await resolved(member, "db") == await resolved(member, "store") == str(db.address)
            assert await resolved(member, "client") == str(client.address)
        server = str(front.subnet.dns)
        for name in ("db", "store", "db.front.test"):
            assert await output(web, "dig", f"@{server}", "+short", name) == str(db.address)
        assert "db." in (await output(web, "dig", f"@{server}", "+short", "-x", str(db.address))).split()
        assert await output(web, "dig", f"@{back.subnet.dns}", "+short", "client") == str(client.address)
        assert await output(web, "dig", f"@{server}", "+short", "web") == str(web.address), (
            "it is asked there"
        )
        assert await output(web, "dig", f"@{back.subnet.dns}", "+short", "web") == str(twin.address)


async def test_nobody_else_has_them() -> None:
    needs("ip", "ping")
    needs("dig")
    async with two() as (front, back, client, db, web, twin):
        assert await resolved(web, "db") == str(db.address)
        for member, name, net in ((client, "db", front), (db, "client", back), (front, "db", front)):
            assert await resolved(member, name) == "-"
            for asked in (name, f"{name}.front.test"):
                assert await output(member, "dig", f"@{net.subnet.dns}", "+short", asked) == ""
        for one, other in ((client, db), (db, client), (client, twin), (db, web)):
            assert not await reaches(one, other)
        await web.namespace.set_sysctl("net.ipv4.ip_forward", 1)
        await output(client, "ip", "route", "add", "10.9.0.0/16", "via", str(web.address))
        await output(db, "ip", "route", "add", "10.0.2.0/24", "via", str(twin.address))
        for one, other in ((client, db), (db, client)):
            assert not await reaches(one, other), (
                "although root in each has a route, and that in between forwards"
            )


@pytest.mark.parametrize("guarded", ["", "front", "back", "front and back"])
@bounded
async def test_what_a_member_of_both_forwards_the_guard_of_the_other_network_drops(guarded: str) -> None:
    """As docs/networks.md says: each guard about what goes into its network, and what goes out by NAT is nobody's."""
    needs("ip", "ping")
    async with (
        network(internal=True, guard="front" in guarded) as front,
        network(subnet="10.9.0.0/16", internal=True, guard="back" in guarded) as back,
        front.member("client") as client,
        back.member("db") as db,
        front.member("web") as web,
        back.member("web", namespace=web.namespace) as twin,
        wire(db) as at_db,
        wire(client) as at_client,
    ):
        await output(client, "ip", "route", "add", "10.9.0.0/16", "via", str(web.address))
        await output(db, "ip", "route", "add", "10.0.2.0/24", "via", str(twin.address))
        for one, own in (client, web), (db, twin):
            assert await status(one, "ping", "-c1", "-W20", str(own.address)) == 0
        await web.namespace.set_sysctl("net.ipv4.ip_forward", 0)
        assert not await reaches(client, db)
        await web.namespace.set_sysctl("net.ipv4.ip_forward", 1)
        for one, other, ear, own, net in (
            (client, db, at_db, twin, "back"),
            (db, client, at_client, web, "front"),
        ):
            assert await reaches(one, other, 1 if guarded else 20) == (not guarded)
            mark = (
                Ether(src=own.mac, dst=other.mac)
                / IP(src=str(own.address), dst=str(other.address))
                / UDP()
                / MARK
            )
            async with wire(web, own.ifname) as out:
                out.send(bytes(mark))
            heard = [Ether(each) for each in await arrived(ear)]
            came = [each for each in heard if IP in each and each[IP].src == str(one.address)]
            assert bool(came) == (net not in guarded)


async def reaches(member: Member, other: Member, seconds: int = 1) -> bool:
    return await status(member, "ping", "-c1", f"-W{seconds}", str(other.address)) == 0


async def test_names_come_and_go_on_both_sides() -> None:
    """In commands that run, and at DNS; and all of it ends with either membership."""
    needs("ip")
    needs("dig")
    async with two() as (front, back, _, _, web, twin):
        server = str(front.subnet.dns)

        async def seen() -> list[str]:
            if "web" in back.members:
                text = await output(back.members["web"], "cat", "/etc/hosts")
                assert text == await output(web, "cat", "/etc/hosts"), "there is one hosts file"
            await process.stdin.send(b"?\n")  # type: ignore[union-attr]  # it is a pipe
            running = (await process.stdout.receive()).decode().split()  # type: ignore[union-attr]  # the same
            for name in ("cache", "db"):
                found = await output(web, "dig", f"@{server}", "+short", name)
                assert (found != "") == (name in running)
            return running

        async with await web.popen([sys.executable, "-ISc", FOLLOW]) as process:
            assert await seen() == ["client", "db", "store"]
            cache = await back.add_member("cache")
            assert await seen() == ["client", "db", "store", "cache"]
            await back.remove_member("cache")
            assert await seen() == ["client", "db", "store"]
            await twin.close()
            assert await seen() == ["client"]
            assert [each.name for each in await web.namespace.links()] == ["lo", "eth0"]
            rules = await output(web, "ip", "rule")
            assert len(rules.splitlines()) == 3, "those that the kernel has"
            async with back.member("web", namespace=web.namespace, ifname="lan7"):
                assert await seen() == ["client", "db", "store"]
            del cache


FOLLOW = """
import sys
for line in sys.stdin:
    names = [word for entry in open("/etc/hosts") for word in entry.split()[1:]]
    print(*(name for name in names if name in ("client", "cache", "db", "store")), flush=True)
"""


async def test_each_network_publishes_ports_of_its_own() -> None:
    """Also to clients from afar, whose answers leave by the network that they came from."""
    async with two() as (_, _, client, db, web, twin), serving(web, 80):
        (forward,) = await twin.forwarder.list()
        async with await anyio.connect_tcp("127.0.0.1", forward.host_port) as stream:
            assert await stream.receive() == b"10.9.0.2"
        async with await twin.connect_tcp(80, source="192.0.2.7") as stream:
            assert await stream.receive() == b"192.0.2.7"
        async with await web.connect_tcp(80, source="192.0.2.7") as stream:
            assert await stream.receive() == b"192.0.2.7"
        assert {str(each.remote.address) for each in await twin.flows()} <= {"10.9.0.2", "192.0.2.7"}
        assert await ask(client, "web", 80) == str(client.address)
        assert await ask(db, "web", 80) == str(db.address)


async def test_the_way_out_is_that_of_the_network_that_came_first() -> None:
    with tcp_server(hello) as port:
        async with two() as (_, _, client, db, web, twin):
            for member in (client, web, twin):
                assert await ask(member, "10.0.2.2", port) == "hello"
            assert await status(db, sys.executable, "-ISc", CONNECT, "10.0.2.2", str(port)) != 0
            ways = [each for each in await web.namespace.routes() if each.destination.prefixlen == 0]
            assert [str(each.gateway) for each in ways] == ["10.0.2.2"]


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"


async def test_ipv6_is_of_both() -> None:
    needs("ip")
    needs_ipv6()
    needs("dig")
    async with (
        network(ipv6=True) as front,
        network(ipv6=Subnet6("fd00:9::/64"), subnet="10.9.0.0/16", policy=Policy.deny()) as back,
        front.member("web") as web,
        back.member("db") as db,
        back.member("web", namespace=web.namespace) as twin,
        serving(web, 80, host="::"),
    ):
        assert (str(web.address6), str(twin.address6)) == ("fd00::1:101", "fd00:9::1:102")
        assert await output(web, "dig", f"@{front.subnet.dns}", "+short", "AAAA", "db") == str(db.address6)
        assert await ask(db, str(twin.address6), 80) == str(db.address6)
        said = await output(web, "ip", "-6", "route", "get", "2001:db8::7", "from", str(twin.address6))
        assert "dev eth1" in said
        said = await output(web, "ip", "-6", "route", "get", "2001:db8::7")
        assert "dev eth0" in said


@bounded
async def test_one_that_was_attached_twice_is_one() -> None:
    """By two objects, as of a container; each has a hosts file of its own, with the names of both."""
    async with (
        Namespace.create() as container,
        network() as front,
        network(subnet="10.9.0.0/16", policy=Policy.deny()) as back,
        front.member("client") as client,
        back.member("db") as db,
        front.member("web", namespace=Namespace.attach(pid=container.pid)) as web,
        back.member("box", namespace=Namespace.attach(pid=container.pid)) as box,
        serving(db, 80),
    ):
        assert (web.ifname, box.ifname) == ("eth0", "eth1")
        for member in (web, box):
            assert await ask(member, "db", 80) == str(box.address)
            assert await resolved(member, "client") == str(client.address)
        await front.close()
        assert await resolved(box, "client") == "-"
        assert await ask(box, "db", 80) == str(box.address)


@once
@bounded
async def test_a_second_network_that_is_cancelled_at_any_moment_leaves_nothing() -> None:
    needs("ip")
    needs("dig")
    async with two() as (front, back, _, _, web, twin):
        await twin.close()
        await cancelled_at_any_moment(lambda: back.member("web", namespace=web.namespace))
        assert await resolved(web, "db") == "-"
        assert await output(web, "dig", f"@{front.subnet.dns}", "+short", "db") == ""
        assert [each.name for each in await web.namespace.links()] == ["lo", "eth0"]
        assert len((await output(web, "ip", "rule")).splitlines()) == 3
        assert back.members.keys() == {"db"}
