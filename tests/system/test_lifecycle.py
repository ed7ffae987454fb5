"""However it ends, and whoever ends it: a typed error in the caller's task, and nothing left."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import math
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NoReturn, get_args

import anyio
import anyio.abc
import pytest

from netns_kit import DeviceGone, NamespaceGone, Network, StackCrashed, TapDevice, Uplink, UserStack
from netns_kit.drivers import DriverName
from netns_kit.errors import NetnsKitError
from netns_kit.gateway import Gateway
from tests.servers import SECONDS, bounded, echo, tcp_server, udp_server
from tests.support import Possessions, needs, needs_tun

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

LONG = bool(os.environ.get("NETNS_KIT_LONG"))
GATEWAY = "10.0.2.2"


@pytest.fixture(params=["thread", "loop", "worker"])
def driver(request: pytest.FixtureRequest) -> DriverName:
    needs_tun()
    driver: DriverName = request.param
    return driver


def network(driver: DriverName, **options: Any) -> Network:
    return Network(uplink=Uplink(allow_host_loopback=True), driver=driver, **options)


@asynccontextmanager
async def in_use(net: Network) -> AsyncIterator[anyio.abc.SocketStream]:
    """Connections out and in, datagrams, a ping and a command are under way."""
    async with AsyncExitStack() as stack:
        port = stack.enter_context(tcp_server(echo))
        sink = stack.enter_context(udp_server())
        stream = await stack.enter_async_context(await net.namespace.connect_tcp(GATEWAY, port))
        await stream.send(b"x")
        assert await stream.receive() == b"x"
        sock = stack.enter_context(await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.sendto(b"x", (GATEWAY, sink))
        await anyio.wait_readable(sock)
        (forward,) = await net.forwarder.add("127.0.0.1:0:80")
        await net.forwarder.add("127.0.0.1:0:53/udp")
        await stack.enter_async_context(await net.namespace.listen_tcp("10.0.2.100", 80))
        await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", forward.host_port))
        await stack.enter_async_context(await net.popen(["sleep", "600"]))
        yield stream


@bounded
async def test_an_error_in_the_block_is_raised_as_it_is(driver: DriverName) -> None:
    with pytest.raises(ZeroDivisionError):
        async with network(driver) as net, in_use(net):
            _ = 1 / 0


@bounded
async def test_an_error_in_a_task_of_the_block(driver: DriverName) -> None:
    async def handler() -> NoReturn:
        raise LookupError("a handler of the caller's")

    with pytest.raises(BaseException) as caught:
        async with network(driver) as net, in_use(net), anyio.create_task_group() as tasks:
            tasks.start_soon(handler)
    (error,) = caught.value.exceptions  # type: ignore[attr-defined]  # ExceptionGroup, by another name on 3.10
    assert isinstance(error, LookupError)


@bounded
async def test_a_killed_agent(driver: DriverName) -> None:
    with pytest.raises(NamespaceGone, match="agent"):
        async with network(driver) as net, in_use(net):
            os.kill(net.namespace.pid, signal.SIGKILL)
            await net.wait_closed()


@bounded
async def test_a_device_removed_inside(driver: DriverName) -> None:
    needs("ip")
    with pytest.raises(DeviceGone):
        async with network(driver) as net, in_use(net):
            await net.run(["ip", "link", "delete", "tap0"])
            await net.wait_closed()


@bounded
async def test_a_link_that_is_down_is_no_error(driver: DriverName) -> None:
    needs("ip")
    with tcp_server(echo) as port:
        async with network(driver) as net:
            await net.run(["ip", "link", "set", "tap0", "down"])
            with pytest.raises(OSError, match="unreachable"):
                await net.namespace.connect_tcp(GATEWAY, port)
            await net.run("ip link set tap0 up; ip route replace default via 10.0.2.2")
            async with await net.namespace.connect_tcp(GATEWAY, port) as stream:
                await stream.send(b"x")
                assert await stream.receive() == b"x"


@pytest.mark.parametrize("driver", ["thread", "loop"])  # the worker's: tests/test_worker.py
@bounded
async def test_a_bug_in_the_stack(driver: DriverName, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StackCrashed, match="LookupError: a bug") as caught:
        async with network(driver) as net, in_use(net) as stream:

            def crash(*_: object) -> NoReturn:
                raise LookupError("a bug")

            monkeypatch.setattr(net.stack.gateway.stack, "_packet", crash, raising=False)
            monkeypatch.setattr(Gateway, "_read_frames", crash)
            monkeypatch.setattr(type(net.stack.gateway.stack), "receive", crash)
            await stream.send(b"x")
            await net.wait_closed()
    assert isinstance(caught.value.__cause__, LookupError)


@pytest.mark.parametrize("driver", ["thread", "loop"])
@bounded
async def test_a_bug_in_a_timer(driver: DriverName) -> None:
    class Timer:
        timer_at = timer_entry = math.inf

        def handle_timer(self, now: float) -> NoReturn:
            raise LookupError("a bug")

    with pytest.raises(StackCrashed):
        async with network(driver) as net, in_use(net):
            engine = net.stack.gateway.engine
            await net.stack.local.call(lambda: engine.timers.arm(Timer(), engine.now + 0.01))
            await net.wait_closed()


@bounded
async def test_what_is_asked_afterwards_is_a_typed_error(driver: DriverName) -> None:
    async with network(driver) as net:
        (forward,) = await net.forwarder.add("127.0.0.1:0:80")
    for ask in (
        net.stack.flows,
        net.stack.stats,
        net.forwarder.list,
        lambda: net.forwarder.add("127.0.0.1:0:81"),
        lambda: net.forwarder.remove(forward),
        lambda: net.run(["true"]),
    ):
        with pytest.raises(NetnsKitError):
            await ask()


@bounded
async def test_cancelled_while_it_runs(driver: DriverName) -> None:
    with anyio.CancelScope() as scope:
        async with network(driver) as net, in_use(net):
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught


@bounded
async def test_cancelled_at_any_moment_of_entering(driver: DriverName) -> None:
    entered = 0
    for milliseconds in range(0, 90, 4):
        with anyio.move_on_after(milliseconds / 1000):
            async with network(driver, ports=["127.0.0.1:0:80", "127.0.0.1:0:53/udp"]):
                entered += 1
                await anyio.sleep_forever()


@bounded
async def test_a_stack_on_a_device_that_is_not_open(driver: DriverName) -> None:
    near, far = TapDevice.pair()
    await near.close()
    with pytest.raises(DeviceGone):
        async with UserStack(near, driver=driver):
            pass
    await far.close()


@bounded
async def test_a_stack_needs_no_namespace(driver: DriverName) -> None:
    """Any device will do; and what its other end does to it is an error of the block."""
    near, far = TapDevice.pair()
    with pytest.raises(DeviceGone):
        async with near, UserStack(near, driver=driver) as stack:
            assert await stack.flows() == ()
            await far.close()
            await stack.wait_closed()


async def test_hundreds_of_namespaces_leave_nothing(anyio_backend_name: str) -> None:
    """Fifty at a time: no descriptor, process, thread or memory."""
    needs_tun()
    count = 2000 if LONG else 200 if anyio_backend_name == "asyncio" else 50
    before: Possessions | None = None
    limit = anyio.Semaphore(50)

    async def one(driver: DriverName) -> None:
        async with limit, Network(driver=driver, ports=["127.0.0.1:0:80"]) as net:
            await net.stack.flows()

    with anyio.fail_after(SECONDS if not LONG else 600):
        for number in (50, count):  # the first to warm up
            size = _resident()
            before = Possessions()
            async with anyio.create_task_group() as tasks:
                for turn in range(number):
                    tasks.start_soon(one, get_args(DriverName)[turn % 3])
            assert not before.difference()
    assert _resident() - size < 16 << 20


def _resident() -> int:
    """Bytes of memory of this process, see proc_pid_statm(5)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
