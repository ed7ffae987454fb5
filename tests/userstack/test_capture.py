"""Blocks of a stack that are entered, and files that are the program's own: on a pair of fake devices."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest

from netns_kit import (
    AlreadyOpened,
    ArgumentTypeError,
    CaptureError,
    StackClosed,
    TapDevice,
    Uplink,
    UserStack,
)
from netns_kit.gateway.setup import DriverName
from tests.support.pcapng import read
from tests.support.servers import bounded

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]


@asynccontextmanager
async def joined(driver: DriverName) -> AsyncIterator[tuple[UserStack, UserStack]]:
    near, far = TapDevice.pair()
    async with (
        near,
        far,
        UserStack(near, driver=driver) as stack,
        UserStack(far, Uplink(any_source=True), subnet="10.9.0.0/24", driver="loop") as inside,
    ):
        yield stack, inside


async def talk(stack: UserStack, inside: UserStack) -> None:
    """Have frames cross the device."""
    with pytest.raises(OSError):
        async with await inside.connect_tcp("10.0.2.2", 9, source="10.0.2.100"):
            pass


class Own:
    """A file of the program's, which keeps what it gets, and may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.pieces: list[Any] = []
        self._error = error

    def write(self, data: Any) -> int:
        if self._error is not None and self.pieces:
            raise self._error
        self.pieces.append(data)
        return len(data)


@bounded
async def test_a_file_may_keep_what_it_gets(driver: DriverName) -> None:
    own = Own()
    async with joined(driver) as (stack, inside), stack.capture(own) as capture:  # type: ignore[arg-type]  # mypy: no BinaryIO
        await talk(stack, inside)
    assert len(read(b"".join(own.pieces)).packets) == capture.frames > 0


@pytest.mark.parametrize("error", [OSError("full"), LookupError("full")])
@bounded
async def test_a_file_that_fails_ends_the_capture(driver: DriverName, error: Exception) -> None:
    async with joined(driver) as (stack, inside):
        with pytest.raises(CaptureError, match="full"):  # noqa: PT012 - its end raises
            async with stack.capture(Own(error)) as capture:  # type: ignore[arg-type]  # mypy: no BinaryIO
                await talk(stack, inside)
                while capture.ended is None:  # noqa: ASYNC110 - nobody tells
                    await anyio.sleep(0.001)
        assert capture.ended == "error"
        await talk(stack, inside)


@bounded
async def test_a_block_is_entered_once(driver: DriverName) -> None:
    async with joined(driver) as (stack, inside):
        for block in stack.capture(io.BytesIO()), stack.faults(loss=0.0, delay=0.001):
            async with block:
                with pytest.raises(AlreadyOpened):
                    await block.__aenter__()
                await talk(stack, inside)
            with pytest.raises(AlreadyOpened):
                await block.__aenter__()
        await talk(stack, inside)
        if driver != "worker":
            assert stack.gateway.device is stack.tap


@bounded
async def test_a_capture_is_read_once_it_is_open(driver: DriverName) -> None:
    async with joined(driver) as (stack, inside):
        capture = stack.capture(None, max_bytes=1 << 20)
        assert repr(capture) == "<Capture to memory: not open>"
        for read_it in capture.packets, partial(capture.dump, io.BytesIO()):
            with pytest.raises(StackClosed, match="the capture is not open; enter it with `async with`"):
                await read_it()
        async with capture:
            await talk(stack, inside)
        assert repr(capture) == "<Capture to memory: complete>"
        assert len(await capture.packets()) == capture.frames > 0


@bounded
async def test_a_file_for_text_is_no_file_for_bytes(driver: DriverName) -> None:
    async with joined(driver) as (stack, _):
        with pytest.raises(ArgumentTypeError, match="open for bytes"):
            stack.capture(io.StringIO())  # type: ignore[arg-type]  # it is the test
