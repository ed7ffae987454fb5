"""What is told of flows, and how they are ended: the same from every driver, and from several workers."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from ipaddress import IPv4Address
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from netns_kit import Endpoint, FlowEvent, FlowInfo, Network, Refusal, Uplink
from tests.support import needs_tun, needs_userns, uplinks
from tests.support.events import flow_events
from tests.support.servers import bounded

pytestmark = [pytest.mark.anyio, pytest.mark.engine, pytest.mark.usefixtures("leaks")]

ELSEWHERE = IPv4Address("203.0.113.9")
DRIVERS: dict[str, dict[str, Any]] = {
    "thread": {"driver": "thread"},
    "loop": {"driver": "loop"},
    "worker": {"driver": "worker"},
    "two workers": {"driver": "worker", "queues": 2},
}


@pytest.fixture(params=DRIVERS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    needs_userns()
    needs_tun()
    return {"uplink": Uplink(allow_host_loopback=True), **DRIVERS[request.param]}


async def until(net: Network, condition: Callable[[FlowInfo], bool]) -> FlowInfo:
    """The first flow of which that is so.  What the guest's kernel acknowledges, it does in its own time."""
    while True:
        for flow in await net.stack.flows():
            if condition(flow):
                return flow
        await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def events_of(net: Network) -> AsyncIterator[Callable[[str, str], Any]]:
    """What waits for the next event of a kind and protocol."""
    into, out_of = anyio.create_memory_object_stream[FlowEvent](1000)

    async def follow() -> None:
        async with aclosing(flow_events(net.stack)) as events:
            async for event in events:
                await into.send(event)

    async def wait(kind: str, protocol: str) -> FlowEvent:
        while True:
            event = await out_of.receive()
            if (event.kind, event.flow.protocol) == (kind, protocol):
                return event

    async with into, out_of, anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        await anyio.wait_all_tasks_blocked()
        await net.stack.flows()  # what was asked first is answered first: it is subscribed
        yield wait
        tasks.cancel_scope.cancel()


def name_of(sock: Any) -> str:
    return "{}:{}".format(*sock[:2])


async def listening() -> anyio.abc.SocketListener:
    """A listener on the host's loopback."""
    (listener,) = (await anyio.create_tcp_listener(local_host="127.0.0.1")).listeners
    assert isinstance(listener, anyio.abc.SocketListener)
    return listener


async def read(stream: anyio.abc.ByteReceiveStream, size: int) -> None:
    while size:
        size -= len(await stream.receive(size))


@bounded
async def test_an_outbound_connection_is_told_of_and_ended(options: dict[str, Any]) -> None:
    async with Network(**options) as net, events_of(net) as next_event:
        listener = await listening()
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        guest = await net.namespace.connect_tcp(net.subnet.gateway, port)
        host = await listener.accept()
        async with listener, guest, host:
            opened = (await next_event("opened", "tcp")).flow
            assert (opened.direction, opened.host, opened.bytes_from_guest) == ("outbound", None, 0)
            await guest.send(bytes(100_000))
            await read(host, 100_000)
            await host.send(bytes(50_000))
            await read(guest, 50_000)
            flow = await until(net, lambda flow: flow.bytes_to_guest == 50_000)
            assert flow.bytes_from_guest == 100_000
            assert flow.id == opened.id
            assert str(flow.host) == name_of(host.extra(anyio.abc.SocketAttribute.remote_address))
            assert flow.name == "gateway.containers.internal"
            assert flow.age > 0
            assert (await until(net, lambda each: each.age > flow.age)).id == flow.id
            assert await net.stack.end_flow(flow.id)
            for end in (guest, host):
                with pytest.raises((anyio.BrokenResourceError, ConnectionResetError)):
                    await end.receive()
            closed = (await next_event("closed", "tcp")).flow
            assert (closed.id, closed.bytes_from_guest, closed.bytes_to_guest) == (flow.id, 100_000, 50_000)
            assert closed.host == flow.host
            assert not await net.stack.end_flow(flow.id)


@bounded
async def test_the_last_event_of_a_connection_that_ends_by_itself_has_all_bytes(
    options: dict[str, Any],
) -> None:
    """FIN and SYN have sequence numbers, and are no bytes."""
    async with Network(**options) as net, events_of(net) as next_event:
        listener = await listening()
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with listener:
            guest = await net.namespace.connect_tcp(net.subnet.gateway, port)
            host = await listener.accept()
            await guest.send(b"question")
            await read(host, 8)
            await host.send(b"answer")
            await host.send_eof()
            await read(guest, 6)
            await guest.aclose()
            await host.aclose()
            closed = (await next_event("closed", "tcp")).flow
            assert (closed.bytes_from_guest, closed.bytes_to_guest) == (8, 6)
            assert closed.host is not None
            assert not await net.stack.end_flow(closed.id)


@bounded
async def test_an_inbound_connection_is_told_of_with_its_client(options: dict[str, Any]) -> None:
    async with Network(**options) as net, events_of(net) as next_event:
        (forward,) = await net.forwarder.add("127.0.0.1:0:80")
        async with await net.namespace.listen_tcp(net.subnet.guest, 80) as listener:
            client = await anyio.connect_tcp("127.0.0.1", forward.host_port)
            async with client, await listener.accept() as server:
                await client.send(b"hello")
                await read(server, 5)
                flow = await until(net, lambda flow: flow.bytes_to_guest == 5)
                assert flow.direction == "inbound"
                assert str(flow.host) == name_of(client.extra(anyio.abc.SocketAttribute.local_address))
                assert flow.guest == (net.subnet.guest, 80)
                assert await net.stack.end_flow(flow.id)
                for end in (client, server):
                    with pytest.raises((anyio.BrokenResourceError, ConnectionResetError)):
                        await end.receive()
                assert (await next_event("closed", "tcp")).flow.id == flow.id


@bounded
async def test_an_inbound_connection_that_is_refused_inside(options: dict[str, Any]) -> None:
    async with Network(**options) as net, events_of(net) as next_event:
        (forward,) = await net.forwarder.add("127.0.0.1:0:80")
        with socket.create_connection(("127.0.0.1", forward.host_port)) as client:
            refused = await next_event("refused", "tcp")
            assert refused.refusal is Refusal.RESET
            assert (refused.flow.direction, refused.flow.host) == ("inbound", Endpoint(*client.getsockname()))


@bounded
async def test_datagrams_are_counted_and_their_flow_ended(options: dict[str, Any]) -> None:
    async with Network(**options) as net, events_of(net) as next_event:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
            await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as guest,
        ):
            server.bind(("127.0.0.1", 0))
            server.setblocking(False)
            guest.connect((str(net.subnet.gateway), server.getsockname()[1]))
            for size in (0, 10, 100):
                guest.send(bytes(size))
            for _ in range(3):
                await anyio.wait_readable(server)
                _, sender = server.recvfrom(1000)
            for _ in range(2):
                server.sendto(bytes(500), sender)
                await anyio.wait_readable(guest)
                assert guest.recv(1000) == bytes(500)
            flow = await until(net, lambda flow: flow.protocol == "udp")
            assert (flow.bytes_from_guest, flow.bytes_to_guest) == (110, 1000)
            assert flow.host is not None
            assert flow.host.port == sender[1]
            assert await net.stack.end_flow(flow.id)
            assert (await next_event("closed", "udp")).flow.bytes_from_guest == 110
            assert flow.id not in {each.id for each in await net.stack.flows()}
            guest.send(b"again")
            await anyio.wait_readable(server)
            again = await until(net, lambda flow: flow.protocol == "udp")
            assert again.id != flow.id


@bounded
async def test_a_datagram_flow_of_a_client_has_its_address(options: dict[str, Any]) -> None:
    async with Network(**options) as net:
        (forward,) = await net.forwarder.add("127.0.0.1:0:53/udp")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(("127.0.0.1", forward.host_port))
            client.send(b"x" * 7)
            flow = await until(net, lambda flow: flow.protocol == "udp")
            assert (flow.direction, flow.host, flow.bytes_to_guest) == (
                "inbound",
                Endpoint(*client.getsockname()),
                7,
            )


async def resolver(sock: socket.socket) -> None:
    """Answers every question with 127.0.0.1, for a minute."""
    while True:
        await anyio.wait_readable(sock)
        query, client = sock.recvfrom(4096)
        end = query.index(0, 12) + 5
        answer = bytes.fromhex("c00c 0001 0001 0000003c 0004") + ELSEWHERE.packed
        sock.sendto(query[:2] + bytes.fromhex("8180 0001 0001 0000 0000") + query[12:end] + answer, client)


@bounded
async def test_a_flow_has_the_name_that_was_looked_up_for_it(options: dict[str, Any]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream:
        upstream.bind(("127.0.0.1", 0))
        upstream.setblocking(False)
        options["uplink"] = Uplink(dns=[Endpoint(*upstream.getsockname())], policy=uplinks.names_only)
        async with (
            Network(**options) as net,
            events_of(net) as next_event,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(resolver, upstream)
            await net.run([sys.executable, "-c", "import socket; socket.gethostbyname('www.example.com')"])
            for port in range(1, 9):  # each worker has some of them
                guest = await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
                with guest:
                    guest.connect_ex((str(ELSEWHERE), port))
                    assert (await next_event("opened", "tcp")).flow.name == "www.example.com"
            tasks.cancel_scope.cancel()


@bounded
async def test_an_id_is_one_flow_of_all_workers() -> None:
    needs_userns()
    needs_tun()
    uplink = Uplink(allow_host_loopback=True)
    async with Network(uplink=uplink, driver="worker", queues=2) as net:
        listener = await listening()
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with listener, AsyncExitStack() as held:
            for _ in range(8):
                guest = await net.namespace.connect_tcp(net.subnet.gateway, port)
                await held.enter_async_context(guest)
                await held.enter_async_context(await listener.accept())
            flows = {flow.id: flow for flow in await net.stack.flows()}
            assert len(flows) == 8
            assert await net.stack.end_flow(next(iter(flows)))
            assert {flow.id for flow in await net.stack.flows()} == flows.keys() - {next(iter(flows))}
