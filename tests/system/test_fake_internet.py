"""A fake internet, with programs in a namespace, on each driver."""

from __future__ import annotations

import errno
import json
import socket
import sys
from collections.abc import AsyncIterator

import anyio
import pytest

from netns_kit import FakeInternet, FlowEvent, GuestDatagrams, GuestStream, Network, Record, Refusal
from netns_kit.gateway.setup import DriverName
from tests.support import needs
from tests.support.drivers import driver
from tests.support.events import followed
from tests.support.servers import bounded

__all__ = ["driver"]  # a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

TRY = """
import json, socket, sys
host, port, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
sock.settimeout(float(sys.argv[4]))
try:
    sock.connect((host, port))
    sock.send(b"hello")
    print(json.dumps(sock.recv(100).decode()))
except TimeoutError:
    print('"silence"')
except OSError as error:
    print(json.dumps(error.errno))
"""
ECHO = """
import socket
server = socket.create_server(("", 80))
print(flush=True)
connection, (address, _) = server.accept()
connection.sendall(address.encode())
"""


async def http(stream: GuestStream) -> None:
    request = b""
    while b"\r\n\r\n" not in request:
        request += await stream.receive()
    body = request.split()[1]
    await stream.send(
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )


async def echo(stream: GuestStream | GuestDatagrams) -> None:
    async for data in stream:
        await stream.send(data)


class World:
    def __init__(self, fake: FakeInternet, net: Network) -> None:
        self.fake, self.net = fake, net

    async def attempt(self, host: str, port: int, kind: str = "tcp", seconds: float = 20) -> object:
        """What a program inside hears of what it has said, or how it fails."""
        done = await self.net.run([sys.executable, "-c", TRY, host, str(port), kind, str(seconds)], stdout=-1)
        return json.loads(done.stdout)


@pytest.fixture
async def world(leaks: None, driver: DriverName) -> AsyncIterator[World]:
    fake = FakeInternet(search=["example.com"])
    async with Network(uplink=fake, driver=driver, ports=["8080:80"], ipv6=True) as net:
        yield World(fake, net)


@bounded
async def test_curl_and_a_host_by_its_name(world: World) -> None:
    needs("curl")
    api = world.fake.host("api.example.com")
    api.serve_tcp(80, http)
    for url in (
        "http://api.example.com/a",
        "http://api/a",
        f"http://{api.addresses[0]}/a",
        f"http://[{api.addresses[1]}]/a",
    ):
        assert (await world.net.run(["curl", "-sS", url], stdout=-1)).stdout == b"/a"
    failed = await world.net.run(["curl", "-sS", "http://nowhere.example.org/"], check=False, stderr=-1)
    assert b"Could not resolve host" in failed.stderr
    assert {each.name for each in world.fake.queries} >= {"api.example.com", "nowhere.example.org"}
    assert [each.host for each in world.fake.flows] == [api] * 4


@bounded
async def test_what_programs_see_of_refusals(world: World) -> None:
    api = world.fake.host("api.example.com")
    api.serve_tcp(80, echo)
    api.serve_udp(80, echo)
    api.refuse_tcp(82, Refusal.PROHIBITED)
    api.refuse_udp(82, Refusal.PROHIBITED)
    api.refuse_udp(83, Refusal.DROP)
    for kind in ("tcp", "udp"):
        assert await world.attempt("api.example.com", 80, kind) == "hello"
        assert await world.attempt("api.example.com", 81, kind) == errno.ECONNREFUSED
    assert await world.attempt("api.example.com", 82) == errno.EHOSTUNREACH
    assert await world.attempt("api.example.com", 82, "udp") == errno.EHOSTUNREACH
    assert await world.attempt("api.example.com", 83, "udp", 0.2) == "silence"
    assert await world.attempt("192.0.2.200", 80) == errno.ENETUNREACH
    api.down()
    assert await world.attempt("api.example.com", 80) == errno.EHOSTUNREACH


@bounded
async def test_pings(world: World) -> None:
    needs("ping")
    api = world.fake.host("api.example.com")

    async def ping(*options: str) -> tuple[int, bytes]:
        done = await world.net.run(["ping", "-c", "1", *options], check=False, stdout=-1)
        return done.returncode, done.stdout

    assert (await ping("api.example.com"))[0] == 0
    assert (await ping(str(api.addresses[1])))[0] == 0
    api.ping = False
    assert (await ping("-W", "0.2", "api.example.com"))[0] == 1
    api.down()
    code, said = await ping("-W", "5", "api.example.com")
    assert (code, b"Unreachable" in said) == (1, True)
    code, said = await ping("-W", "5", "192.0.2.200")
    assert (code, b"Unreachable" in said) == (1, True)
    assert [each.refused for each in world.fake.flows] == [
        None, None, Refusal.DROP, Refusal.HOST_UNREACHABLE, Refusal.NET_UNREACHABLE
    ]  # fmt: skip


@bounded
async def test_datagrams_of_a_flow_have_one_handler(world: World) -> None:
    api = world.fake.host("api.example.com")
    sizes: list[int] = []

    @api.udp(None)
    async def handler(stream: GuestDatagrams) -> None:
        async for data in stream:
            sizes.append(len(data))
            await stream.send(data[::-1])

    with await world.net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        client.connect((str(api.addresses[0]), 123))
        for said in (b"abc", b"", b"x" * 65507):
            client.send(said)
            await anyio.wait_readable(client)
            assert client.recv(65536) == said[::-1]
    assert sizes == [3, 0, 65507]
    assert len(world.fake.flows) == 1


@bounded
async def test_a_server_inside_has_clients_outside(world: World) -> None:
    client = world.fake.host("client.example.net", addresses=["198.51.100.9"])
    with pytest.raises(ConnectionRefusedError):
        await client.connect_tcp(8080)
    async with await world.net.popen([sys.executable, "-c", ECHO], stdout=-1) as server:
        assert server.stdout
        await server.stdout.receive()
        async with await client.connect_tcp(8080) as stream:
            assert await stream.receive() == b"198.51.100.9"


@bounded
async def test_events_are_as_of_any_flow(world: World) -> None:
    world.fake.host("api.example.com").serve_tcp(80, echo)
    world.fake.add_record(Record("www.example.com", "api.example.com", "CNAME"))
    seen: list[FlowEvent] = []
    async with followed(world.net.stack) as events:
        assert await world.attempt("www.example.com", 80) == "hello"
        while len(seen) < 2:
            event = await events.receive()
            if event.flow.remote.port == 80:
                seen.append(event)
    assert [each.kind for each in seen] == ["opened", "closed"]
    assert seen[-1].flow.name == "www.example.com"
    assert (seen[-1].flow.bytes_from_guest, seen[-1].flow.bytes_to_guest) == (5, 5)


@bounded
async def test_the_hosts_own_names_are_not_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netns_kit.network.shown.text_of", lambda _: "192.0.2.250 intranet")
    files = await world.net.files()
    assert "intranet" not in files["/etc/hosts"]
    assert "search example.com" in files["/etc/resolv.conf"]


@bounded
async def test_several_workers_have_one_internet() -> None:
    fake = FakeInternet()
    fake.host("api.example.com").serve_tcp(80, echo)
    async with Network(uplink=fake, driver="worker", queues=2) as net:
        world = World(fake, net)
        for _ in range(6):
            assert await world.attempt("api.example.com", 80) == "hello"
    assert len(fake.flows) == 6
