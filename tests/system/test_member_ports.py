"""Ports that lead to a member of a network: every mode, from the host and from another member."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from netns_kit import Follow, Mode, PortInUseError, Uplink
from netns_kit.arguments import AddressLike
from netns_kit.gateway.setup import DriverName
from netns_kit.namespace.background import beside
from tests.support import missing, needs_tun
from tests.support.connections import every_driver
from tests.support.members import ask, echo, network, serving
from tests.support.servers import closed_port, host_address

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]
MODES: tuple[Mode, ...] = ("stack", "socket", "transparent")


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


def said(address: str, port: int) -> str:
    with socket.create_connection((address, port), 20) as sock:
        return sock.recv(99).decode()


def said_udp(address: str, port: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.connect((address, port))
        sock.send(b"?")
        return sock.recv(99).decode()


@every_driver
async def test_a_port_leads_to_its_member_in_every_mode(driver: DriverName) -> None:
    """And to no other: each says who it is."""
    async with network(driver=driver) as net, net.member("a") as a, net.member("b") as b:
        for mode in MODES:
            for member, own in ((a, b"a"), (b, b"b")):

                async def tell(stream: anyio.abc.SocketStream, own: bytes = own) -> None:
                    async with stream:
                        await stream.send(own)

                async with serving(member, 80, tell):
                    (forward,) = await member.forwarder.add("127.0.0.1:0:80", mode=mode)
                    assert (
                        await anyio.to_thread.run_sync(said, "127.0.0.1", forward.host_port) == own.decode()
                    )
                    await member.forwarder.remove(forward)


async def test_socket_mode_reaches_the_loopback_of_the_member() -> None:
    async with (
        network() as net,
        net.member("a", ports=["127.0.0.1:0:127.0.0.1:80"]) as a,
        net.member("b", ports=["127.0.0.1:0:127.0.0.1:80"]) as b,
        serving(a, 80, host="127.0.0.1"),
    ):
        (there,), (nobody,) = await a.forwarder.list(), await b.forwarder.list()
        assert there.mode == "socket"
        assert await anyio.to_thread.run_sync(said, "127.0.0.1", there.host_port) == "127.0.0.1"
        with pytest.raises(ConnectionResetError):
            await anyio.to_thread.run_sync(said, "127.0.0.1", nobody.host_port)


@pytest.mark.parametrize("mode", ["stack", "transparent"])
async def test_the_clients_address_is_kept(mode: Mode) -> None:
    host = host_address()
    if host is None:
        missing("this machine has no address but the loopback's")
    async with network() as net, net.member("web") as web, serving(web, 80):
        (forward,) = await web.forwarder.add("0.0.0.0:0:80", mode=mode)
        assert await anyio.to_thread.run_sync(said, host, forward.host_port) == host


@pytest.mark.parametrize("mode", MODES)
async def test_datagrams(mode: Mode) -> None:
    async with network() as net, net.member("web", ports=[]) as web:
        with closing(await web.namespace.listening_socket("udp", "0.0.0.0", 53)) as sock:

            async def answer() -> None:
                while True:
                    await anyio.wait_readable(sock)
                    _, client = sock.recvfrom(99)
                    sock.sendto(b"web", client)

            async with beside(answer):
                (forward,) = await web.forwarder.add("127.0.0.1:0:53/udp", mode=mode)
                assert await anyio.to_thread.run_sync(said_udp, "127.0.0.1", forward.host_port) == "web"


@pytest.mark.parametrize("mode", MODES)
async def test_a_member_reaches_a_published_port_of_another_by_the_hosts_address(mode: Mode) -> None:
    host = host_address()
    if host is None:
        missing("this machine has no address but the loopback's")
    async with network() as net, net.member("web") as web, net.member("db") as db, serving(web, 80):
        (forward,) = await web.forwarder.add("0.0.0.0:0:80", mode=mode)
        seen = await ask(db, host, forward.host_port)
        assert seen == (str(web.address) if mode == "socket" else host)
        assert await ask(web, host, forward.host_port) == seen, "and its own"


async def test_by_the_gateway_where_the_loopback_is_allowed() -> None:
    port = closed_port()
    uplink = Uplink(allow_host_loopback=[port])
    async with (
        network(uplink=uplink) as net,
        net.member("web", ports=[f"127.0.0.1:{port}:80"]) as web,
        net.member("db") as db,
        serving(web, 80),
    ):
        assert await ask(db, "10.0.2.2", port) == "10.0.2.2"


async def test_two_members_cannot_have_the_same_port() -> None:
    async with network() as net, net.member("a", ports=["127.0.0.1:0:80"]) as a:
        (forward,) = await a.forwarder.list()
        with pytest.raises(PortInUseError):
            await net.add_member("b", ports=[f"127.0.0.1:{forward.host_port}:80"])
        assert net.members.keys() == {"a"}
        await net.remove_member("a")
        await net.add_member("b", ports=[f"127.0.0.1:{forward.host_port}:80"])


async def test_ports_are_followed() -> None:
    port = closed_port()
    async with network() as net, net.member("web", ports=[Follow("tcp", include=[(port, port)])]) as web:
        for host in ("0.0.0.0", "127.0.0.1"):
            async with serving(web, port, host=host):
                with anyio.fail_after(20):
                    while not await web.forwarder.list():  # noqa: ASYNC110 - nobody tells
                        await anyio.sleep(0.05)
                await anyio.to_thread.run_sync(said, "127.0.0.1", port)
            with anyio.fail_after(20):
                while await web.forwarder.list():  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.05)


async def test_a_port_inside_a_member_leads_out(short_path: Path) -> None:
    async with network() as net, net.member("web") as web, net.member("db") as db:
        await web.forwarder.reverse("0.0.0.0:5432", echo)
        for member, host in ((web, "127.0.0.1"), (db, "web")):
            assert await _echoed(member.namespace, host if host != "web" else web.address)
        assert net.forwarder.reverses() == ()


async def _echoed(namespace: object, host: AddressLike) -> bool:
    async with await namespace.connect_tcp(host, 5432) as stream:  # type: ignore[attr-defined]  # it is one
        await stream.send(b"?")
        return bool(await stream.receive() == b"?")
