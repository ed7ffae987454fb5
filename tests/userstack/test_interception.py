"""Interception: two stacks on a pair of fake devices, and servers on the host's loopback, on each driver."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address

import anyio
import pytest
from anyio.abc import ByteStream, SocketAttribute
from dnslib import DNSRecord

from netns_kit import (
    ArgumentError,
    ArgumentTypeError,
    Endpoint,
    FlowAttribute,
    GuestStream,
    InterceptedStream,
    Policy,
    PolicyError,
    Rule,
    TapDevice,
    Uplink,
    UpstreamStream,
    UserStack,
)
from netns_kit.gateway.setup import DriverName
from tests.support.hellos import client_hello
from tests.support.servers import bounded
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

GATEWAY, GUEST, NAME = "10.0.2.2", "10.0.2.100", "api.example.com"
BLOCK = bytes(range(256)) * 4096
REQUEST = b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n"

Handler = Callable[[InterceptedStream], Awaitable[object]]


class Pair:
    """A stack that intercepts, and another one in place of its namespace."""

    def __init__(self, stack: UserStack, inside: UserStack, port: int) -> None:
        self.stack, self.inside, self.port = stack, inside, port

    async def dial(self, address: str = GATEWAY, port: int = 0) -> GuestStream:
        packed = ip_address(address).packed  # which a namespace would send to its gateway
        self.inside.gateway.stack.link.learn(packed, self.stack.subnet.mac)
        return await self.inside.connect_tcp(address, port or self.port, source=GUEST)


async def echo(stream: ByteStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


async def everything(stream: ByteStream) -> bytes:
    return b"".join([data async for data in stream])


async def exactly(stream: ByteStream, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += await stream.receive()
    assert len(found) == size
    return found


async def both_ways(stream: InterceptedStream, upstream: UpstreamStream) -> None:
    """Copy in Python, as a handler that changes bytes would."""

    async def carry(source: ByteStream, sink: ByteStream) -> None:
        async for data in source:
            await sink.send(data)
        await sink.send_eof()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(carry, stream, upstream)
        tasks.start_soon(carry, upstream, stream)


@asynccontextmanager
async def joined(
    driver: DriverName, serve: Callable[[ByteStream], Awaitable[object]] = echo, policy: Policy | None = None
) -> AsyncIterator[Pair]:
    near, far = TapDevice.pair()
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as tasks,
        near,
        far,
        UserStack(near, Uplink(allow_host_loopback=True, policy=policy), driver=driver) as stack,
        UserStack(far, Uplink(any_source=True), subnet="10.9.0.0/24", driver="loop") as inside,
    ):
        tasks.start_soon(listener.serve, serve)
        yield Pair(stack, inside, listener.extra(SocketAttribute.local_port))
        tasks.cancel_scope.cancel()


async def crosses(client: ByteStream) -> None:
    """Bytes go both ways, and each half ends."""
    await client.send(BLOCK)
    await client.send_eof()
    assert await everything(client) == BLOCK


@bounded
async def test_bytes_are_copied_through_a_handler(driver: DriverName) -> None:
    async def handler(stream: InterceptedStream) -> None:
        assert stream.extra(FlowAttribute.local) == Endpoint(GATEWAY, pair.port)
        assert stream.extra(FlowAttribute.remote).address == Endpoint(GUEST, 1).address
        async with await stream.connect_upstream() as upstream:
            assert upstream.extra(SocketAttribute.remote_address) == ("127.0.0.1", pair.port)
            await both_ways(stream, upstream)

    async with joined(driver) as pair, await pair.stack.intercept(GATEWAY, handler):
        async with await pair.dial() as client:
            [flow] = await pair.stack.flows()
            assert (flow.guest, flow.remote) == (
                client.extra(FlowAttribute.local),
                Endpoint(GATEWAY, pair.port),
            )
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.send, BLOCK)
                assert await exactly(client, len(BLOCK)) == BLOCK
            await client.send_eof()
            assert await everything(client) == b""
        await eventually(pair.stack.flows, ())


async def at_once(stream: InterceptedStream) -> None:
    await stream.join()


async def after_a_look(stream: InterceptedStream) -> None:
    assert (await stream.peek(3))[:3] == BLOCK[:3]
    assert (await stream.peek(3))[:3] == BLOCK[:3]
    await stream.join()


async def after_a_part(stream: InterceptedStream) -> None:
    upstream = await stream.connect_upstream()
    await stream.peek(1000)
    await upstream.send(await stream.receive(10))
    await stream.join(upstream)


async def after_both_have_spoken(stream: InterceptedStream) -> None:
    upstream = await stream.connect_upstream()
    await upstream.send(await stream.receive(10))
    await stream.send(await upstream.receive())
    await stream.join(upstream)


@pytest.mark.parametrize("handler", [at_once, after_a_look, after_a_part, after_both_have_spoken])
@bounded
async def test_a_joined_connection_is_as_any_other(driver: DriverName, handler: Handler) -> None:
    async with joined(driver) as pair:
        interceptor = await pair.stack.intercept(GATEWAY, handler)
        async with await pair.dial() as client:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.send, BLOCK)
                assert await exactly(client, len(BLOCK)) == BLOCK
            [flow] = await pair.stack.flows()
            assert flow.host is not None
            await interceptor.aclose()  # it is not the interceptor's any more
            await client.send(b"more")
            assert await client.receive() == b"more"
            await client.send_eof()
            assert await everything(client) == b""
        await eventually(pair.stack.flows, ())


@bounded
async def test_what_was_sent_before_a_join_comes_first(driver: DriverName) -> None:
    """Even where the guest has not read it, and though the server has spoken already."""

    async def greet(stream: ByteStream) -> None:
        await stream.send(b"the server")
        await echo(stream)

    async def handler(stream: InterceptedStream) -> None:
        upstream = await stream.connect_upstream()
        await stream.send(BLOCK[: 1 << 17])
        await stream.join(upstream)

    async with joined(driver, greet) as pair, await pair.stack.intercept(GATEWAY, handler):
        async with await pair.dial() as client:
            await client.send(b"said")
            await client.send_eof()
            assert await everything(client) == BLOCK[: 1 << 17] + b"the server" + b"said"
        await eventually(pair.stack.flows, ())


@bounded
async def test_a_socket_of_the_way_out_is_no_childs_and_its_end_is_the_end(driver: DriverName) -> None:
    seen: list[bool] = []
    done = anyio.Event()

    async def handler(stream: InterceptedStream) -> None:
        async with await stream.connect_upstream() as upstream:
            seen.append(upstream.extra(SocketAttribute.raw_socket).get_inheritable())
            for each in stream, upstream:
                await each.send(b"")
                await each.send_eof()
                for data in b"", b"more":
                    with pytest.raises(anyio.ClosedResourceError):
                        await each.send(data)
            assert await everything(upstream) == b""
        done.set()

    async with (
        joined(driver) as pair,
        await pair.stack.intercept(GATEWAY, handler),
        await pair.dial() as client,
    ):
        assert await everything(client) == b""
        await done.wait()
    assert seen == [False]


@bounded
async def test_what_was_joined_outlives_its_interceptor(driver: DriverName) -> None:
    """Also if what the handler has sent is not with the guest yet."""
    done = anyio.Event()

    async def handler(stream: InterceptedStream) -> None:
        upstream = await stream.connect_upstream()
        with anyio.move_on_after(0.1):
            while True:
                await stream.send(BLOCK)
        await stream.join(upstream)
        done.set()

    async with joined(driver) as pair:
        interceptor = await pair.stack.intercept(GATEWAY, handler)
        async with await pair.dial() as client:
            await done.wait()
            await interceptor.aclose()
            await client.send(b"the end")
            await client.send_eof()
            assert (await everything(client)).endswith(b"the end")


@bounded
async def test_the_guests_end_before_and_after_the_join(driver: DriverName) -> None:
    has_ended, go = anyio.Event(), anyio.Event()

    async def handler(stream: InterceptedStream) -> None:
        await stream.peek(4)
        await go.wait()
        await stream.join()

    async with joined(driver) as pair, await pair.stack.intercept(GATEWAY, handler):
        async with await pair.dial() as client:
            await client.send(b"said")
            await client.send_eof()
            await anyio.sleep(0.02)
            has_ended.set()
            go.set()
            assert await everything(client) == b"said"
        await eventually(pair.stack.flows, ())


@bounded
async def test_a_joined_connection_is_reset_by_either_side(driver: DriverName) -> None:
    closed: list[str] = []

    async def serve(stream: ByteStream) -> None:
        async with stream:
            try:
                asked = await stream.receive()
                if asked == b"reset":
                    stream.extra(SocketAttribute.raw_socket).setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
                    )
                    return
                await stream.send(b"joined")
                await stream.receive()
            except anyio.BrokenResourceError:
                closed.append("reset")

    async with joined(driver, serve) as pair, await pair.stack.intercept(GATEWAY, after_no_byte):
        async with await pair.dial() as client:
            await client.send(b"reset")
            with pytest.raises(anyio.BrokenResourceError):
                await client.receive()
        async with await pair.dial() as client:
            await client.send(b"wait")
            assert await client.receive() == b"joined"  # by the engine, before the end of the flow
            await pair.inside.end_flow(client.extra(FlowAttribute.flow_id))
        await eventually(pair.stack.flows, ())
        await eventually(lambda: closed, ["reset"])


async def after_no_byte(stream: InterceptedStream) -> None:
    upstream = await stream.connect_upstream()
    await stream.peek(1)
    await stream.join(upstream)


@bounded
async def test_a_handler_answers_by_itself(driver: DriverName) -> None:
    async def handler(stream: InterceptedStream) -> None:
        assert await stream.asked_name() == NAME
        await stream.send(await stream.receive())

    async def quiet(stream: InterceptedStream) -> None:
        """Return, without a byte."""

    async with joined(driver) as pair:
        async with (
            await pair.stack.intercept("192.0.2.7", handler, ports=80),
            await pair.dial("192.0.2.7", 80) as client,
        ):
            await client.send(REQUEST)
            assert await everything(client) == REQUEST
        async with (
            await pair.stack.intercept(["192.0.2.0/24"], quiet),
            await pair.dial("192.0.2.7", 80) as client,
        ):
            assert await everything(client) == b""
        await eventually(pair.stack.flows, ())


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (REQUEST, NAME),
        (client_hello(NAME), NAME),
        (b"SSH-2.0-OpenSSH_10.0\r\n", None),
        (b"GET / HTTP/1.1\r\nHost: 192.0.2.7\r\n\r\n", None),
        (REQUEST[:20], None),
    ],
)
@bounded
async def test_the_name_that_a_client_asks_for(said: bytes, name: str | None) -> None:
    names: list[str | None] = []

    async def handler(stream: InterceptedStream) -> None:
        names.append(await stream.asked_name())
        assert await stream.receive() == said

    async with (
        joined("loop") as pair,
        await pair.stack.intercept([], handler),
        await pair.dial("192.0.2.7", 443) as client,
    ):
        await client.send(said[:5])
        await anyio.sleep(0.005)
        await client.send(said[5:])
        await client.send_eof()
        assert await everything(client) == b""
    assert names == [name]


@bounded
async def test_a_refusal_that_is_let_through_is_the_guests(driver: DriverName) -> None:
    async def handler(stream: InterceptedStream) -> None:
        await stream.connect_upstream()

    async def wrapped(stream: InterceptedStream) -> None:
        try:
            await stream.connect_upstream()
        except OSError as error:
            raise RuntimeError("it does not work") from error

    async def late(stream: InterceptedStream) -> None:
        await stream.peek()
        await stream.connect_upstream()

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        async with joined(driver) as pair:
            for refused in handler, wrapped, at_once:
                async with await pair.stack.intercept(GATEWAY, refused):
                    with pytest.raises(ConnectionRefusedError):
                        await pair.dial(port=port)
            async with await pair.stack.intercept(GATEWAY, late), await pair.dial(port=port) as client:
                await client.send(b".")
                with pytest.raises(anyio.BrokenResourceError):
                    await client.receive()
            await eventually(pair.stack.flows, ())


@bounded
async def test_another_target_and_what_refuses_it(driver: DriverName) -> None:
    errors: list[int | None] = []

    async def handler(stream: InterceptedStream) -> None:
        for address in ("192.0.2.9", "169.254.169.254"):  # the policy refuses one, the uplink the other
            try:
                await stream.connect_upstream(address, 9)
            except OSError as error:
                errors.append(error.errno)
        async with await stream.connect_upstream(GATEWAY, pair.port) as upstream:
            await upstream.send(b"elsewhere")
            await stream.send(await upstream.receive())

    policy = Policy.deny().allow("192.0.2.7", GATEWAY)
    async with joined(driver, policy=policy) as pair, await pair.stack.intercept("192.0.2.0/24", handler):
        async with await pair.dial("192.0.2.7", 80) as client:
            assert await everything(client) == b"elsewhere"
        assert errors == [errno.EACCES, errno.EACCES]
        with pytest.raises((OSError, TimeoutError)):  # the policy comes first: no handler gets it
            await pair.dial("192.0.2.8", 80)
        assert len(errors) == 2


@bounded
async def test_the_policy_looks_before_the_handler_does(driver: DriverName) -> None:
    heard: list[bytes] = []

    async def handler(stream: InterceptedStream) -> None:
        upstream = await stream.connect_upstream()
        heard.append(await stream.peek(5))
        await stream.join(upstream)

    async def blind(stream: InterceptedStream) -> None:
        await stream.send(b"")
        await stream.join(await stream.connect_upstream())

    policy = Policy.deny().allow(NAME, host=True)
    async with joined(driver, policy=policy) as pair:
        await pair.stack.add_record(f"{NAME}={GATEWAY}")
        await resolve(pair)
        for each in handler, blind:
            async with await pair.stack.intercept(NAME, each):
                async with await pair.dial() as client:
                    await client.send(REQUEST)
                    assert await exactly(client, len(REQUEST)) == REQUEST
                async with await pair.dial() as client:
                    await client.send(REQUEST.replace(b"api", b"nay"))
                    with pytest.raises(anyio.BrokenResourceError):
                        await client.receive()
        await eventually(pair.stack.flows, ())
    assert [each[:5] for each in heard] == [REQUEST[:5]]


async def resolve(pair: Pair) -> None:
    """Ask our DNS for the name, as a program inside would."""
    query = DNSRecord.question(NAME).pack()
    async with await pair.dial("10.0.2.3", 53) as dns:
        await dns.send(len(query).to_bytes(2, "big") + query)
        assert await dns.receive()


@bounded
async def test_by_name_even_if_another_name_has_the_address(driver: DriverName) -> None:
    names: list[str | None] = []

    async def handler(stream: InterceptedStream) -> None:
        names.append(stream.extra(FlowAttribute.name))

    async with joined(driver) as pair:
        await pair.stack.add_record(f"{NAME}={GATEWAY}")
        await pair.stack.add_record(f"other.example.org={GATEWAY}")
        rule = Rule("deny", [NAME, "192.0.2.0/24"], ports=pair.port, protocol="tcp")
        for targets in (NAME, "*.example.com", rule):
            async with await pair.stack.intercept(targets, handler), await pair.dial() as client:
                assert await everything(client) == b""
        async with (
            await pair.stack.intercept(Rule("allow", [NAME], protocol="udp"), handler),
            await pair.stack.intercept(NAME, handler, ports=pair.port - 1),
            await pair.stack.intercept("example.com", handler),
            await pair.dial() as client,
        ):
            await crosses(client)
    assert names == [NAME] * 3


@bounded
async def test_the_first_rule_counts_and_what_is_served_is_not_intercepted(driver: DriverName) -> None:
    def saying(word: bytes) -> Callable[[GuestStream], Awaitable[object]]:
        async def handler(stream: GuestStream) -> None:
            await stream.send(word)

        return handler

    async def heard() -> bytes:
        async with await pair.dial() as client:
            return await everything(client)

    async with joined(driver) as pair:
        first = await pair.stack.intercept(GATEWAY, saying(b"first"))
        async with await pair.stack.intercept([], saying(b"second")):
            assert await heard() == b"first"
            async with await pair.stack.serve_tcp(GATEWAY, pair.port, saying(b"served")):
                assert await heard() == b"served"
            await first.aclose()
            assert await heard() == b"second"
        async with await pair.dial() as client:
            await crosses(client)


@bounded
async def test_what_cannot_be_intercepted() -> None:
    async def handler(_: object) -> None: ...

    async with joined("loop") as pair:
        stack = pair.stack
        with pytest.raises(PolicyError):
            await stack.intercept("http://example.com/", handler)
        with pytest.raises(PolicyError):
            await stack.intercept(NAME, handler, ports=0)
        with pytest.raises(ArgumentError):
            await stack.intercept(Rule("allow", protocol="icmp"), handler)
        with pytest.raises(ArgumentError):
            await stack.intercept(NAME, handler, protocol="icmp")  # type: ignore[arg-type]  # it is the test
        with pytest.raises(ArgumentTypeError):
            await stack.intercept(NAME, "handler")  # type: ignore[arg-type]  # the same


@pytest.mark.parametrize("error", [LookupError, SystemExit, asyncio.CancelledError])
@bounded
async def test_a_handler_that_fails_or_is_cancelled_resets(
    driver: DriverName, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(stream: InterceptedStream) -> None:
        await stream.peek()
        raise error

    async def waits(stream: InterceptedStream) -> None:
        async with await stream.connect_upstream():
            await stream.send(b".")
            await anyio.sleep_forever()

    caplog.set_level(logging.ERROR)
    async with joined(driver) as pair:
        async with await pair.stack.intercept(GATEWAY, fails), await pair.dial() as client:
            await client.send(b"hello")
            with pytest.raises(anyio.BrokenResourceError):
                await client.receive()
        interceptor = await pair.stack.intercept(GATEWAY, waits)
        async with await pair.dial() as client:
            await client.receive()
            await interceptor.aclose()
            with pytest.raises(anyio.BrokenResourceError):
                await client.receive()
        await eventually(pair.stack.flows, ())
        port = pair.port
    assert [record.message for record in caplog.records] == [f"the handler of {GATEWAY}:{port} has failed"]


@bounded
async def test_a_guest_that_gives_up_before_the_handler_has_begun(driver: DriverName) -> None:
    begun, ended = anyio.Event(), anyio.Event()

    async def handler(stream: InterceptedStream) -> None:
        begun.set()
        try:
            async with await stream.connect_upstream():
                await anyio.sleep_forever()
        finally:
            ended.set()

    async def dial() -> None:
        with suppress(OSError):  # it is refused
            await pair.dial()

    async with joined(driver) as pair, await pair.stack.intercept(GATEWAY, handler):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dial)
            await begun.wait()
            [flow] = await pair.stack.flows()
            await pair.stack.end_flow(flow.id)
            await ended.wait()
            tasks.cancel_scope.cancel()
        await eventually(pair.stack.flows, ())


@bounded
async def test_a_guest_that_does_not_read_holds_up_its_server_alone(driver: DriverName) -> None:
    sent = 0

    async def flood(stream: ByteStream) -> None:
        nonlocal sent
        async with stream:
            with suppress(anyio.BrokenResourceError):
                while True:
                    await stream.send(BLOCK)
                    sent += len(BLOCK)

    async def handler(stream: InterceptedStream) -> None:
        async with await stream.connect_upstream() as upstream:
            await both_ways(stream, upstream)

    async with (
        joined(driver, flood) as pair,
        await pair.stack.intercept(GATEWAY, handler),
        await pair.dial() as client,
    ):
        await client.receive(1)
        before = -1
        while before != sent:
            before = sent
            await anyio.sleep(0.2)
        assert sent < 64 << 20
        async with await pair.dial() as other:
            assert await other.receive(10)


@bounded
async def test_a_join_that_is_cancelled_resets(driver: DriverName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more is taken from the guest by then: it would wait for ever."""

    async def stuck(*_: object) -> None:
        await anyio.sleep_forever()

    async def handler(stream: InterceptedStream) -> None:
        upstream = await stream.connect_upstream()
        await stream.send(b".")
        with anyio.move_on_after(0.05):
            await stream.join(upstream)

    monkeypatch.setattr(InterceptedStream, "_pass_on", stuck)
    async with joined(driver) as pair, await pair.stack.intercept([], handler):
        async with await pair.dial() as client:
            assert await client.receive() == b"."
            with pytest.raises(anyio.BrokenResourceError):
                await everything(client)
        await eventually(pair.stack.flows, ())


@bounded
async def test_beyond_256_connections_the_others_wait() -> None:
    running = most = 0
    go = anyio.Event()
    accepted: list[GuestStream] = []

    async def handler(stream: InterceptedStream) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await stream.send(b".")
        await go.wait()
        running -= 1

    async def dial() -> None:
        async with await pair.dial() as client:
            assert await client.receive() == b"."
            accepted.append(client)
            await go.wait()

    async with joined("loop") as pair, await pair.stack.intercept([], handler):
        async with anyio.create_task_group() as tasks:
            for _ in range(270):
                tasks.start_soon(dial)
            while len(accepted) < 256:  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.01)
            await anyio.sleep(0.1)
            assert (len(accepted), running) == (256, 256)
            go.set()
        assert (len(accepted), most) == (270, 256)
