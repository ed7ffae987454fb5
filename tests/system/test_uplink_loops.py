"""Uplinks on each event loop and each driver: TCP and UDP by SOCKS5, HTTP CONNECT, a chooser, another namespace."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import anyio
import pytest

from netns_kit import (
    ChooserUplink,
    GuestDatagrams,
    GuestStream,
    HttpConnectUplink,
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
