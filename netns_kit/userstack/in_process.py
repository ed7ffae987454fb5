"""LocalStack: engine, gateway and control in this process, on a driver.

A `UserStack` has either this or `Workers`, and uses both in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar, cast

from netns_kit.gateway.engine import Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.setup import Setup

from .control import Control
from .drivers import Driver, driver_named

T = TypeVar("T")


class LocalStack:
    """A stack in this process.

    Args:
        setup: What to run.
        news: Called on the event loop, with the number of a subscriber that has events to take.

    Raises:
        OSError: The kernel has no room for the engine; nothing is left open then.
    """

    sandbox: Mapping[str, str] = {}  # a part of a process cannot have one

    def __init__(self, setup: Setup, news: Callable[[int], None]) -> None:
        self._engine = Engine()
        try:
            self.gateway = Gateway(self._engine, setup)
        except BaseException:
            self._engine.close()
            raise
        self.driver: Driver = driver_named(setup.driver)(self._engine)
        self._control = Control(self.gateway, lambda number: self.driver.post(partial(news, number)))

    async def run(self) -> None:
        """Drive the engine.  Raises what ends it."""
        await self.driver.run()

    async def ready(self) -> None:
        """Ready immediately."""

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have `Control` do an operation.  Raises what that raises, and `StackClosed`."""
        return cast("T", await self.driver.call(lambda: self._control.do(operation.__qualname__, *arguments)))

    async def close(self) -> None:
        """Close the gateway and the engine, when nothing drives them any more."""
        self.driver.finish(self._end)

    def _end(self) -> None:
        try:
            self._control.close()
        finally:
            self._engine.close()
