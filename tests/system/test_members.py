"""Networks of several namespaces: members reach each other by name, the world, and are reached by ports."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator
from ipaddress import IPv4Address

import anyio
import pytest

from netns_kit import (
    AddressError,
    ArgumentError,
    Composition,
    Member,
    Namespace,
    NamespaceGone,
    Network,
    NotFound,
    StaticLease,
    Uplink,
)
from netns_kit.gateway.setup import DriverName
from netns_kit.host.abi import IFA_F_TENTATIVE
from tests.support import needs, needs_ipv6, needs_tun
from tests.support.connections import every_driver, once
from tests.support.members import ask, echo, network, output, serving, status
from tests.support.servers import cancelled_at_any_moment, hello, tcp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


@every_driver
async def test_members_reach_each_other_and_the_way_out(driver: DriverName) -> None:
    needs("getent", "dig")
    with tcp_server(hello) as port:
        async with (
            network(uplink=Uplink(allow_host_loopback=True), driver=driver) as net,
            net.member("web", aliases=["www"], ports=["127.0.0.1:0:80"]) as web,
            net.member("db") as db,
            serving(web, 80),
        ):
            assert (str(web.address), str(db.address)) == ("10.0.2.101", "10.0.2.102")
            assert web.link == "veth"
            assert net.members == {"web": web, "db": db}
            for name in ("web", "www", "10.0.2.101"):
                assert await ask(db, name, 80) == "10.0.2.102", "the address of the client is kept"
            assert await ask(net, "web", 80) == "10.0.2.100", "the hub is one of them"
            assert await ask(db, "10.0.2.2", port) == "hello"
            assert await output(db, "dig", "+short", "www") == "10.0.2.101"
            assert await output(web, "dig", "+short", "-x", "10.0.2.102") == "db."
            (forward,) = await web.forwarder.list()
            with socket.create_connection(("127.0.0.1", forward.host_port)) as client:
                received = await anyio.to_thread.run_sync(client.recv, 99)
            assert received == b"10.0.2.2", "a client on the loopback is the gateway"
            flows = {(str(flow.guest.address), flow.direction) for flow in await net.stack.flows()}
            assert flows <= {("10.0.2.101", "inbound"), ("10.0.2.102", "outbound")}


async def test_members_have_ipv6() -> None:
    needs("dig", "getent")
    needs_ipv6()
    async with (
        network(ipv6=True) as net,
        net.member("web") as web,
        net.member("db") as db,
        serving(web, 80, host="::"),
    ):
        assert str(web.address6) == "fd00::1:101"
        assert await ask(db, "fd00::1:101", 80) == str(db.address6) == "fd00::1:102"
        assert await output(db, "dig", "+short", "AAAA", "web") == "fd00::1:101"
        assert await output(db, "dig", "+short", "-x", "fd00::1:102") == "db."
        assert "fd00::1:101" in await output(db, "getent", "ahosts", "web")


async def test_what_is_of_a_member_goes_with_it() -> None:
    needs("getent", "dig")
    async with network() as net:
        web = await net.add_member("web", aliases=["www"], ports=["127.0.0.1:0:80"])
        db = await net.add_member("db")
        (forward,) = await web.forwarder.list()
        async with serving(web, 80, echo), await web.popen(["sleep", "1000"]) as process:
            stream = await anyio.connect_tcp("127.0.0.1", forward.host_port)
            await stream.send(b"there")
            assert await stream.receive() == b"there"
            await net.remove_member("web")
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()
            await stream.aclose()
            with pytest.raises(NamespaceGone):
                await process.wait()
        assert net.members == {"db": db}
        with pytest.raises(OSError, match=r"refused|multiple|failed"):
            await anyio.connect_tcp("127.0.0.1", forward.host_port)
        for name in ("web", "www"):
            assert await status(db, "getent", "hosts", name) != 0
            assert await output(db, "dig", "+short", name) == ""
        assert {each.value for each in await net.stack.records() if each.name == "db"} == {"10.0.2.102"}
        assert await net.stack.flows() == ()
        again = await net.add_member("web", address="10.0.2.101")
        assert str(again.address) == "10.0.2.101"
        with pytest.raises(NotFound, match="'nobody'"):
            await net.remove_member("nobody")
        with pytest.raises(NotFound):
            await net.remove_member(web)
    assert net.members == {}


async def test_what_a_member_chooses() -> None:
    needs("ip")
    async with (
        network(subnet="10.9.0.0/16") as net,
        net.member("web", address="10.9.200.7", mac="02:00:00:00:00:07", ifname="lan0") as web,
    ):
        assert (web.address, web.mac) == (IPv4Address("10.9.200.7"), "02:00:00:00:00:07")
        found = await output(web, "ip", "address", "show", "dev", "lan0")
        assert "10.9.200.7/16" in found
        assert "02:00:00:00:00:07" in found
        leases = {str(each.address): each.mac for each in await net.stack.leases()}
        assert leases == {"10.9.200.7": "02:00:00:00:00:07"}, "a DHCP client in there is told the same"


async def test_what_two_members_cannot_both_have() -> None:
    async with network() as net, net.member("web", aliases=["www"], address="10.0.2.101"):
        for name, options, message in (
            ("web", {}, "name='web': expected a name that nobody has"),
            ("WWW", {}, "name='www': expected a name that nobody has"),
            ("db", {"aliases": ["web"]}, "aliases='web': expected aliases"),
            ("host.containers.internal", {}, "expected a name that nobody has"),
            ("localhost", {}, "expected a name that nobody has"),
        ):
            with pytest.raises(ArgumentError, match=message):
                await net.add_member(name, **options)  # type: ignore[arg-type]  # one of each kind
        with pytest.raises(AddressError, match=r"10.0.2.101: expected an address that nobody has"):
            await net.add_member("db", address="10.0.2.101")
        async with net.member("other", aliases=["www"]) as other:
            values = [each.value for each in await net.stack.records() if each.name == "www"]
            assert values == ["10.0.2.101", str(other.address)]
        assert net.members.keys() == {"web"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "no name"}, "name='no name': expected a domain name"),
        ({"name": "10.0.2.5"}, "name='10.0.2.5': expected a name that is no address"),
        ({"aliases": ["123"]}, "aliases='123': expected a name that is no address"),
        ({"aliases": "www"}, "aliases='www': expected a list of names"),
        ({"address": "fd00::7"}, "expected an IPv4 address"),
        ({"mac": "03:00:00:00:00:01"}, "expected an interface's address"),
        ({"ifname": "a/b"}, "ifname='a/b': expected 1 to 15 bytes"),
        ({"ports": "80"}, "ports='80': expected a list of ports"),
        ({"ids": "somebody"}, "ids='somebody': expected"),
        ({"ids": "same", "namespace": Namespace.create()}, "ids='same': expected \"root\" for a namespace"),
        ({"namespace": 7}, "namespace=7: expected a Namespace"),
    ],
)
async def test_what_no_member_can_have(options: dict[str, object], message: str) -> None:
    net = Network()
    with pytest.raises(ArgumentError, match=message):
        net.member(**{"name": "web", **options})  # type: ignore[arg-type]  # that is what it is about


async def test_only_a_network_that_configures_its_namespace_has_members() -> None:
    with pytest.raises(ArgumentError, match=r"configure='link': expected True"):
        Network(configure="link").member("web")


async def test_the_hub_goes_on_when_the_first_member_comes() -> None:
    """Its address moves to the bridge, and its connections with it."""
    with tcp_server(_echo) as port:
        async with network(uplink=Uplink(allow_host_loopback=True)) as net:
            stream = await net.namespace.connect_tcp("10.0.2.2", port)
            await stream.send(b"before")
            assert await stream.receive() == b"before"
            async with net.member("web"):
                await stream.send(b"after")
                assert await stream.receive() == b"after"
            await stream.aclose()


def _echo(sock: socket.socket) -> None:
    while data := sock.recv(99):
        sock.sendall(data)


FOLLOW = """
import sys
for line in sys.stdin:
    names = [word for entry in open("/etc/hosts") for word in entry.split()[1:]]
    print(*(name for name in names if name in ("web", "www", "db")), flush=True)
"""


async def test_commands_that_run_see_who_comes_and_goes() -> None:
    """In their hosts file, in the hub and in members; a file of the caller's own stays as it is."""
    async with network() as net, net.member("db") as db:
        options = {"files": {"/etc/hosts": "10.0.2.2 www\n"}}
        command = [sys.executable, "-ISc", FOLLOW]
        async with (
            await net.popen(command) as in_hub,
            await db.popen(command) as in_member,
            await db.popen(command, **options) as with_its_own,  # type: ignore[arg-type]  # it is files
        ):

            async def seen() -> list[str]:
                lines = []
                for each in (in_hub, in_member, with_its_own):
                    assert each.stdin is not None
                    assert each.stdout is not None
                    await each.stdin.send(b"?\n")
                    lines.append((await each.stdout.receive()).decode().strip())
                return lines

            assert await seen() == ["db", "db", "www"]
            async with net.member("web", aliases=["www"]) as web:
                assert await seen() == ["db web www", "db web www", "www"]
                async with await web.popen(command) as third:
                    assert third.stdin is not None
                    assert third.stdout is not None
                    await net.add_member("other")
                    await third.stdin.send(b"?\n")
                    assert await third.stdout.receive() == b"db web www\n"
            assert await seen() == ["db", "db", "www"]


async def test_who_commands_are() -> None:
    needs("id")
    plan = {"members": {"db": {"ids": "same"}}}
    async with (
        network() as net,
        net.member("web", ids="same") as web,
        net.member_of(Composition.from_dict(plan).members[0].setup) as db,
        serving(db, 80),
    ):
        for member in (web, db):
            assert await output(member, "id", "-u") == str(os.getuid())
        assert await ask(web, "db", 80) == str(web.address)
        assert await output(net, "id", "-u") == "0"
    with pytest.raises(ArgumentError, match=r"members.db.ids='somebody'"):
        Composition.from_dict({"members": {"db": {"ids": "somebody"}}})


async def test_the_hub_reaches_an_address_that_another_had() -> None:
    needs("ping")
    async with network() as net:
        for mac in ("02:00:00:00:01:01", "02:00:00:00:01:02"):
            async with net.member("x", address="10.0.2.50", mac=mac) as member:
                assert await status(net, "ping", "-c1", "-W5", "10.0.2.50") == 0
                assert await status(member, "ping", "-c1", "-W5", "10.0.2.100") == 0


async def test_an_address_that_another_has_leased() -> None:
    """It is the member's, whose DHCP client is told so."""
    async with network() as net:
        await net.stack.reserve(StaticLease("10.0.2.20", "02:00:00:00:00:99"))
        async with net.member("web", address="10.0.2.20") as web:
            leases = {str(each.address): each.mac for each in await net.stack.leases()}
            assert leases["10.0.2.20"] == web.mac


async def test_the_link_local_address_is_usable_at_once() -> None:
    needs_ipv6()
    for options in ({"ipv6": True}, {}):
        async with network(**options) as net, net.member("web") as web:
            for place in (net, web):
                for line in (await output(place, "cat", "/proc/net/if_inet6")).splitlines():
                    address, _, _, _, flags, name = line.split()
                    assert name == "tap0" or not int(flags, 16) & IFA_F_TENTATIVE, (address, name)


@pytest.fixture
async def somebody(leaks: None) -> AsyncIterator[Namespace]:
    """A namespace that somebody else has made, in a user namespace of its own."""
    async with Namespace.create() as namespace:
        yield namespace


async def test_an_attached_namespace_is_a_member_like_another(somebody: Namespace) -> None:
    needs("ip")
    async with network() as net, net.member("db") as db:
        async with net.member("web", namespace=Namespace.attach(pid=somebody.pid)) as web, serving(web, 80):
            assert await ask(db, "web", 80) == str(db.address)
            assert web.link == "veth"
            assert "eth0" in {each.name for each in await somebody.links()}
        assert "eth0" not in {each.name for each in await somebody.links()}, "it is gone with the member"


@pytest.mark.parametrize("made_by", [["unshare", "-Urn"], ["unshare", "-Ur", "unshare", "-Urn"]])
async def test_a_namespace_below_any_user_namespace_of_this_user(made_by: list[str]) -> None:
    """Also two levels below, as that of a container in a container is."""
    needs("unshare", "sh")
    says = "read _; readlink /proc/self/ns/net; read _; cat /proc/net/route; read _"
    command = [*made_by, "sh", "-c", says]
    async with (
        await anyio.open_process(command, stderr=None) as process,
        network() as net,
        net.member("db") as db,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send(b"\n")
        assert b"net:" in await process.stdout.receive()
        async with net.member("box", namespace=Namespace.attach(pid=process.pid)) as box, serving(box, 80):
            assert await ask(db, "box", 80) == str(db.address)
            await process.stdin.send(b"\n")
            assert b"eth0" in await process.stdout.receive()
        await process.stdin.send(b"\n")


async def test_an_open_namespace_stays_its_owners(somebody: Namespace) -> None:
    async with network() as net, network(subnet="10.0.3.0/24") as other:
        async with (
            net.member("web", namespace=somebody) as web,
            other.member("web", namespace=somebody, ifname="eth1") as twin,
            other.member("db") as db,
            serving(web, 80),
        ):
            assert await ask(db, "web", 80) == str(db.address), "it is in both networks"
            assert await ask(net, "web", 80) == "10.0.2.100"
            assert (str(web.address), str(twin.address)) == ("10.0.2.101", "10.0.3.101")
            async with network(subnet="10.0.4.0/24") as third:
                with pytest.raises(
                    ArgumentError, match="ifname='eth0': expected the name of an interface that"
                ):
                    await third.add_member("web", namespace=somebody, ifname="eth0")
            with pytest.raises(ArgumentError, match="no member of the network yet: this one is 'web'"):
                await net.add_member("again", namespace=somebody)
            async with network(subnet="10.0.0.0/16") as third:
                with pytest.raises(AddressError, match=r"10.0.0.0/16 and 10.0.2.0/24: .*like subnet="):
                    await third.add_member("web", namespace=somebody)
        assert [each.name for each in await somebody.links()] == ["lo"]
        assert net.members == {}


async def test_a_member_whose_namespace_ends_is_gone(somebody: Namespace) -> None:
    async with network() as net:
        web = await net.add_member("web", namespace=somebody, ports=["127.0.0.1:0:80"])
        assert isinstance(web, Member)
        await somebody.close()
        with pytest.raises(NamespaceGone):
            await web.wait_closed()
        while net.members:  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.01)
        assert [each for each in await net.stack.records() if each.name == "web"] == []
        with pytest.raises(NamespaceGone):
            await web.run(["true"])
        async with net.member("web"):
            pass


async def test_what_a_namespace_lacks(somebody: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    """IPv6, which is switched off in there: the member has IPv4, and no AAAA record."""
    needs_ipv6()
    await somebody.set_sysctl("net.ipv6.conf.default.disable_ipv6", 1)
    async with network(ipv6=True) as net, net.member("db") as db:
        async with net.member("web", namespace=somebody) as web, serving(web, 80):
            assert web.address6 is None
            assert "the member web has IPv4 only: net.ipv6.conf.eth0.disable_ipv6 is 1" in caplog.messages
            assert {each.type for each in await net.stack.records() if each.name == "web"} == {"A"}
            assert await ask(db, "web", 80) == str(db.address)
        assert set(net.stack.guests.values()) == {db.namespace}


async def test_the_hub_is_no_member_and_has_one_bridge() -> None:
    needs("ping")
    async with network(ifname="br0") as net:
        with pytest.raises(ArgumentError, match="without an interface br0"):
            await net.add_member("web")
        assert await status(net, "ping", "-c1", "-W5", "10.0.2.2") == 0
    async with network() as net:
        with pytest.raises(ArgumentError, match="expected another namespace than the network's own"):
            await net.add_member("web", namespace=net.namespace)
        assert {each.name for each in await net.namespace.links()} == {"lo", "tap0"}


async def test_a_bridge_that_cannot_be_used_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("ping")
    async with network() as net:
        with monkeypatch.context() as patch:

            async def full(*_: object, **__: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr("netns_kit.network.hub.Hub._index", full)
            with pytest.raises(OSError, match="No space left"):
                await net.add_member("web")
        assert {each.name for each in await net.namespace.links()} == {"lo", "tap0"}
        assert await status(net, "ping", "-c1", "-W5", "10.0.2.2") == 0
        async with net.member("web") as web:
            assert await status(web, "ping", "-c1", "-W5", "10.0.2.100") == 0


@once
async def test_a_first_member_that_is_cancelled_at_any_moment() -> None:
    needs("ping")
    async with network() as net:
        await cancelled_at_any_moment(lambda: net.member("web"))
        assert await status(net, "ping", "-c1", "-W5", "10.0.2.2") == 0
        async with net.member("web") as web:
            assert await status(web, "ping", "-c1", "-W5", "10.0.2.100") == 0
