"""Several workers on the queues of one tap: to those inside and outside they are one gateway."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing

import anyio
import pytest
from anyio.abc import ByteStream

from netns_kit import Network, StackCrashed, TapDevice, Uplink, UserStack
from netns_kit.dns import Zone
from netns_kit.gateway.gateway import FlowInfo, Gateway
from netns_kit.userstack.worker.owner import WorkerProcess
from tests.support import needs, needs_tun
from tests.support.connections import once
from tests.support.events import flow_events
from tests.support.servers import bounded, dns_server, echo, tcp_server, udp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

GATEWAY = "10.0.2.2"


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


@pytest.fixture
async def net() -> AsyncIterator[Network]:
    async with Network(uplink=Uplink(allow_host_loopback=True), driver="worker", queues=2) as network:
        yield network


def workers(net: Network) -> tuple[WorkerProcess, ...]:
    return net.stack.workers.processes


async def connections(net: Network) -> list[int]:
    """Of each worker."""
    return [(await worker.ask(Gateway.stats))["tcp_connections"] for worker in workers(net)]


async def converse(stream: ByteStream, data: bytes = b"x") -> None:
    await stream.send(data)
    assert await stream.receive() == data


@bounded
async def test_connections_are_shared_out_and_told_of_as_one(net: Network) -> None:
    async with AsyncExitStack() as stack:
        port = stack.enter_context(tcp_server(echo))
        for _ in range(32):
            stream = await net.namespace.connect_tcp(GATEWAY, port)
            await stack.enter_async_context(stream)
            await converse(stream)
        shares = await connections(net)
        assert min(shares) >= 4, shares
        assert sum(shares) == 32 == (await net.stack.stats())["tcp_connections"]
        assert len([flow for flow in await net.stack.flows() if flow.protocol == "tcp"]) == 32


@once
@bounded
async def test_clients_of_a_port_are_shared_out_and_found_again_after_a_silence(net: Network) -> None:
    """After 3 s the kernel has forgotten which queue a flow was written to."""
    (forward,) = await net.forwarder.add("127.0.0.1:0:80")
    listener = await net.namespace.listen_tcp("10.0.2.100", 80)
    async with listener, AsyncExitStack() as stack:
        pairs = []
        for _ in range(16):
            client = await anyio.connect_tcp("127.0.0.1", forward.host_port)
            await stack.enter_async_context(client)
            served = await listener.accept()
            await stack.enter_async_context(served)
            pairs.append((client, served))
        assert min(await connections(net)) >= 1
        await anyio.sleep(4.5)
        before = (await net.stack.stats())["handed_over"]
        for client, served in pairs:
            await served.send(b"still here")
            assert await client.receive() == b"still here"
        assert (await net.stack.stats())["handed_over"] > before, "or nothing was tested"


@bounded
async def test_what_there_is_once_is_the_firsts(net: Network) -> None:
    needs("dig")
    with dns_server({"name.tld": "192.0.2.7"}) as port, udp_server() as echo_port:
        async with Network(
            uplink=Uplink(allow_host_loopback=True, dns=[f"127.0.0.1:{port}"]), driver="worker", queues=3
        ) as three:
            for _ in range(6):  # from another port each, so by any queue
                assert (await three.run(["dig", "+short", "name.tld"])).stdout.strip() == b"192.0.2.7"
                sock = await three.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
                with sock:
                    sock.setblocking(False)
                    sock.connect((GATEWAY, echo_port))
                    sock.send(b"hello")
                    await anyio.wait_readable(sock)
                    assert sock.recv(100) == b"hello"
            stats = [await worker.ask(Gateway.stats) for worker in workers(three)]
            assert [each["udp_flows"] > 0 for each in stats] == [True, False, False]


@bounded
async def test_events_of_all_are_heard(net: Network) -> None:
    heard: set[FlowInfo] = set()
    enough = anyio.Event()

    async def listen() -> None:
        async with aclosing(flow_events(net.stack)) as events:
            async for event in events:
                heard.add(event.flow)
                if len(heard) == 32:
                    enough.set()

    with tcp_server(echo) as port:
        async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
            tasks.start_soon(listen)
            while not enough.is_set():
                stream = await net.namespace.connect_tcp(GATEWAY, port)
                await stack.enter_async_context(stream)
                await converse(stream)
            for worker in workers(net):
                flows = await worker.ask(Gateway.flows)
                assert {flow.guest for flow in flows} & {flow.guest for flow in heard}
            tasks.cancel_scope.cancel()


@bounded
@pytest.mark.parametrize("victim", [0, 1])
async def test_the_end_of_one_is_the_end_of_all(victim: int) -> None:
    pids: list[int] = []
    with pytest.raises(StackCrashed, match="SIGKILL"):
        async with Network(driver="worker", queues=2) as net:
            pids += [worker.pid for worker in workers(net)]
            os.kill(pids[victim], signal.SIGKILL)
            await net.wait_closed()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@bounded
async def test_on_one_processor_they_are_as_right(net: Network) -> None:
    """Whoever waits for the other gives it the processor."""
    one = {min(os.sched_getaffinity(0))}
    for worker in workers(net):
        os.sched_setaffinity(worker.pid, one)
    data = os.urandom(1 << 20)
    with tcp_server(echo) as port:
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(_exchange, net, port, data)
    assert min(await connections(net)) >= 0


async def _exchange(net: Network, port: int, data: bytes) -> None:
    async with await net.namespace.connect_tcp(GATEWAY, port) as stream, anyio.create_task_group() as tasks:
        tasks.start_soon(stream.send, data)
        received = bytearray()
        while len(received) < len(data):
            received += await stream.receive()
        assert received == data


async def test_other_drivers_take_one_queue() -> None:
    with pytest.raises(ValueError, match=r"driver='thread': expected worker processes for 2 queues"):
        Network(queues=2)
    device = TapDevice.open(Network().namespace, queues=2)
    with pytest.raises(ValueError, match="driver='loop': expected worker processes for 2 queues"):
        UserStack(device, driver="loop")


@bounded
@pytest.mark.parametrize("silent", [0, 1])
async def test_a_record_is_everybodys_or_nobodys_also_when_adding_it_is_cancelled(
    net: Network, silent: int
) -> None:
    """Whoever of them has not answered yet, and though the channel to him is full."""
    pid = workers(net)[silent].pid
    os.kill(pid, signal.SIGSTOP)
    names = [f"{'x' * 60}.{'y' * 60}.{number}.test" for number in range(300)]
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(net.stack.add_record, f"{name}=192.0.2.7")
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    os.kill(pid, signal.SIGCONT)
    one, other = [await worker.ask(Zone.records) for worker in workers(net)]
    assert one == other
    assert len(one) >= len(names)
