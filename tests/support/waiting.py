"""Waiting for what an engine, a kernel or another process does a moment later."""

from __future__ import annotations

import inspect
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
