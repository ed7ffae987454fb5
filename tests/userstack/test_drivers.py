"""The drivers: either makes an engine go on either event loop, and ends as it should."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import math
import os
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from netns_kit.errors import NetnsKitError, StackClosed, StackCrashed
from netns_kit.gateway.engine import EDGE, IN, OUT, Engine
from netns_kit.gateway.setup import DriverName
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.userstack.drivers import TURN, Driver, LoopDriver, ThreadDriver, driver_named
from tests.support.servers import SECONDS
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]


@pytest.fixture(params=["thread", "loop"])
def name(request: pytest.FixtureRequest) -> DriverName:
    name: DriverName = request.param
    return name


@pytest.fixture
def engine(leaks: None) -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture
def pair(leaks: None) -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


class Driven(Openable):
    """An engine on a driver, as `UserStack` has it."""

    def __init__(self, name: DriverName, engine: Engine) -> None:
        self.driver = driver_named(name)(engine)
        self.supervisor = Supervisor("engine", StackClosed)

    async def _open(self) -> None:
        self.supervisor.start(self.driver.run)

    async def _close(self) -> None:
        pass


@asynccontextmanager
async def driven(name: DriverName, engine: Engine) -> AsyncIterator[Driver]:
    """What goes wrong in the driver ends the block."""
    with anyio.fail_after(SECONDS):
        async with Driven(name, engine) as made:
            with made.supervisor.guarding():
                yield made.driver


class Timer:
    def __init__(self, ring: Callable[[float], None]) -> None:
        self.timer_at = self.timer_entry = math.inf
        self.handle_timer = ring


def test_there_are_two() -> None:
    engine = Engine()
    assert isinstance(driver_named("thread")(engine), ThreadDriver)
    assert isinstance(driver_named("loop")(engine), LoopDriver)
    engine.close()


async def test_it_serves_what_is_ready(
    name: DriverName, engine: Engine, pair: tuple[socket.socket, socket.socket]
) -> None:
    here, there = pair

    def shout(_: int) -> None:
        here.send(here.recv(100).upper())

    engine.add(here.fileno(), shout, IN)
    async with driven(name, engine):
        for word in (b"one", b"two", b"three"):
            there.send(word)
            await anyio.wait_readable(there)
            assert there.recv(100) == word.upper()
    engine.remove(here.fileno())


async def test_where_it_runs(name: DriverName, engine: Engine) -> None:
    async with driven(name, engine) as driver:
        thread = await driver.call(threading.current_thread)
        assert (thread is threading.current_thread()) == (name == "loop")
        assert await driver.call(threading.current_thread) is thread


async def test_calls_give_back_what_the_function_does(name: DriverName, engine: Engine) -> None:
    async with driven(name, engine) as driver:
        assert await driver.call(lambda: 42) == 42
        with pytest.raises(ZeroDivisionError):
            await driver.call(lambda: 1 // 0)
        results: list[int] = []

        async def ask(number: int) -> None:
            results.append(await driver.call(lambda: number))

        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(ask, number)
        assert sorted(results) == list(range(100))


async def test_now_is_the_drivers_clock(name: DriverName, engine: Engine) -> None:
    async with driven(name, engine) as driver:
        first = await driver.call(lambda: engine.now)
        with anyio.move_on_after(0.02):
            await anyio.sleep_forever()
        second = await driver.call(lambda: engine.now)
        assert 0.01 < second - first < SECONDS


async def test_timers_ring_in_time(name: DriverName, engine: Engine) -> None:
    rung: list[tuple[float, float]] = []
    done = os.eventfd(0, os.EFD_NONBLOCK)
    try:

        def ring(delay: float, now: float) -> None:
            rung.append((delay, now))
            os.eventfd_write(done, 1)

        delays = 0.03, 0.01, 60.0
        timers = [Timer(partial(ring, delay)) for delay in delays]
        async with driven(name, engine) as driver:

            def arm() -> float:
                for timer, delay in zip(timers, delays, strict=True):
                    engine.timers.arm(timer, engine.now + delay)
                return engine.now

            start = await driver.call(arm)
            while len(rung) < 2:
                await anyio.wait_readable(done)
                os.eventfd_read(done)
        assert [delay for delay, _ in rung] == [0.01, 0.03]
        assert all(now >= start + delay for delay, now in rung)
    finally:
        os.close(done)


async def test_an_earlier_timer_comes_first_though_armed_last(name: DriverName, engine: Engine) -> None:
    done = os.eventfd(0, os.EFD_NONBLOCK)
    timers = [Timer(lambda _: os.eventfd_write(done, 1)) for _ in range(3)]
    async with driven(name, engine) as driver:

        def arm(timer: Timer, delay: float) -> None:
            engine.timers.arm(timer, engine.now + delay)

        for timer, delay in zip(timers, (3600.0, 600.0, 0.01), strict=True):
            await driver.call(partial(arm, timer, delay))
            await driver.call(lambda: None)  # by now it waits for that one
        await anyio.wait_readable(done)
    os.close(done)


async def test_what_is_left_for_the_next_step_gets_one(name: DriverName, engine: Engine) -> None:
    async with driven(name, engine) as driver:
        done = os.eventfd(0, os.EFD_NONBLOCK)
        left = 500

        def more() -> None:
            nonlocal left
            left -= 1
            if left:
                engine.again(more)
            else:
                os.eventfd_write(done, 1)

        await driver.call(more)
        await anyio.wait_readable(done)
        os.close(done)


async def test_what_waits_for_the_end_of_a_step_gets_one_after_a_call(
    name: DriverName, engine: Engine
) -> None:
    """An ACK made by a call leaves now, not with the next frame."""
    done = os.eventfd(0, os.EFD_NONBLOCK)
    waiting: list[int] = []

    def flush() -> None:
        while waiting:
            os.eventfd_write(done, waiting.pop())

    engine.after_step.append(flush)
    async with driven(name, engine) as driver:
        await driver.call(lambda: waiting.append(1))
        await anyio.wait_readable(done)
    os.close(done)


async def test_a_crash_is_typed_and_keeps_its_cause(
    name: DriverName, engine: Engine, pair: tuple[socket.socket, socket.socket]
) -> None:
    def handler(_: int) -> None:
        raise LookupError("a bug")

    engine.add(pair[0].fileno(), handler, IN)
    with pytest.raises(StackCrashed, match="LookupError: a bug") as caught:
        async with driven(name, engine):
            pair[1].send(b"x")
            await anyio.sleep_forever()
    assert isinstance(caught.value.__cause__, LookupError)
    assert caught.value.fix


async def test_a_step_that_is_left_by_what_is_no_exception_is_the_last(
    name: DriverName, engine: Engine, pair: tuple[socket.socket, socket.socket]
) -> None:
    """asyncio reports such a thing and goes on, with whatever the step has left half done."""

    class Stop(BaseException):
        pass

    calls = 0

    def handler(_: int) -> None:
        nonlocal calls
        calls += 1
        raise Stop("wherever this comes from")

    engine.add(pair[0].fileno(), handler, IN)
    with pytest.raises(StackCrashed, match="Stop: wherever this comes from") as caught:
        async with driven(name, engine):
            pair[1].send(b"x")
            await anyio.sleep_forever()
    assert isinstance(caught.value.__cause__, Stop)
    assert calls == 1


async def test_a_thread_that_is_told_to_exit_is_missed(
    engine: Engine, pair: tuple[socket.socket, socket.socket]
) -> None:
    """`SystemExit` ends a thread in silence: nobody would answer any more."""

    def handler(_: int) -> None:
        raise SystemExit

    engine.add(pair[0].fileno(), handler, IN)
    with pytest.raises(StackCrashed, match="SystemExit"):
        async with driven("thread", engine):
            pair[1].send(b"x")
            await anyio.sleep_forever()


async def test_a_typed_error_comes_as_it_is(name: DriverName, engine: Engine) -> None:
    class Known(NetnsKitError):
        pass

    def fail(_: float) -> None:
        raise Known("it")

    timer = Timer(fail)
    with pytest.raises(Known, match="it"):
        async with driven(name, engine) as driver:
            await driver.call(lambda: engine.timers.arm(timer, engine.now + 0.01))
            await anyio.sleep_forever()


async def test_a_crash_in_the_first_step(name: DriverName, engine: Engine) -> None:
    def fail() -> None:
        raise LookupError("at once")

    engine.again(fail)
    with pytest.raises(StackCrashed):
        async with driven(name, engine):
            await anyio.sleep_forever()


async def test_a_thread_that_cannot_be_started_holds_nobody_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where RLIMIT_NPROC is reached."""

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            await ThreadDriver(engine).run()


async def test_what_a_thread_has_that_is_left_behind_is_closed_by_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a policy does that does not return: until it does, the thread may use what the engine has."""
    monkeypatch.setattr("netns_kit.userstack.drivers.STOP_SECONDS", 0.05)
    held, let_go, closed_by = threading.Event(), threading.Event(), list[str]()

    def hold() -> None:
        held.set()
        let_go.wait(SECONDS)

    driver = ThreadDriver(engine)

    async def run() -> None:
        with pytest.raises(StackCrashed, match="held up"):
            await driver.run()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        engine.call(hold)
        await anyio.to_thread.run_sync(held.wait, SECONDS)
        tasks.cancel_scope.cancel()
    driver.finish(lambda: closed_by.append(threading.current_thread().name))
    assert closed_by == []
    (left,) = [thread for thread in threading.enumerate() if thread.name == "netns_kit engine"]
    let_go.set()
    await anyio.to_thread.run_sync(left.join)
    assert closed_by == ["netns_kit engine"]
    driver.finish(lambda: closed_by.append("us"))
    assert closed_by[1:] == ["us"]


async def test_a_call_does_not_wait_for_an_engine_that_crashed(name: DriverName, engine: Engine) -> None:
    def fail() -> None:
        raise LookupError("a bug")

    with pytest.raises((StackCrashed, StackClosed)) as caught:
        async with driven(name, engine) as driver:
            await driver.call(lambda: engine.again(fail))
            while True:
                await driver.call(lambda: None)
    crash = caught.value if isinstance(caught.value, StackCrashed) else caught.value.__context__
    assert isinstance(crash, StackCrashed), "what has happened is not lost"
    with pytest.raises(StackClosed):
        await driver.call(lambda: None)


async def test_cancelled_it_leaves_nothing(name: DriverName, engine: Engine) -> None:
    for _ in range(20):
        with anyio.CancelScope() as scope:
            async with driven(name, engine) as driver:
                await driver.call(lambda: None)
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
    for _ in range(5):
        async with driven(name, engine):
            pass  # left before it has begun
    assert not [thread for thread in threading.enumerate() if "engine" in thread.name]


async def test_a_call_that_was_cancelled_does_no_harm_later(name: DriverName) -> None:
    """It may be run yet, when the engine is closed: nobody is waiting any more."""
    engine = Engine()
    try:
        driver = driver_named(name)(engine)
        done: list[int] = []
        with anyio.CancelScope() as scope:
            scope.cancel()
            await driver.call(lambda: done.append(1))
        assert len(done) <= 1
    finally:
        engine.close()


async def test_the_loop_stays_responsive(engine: Engine) -> None:
    """Sockets that are always ready, and handlers that take their time: other tasks have theirs after each step."""
    ends = [end for _ in range(8) for end in socket.socketpair()]

    def busy(_: int) -> None:
        end = time.monotonic() + TURN / 8
        while time.monotonic() < end:
            pass

    for end in ends:
        engine.add(end.fileno(), busy, OUT)
    async with driven("loop", engine):
        steps = [engine.steps]
        for _ in range(50):
            await anyio.lowlevel.checkpoint()
            steps.append(engine.steps)
    assert max(later - earlier for earlier, later in pairwise(steps)) <= 2, steps
    assert steps[-1] > 20, "it worked meanwhile"
    for end in ends:
        engine.remove(end.fileno())
        end.close()


async def test_an_idle_engine_sleeps(
    name: DriverName, engine: Engine, pair: tuple[socket.socket, socket.socket]
) -> None:
    """No step while there is nothing to do: it would be a busy loop."""
    steps: list[float] = []
    engine.after_step.append(lambda: steps.append(engine.now))
    engine.add(pair[0].fileno(), lambda _: None, IN | EDGE)
    async with driven(name, engine) as driver:
        await driver.call(lambda: None)
        with anyio.move_on_after(0.05):
            await anyio.sleep_forever()
        count = len(steps)
        with anyio.move_on_after(0.1):
            await anyio.sleep_forever()
        assert len(steps) == count
        pair[1].send(b"x")
        pair[1].send(b"y")
        await eventually(lambda: len(steps) > count)
        with anyio.move_on_after(0.1):
            await anyio.sleep_forever()
        assert count < len(steps) <= count + 2
        assert not select.select([engine.fileno()], [], [], 0)[0]
    engine.remove(pair[0].fileno())
