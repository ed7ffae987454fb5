"""Guard: errors come out bare, and cancellation goes where it belongs."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import asyncio
import sys

import anyio
import anyio.lowlevel
import pytest

from netns_kit.guard import Guard

pytestmark = pytest.mark.anyio


class Boom(Exception):
    pass


async def fail(after: anyio.Event | None = None, error: Exception | None = None) -> None:
    if after is not None:
        await after.wait()
    raise error or Boom("task")


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


async def test_a_failing_task_ends_the_block_bare() -> None:
    with pytest.raises(Boom) as caught:
        async with Guard() as guard:
            guard.start_soon(fail)
            await anyio.sleep_forever()
    assert type(caught.value) is Boom
    await still_works()


async def test_the_body_ends_and_the_task_is_cancelled() -> None:
    ended = []

    async def background() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    async with Guard() as guard:
        guard.start_soon(background)
        await anyio.wait_all_tasks_blocked()
    assert ended == [True]
    await still_works()


async def test_the_bodys_error_is_bare_and_wins() -> None:
    error, failed = ValueError("body"), anyio.Event()
    task_error = Boom("task")

    async def late() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            failed.set()
            raise task_error

    with pytest.raises(ValueError, match="body") as caught:
        async with Guard() as guard:
            guard.start_soon(late)
            await anyio.wait_all_tasks_blocked()
            raise error
    assert caught.value is error
    assert failed.is_set()
    assert error.__context__ is task_error
    await still_works()


async def test_a_task_that_fails_while_being_cancelled_is_heard() -> None:
    async def late() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise Boom

    with pytest.raises(Boom):
        async with Guard() as guard:
            guard.start_soon(late)
            await anyio.wait_all_tasks_blocked()
    await still_works()


async def test_the_first_failure_is_the_one_raised() -> None:
    first, second = Boom("first"), Boom("second")

    async def late() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise second

    with pytest.raises(Boom) as caught:
        async with Guard() as guard:
            guard.start_soon(late)
            await anyio.wait_all_tasks_blocked()
            guard.start_soon(fail, None, first)
            await anyio.sleep_forever()
    assert caught.value is first


async def test_a_failure_before_the_body_waits_for_anything() -> None:
    reached = []
    with pytest.raises(Boom):
        async with Guard() as guard:
            guard.start_soon(fail)
            reached.append(True)
    # the task may not have run before the block ended; if it has not, it must not be lost either
    assert reached
    await still_works()


async def test_a_body_that_never_waits_still_raises_the_failure() -> None:
    async with anyio.create_task_group() as outside:
        with pytest.raises(Boom):
            async with Guard() as guard:
                guard.start_soon(fail)
                with anyio.CancelScope(shield=True):
                    await anyio.wait_all_tasks_blocked()
        outside.start_soon(still_works)
    await still_works()


async def test_cancellation_from_outside_passes_through() -> None:
    with anyio.move_on_after(0.01) as scope:
        async with Guard() as guard:
            guard.start_soon(anyio.sleep_forever)
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    await still_works()


async def test_cancellation_from_outside_while_leaving() -> None:
    with anyio.CancelScope() as scope:
        async with Guard() as guard:

            async def stubborn() -> None:
                try:
                    await anyio.sleep_forever()
                finally:
                    scope.cancel()
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(0.01)

            guard.start_soon(stubborn)
            await anyio.wait_all_tasks_blocked()
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    await still_works()


async def test_the_bodys_error_survives_a_cancellation_while_leaving() -> None:
    with pytest.raises(ValueError, match="body"), anyio.CancelScope() as scope:
        async with Guard() as guard:

            async def stubborn() -> None:
                try:
                    await anyio.sleep_forever()
                finally:
                    scope.cancel()
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(0.01)

            guard.start_soon(stubborn)
            await anyio.wait_all_tasks_blocked()
            raise ValueError("body")
    await still_works()


async def test_failure_and_cancellation_at_once() -> None:
    with pytest.raises(Boom), anyio.CancelScope() as scope:
        async with Guard() as guard:

            async def both() -> None:
                scope.cancel()
                raise Boom

            guard.start_soon(both)
            await anyio.sleep_forever()
    await still_works()


async def test_an_error_in_a_group_beside_our_cancellation() -> None:
    async def fails_when_cancelled() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("body")

    ended = []

    async def background() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    with pytest.raises(BaseException) as caught:  # ExceptionGroup is no builtin on Python 3.10
        async with Guard() as guard, anyio.create_task_group() as group:
            guard.start_soon(background)
            group.start_soon(fails_when_cancelled)
            await anyio.wait_all_tasks_blocked()
            guard.start_soon(fail)
            await anyio.sleep_forever()
    assert [type(error) for error in getattr(caught.value, "exceptions", [])] == [ValueError]
    assert ended
    await still_works()


@pytest.mark.parametrize("inner_fails", [True, False])
async def test_nested(inner_fails: bool) -> None:
    order = []
    with pytest.raises(Boom):
        async with Guard() as outer:
            try:
                async with Guard() as inner:
                    inner.start_soon(anyio.sleep_forever)
                    outer.start_soon(anyio.sleep_forever)
                    (inner if inner_fails else outer).start_soon(fail)
                    await anyio.sleep_forever()
            except Boom:
                order.append("inner")
                raise
            finally:
                order.append("left")
    assert order == (["inner", "left"] if inner_fails else ["left"])
    await still_works()


async def test_a_failed_inner_block_leaves_the_outer_one_working() -> None:
    async with Guard() as outer:
        outer.start_soon(anyio.sleep_forever)
        with pytest.raises(Boom):
            async with Guard() as inner:
                inner.start_soon(fail)
                await anyio.sleep_forever()
        await still_works()


async def test_scopes_inside_the_body_are_left_alone() -> None:
    async with Guard() as guard:
        guard.start_soon(anyio.sleep_forever)
        with anyio.move_on_after(0.01) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        await still_works()


async def test_a_task_group_in_the_body_does_not_hide_the_failure() -> None:
    with pytest.raises(Boom):
        async with Guard() as guard, anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            guard.start_soon(fail)
            await anyio.sleep_forever()
    await still_works()


async def test_an_interrupt_of_the_body_is_bare() -> None:
    with pytest.raises(SystemExit):
        async with Guard() as guard:
            guard.start_soon(anyio.sleep_forever)
            raise SystemExit(3)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_native_cancellation_of_asyncio() -> None:
    entered = asyncio.Event()

    async def body() -> None:
        async with Guard() as guard:
            guard.start_soon(anyio.sleep_forever)
            entered.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_native_cancellation_while_leaving() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("before Python 3.11 a task group of anyio takes a native cancellation for its own here")
    leaving = asyncio.Event()

    async def slow() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            leaving.set()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)

    async def body() -> None:
        async with Guard() as guard:
            guard.start_soon(slow)
            await anyio.wait_all_tasks_blocked()

    task = asyncio.create_task(body())
    await leaving.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncios_own_timeout() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("asyncio.timeout came with Python 3.11")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), Guard() as guard:
            guard.start_soon(anyio.sleep_forever)
            await asyncio.sleep(60)
    with pytest.raises(Boom):
        async with asyncio.timeout(60), Guard() as guard:
            guard.start_soon(fail)
            await asyncio.sleep(60)
    await still_works()


async def test_a_cancellation_from_outside_ends_the_body_before_the_tasks() -> None:
    served: list[str] = []

    async def serve() -> None:
        asked.set()
        await wanted.wait()
        served.append("still there")
        done.set()
        await anyio.sleep_forever()

    asked, wanted, done = anyio.Event(), anyio.Event(), anyio.Event()
    with anyio.CancelScope() as outer:
        async with Guard() as guard:
            guard.start_soon(serve)
            await asked.wait()
            outer.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True), anyio.fail_after(5):
                    wanted.set()
                    await done.wait()
    assert outer.cancelled_caught
    assert served == ["still there"]
