"""Events in a file: whoever writes them, none is lost without a word, and no file takes the stack with it."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO

import anyio
import pytest

from netns_kit import ArgumentTypeError, EventLogError, StackClosed, TapDevice, UserStack
from netns_kit.gateway.setup import DriverName
from netns_kit.userstack import events, userstack
from tests.support.packets import datagram, syn
from tests.support.servers import bounded
from tests.support.taps import ELSEWHERE, send, stack_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]


@asynccontextmanager
async def logged(stack: UserStack, target: Any) -> AsyncIterator[None]:
    """Log what happens in the block."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stack.log_events, target)
        await anyio.wait_all_tasks_blocked()
        await stack.flows()  # what was asked first is answered first: it is subscribed
        yield
        tasks.cancel_scope.cancel()


async def open_flows(stack: UserStack, guest: TapDevice, *ports: int) -> None:
    for port in ports:
        send(guest, datagram(ELSEWHERE, port))
    while len(await stack.flows()) < len(ports):
        await anyio.lowlevel.checkpoint()


def read(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@bounded
async def test_each_event_is_a_line_and_what_is_under_way_in_the_end_is_one_too(
    driver: DriverName, tmp_path: Path
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "before"}\n')
    async with stack_of(driver) as (stack, guest):
        async with logged(stack, path):
            await open_flows(stack, guest, 1, 2)
            [first, _] = await stack.flows()
            await stack.end_flow(first.id)
        found = read(path.read_text())
    assert [(each["kind"], each.get("remote_port")) for each in found] == [
        ("before", None),
        ("opened", 1),
        ("opened", 2),
        ("closed", 1),
        ("open", 2),
    ]
    assert found[3]["ended"] == "ended"
    assert found[1]["time"] <= found[-1]["time"]


@bounded
async def test_lines_are_there_as_soon_as_they_happen(driver: DriverName, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    async with stack_of(driver) as (stack, guest), logged(stack, os.fspath(path)):
        await open_flows(stack, guest, 1)
        while not path.read_text():
            await anyio.lowlevel.checkpoint()
        [line] = read(path.read_text())
        assert line["kind"] == "opened"


@bounded
async def test_a_file_of_the_callers_stays_open(driver: DriverName) -> None:
    file = io.StringIO()
    async with stack_of(driver) as (stack, guest):
        async with logged(stack, file):
            await open_flows(stack, guest, 1)
        assert [each["kind"] for each in read(file.getvalue())] == ["opened", "open"]


@bounded
async def test_it_ends_with_the_stack(driver: DriverName, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    async with anyio.create_task_group() as tasks, stack_of(driver) as (stack, guest):
        tasks.start_soon(stack.log_events, path)
        await anyio.wait_all_tasks_blocked()
        await stack.flows()
        await open_flows(stack, guest, 1)
        while not path.read_text():
            await anyio.lowlevel.checkpoint()
    assert [each["kind"] for each in read(path.read_text())] == ["opened"]


@pytest.mark.parametrize("driver", ["thread", "loop"])  # a worker cannot be looked into
@bounded
async def test_what_was_too_slow_says_how_much_was_lost(
    driver: DriverName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "EVENTS_KEPT", 2)
    path = tmp_path / "events.jsonl"
    async with stack_of(driver) as (stack, guest), logged(stack, path):
        await open_flows(stack, guest, 1)
        while not path.read_text():
            await anyio.lowlevel.checkpoint()
        taken, take = anyio.Event(), stack.ask

        async def late(operation: Callable[..., Any], *arguments: object) -> Any:
            if operation.__name__ == "take":
                await taken.wait()
            return await take(operation, *arguments)

        stack.ask = late  # type: ignore[method-assign]  # a log that is slow
        for port in (2, 3, 4, 5):
            send(guest, datagram(ELSEWHERE, port))
        while len(await stack.flows()) < 5:
            await anyio.lowlevel.checkpoint()
        taken.set()
        while len(read(path.read_text())) < 4:
            await anyio.lowlevel.checkpoint()
        found = read(path.read_text())
        assert [each["kind"] for each in found] == ["opened", "lost", "opened", "opened"]
        assert found[1]["count"] == 2
        assert [each.get("remote_port") for each in found] == [1, None, 4, 5]


async def failed(stack: UserStack, guest: TapDevice, target: Any) -> Exception:
    """How a log ends when something happens."""
    error: list[Exception] = []

    async def log() -> None:
        try:
            await stack.log_events(target)
        except Exception as exc:
            error.append(exc)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(log)
        await anyio.wait_all_tasks_blocked()
        await stack.flows()
        send(guest, datagram(ELSEWHERE, 1))
    return error[0]


@bounded
async def test_a_full_disk_ends_the_log_and_not_the_stack(driver: DriverName) -> None:
    async with stack_of(driver) as (stack, guest):
        error = await failed(stack, guest, "/dev/full")
        assert isinstance(error, EventLogError)
        assert error.errno == errno.ENOSPC
        assert "/dev/full" in str(error)
        assert "make room" in str(error)
        assert len(await stack.flows()) == 1
        await open_flows(stack, guest, 1, 2)


def closed() -> TextIO:
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        (closed, EventLogError, "closed file"),
        (io.BytesIO, ArgumentTypeError, "open for text"),
    ],
)
@bounded
async def test_so_does_a_file_that_takes_no_text(
    driver: DriverName, target: Callable[[], Any], kind: type[Exception], words: str
) -> None:
    async with stack_of(driver) as (stack, guest):
        error = await failed(stack, guest, target())
        assert isinstance(error, kind)
        assert words in str(error)
        assert len(await stack.flows()) == 1


@bounded
async def test_what_is_no_file_is_told_at_once(driver: DriverName, tmp_path: Path) -> None:
    async with stack_of(driver) as (stack, _):
        with pytest.raises(EventLogError) as caught:
            await stack.log_events(tmp_path / "missing" / "events.jsonl")
        assert caught.value.errno == errno.ENOENT
        for wrong in (None, 7, b"bytes", object()):
            with pytest.raises(ArgumentTypeError, match="a path, or a file"):
                await stack.log_events(wrong)  # type: ignore[arg-type]  # so it is
    with pytest.raises(StackClosed):
        await stack.log_events(tmp_path / "late.jsonl")


@bounded
async def test_a_file_that_blocks_holds_up_nobody(
    driver: DriverName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nobody reads: the stack goes on, and the log can be cancelled."""
    monkeypatch.setattr(userstack, "CLOSING_SECONDS", 0.1)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb"), os.fdopen(writing, "w") as file:
        os.set_blocking(writing, False)
        size = 0
        try:
            while True:
                size += os.write(writing, bytes(4096))
        except BlockingIOError:
            os.set_blocking(writing, True)
        async with stack_of(driver) as (stack, guest):
            async with logged(stack, file):
                send(guest, syn(ELSEWHERE, 9))
                await open_flows(stack, guest, 1, 2)
                taken = anyio.to_thread.current_default_thread_limiter().borrowed_tokens
            os.read(reading, size)  # the thread that writes ends
            assert taken == 0, "it takes none of the program's threads"


@bounded
async def test_it_ends_without_the_subscriber(driver: DriverName, tmp_path: Path) -> None:
    async with stack_of(driver) as (stack, guest):
        async with logged(stack, tmp_path / "events.jsonl"):
            await open_flows(stack, guest, 1)
        assert not stack._news
