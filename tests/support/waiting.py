"""Waiting for what an engine, a kernel or another process does a moment later."""

from __future__ import annotations

import inspect
import os
import select
from collections.abc import Callable
from typing import Any

import anyio

from netns_kit import Network
from tests.support.servers import SECONDS


async def eventually(look: Callable[[], Any], wanted: object = True) -> None:
    """Look again and again until that gives `wanted`; in the end the test fails, and shows what it gave instead."""
    found: object = None
    with anyio.move_on_after(0.8 * SECONDS):  # `bounded` takes longer, and shows nothing
        while (found := await _looked(look)) != wanted:  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.002)
    assert found == wanted


async def _looked(look: Callable[[], Any]) -> object:
    found = look()
    return await found if inspect.isawaitable(found) else found


async def gauge(net: Network, name: str) -> int:
    """A gauge or counter of the stack's."""
    count: int = dict[str, Any](await net.stack.stats())[name]
    return count


def until_written(terminal: int, expected: bytes) -> bytes:
    """Read until that has been written on a terminal; what has been, if it is not within a bound."""
    seen = b""
    while expected not in seen and select.select([terminal], [], [], SECONDS)[0]:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # nobody has it open any more
            break
        seen += data
    return seen
