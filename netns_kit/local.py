"""LocalStack: engine, gateway and control in this process, on a driver.

It is one of the two things that `UserStack` may hold, the other being `Workers`; they are used alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar, cast

from .control import Control
from .drivers import Driver, driver_named
from .engine import Engine
from .gateway import Gateway
from .setup import Setup

T = TypeVar("T")


class LocalStack:
    """`news` is called on the event loop, with the number of a subscriber that has events to take."""

    sandbox: Mapping[str, str] = {}  # it is not to be had for a part of a process

    def __init__(self, setup: Setup, news: Callable[[int], None]) -> None:
        """Raises what a `Gateway` does; nothing is left open then."""
        self._engine = Engine()
        try:
            self.gateway = Gateway(self._engine, setup)
        except BaseException:
            self._engine.close()
            raise
        self._driver: Driver = driver_named(setup.driver)(self._engine)
        self._control = Control(self.gateway, lambda number: self._driver.post(partial(news, number)))

    async def run(self) -> None:
        """Drive it.  Raises what ends it."""
        await self._driver.run()

    async def ready(self) -> None:
        """It is, at once."""

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` between two steps, see `Driver.call`."""
        return await self._driver.call(function)

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have `Control` do it.  Raises what it raises, and `StackClosed`."""
        return cast(
            "T", await self._driver.call(lambda: self._control.do(operation.__qualname__, *arguments))
        )

    async def close(self) -> None:
        """End what `run` has left when it ended."""
        self._driver.finish(self._end)

    def _end(self) -> None:
        try:
            self._control.close()
        finally:
            self._engine.close()
