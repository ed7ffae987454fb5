"""Ways out of intercepted connections that end at a host of a fake internet, on each driver."""

from __future__ import annotations

import errno
import io
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream

from netns_kit import (
    Endpoint,
    FakeHost,
    FakeInternet,
    FlowAttribute,
    GuestStream,
    InterceptedStream,
    Policy,
    Rule,
    TapDevice,
    UserStack,
)
from netns_kit.gateway.setup import DriverName
from tests.support.servers import bounded
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

GUEST, NAME = "10.0.2.100", "api.example.com"
BLOCK = bytes(range(256)) * 4096

Handler = Callable[[InterceptedStream], Awaitable[object]]


class World:
    """A stack on a fake internet with one host, and another stack in place of its namespace."""

    def __init__(self, fake: FakeInternet, stack: UserStack, inside: UserStack) -> None:
        self.fake, self.stack, self.inside = fake, stack, inside
        self.host: FakeHost = fake.host(NAME)

    async def dial(self, port: int = 80) -> GuestStream:
        return await self.inside.connect_tcp(self.host.addresses[0], port, source=GUEST)


@asynccontextmanager
async def world(driver: DriverName, policy: Policy | None = None) -> AsyncIterator[World]:
    fake = FakeInternet(policy=policy)
    near, far = TapDevice.pair()
    async with (
        near,
        far,
        UserStack(near, fake, driver=driver) as stack,
        UserStack(far, FakeInternet(any_source=True), subnet="10.9.0.0/24", driver="loop") as inside,
    ):
        yield World(fake, stack, inside)


async def echo(stream: ByteStream) -> None:
    async for data in stream:
        await stream.send(data)


async def everything(stream: ByteStream) -> bytes:
    return b"".join([data async for data in stream])


async def copies(stream: InterceptedStream) -> None:
    async def carry(source: ByteStream, sink: ByteStream) -> None:
        async for data in source:
            await sink.send(data)
        await sink.send_eof()

    async with await stream.connect_upstream() as upstream, anyio.create_task_group() as tasks:
        tasks.start_soon(carry, stream, upstream)
        await carry(upstream, stream)


async def joins(stream: InterceptedStream) -> None:
    await stream.join()


async def looks_and_joins(stream: InterceptedStream) -> None:
    await stream.peek()
    await stream.join()


async def connects_and_joins(stream: InterceptedStream) -> None:
    upstream = await stream.connect_upstream()
    await upstream.send(await stream.receive())
    await stream.send(await upstream.receive())
    await stream.join(upstream)


HANDLERS = [copies, joins, looks_and_joins, connects_and_joins]


@pytest.mark.parametrize("handler", HANDLERS)
@bounded
async def test_bytes_cross_to_a_host_in_memory(driver: DriverName, handler: Handler) -> None:
    ends: list[Any] = []

    async def host(stream: GuestStream) -> None:
        ends.append((stream.extra(FlowAttribute.remote), stream.extra(FlowAttribute.local)))
        await echo(stream)

    async with world(driver) as there, await there.stack.intercept((), handler):
        there.host.serve_tcp(80, host)
        for number in range(3):
            async with await there.dial() as client:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(client.send, BLOCK)
                    heard = b""
                    while len(heard) < len(BLOCK):
                        heard += await client.receive()
                assert heard == BLOCK
                await client.send_eof()
                assert await everything(client) == b""
                assert ends[number] == (client.extra(FlowAttribute.local), client.extra(FlowAttribute.remote))
        assert [(each.host, each.refused) for each in there.fake.flows] == [(there.host, None)] * 3
        await eventually(there.stack.flows, ())


@pytest.mark.parametrize("handler", HANDLERS)
@bounded
async def test_a_host_that_fails_resets_its_client(driver: DriverName, handler: Handler) -> None:
    async def fails(stream: GuestStream) -> None:
        await stream.receive()
        await stream.send(b"half")
        await stream.receive()
        raise ConnectionResetError

    async with world(driver) as there, await there.stack.intercept((), handler):
        there.host.serve_tcp(80, fails)
        async with await there.dial() as client:
            await client.send(b"hello")
            assert await client.receive() == b"half"
            await client.send(b"more")
            with pytest.raises(anyio.BrokenResourceError):
                await client.receive()
        async with await there.dial() as client:
            await client.send(b"hello")
            assert await client.receive() == b"half"
            there.host.down()
            with pytest.raises(anyio.BrokenResourceError):
                await client.receive()


@pytest.mark.parametrize("handler", [looks_and_joins, connects_and_joins])
@bounded
async def test_a_client_that_resets_a_joined_connection(driver: DriverName, handler: Handler) -> None:
    heard: list[str] = []
    ended = anyio.Event()

    async def host(stream: GuestStream) -> None:
        try:
            await echo(stream)
            heard.append("end")
        except anyio.BrokenResourceError:
            heard.append("reset")
        ended.set()

    async with world(driver) as there, await there.stack.intercept((), handler):
        there.host.serve_tcp(80, host)
        async with await there.dial() as client:
            for _ in range(2):  # the second time it is joined
                await client.send(b"hello")
                assert await client.receive() == b"hello"
            [flow] = await there.inside.flows()
            await there.inside.end_flow(flow.id)
        await ended.wait()
    assert heard == ["reset"]


@bounded
async def test_the_host_refuses_the_way_out(driver: DriverName) -> None:
    seen: list[int | None] = []

    async def handler(stream: InterceptedStream) -> None:
        try:
            await stream.connect_upstream()
        except OSError as error:
            seen.append(error.errno)
            raise

    async def elsewhere(stream: InterceptedStream) -> None:
        upstream = await stream.connect_upstream(other.addresses[0], 81)
        await stream.send(await upstream.receive())

    async def hello(stream: GuestStream) -> None:
        await stream.send(str(stream.extra(FlowAttribute.name)).encode())

    async with world(driver) as there:
        other = there.fake.host("other.example.com")
        other.serve_tcp(81, hello)
        async with await there.stack.intercept((), handler):
            with pytest.raises(ConnectionRefusedError):
                await there.dial()
            there.host.down()
            with pytest.raises(OSError, match="No route to host"):
                await there.dial()
        assert seen == [errno.ECONNREFUSED, errno.EHOSTUNREACH]
        async with await there.stack.intercept((), elsewhere), await there.dial() as client:
            assert await everything(client) == b"None"
        assert [each.remote.port for each in there.fake.flows] == [80, 80, 81]


@bounded
async def test_a_handler_that_gives_up_leaves_nothing(
    driver: DriverName, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    begun, ended = anyio.Event(), anyio.Event()

    async def waits(stream: GuestStream) -> None:
        begun.set()
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        ended.set()

    async def gives_up(stream: InterceptedStream) -> None:
        async with await stream.connect_upstream():
            await begun.wait()
        await ended.wait()
        await stream.send(b"done")

    async with world(driver) as there, await there.stack.intercept((), gives_up):
        there.host.serve_tcp(80, waits)
        async with await there.dial() as client:
            assert await everything(client) == b"done"
    assert not caplog.records


@bounded
async def test_who_sees_what(driver: DriverName) -> None:
    """The table in docs/programming.md."""
    handled: list[int] = []
    denied = "192.0.2.99"

    async def handler(stream: InterceptedStream) -> None:
        handled.append(stream.extra(FlowAttribute.local).port)
        with pytest.raises(PermissionError):
            await stream.connect_upstream(denied)
        await copies(stream)

    async def client(address: str, port: int) -> bytes:
        async with await there.inside.connect_tcp(address, port, source=GUEST) as stream:
            await stream.send(b"hello")
            heard = await stream.receive()
            [flow] = await there.stack.flows()
            assert flow.remote == Endpoint(address, port)
            return heard

    policy = Policy("allow", (Rule("deny", [denied]),))
    target = io.BytesIO()
    async with (
        world(driver, policy) as there,
        await there.stack.intercept((), handler, ports=(80, 82)),
        await there.stack.serve_tcp(denied, 80, echo),
        there.stack.capture(target),
    ):
        address = str(there.host.addresses[0])
        there.host.serve_tcp(None, echo)
        for where, port in (denied, 80), (address, 80), (address, 81):  # served, intercepted, fake
            assert await client(where, port) == b"hello"
            await eventually(there.stack.flows, ())
        async with there.stack.faults(refuse=True, ports=82):
            with pytest.raises(ConnectionRefusedError):
                await client(address, 82)
        with pytest.raises(OSError, match="No route to host"):
            await client(denied, 81)
        assert handled == [80]
        assert [each.remote.port for each in there.fake.flows] == [80, 81]
    for port in 80, 81, 82:
        assert port.to_bytes(2, "big") in target.getvalue()
