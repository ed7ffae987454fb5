"""Openable and Supervisor: any task opens and closes, errors come out bare, and nobody's task is cancelled."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import asyncio
import gc
import os
import sys
import traceback
import warnings
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from netns_kit.errors import AlreadyOpened, NamespaceGone, NetnsKitError, StackClosed
from netns_kit.namespace.background import Openable, Supervisor

pytestmark = pytest.mark.anyio


class Boom(NetnsKitError):
    """What fails in the background."""


class Thing(Openable):
    """As simple as can be: one background task, which fails when it is told to, and one call."""

    def __init__(self, *above: Supervisor, opening: Callable[[], Awaitable[object]] | None = None) -> None:
        self.supervisor = Supervisor("thing", StackClosed, *above)
        self.log: list[str] = []
        self.closing: Callable[[], Awaitable[object]] = anyio.lowlevel.checkpoint
        self.error: Exception = Boom("background")
        self._opening = opening or anyio.lowlevel.checkpoint

    async def _open(self) -> None:
        self.told = anyio.Event()
        self.supervisor.start(self._background)
        await self._opening()
        self.log.append("open")

    async def _close(self) -> None:
        await self.closing()
        self.log.append("closed")

    async def _background(self) -> None:
        try:
            await self.told.wait()
        finally:
            self.log.append("task ended")
        raise self.error

    async def fail(self) -> None:
        """Returns when it has failed."""
        self.told.set()
        while self.supervisor.failure is None:
            await anyio.lowlevel.checkpoint()

    async def call(self) -> None:
        """It takes for ever."""
        with self.supervisor.guarding():
            self.log.append("called")
            await anyio.sleep_forever()

    async def quick_call(self) -> None:
        with self.supervisor.guarding():
            await anyio.lowlevel.checkpoint()


async def in_a_task(function: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run it in a task that ends with it."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(function)


async def still_works() -> None:
    """Nothing of a cancellation is left on this task."""
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    if sys.version_info >= (3, 11) and (task := _asyncio_task()) is not None:
        assert task.cancelling() == 0


def _asyncio_task() -> asyncio.Task[object] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # trio
        return None


# -- opening and closing -------------------------------------------------------------------------------


async def test_any_task_opens_uses_and_closes() -> None:
    thing = Thing()
    await in_a_task(thing.open)
    await in_a_task(thing.quick_call)
    await thing.quick_call()
    await in_a_task(thing.close)
    assert thing.log == ["open", "task ended", "closed"]
    await still_works()


async def test_a_generator_that_is_entered_and_left_in_different_tasks() -> None:
    """As a fixture of pytest-asyncio is."""

    async def fixture() -> AsyncGenerator[Thing, None]:
        async with Thing() as thing:
            yield thing

    made: list[Thing] = []
    generator = fixture()

    async def enter() -> None:
        made.append(await anext(generator))

    async def leave() -> None:
        with pytest.raises(StopAsyncIteration):
            await anext(generator)

    await in_a_task(enter)
    await in_a_task(made[0].quick_call)
    await in_a_task(leave)
    assert made[0].log[-1] == "closed"


@pytest.mark.parametrize("how", ["block", "calls"])
async def test_it_is_opened_once(how: str) -> None:
    thing = Thing()
    if how == "block":
        async with thing:
            with pytest.raises(AlreadyOpened, match="the thing is open: it is opened once; use it as it is"):
                await thing.open()
            await thing.quick_call()
    else:
        await thing.open()
        await thing.close()
    with pytest.raises(AlreadyOpened, match="has been closed: it is opened once; make a new one"):
        await thing.open()
    assert thing.log.count("closed") == 1


async def test_what_is_asked_before_and_after() -> None:
    thing = Thing()
    for ask in (thing.call, thing.wait_closed):
        with pytest.raises(StackClosed, match=r"the thing is not open; .* await its open\(\) first"):
            await ask()
    async with thing:
        pass
    with pytest.raises(StackClosed, match="has been closed; make a new one"):
        await thing.call()
    await thing.wait_closed()


async def test_closing_again_is_nothing_and_so_is_closing_what_is_not_open() -> None:
    thing = Thing()
    await thing.close()
    await thing.__aexit__(None, None, None)
    async with thing:
        await thing.close()
        await thing.close()
    await thing.__aexit__(None, None, None)
    assert thing.log.count("closed") == 1


async def test_all_who_close_wait_for_the_one_closing() -> None:
    thing, closed = await Thing().open(), 0
    going, may_go = anyio.Event(), anyio.Event()

    async def slowly() -> None:
        going.set()
        await may_go.wait()

    async def close() -> None:
        nonlocal closed
        await thing.close()
        closed += 1

    thing.closing = slowly
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(close)
        await going.wait()
        await anyio.wait_all_tasks_blocked()
        assert closed == 0
        may_go.set()
    assert closed == 3
    assert thing.log.count("closed") == 1


async def test_calls_under_way_end_when_it_is_closed() -> None:
    thing = await Thing().open()

    async def call() -> None:
        with pytest.raises(StackClosed, match="has been closed"):
            await thing.call()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        tasks.start_soon(thing.wait_closed)  # which returns
        await anyio.wait_all_tasks_blocked()
        await thing.close()


async def test_a_block_of_what_is_open_closes_it() -> None:
    thing = Thing()
    async with await thing.open() as entered:
        assert entered is thing
        await thing.quick_call()
    assert thing.log.count("closed") == 1
    with pytest.raises(AlreadyOpened, match="has been closed"):
        async with thing:
            raise AssertionError("it was entered")


async def test_a_block_of_what_has_failed_is_not_entered() -> None:
    thing = Thing()
    await thing.open()
    thing.supervisor.fail(LookupError("in the background"))
    with pytest.raises(LookupError, match="in the background"):
        async with thing:
            raise AssertionError("it was entered")
    with pytest.raises(LookupError, match="in the background"):
        await thing.close()


async def test_opening_that_fails_leaves_nothing() -> None:
    async def opening() -> None:
        raise LookupError("opening")

    thing = Thing(opening=opening)
    with pytest.raises(LookupError, match="opening"):
        await thing.open()
    assert thing.log == ["task ended", "closed"]
    with pytest.raises(AlreadyOpened):
        await thing.open()


async def test_opening_that_is_cancelled_leaves_nothing() -> None:
    thing = Thing(opening=anyio.sleep_forever)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(thing.open)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    assert thing.log == ["task ended", "closed"]
    await still_works()


async def test_an_error_in_the_background_ends_opening() -> None:
    async def opening() -> None:
        thing.told.set()
        await anyio.sleep_forever()

    thing = Thing(opening=opening)
    with pytest.raises(Boom):
        await thing.open()
    assert thing.log == ["task ended", "closed"]


async def test_closing_ends_opening() -> None:
    thing = Thing(opening=anyio.sleep_forever)

    async def open_it() -> None:
        with pytest.raises(StackClosed, match="has been closed"):
            await thing.open()
        assert thing.log == ["task ended", "closed"]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_it)
        await anyio.wait_all_tasks_blocked()
        await thing.close()
        assert thing.log == ["task ended", "closed"]


# -- errors in the background --------------------------------------------------------------------------


async def test_an_error_in_the_background_cancels_nobody() -> None:
    went_on = False
    with pytest.raises(Boom) as caught:
        async with Thing() as thing:
            await thing.fail()
            await still_works()
            went_on = True
    assert went_on
    assert type(caught.value) is Boom
    assert thing.log == ["open", "task ended", "closed"]


async def test_it_is_raised_by_every_call_and_once_by_close() -> None:
    thing = await Thing().open()
    await thing.fail()
    for _ in range(2):
        for ask in (thing.call, thing.quick_call, thing.wait_closed):
            with pytest.raises(Boom):
                await ask()
    with pytest.raises(Boom):
        await thing.close()
    await thing.close()
    for ask in (thing.call, thing.wait_closed):
        with pytest.raises(Boom):
            await ask()


async def test_calls_under_way_end_with_it_at_once() -> None:
    thing, ended = await Thing().open(), []

    async def ask(call: Callable[[], Awaitable[None]]) -> None:
        with pytest.raises(Boom):
            await call()
        ended.append(call)
        await still_works()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, thing.call)
        tasks.start_soon(ask, thing.wait_closed)
        await anyio.wait_all_tasks_blocked()
        thing.told.set()
    assert len(ended) == 2
    with pytest.raises(Boom):
        await thing.close()


async def test_who_wants_to_be_cancelled_by_it() -> None:
    with pytest.raises(BaseException) as caught:  # ExceptionGroup is no builtin on Python 3.10
        async with anyio.create_task_group() as tasks, Thing() as thing:
            tasks.start_soon(thing.wait_closed)
            thing.told.set()
            await anyio.sleep_forever()
    assert [type(error) for error in getattr(caught.value, "exceptions", [])] == [Boom]
    assert thing.log[-1] == "closed"
    await still_works()


async def test_the_bodys_error_wins_and_knows_of_it() -> None:
    error = ValueError("body")
    with pytest.raises(ValueError, match="body") as caught:
        async with Thing() as thing:
            await thing.fail()
            raise error
    assert caught.value is error
    assert isinstance(error.__context__, Boom)


async def test_the_same_error_is_told_once() -> None:
    with pytest.raises(Boom) as caught:
        async with Thing() as thing:
            thing.told.set()
            await thing.call()
    assert not isinstance(caught.value.__context__, Boom)


async def test_each_raising_has_a_traceback_of_its_own() -> None:
    thing = await Thing().open()
    thing.error.__cause__ = LookupError("why")
    await thing.fail()
    lengths = set()
    for _ in range(3):
        with pytest.raises(Boom) as caught:
            await thing.quick_call()
        lengths.add(len(traceback.extract_tb(caught.value.__traceback__)))
        assert isinstance(caught.value.__cause__, LookupError)
    assert len(lengths) == 1
    await thing.supervisor.end()


async def test_an_error_while_the_task_is_being_cancelled_is_heard() -> None:
    async def late() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise Boom("late")

    with pytest.raises(Boom, match="late"):
        async with Thing() as thing:
            thing.supervisor.start(late)
            await anyio.wait_all_tasks_blocked()


async def test_an_error_of_closing_is_raised() -> None:
    async def closing() -> None:
        raise LookupError("closing")

    thing = await Thing().open()
    thing.closing = closing
    with pytest.raises(LookupError, match="closing"):
        await thing.close()
    await thing.close()


async def test_the_first_error_counts() -> None:
    async def second() -> None:
        await thing.told.wait()
        await anyio.wait_all_tasks_blocked()
        raise Boom("second")

    with pytest.raises(Boom, match="background"):
        async with Thing() as thing:
            thing.supervisor.start(second)
            await thing.fail()


# -- what stands above ---------------------------------------------------------------------------------


async def test_what_fails_above_fails_what_is_built_on_it() -> None:
    base = await Thing().open()
    thing = await Thing(base.supervisor).open()

    async def ask(call: Callable[[], Awaitable[None]]) -> None:
        with pytest.raises(Boom, match="above"):
            await call()

    base.error = Boom("above")
    async with anyio.create_task_group() as tasks:
        for call in (thing.call, thing.wait_closed):
            tasks.start_soon(ask, call)
        await anyio.wait_all_tasks_blocked()
        await base.fail()
    await thing.fail()
    await ask(thing.quick_call)  # what is above explains more
    await ask(thing.close)
    await ask(base.close)


async def test_what_is_closed_above_is_told() -> None:
    base = Thing()
    base.supervisor = Supervisor("base", NamespaceGone)
    await base.open()
    async with Thing(base.supervisor) as thing:

        async def call() -> None:
            with pytest.raises(NamespaceGone, match="the base has been closed"):
                await thing.call()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            await base.close()
        with pytest.raises(NamespaceGone):
            await thing.wait_closed()


# -- cancellation --------------------------------------------------------------------------------------


async def test_a_cancelled_body_is_closed_and_passes_the_cancellation_on() -> None:
    with anyio.CancelScope() as scope:
        async with Thing() as thing:
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert thing.log[-1] == "closed"
    await still_works()


async def test_while_the_body_is_being_cancelled_the_background_still_serves_it() -> None:
    with anyio.CancelScope() as scope:
        async with Thing() as thing:
            scope.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await thing.quick_call()
                assert "task ended" not in thing.log
    assert scope.cancelled_caught


async def test_a_cancelled_close_completes() -> None:
    thing = await Thing().open()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await thing.close()
    assert thing.log[-1] == "closed"
    await still_works()


async def test_cancellation_and_error_at_once() -> None:
    with anyio.CancelScope() as scope:
        async with Thing() as thing:
            await thing.fail()
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught, "who cancels the block has no use for it"
    await still_works()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_native_cancellation_of_close_completes_it_first() -> None:
    thing, going, may_go = await Thing().open(), anyio.Event(), anyio.Event()

    async def slowly() -> None:
        going.set()
        await may_go.wait()

    thing.closing = slowly
    task = asyncio.create_task(thing.close())
    await going.wait()
    for _ in range(3):
        task.cancel()
        await anyio.wait_all_tasks_blocked()
    assert not task.done()
    may_go.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert thing.log[-1] == "closed"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_native_cancellation_of_the_block() -> None:
    thing, entered = Thing(), asyncio.Event()

    async def body() -> None:
        async with thing:
            entered.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert thing.log[-1] == "closed"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncios_own_timeout() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("asyncio.timeout came with Python 3.11")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), Thing():
            await asyncio.sleep(60)
    with pytest.raises(Boom):
        async with asyncio.timeout(60), Thing() as thing:
            thing.told.set()
            await thing.call()
    await still_works()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_whoever_cancels_all_tasks_of_the_loop_ends_it_with_a_typed_error() -> None:
    thing, me = await Thing().open(), asyncio.current_task()
    for task in asyncio.all_tasks():
        if task is not me and "netns_kit" in task.get_name():
            task.cancel()
    with pytest.raises(StackClosed, match="the event loop has cancelled the background tasks of the thing"):
        await thing.call()
    with pytest.raises(StackClosed, match="close it before the event loop ends"):
        await thing.close()
    assert thing.log[-1] == "closed"


# -- what is forgotten ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_one_that_is_forgotten_ends_with_the_loop_and_warns(backend: str) -> None:
    log: list[str] = []

    async def forget() -> None:
        thing = await Thing().open()
        thing.log = log
        await anyio.wait_all_tasks_blocked()

    def run() -> None:
        anyio.run(forget, backend=backend)
        gc.collect()

    with pytest.warns(ResourceWarning, match=r"unclosed thing: .* await its close\(\)"):
        run()
    assert log == ["task ended"]


async def test_a_forked_child_that_drops_what_its_parent_has_open_says_nothing() -> None:
    opened = [Supervisor("thing", StackClosed)]
    await opened[0].open(anyio.lowlevel.checkpoint, anyio.lowlevel.checkpoint)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ResourceWarning)
        pid = os.fork()
        if not pid:
            opened.clear()
            os._exit(len([each for each in said if each.category is ResourceWarning]))
    assert (await anyio.to_thread.run_sync(os.waitpid, pid, 0))[1] == 0
    await opened[0].close()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_is_closed_in_another_loop_when_its_own_has_ended(backend: str) -> None:
    thing = Thing()
    anyio.run(thing.open, backend=backend)
    with pytest.raises(StackClosed, match="close it before the event loop ends"):
        anyio.run(thing.close, backend=backend)
    assert thing.log == ["open", "task ended", "closed"]


async def test_nothing_is_left_for_the_collector() -> None:
    """No cycle holds what has been closed."""
    gc.collect()
    gc.disable()
    try:
        thing = await Thing().open()
        await thing.quick_call()
        await thing.close()
        gone = weakref.ref(thing)
        del thing
        await still_works()
        assert gone() is None
    finally:
        gc.enable()
