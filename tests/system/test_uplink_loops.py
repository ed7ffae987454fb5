"""Uplinks on each event loop and each driver, for flows of the engine and of handlers."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import anyio
import pytest

from netns_kit import (
    ChooserUplink,
    FakeInternet,
    GuestDatagrams,
    GuestStream,
    HttpConnectUplink,
    InterceptedDatagrams,
    InterceptedStream,
    NamespaceUplink,
    Network,
    Socks5Uplink,
)
from netns_kit.gateway.setup import DriverName
from tests.support.drivers import driver
from tests.support.proxies import Proxy

__all__ = ["driver"]  # a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

LOOPS: list[Any] = ["asyncio", "trio"]
if find_spec("uvloop") is not None:
    LOOPS.append(("asyncio", {"use_uvloop": True}))
TALK = """
import errno, socket, sys
def told(kind, address):
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.settimeout(20)
        try:
            sock.connect((address, 80))
            sock.send(b"abc")
            return sock.recv(100).decode()
        except OSError as error:
            return errno.errorcode[error.errno]
for address in sys.argv[1:]:
    print(told(socket.SOCK_STREAM, address), told(socket.SOCK_DGRAM, address))
"""


@pytest.fixture(scope="module", params=LOOPS, ids=str)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    if isinstance(request.param, tuple):
        backend, options = request.param
        # from its first run on, uvloop keeps a pipe
        anyio.run(anyio.sleep, 0, backend=backend, backend_options=options)
    return request.param


async def talk(net: Network, *addresses: str) -> list[str]:
    done = await net.run([sys.executable, "-c", TALK, *addresses])
    return done.stdout.decode().splitlines()


async def test_proxies(driver: DriverName) -> None:
    with Proxy("socks", password=("me", "s3cr3t")) as socks, Proxy("http") as http:
        uplink = ChooserUplink(
            [("203.0.113.0/24", HttpConnectUplink(http.at))], Socks5Uplink(socks.at, "me", "s3cr3t")
        )
        async with Network(uplink=uplink, driver=driver) as net:
            assert await talk(net, "192.0.2.1", "203.0.113.1") == ["abc cba", "abc EHOSTUNREACH"]


async def test_another_namespace(driver: DriverName) -> None:
    async def stream(peer: GuestStream) -> None:
        await peer.send(b"from " + await peer.receive())

    async def datagrams(peer: GuestDatagrams) -> None:
        async for each in peer:
            await peer.send(b"from " + each)

    async with (
        Network(subnet="10.9.0.0/24", driver=driver) as via,
        await via.stack.serve_tcp("192.0.2.1", 80, stream),
        await via.stack.serve_udp("192.0.2.1", 80, datagrams),
        Network(uplink=NamespaceUplink(via.namespace), driver=driver) as net,
    ):
        assert await talk(net, "192.0.2.1") == ["from abc from abc"]


async def upper(stream: InterceptedStream) -> None:
    async with await stream.connect_upstream() as upstream:
        await upstream.send((await stream.receive()).upper())
        await stream.send(await upstream.receive())


async def looks_and_joins(stream: InterceptedStream) -> None:
    upstream = await stream.connect_upstream()
    await stream.peek()
    await stream.join(upstream)


async def upper_datagrams(stream: InterceptedDatagrams) -> None:
    async with await stream.connect_upstream() as upstream:
        async for data in stream:
            await upstream.send(data.upper())
            await stream.send(await upstream.receive())


async def datagrams_join(stream: InterceptedDatagrams) -> None:
    await stream.join()


async def intercepted(net: Network, *addresses: str) -> list[list[str]]:
    """What is told when handlers copy, and when they join."""
    told = []
    for streams, datagrams in (upper, upper_datagrams), (looks_and_joins, datagrams_join):
        async with (
            await net.stack.intercept((), streams),
            await net.stack.intercept((), datagrams, protocol="udp"),
        ):
            told.append(await talk(net, *addresses))
    return told


async def test_ways_out_of_handlers_by_proxies(driver: DriverName) -> None:
    with Proxy("socks", password=("me", "s3cr3t")) as socks, Proxy("http") as http:
        uplink = ChooserUplink(
            [("203.0.113.0/24", HttpConnectUplink(http.at))], Socks5Uplink(socks.at, "me", "s3cr3t")
        )
        async with Network(uplink=uplink, driver=driver) as net:
            assert await intercepted(net, "192.0.2.1", "203.0.113.1") == [
                ["ABC CBA", "ABC EHOSTUNREACH"],
                ["abc cba", "abc EHOSTUNREACH"],
            ]


async def test_a_refused_way_out_of_datagrams_by_a_proxy(driver: DriverName) -> None:
    refused: list[type[OSError]] = []

    async def handler(stream: InterceptedDatagrams) -> None:
        try:
            await stream.connect_upstream()
        except OSError as error:
            refused.append(type(error))
            raise

    with Proxy("socks", 7) as socks:
        async with (
            Network(uplink=Socks5Uplink(socks.at), driver=driver) as net,
            await net.stack.intercept((), handler, protocol="udp"),
        ):
            assert (await talk(net, "192.0.2.1"))[0].split()[1] == "EHOSTUNREACH"
    assert refused


async def test_ways_out_of_handlers_by_another_namespace(driver: DriverName) -> None:
    async def stream(peer: GuestStream) -> None:
        await peer.send(b"from " + await peer.receive())

    async def datagrams(peer: GuestDatagrams) -> None:
        async for each in peer:
            await peer.send(b"from " + each)

    async with (
        Network(subnet="10.9.0.0/24", driver=driver) as via,
        await via.stack.serve_tcp("192.0.2.1", 80, stream),
        await via.stack.serve_udp("192.0.2.1", 80, datagrams),
        Network(uplink=NamespaceUplink(via.namespace), driver=driver) as net,
    ):
        assert await intercepted(net, "192.0.2.1") == [["from ABC from ABC"], ["from abc from abc"]]


async def test_ways_out_of_handlers_in_memory(driver: DriverName) -> None:
    fake = FakeInternet()
    host = fake.host("api.example.com", addresses=["192.0.2.1"])

    @host.tcp(80)
    async def stream(peer: GuestStream) -> None:
        await peer.send(b"from " + await peer.receive())

    @host.udp(80)
    async def datagrams(peer: GuestDatagrams) -> None:
        async for each in peer:
            await peer.send(b"from " + each)

    async with Network(uplink=fake, driver=driver) as net:
        assert await intercepted(net, "192.0.2.1") == [["from ABC from ABC"], ["from abc from abc"]]
