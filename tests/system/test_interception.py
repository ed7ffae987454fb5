"""Interception, with programs in a namespace, on each driver."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import SocketAttribute

from netns_kit import (
    FlowAttribute,
    FlowRequest,
    InterceptedDatagrams,
    InterceptedStream,
    Network,
    Policy,
    Uplink,
)
from netns_kit.gateway.setup import DriverName
from tests.support.drivers import driver
from tests.support.servers import bounded

__all__ = ["driver"]  # a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

GATEWAY = "10.0.2.2"
CONNECT = """
import socket, sys
for address in sys.argv[2:]:
    try:
        with socket.create_connection((address, int(sys.argv[1])), timeout=20) as client:
            print(client.recv(100).decode())
    except OSError as error:
        print(type(error).__name__)
"""


async def connect(net: Network, port: int, *addresses: str) -> list[str]:
    done = await net.run([sys.executable, "-c", CONNECT, str(port), *addresses], stdout=-1)
    return (done.stdout or b"").decode().split("\n")[:-1]


async def its_name(stream: InterceptedStream) -> None:
    await stream.send(str(stream.extra(FlowAttribute.name)).encode())


@asynccontextmanager
async def echo_of_datagrams() -> AsyncIterator[int]:
    async with (
        await anyio.create_udp_socket(family=socket.AF_INET, local_host="127.0.0.1") as server,
        anyio.create_task_group() as tasks,
    ):

        async def serve() -> None:
            async for data, (host, port) in server:
                await server.sendto(b"echo of " + data, host, port)

        tasks.start_soon(serve)
        yield server.extra(SocketAttribute.local_port)
        tasks.cancel_scope.cancel()


async def answers(stream: InterceptedDatagrams) -> None:
    async for data in stream:
        await stream.send(b"answer to " + data)


async def rewrites(stream: InterceptedDatagrams) -> None:
    async with await stream.connect_upstream() as upstream:
        async for data in stream:
            await upstream.send(data.upper())
            await stream.send(await upstream.receive())


async def answers_once(stream: InterceptedDatagrams) -> None:
    await stream.send(b"answer to " + await stream.receive())
    await stream.join()


async def joins(stream: InterceptedDatagrams) -> None:
    await stream.join()


@pytest.mark.parametrize(
    ("handler", "first", "second"),
    [
        (answers, b"answer to a", b"answer to b"),
        (rewrites, b"echo of A", b"echo of B"),
        (answers_once, b"answer to a", b"echo of b"),
        (joins, b"echo of a", b"echo of b"),
    ],
)
@bounded
async def test_datagrams_through_a_handler(
    driver: DriverName,
    handler: Callable[[InterceptedDatagrams], Awaitable[object]],
    first: bytes,
    second: bytes,
) -> None:
    async with (
        echo_of_datagrams() as port,
        Network(driver=driver, uplink=Uplink(allow_host_loopback=True)) as net,
        await net.stack.intercept(GATEWAY, handler, protocol="udp"),
    ):
        with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.connect((GATEWAY, port))
            for said, expected in (b"a", first), (b"b", second):
                client.send(said)
                await anyio.wait_readable(client)
                assert client.recv(100) == expected


@bounded
async def test_a_refused_way_out_of_datagrams(driver: DriverName) -> None:
    async def handler(stream: InterceptedDatagrams) -> None:
        await stream.connect_upstream("10.0.2.77")

    async with (
        Network(driver=driver) as net,
        await net.stack.intercept([], handler, ports=9, protocol="udp"),
    ):
        with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
            client.connect(("192.0.2.1", 9))
            client.send(b".")
            await anyio.wait_readable(client)
            with pytest.raises(OSError, match="No route to host"):
                client.recv(100)


@bounded
async def test_a_name_is_what_our_dns_has_answered(driver: DriverName) -> None:
    records = ["api.example.com=192.0.2.7", "other.example.com=192.0.2.7", "third.example.com=192.0.2.8"]
    async with (
        Network(driver=driver, records=records) as net,
        await net.stack.intercept(["api.example.com", "192.0.2.9"], its_name, ports=80),
    ):
        heard = await connect(net, 80, "api.example.com", "other.example.com", "192.0.2.7", "192.0.2.9")
        assert heard[:3] == ["api.example.com"] * 3  # one address, and a name of it is meant
        assert heard[3] == "None"


@bounded
async def test_with_a_policy_by_name_there_is_no_way_past_an_interceptor(driver: DriverName) -> None:
    """Another address, another port, IPv6: the policy refuses what no name of its own stands for."""
    policy = Policy.deny().allow("api.example.com", ports=80)
    async with (
        Network(driver=driver, policy=policy, ipv6=True, records=["api.example.com=192.0.2.7"]) as net,
        await net.stack.intercept("api.example.com", its_name),
    ):
        tries = ["192.0.2.7", "api.example.com", "192.0.2.7", "192.0.2.8", "2001:db8::7", "::ffff:192.0.2.8"]
        heard = await connect(net, 80, *tries)
        assert heard[1:3] == ["api.example.com"] * 2
        assert not {"api.example.com", "None"} & {*heard[3:]}
        assert await connect(net, 81, "192.0.2.7") == ["OSError"]


@bounded
async def test_what_is_asked_about_is_asked_first(driver: DriverName) -> None:
    asked: list[str] = []

    async def on_flow(request: FlowRequest) -> bool:
        asked.append(str(request.remote))
        return request.remote.port == 80

    async with (
        Network(driver=driver, policy=Policy.ask(), on_flow=on_flow) as net,
        await net.stack.intercept([], its_name),
    ):
        assert await connect(net, 80, "192.0.2.7") == ["None"]
        assert await connect(net, 81, "192.0.2.7") == ["OSError"]
    assert asked == ["192.0.2.7:80", "192.0.2.7:81"]


@bounded
async def test_a_refusal_is_told_as_ever(driver: DriverName) -> None:
    async def handler(stream: InterceptedStream) -> None:
        await stream.connect_upstream()

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        async with Network(driver=driver, uplink=Uplink(allow_host_loopback=True)) as net:
            for each in handler, InterceptedStream.join:
                async with await net.stack.intercept([], each):
                    assert await connect(net, port, GATEWAY) == ["ConnectionRefusedError"]


@bounded
async def test_a_new_policy_cuts_what_is_intercepted(driver: DriverName) -> None:
    ended = anyio.Event()

    async def handler(stream: InterceptedStream) -> None:
        try:
            await stream.send(b".")
            await stream.receive()
        except (anyio.BrokenResourceError, anyio.EndOfStream):
            ended.set()

    async with (
        Network(driver=driver) as net,
        await net.stack.intercept([], handler),
        await net.namespace.connect_tcp("192.0.2.7", 80) as client,
    ):
        await client.receive()
        await net.stack.set_policy(Policy.deny(), existing="cut")
        await ended.wait()
        with pytest.raises(anyio.BrokenResourceError):
            await client.receive()
