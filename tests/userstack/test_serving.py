"""Endpoints in this process: two stacks on a pair of fake devices, without privilege, on each driver."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import ByteStream, SocketAttribute

from netns_kit import (
    AddressError,
    ArgumentError,
    ArgumentTypeError,
    Endpoint,
    Flow,
    FlowAttribute,
    GuestStream,
    PortInUseError,
    Refusal,
    StackClosed,
    TapDevice,
    Uplink,
    UserStack,
)
from netns_kit.gateway.setup import DriverName
from netns_kit.userstack.guest_streams import AT_ONCE_MOST, _End
from tests.support.servers import bounded
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

METADATA, GUEST = "169.254.169.254", "10.0.2.100"
BLOCK = bytes(range(256)) * 4096


class Pair:
    """A stack that serves, and another one in place of its namespace."""

    def __init__(self, stack: UserStack, inside: UserStack) -> None:
        self.stack, self.inside = stack, inside

    async def dial(self, address: str = METADATA, port: int = 80) -> GuestStream:
        return await self.inside.connect_tcp(address, port, source=GUEST)


@asynccontextmanager
async def joined(driver: DriverName, uplink: Uplink | None = None) -> AsyncIterator[Pair]:
    near, far = TapDevice.pair()
    async with (
        near,
        far,
        UserStack(near, uplink, driver=driver) as stack,
        UserStack(far, Uplink(any_source=True), subnet="10.9.0.0/24", driver="loop") as inside,
    ):
        yield Pair(stack, inside)


async def echo(stream: ByteStream) -> None:
    async for data in stream:
        await stream.send(data)


async def everything(stream: ByteStream) -> bytes:
    return b"".join([data async for data in stream])


@bounded
async def test_bytes_go_both_ways_and_each_half_is_closed(driver: DriverName) -> None:
    heard: list[bytes] = []

    async def handler(stream: GuestStream) -> None:
        await stream.send(b"hello")
        heard.append(await everything(stream))
        await stream.send(heard[0][::-1])

    async with joined(driver) as pair, await pair.stack.serve_tcp(METADATA, 80, handler):
        async with await pair.dial() as stream:
            assert await stream.receive() == b"hello"
            await stream.send(BLOCK)
            await stream.send_eof()
            assert await everything(stream) == BLOCK[::-1]
        assert heard == [BLOCK]
        await eventually(pair.stack.flows, ())


@bounded
async def test_a_stream_tells_whose_it_is(driver: DriverName) -> None:
    streams: list[GuestStream] = []

    async def handler(stream: GuestStream) -> None:
        streams.append(stream)
        [flow] = await pair.stack.flows()
        assert stream.extra(FlowAttribute.flow_id) == flow.id
        assert stream.extra(FlowAttribute.remote) == flow.guest
        await stream.send(b".")

    async with joined(driver) as pair, await pair.stack.serve_tcp(METADATA, 80, handler):
        await pair.stack.add_record(f"metadata.internal={METADATA}")
        async with await pair.dial() as client:
            await client.receive()
            [stream] = streams
            assert stream.extra(FlowAttribute.local) == Endpoint(METADATA, 80)
            assert stream.extra(FlowAttribute.name) == "metadata.internal"
            assert stream.extra(SocketAttribute.family) == socket.AF_INET
            assert stream.extra(SocketAttribute.local_address) == (METADATA, 80)
            assert stream.extra(SocketAttribute.local_port) == 80
            assert stream.extra(SocketAttribute.remote_address) == client.extra(SocketAttribute.local_address)
            assert stream.extra(SocketAttribute.remote_port) == client.extra(SocketAttribute.local_port)
            assert client.extra(FlowAttribute.local).address == Endpoint(GUEST, 0).address
            assert client.extra(FlowAttribute.remote) == Endpoint(METADATA, 80)


@pytest.mark.parametrize("has_ended", [False, True])
@bounded
async def test_a_reset_of_the_guest_is_no_end(driver: DriverName, has_ended: bool) -> None:
    seen: list[object] = []
    done = anyio.Event()

    async def handler(stream: GuestStream) -> None:
        await (stream.send_eof() if has_ended else stream.send(b"."))
        try:
            seen.append(await everything(stream))
        except anyio.BrokenResourceError as error:
            seen.append(type(error))
        done.set()

    async with (
        joined(driver) as pair,
        await pair.stack.serve_tcp(METADATA, 80, handler),
        await pair.dial() as client,
    ):
        if has_ended:
            assert await everything(client) == b""
        else:
            await client.receive()
        await client.send(b"half of it")
        await anyio.sleep(0.01)
        await pair.inside.end_flow(client.extra(FlowAttribute.flow_id))
        await done.wait()
    assert seen == [anyio.BrokenResourceError]


@pytest.mark.parametrize("error", [LookupError, SystemExit, asyncio.CancelledError])
@bounded
async def test_a_handler_that_fails_resets_its_connection_and_is_logged_once(
    driver: DriverName, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """Also if what has failed is a task that the handler waited for, and that somebody has cancelled."""

    async def handler(stream: GuestStream) -> None:
        data = await stream.receive()
        if data == b"fail":
            raise error
        await stream.send(data)

    caplog.set_level(logging.ERROR)
    async with joined(driver) as pair, await pair.stack.serve_tcp(METADATA, 80, handler):
        async with await pair.dial() as client:
            await client.send(b"fail")
            with pytest.raises(anyio.BrokenResourceError):
                await client.receive()
        async with await pair.dial() as client:  # others are served
            await client.send(b"hello")
            assert await client.receive() == b"hello"
    assert [record.message for record in caplog.records] == [f"the handler of {METADATA}:80 has failed"]


@bounded
async def test_a_server_that_is_closed_leaves_nothing(driver: DriverName) -> None:
    cancelled = anyio.Event()

    async def handler(stream: GuestStream) -> None:
        await stream.send(b".")
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    async with joined(driver) as pair:
        server = await pair.stack.serve_tcp(METADATA, 80, handler)
        async with await pair.dial() as client:
            await client.receive()
            await server.aclose()
            assert cancelled.is_set()
            with pytest.raises(anyio.BrokenResourceError):
                await client.receive()
        await eventually(pair.stack.flows, ())
        await server.aclose()
        async with await pair.stack.serve_tcp(METADATA, 80, echo), await pair.dial() as client:  # it is free
            await client.send(b"hello")
            assert await client.receive() == b"hello"
    await server.aclose()


@bounded
async def test_who_does_not_read_is_waited_for(driver: DriverName) -> None:
    sent = 0

    async def handler(stream: GuestStream) -> None:
        nonlocal sent
        while True:
            await stream.send(BLOCK)
            sent += len(BLOCK)

    async with (
        joined(driver) as pair,
        await pair.stack.serve_tcp(METADATA, 80, handler),
        await pair.dial() as client,
    ):
        before = -1
        while not sent or before != sent:
            before = sent
            await anyio.sleep(0.1)
        assert 0 < sent < 64 << 20
        received = 0
        while received <= before + len(BLOCK):
            received += len(await client.receive())


@bounded
async def test_one_address_comes_before_any(driver: DriverName) -> None:
    def saying(what: bytes) -> Callable[[GuestStream], Awaitable[None]]:
        async def handler(stream: GuestStream) -> None:
            await stream.send(what)

        return handler

    async with (
        joined(driver) as pair,
        await pair.stack.serve_tcp(None, 80, saying(b"any")),
        await pair.stack.serve_tcp(METADATA, 81, saying(b"another port")),
    ):
        async with await pair.stack.serve_tcp(METADATA, 80, saying(b"one")), await pair.dial() as client:
            assert await everything(client) == b"one"
        async with await pair.dial("10.0.2.2") as client:
            assert await everything(client) == b"any"
        async with await pair.dial(METADATA) as client:
            assert await everything(client) == b"any"
        with pytest.raises(OSError):
            await pair.dial("10.0.2.2", 81)


@bounded
async def test_the_uplinks_function_is_told(driver: DriverName) -> None:
    async with joined(driver, Uplink(policy=only_served)) as pair, await pair.stack.serve_tcp(None, 80, echo):
        async with await pair.dial("10.0.2.2") as client:
            await client.send(b"hello")
            assert await client.receive() == b"hello"
        with pytest.raises(ConnectionRefusedError):
            await pair.dial("10.0.2.3")


def only_served(flow: Flow) -> Refusal | None:
    return None if flow.served and str(flow.destination.address) != "10.0.2.3" else Refusal.RESET


@bounded
async def test_a_client_that_tries_again_is_tested_in_a_few_milliseconds() -> None:
    """The whole of it: two stacks, a server that fails twice, a client that gets its answer, and the end.

    It takes less of the processor than starting Python twice.
    """
    times: list[float] = []
    for _ in range(10):
        begun, attempts = time.process_time(), 0

        async def flaky(stream: GuestStream) -> None:
            nonlocal attempts
            attempts += 1
            await stream.receive()
            if attempts == 1:
                raise ConnectionResetError
            await stream.send(b"503" if attempts == 2 else b"200")

        async with joined("loop") as pair, await pair.stack.serve_tcp(METADATA, 80, flaky):
            assert await persistent(pair.dial) == b"200"
        assert attempts == 3
        times.append(time.process_time() - begun)
    assert min(times) < 2 * min(start_of_python() for _ in range(5))


def start_of_python() -> float:
    """The processor time in seconds that a Python takes to start and to end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-I", "-c", ""], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


async def persistent(dial: Callable[[], Awaitable[ByteStream]]) -> bytes:
    """What a client does that asks until it is told 200."""
    while True:
        with suppress(OSError, anyio.BrokenResourceError):
            async with await dial() as stream:
                await stream.send(b"GET")
                answer = await everything(stream)
                if answer == b"200":
                    return answer


@bounded
async def test_a_handler_whose_peer_has_gone_has_not_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(stream: GuestStream) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.receive)

    async with (
        joined("loop") as pair,
        await pair.stack.serve_tcp(METADATA, 80, handler),
        await pair.dial() as client,
    ):
        await client.send_eof()
        with pytest.raises(anyio.BrokenResourceError):
            await everything(client)
    assert not caplog.records


@bounded
async def test_many_at_once(driver: DriverName) -> None:
    async def say(pair: Pair, number: int) -> None:
        async with await pair.dial() as client:
            await client.send(b"%d" % number)
            await client.send_eof()
            assert await everything(client) == b"%d" % number

    async with joined(driver) as pair, await pair.stack.serve_tcp(METADATA, 80, echo):
        async with anyio.create_task_group() as tasks:
            for number in range(300):
                tasks.start_soon(say, pair, number)
        await eventually(pair.stack.flows, ())


@bounded
async def test_a_stack_that_ends_ends_its_streams(driver: DriverName) -> None:
    async with joined(driver) as pair:
        await pair.stack.serve_tcp(METADATA, 80, echo)
        client = await pair.dial()
        await pair.stack.close()
        with pytest.raises((anyio.BrokenResourceError, anyio.EndOfStream)):
            await client.receive()
        await pair.inside.close()
        with pytest.raises((anyio.BrokenResourceError, anyio.EndOfStream)):
            await client.receive()
        await client.aclose()
        for call in (pair.stack.serve_tcp(METADATA, 80, echo), pair.stack.connect_tcp(None, 80)):
            with pytest.raises(StackClosed):
                await call


@bounded
@pytest.mark.parametrize("how", ["stack", "server"])
async def test_a_handler_that_is_cut_ends_by_a_reset(driver: DriverName, how: str) -> None:
    """Its own closing, on its way out, is no end of the stream."""
    begun = 0

    async def closes(stream: GuestStream) -> None:
        nonlocal begun
        begun += 1
        async with stream:
            try:
                await stream.receive()
            finally:
                with anyio.CancelScope(shield=True):
                    await stream.send_eof()
                    await stream.aclose()

    for _ in range(5):  # it was a race
        begun = 0
        async with joined(driver) as pair:
            server = await pair.stack.serve_tcp(METADATA, 80, closes)
            clients = [await pair.dial() for _ in range(8)]
            while begun < len(clients):  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.001)
            await (pair.stack.close if how == "stack" else server.aclose)()
            for client in clients:
                with pytest.raises(anyio.BrokenResourceError):
                    await client.receive()
                await client.aclose()


@bounded
async def test_a_handler_that_fails_within_its_stream_ends_by_a_reset(driver: DriverName) -> None:
    async def fails(stream: GuestStream) -> None:
        async with stream:
            await stream.receive()
            raise ConnectionAbortedError

    async with joined(driver) as pair:
        await pair.stack.serve_tcp(METADATA, 80, fails)
        for _ in range(10):
            async with await pair.dial() as client:
                await client.send(b".")
                with pytest.raises(anyio.BrokenResourceError):
                    await client.receive()


@bounded
async def test_what_cannot_be_is_told_at_once(driver: DriverName) -> None:
    async with joined(driver) as pair:
        stack = pair.stack
        async with await stack.serve_tcp(METADATA, 80, echo), await stack.serve_tcp(None, 80, echo):
            for address in (METADATA, None):
                with pytest.raises(PortInUseError, match="port 80/tcp has a handler"):
                    await stack.serve_tcp(address, 80, echo)
        with pytest.raises(PortInUseError):
            await stack.serve_udp("10.0.2.3", 53, echo)  # type: ignore[arg-type]  # it gets none
        for address in ("fd00::7", GUEST, "224.0.0.1", "0.0.0.0", "not one"):
            with pytest.raises(AddressError):
                await stack.serve_tcp(address, 80, echo)
        for address in ("fd00::7", "10.0.2.2", "224.0.0.1", "not one"):
            with pytest.raises(AddressError):
                await stack.connect_tcp(address, 80)
        with pytest.raises(AddressError, match="IPv4"):
            await stack.connect_tcp(GUEST, 80, source="::1")
        for port in (0, 65536):
            with pytest.raises(ArgumentError):
                await stack.serve_tcp(METADATA, port, echo)
            with pytest.raises(ArgumentError):
                await stack.connect_tcp(GUEST, port)
        with pytest.raises(ArgumentTypeError, match="async function"):
            await stack.serve_tcp(METADATA, 80, None)  # type: ignore[arg-type]


@bounded
async def test_a_connection_that_nobody_takes_is_given_up_with_its_caller(driver: DriverName) -> None:
    async with joined(driver) as pair:
        with anyio.move_on_after(0.05) as scope:
            await pair.stack.connect_tcp("10.0.2.77", 80)
        assert scope.cancelled_caught
        await eventually(pair.stack.flows, ())


@bounded
async def test_a_connection_that_is_refused(driver: DriverName) -> None:
    async with joined(driver) as pair:
        with pytest.raises(ConnectionRefusedError):
            await pair.stack.connect_tcp("10.9.0.3", 81, source="10.9.0.100")


async def test_what_is_always_ready_leaves_others_their_turn() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    with far:
        end = _End(near)
        for _ in range(8 * AT_ONCE_MOST):
            far.send(b"x")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take_turns)
            for _ in range(8 * AT_ONCE_MOST):
                assert await end.receive(1) == b"x"
            tasks.cancel_scope.cancel()
        await end.aclose()
    assert turns >= 3
