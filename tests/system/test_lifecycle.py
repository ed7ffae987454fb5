"""However it ends, and whoever opens and ends it: a typed error for who asks, and nothing left."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import gc
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, NoReturn, get_args

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import pytest

from netns_kit import (
    AlreadyOpened,
    DeviceGone,
    Flow,
    Forwarder,
    Namespace,
    NamespaceGone,
    Network,
    StackClosed,
    StackCrashed,
    TapDevice,
    Uplink,
    UserStack,
    WrongEventLoop,
)
from netns_kit.errors import NetnsKitError
from netns_kit.gateway.frame_pump import FramePump
from netns_kit.gateway.setup import DriverName
from netns_kit.userstack import drivers
from tests.support import LONG, ROOT, Possessions, needs, needs_tun, wait_exit
from tests.support.load import leaked, resident
from tests.support.servers import (
    SECONDS,
    bounded,
    cancelled_at_any_moment,
    closed_port,
    echo,
    tcp_server,
    udp_server,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

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


@pytest.mark.parametrize("driver", ["thread", "loop"])  # the worker's: tests/userstack/test_worker.py
@bounded
async def test_a_bug_in_the_stack(driver: DriverName, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StackCrashed, match="LookupError: a bug") as caught:
        async with network(driver) as net, in_use(net) as stream:

            def crash(*_: object) -> NoReturn:
                raise LookupError("a bug")

            monkeypatch.setattr(net.stack.gateway.stack, "_packet", crash, raising=False)
            monkeypatch.setattr(FramePump, "read_frames", crash)
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
            await net.stack.local.driver.call(lambda: engine.timers.arm(Timer(), engine.now + 0.01))
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
@pytest.mark.parametrize("driver", ["thread", "loop"])  # a worker's: tests/userstack/test_worker.py
async def test_cancelled_at_any_moment_of_entering(driver: DriverName) -> None:
    await cancelled_at_any_moment(lambda: network(driver, ports=["127.0.0.1:0:80", "127.0.0.1:0:53/udp"]))


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


@pytest.mark.timeout(660 if LONG else 300)
async def test_hundreds_of_namespaces_leave_nothing(anyio_backend_name: str) -> None:
    """Many at a time: no descriptor, process, thread or memory."""
    needs_tun()
    count = 500 if LONG else 24 if anyio_backend_name == "asyncio" else 12
    limit = anyio.Semaphore(50)

    async def one(driver: DriverName) -> None:
        async with limit, Network(driver=driver, ports=["127.0.0.1:0:80"]) as net:
            await net.stack.flows()

    with anyio.fail_after(600 if LONG else 240):
        sizes = [resident()]
        for _ in range(3):
            before = Possessions()
            async with anyio.create_task_group() as tasks:
                for turn in range(count):
                    tasks.start_soon(one, get_args(DriverName)[turn % 3])
            assert not before.difference()
            gc.collect()  # what is in a circle waits for it, and that may be long
            sizes.append(resident())
    assert leaked(sizes) < count * 20 << 10, sizes


# -- any task opens and closes ---------------------------------------------------------------------------


async def in_a_task(function: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run it in a task that ends with it."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(function)


@bounded
async def test_opened_used_and_closed_in_different_tasks(driver: DriverName) -> None:
    net = network(driver, ports=["127.0.0.1:0:80"])
    await in_a_task(net.open)

    async def use() -> None:
        assert (await net.run(["echo", "inside"])).stdout == b"inside\n"
        assert len(await net.forwarder.list()) == 1
        async with in_use(net):
            pass

    await in_a_task(use)
    await in_a_task(net.close)
    await net.close()
    with pytest.raises(AlreadyOpened, match="make a new one"):
        await net.open()


@bounded
async def test_the_parts_one_by_one(driver: DriverName) -> None:
    """Opened without a block, in the order of what is built on what; a part may be closed early."""
    ns = Namespace.create()
    tap = TapDevice.open(ns)
    stack = UserStack(tap, driver=driver)
    forwarder = Forwarder(stack)
    with pytest.raises(NamespaceGone, match=r"not open; .* await its open\(\)"):
        _ = await tap
    with pytest.raises(StackClosed, match="not open"):
        await forwarder.open()
    await in_a_task(ns.open)
    await in_a_task(lambda: _opened(tap))
    await in_a_task(stack.open)
    forwarder = Forwarder(stack)
    await in_a_task(forwarder.open)
    (forward,) = await forwarder.add(f"127.0.0.1:{closed_port()}:80")
    await stack.close()
    with socket.create_server(("127.0.0.1", forward.host_port)):
        pass
    with pytest.raises(StackClosed, match="the UserStack has been closed"):
        await forwarder.add("127.0.0.1:0:80")
    assert (await ns.run(["echo", "inside"])).stdout == b"inside\n"
    for part in (forwarder, stack, tap, ns, ns):
        await part.close()


async def _opened(tap: TapDevice) -> None:
    assert await tap is tap


@bounded
async def test_a_network_whose_stack_was_closed_early(driver: DriverName) -> None:
    async with network(driver) as net:
        await net.stack.close()
        with pytest.raises(StackClosed):
            await net.run(["true"])
        await net.namespace.run(["true"])
        await net.tap.close()


@bounded
async def test_what_is_under_way_ends_with_the_namespace(driver: DriverName) -> None:
    """Also where the agent, or the engine, is not who is waited for."""
    net = await network(driver).open()
    command = await net.popen(["sleep", "600"])
    sock = await net.namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
    with sock:
        sock.bind(("10.0.2.100", 9))
        sock.listen(0)
        ended = 0

        async def ends(call: Callable[[], Coroutine[Any, Any, object]]) -> None:
            nonlocal ended
            with pytest.raises(NamespaceGone, match="agent"):
                await call()
            ended += 1

        async with anyio.create_task_group() as tasks:
            for call in (
                net.wait_closed,
                net.stack.wait_closed,
                net.forwarder.wait_closed,
                net.namespace.wait_closed,
                command.wait,
                lambda: net.run(["sleep", "600"]),
                lambda: net.namespace.run(["sleep", "600"]),
                lambda: anext(net.stack.events()),
                lambda: net.namespace.connect_tcp("10.0.2.99", 9),
            ):
                tasks.start_soon(ends, call)
            await anyio.wait_all_tasks_blocked()
            await net.stack.flows()
            os.kill(net.namespace.pid, signal.SIGKILL)
        await ends(net.stack.flows)
        await ends(net.forwarder.list)
        await ends(net.files)
        await ends(lambda: net.forwarder.add("127.0.0.1:0:80"))
        await command.aclose()
        await ends(net.close)
        await net.close()
    assert ended == 14


@bounded
async def test_what_is_under_way_ends_with_the_stack(driver: DriverName) -> None:
    needs("ip")
    net = await network(driver).open()
    command = await net.popen(["sleep", "600"])

    async def ends(call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        with pytest.raises(DeviceGone):
            await call()

    async with anyio.create_task_group() as tasks:
        for call in (
            net.wait_closed,
            net.stack.wait_closed,
            net.forwarder.wait_closed,
            command.wait,
            lambda: net.run(["sleep", "600"]),
            lambda: anext(net.stack.events()),
        ):
            tasks.start_soon(ends, call)
        await anyio.wait_all_tasks_blocked()
        await net.stack.flows()
        await net.namespace.run(["ip", "link", "delete", "tap0"])
    assert command.returncode is None, "its owner decides"
    await command.aclose()
    assert (await net.namespace.run(["echo", "inside"])).stdout == b"inside\n", "that is as good as it was"
    await ends(net.close)


@bounded
async def test_a_call_on_another_event_loop_ends_too() -> None:
    """A namespace serves any number of loops and threads."""
    ns = await Namespace.create().open()
    running = threading.Event()

    async def call() -> None:
        await ns.run(["true"])
        running.set()
        with pytest.raises(NamespaceGone, match="agent"), anyio.fail_after(SECONDS / 2):
            await ns.wait_closed()  # nothing but us wakes it
        with pytest.raises(NamespaceGone, match="agent"):
            await ns.run(["true"])

    async with anyio.create_task_group() as tasks:
        for backend in ("asyncio", "trio"):
            tasks.start_soon(anyio.to_thread.run_sync, partial(anyio.run, call, backend=backend))
            await anyio.to_thread.run_sync(running.wait)
            running.clear()
        await anyio.wait_all_tasks_blocked()
        os.kill(ns.pid, signal.SIGKILL)
    with pytest.raises(NamespaceGone):
        await ns.close()


@bounded
async def test_a_network_is_used_on_the_event_loop_it_was_opened_on(driver: DriverName) -> None:
    """Elsewhere a call, or closing, says so at once; it would wait for ever."""
    async with Network(driver=driver) as net:

        async def elsewhere() -> None:
            for call in (lambda: net.run(["true"]), net.stack.stats, net.forwarder.list, net.close):
                with pytest.raises(WrongEventLoop, match="opened on another event loop; use it there"):
                    await call()

        for backend in ("asyncio", "trio"):
            await anyio.to_thread.run_sync(partial(anyio.run, elsewhere, backend=backend))
        assert (await net.run(["echo", "inside"])).stdout == b"inside\n"


@bounded
async def test_commands_inside_do_not_survive_the_process_whose_namespace_it_was() -> None:
    """They are killed when it is noticed, not when somebody closes."""
    async with Namespace.create() as theirs, await theirs.popen(["sleep", "600"]) as stranger:
        ns = await Namespace.attach(pid=stranger.pid).open()
        command = await ns.popen(["sleep", "600"])
        pidfd = os.pidfd_open(command.pid)
        try:
            stranger.kill()
            with pytest.raises(NamespaceGone, match="the process whose namespace it was has ended"):
                await command.wait()
            await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        await command.aclose()
        with pytest.raises(NamespaceGone, match="the process whose namespace it was has ended"):
            await ns.close()


@bounded
async def test_a_policy_that_holds_up_the_thread_does_not_hold_up_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Closing is bounded, others have their turns meanwhile, and the thread cleans up when it is let go."""
    needs_tun()
    monkeypatch.setattr(drivers, "STOP_SECONDS", 1.0)
    monkeypatch.setattr("netns_kit.forwarder.forwarder.CLOSING_SECONDS", 0.1)
    asked, let_go = threading.Event(), threading.Event()

    def policy(_: Flow) -> None:
        asked.set()
        let_go.wait(SECONDS)

    turns = others = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await anyio.sleep(0.001)
            turns += 1

    def beside() -> None:
        nonlocal others
        while not is_over.wait(0.001):
            others += 1

    is_over = threading.Event()

    net = await Network(uplink=Uplink(policy=policy)).open()
    (forward,) = await net.forwarder.add(f"127.0.0.1:{closed_port()}:80")
    with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("203.0.113.9", 9))
        await anyio.to_thread.run_sync(asked.wait)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take_turns)
            thread = threading.Thread(target=beside)
            thread.start()
            with pytest.raises(StackCrashed, match="held up"):
                await net.close()
            is_over.set()
            tasks.cancel_scope.cancel()
        thread.join()
        assert turns > 10
        assert turns > others / 4, "as a thread that nobody holds up"
        engines = [thread for thread in threading.enumerate() if thread.name == "netns_kit engine"]
        assert len(engines) == 1
        let_go.set()
        await anyio.to_thread.run_sync(engines[0].join)
    with socket.create_server(("127.0.0.1", forward.host_port)):
        pass


@bounded
async def test_a_policy_that_takes_its_time_is_waited_for() -> None:
    needs_tun()
    asked, let_go = threading.Event(), threading.Event()

    def policy(_: Flow) -> None:
        asked.set()
        let_go.wait(SECONDS)

    with anyio.CancelScope() as scope:
        async with Network(uplink=Uplink(policy=policy)) as net:
            with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", ("203.0.113.9", 9))
                await anyio.to_thread.run_sync(asked.wait)
            threading.Timer(0.05, let_go.set).start()
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert not [thread for thread in threading.enumerate() if thread.name == "netns_kit engine"]


@bounded
async def test_a_command_that_is_dropped_is_killed_with_a_warning() -> None:
    async with Namespace.create() as ns:
        command = await ns.popen(["sleep", "600"], stdin=None, stdout=None, stderr=None)
        pidfd = os.pidfd_open(command.pid)
        try:
            with pytest.warns(
                ResourceWarning, match=rf"process {command.pid} is killed: .* await its aclose\(\)"
            ):
                del command
            await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        done = await ns.popen(["true"], stdin=None, stdout=None, stderr=None)
        await anyio.wait_readable(done._conversation._channel)  # its status is there, though nobody has asked
        del done


FORGOTTEN = """
import sys, warnings
import anyio
from netns_kit import Network

async def main():
    net = await Network(driver=sys.argv[2]).open()
    print(net.namespace.pid, flush=True)

anyio.run(main, backend=sys.argv[1])
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_one_that_is_forgotten_ends_with_its_owner_and_warns(driver: DriverName, backend: str) -> None:
    child = script(FORGOTTEN, backend, driver)
    out, err = child.communicate(timeout=SECONDS)
    assert child.returncode == 0, err
    assert "ResourceWarning: unclosed Network: leave its `async with` block, or await its close()" in err
    assert "Traceback" not in err
    assert wait_exit({int(out)}, time.monotonic() + SECONDS) == set()


INTERRUPTED = """
import sys
import anyio
from netns_kit import Network

async def main():
    async with Network(driver=sys.argv[2]) as net:
        async with await net.popen(["sleep", "600"]) as command:
            print(net.namespace.pid, command.pid, flush=True)
            if sys.argv[3] == "call":
                await command.wait()
            await anyio.sleep_forever()

try:
    anyio.run(main, backend=sys.argv[1])
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("where", ["body", "call"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_interrupted_by_the_keyboard(driver: DriverName, backend: str, where: str) -> None:
    child = script(INTERRUPTED, backend, driver, where)
    assert child.stdout is not None
    pids = [int(word) for word in child.stdout.readline().split()]
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=SECONDS)
    assert (out, child.returncode) == ("interrupted\n", 0), err
    assert "Traceback" not in err
    assert wait_exit(set(pids), time.monotonic() + SECONDS) == set()


def script(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Run it in an interpreter of its own, where SIGINT does what it usually does."""
    prefix = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-W", "always::ResourceWarning", "-c", prefix + code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
