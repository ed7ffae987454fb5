"""LocalStack: engine, gateway and control in this process, with a driver.

A `UserStack` has either a `LocalStack` or `Workers`, and uses both in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar, cast

from netns_kit.gateway.engine import Engine
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.setup import Setup
from netns_kit.host.undo import on_error

from .control import Control
from .drivers import Driver, driver_named

T = TypeVar("T")


class LocalStack:
    """A stack in this process.

    Args:
        setup: The settings of the stack.
        news: Called on the event loop, with the number of a subscriber that has events to take.

    Raises:
        OSError: The kernel has no resources for the engine.  Nothing is left open.
    """

    sandbox: Mapping[str, str] = {}  # a part of a process cannot be in one

    def __init__(self, setup: Setup, news: Callable[[int], None]) -> None:
        self._engine = Engine()
        with on_error(self._engine.close):
            self.gateway = Gateway(self._engine, setup)
        self.driver: Driver = driver_named(setup.driver)(self._engine)
        self._control = Control(self.gateway, lambda number: self.driver.post(partial(news, number)))

    async def run(self) -> None:
        """Drive the engine, until an exception or cancellation ends it."""
        await self.driver.run()

    async def ready(self) -> None:
        """Return: a stack in this process is ready at once."""

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have `Control` do an operation, and return its result.

        Raises:
            StackClosed: The stack is not driven any more.  Other errors are those of the operation.
        """
        return cast("T", await self.driver.call(lambda: self._control.do(operation.__qualname__, *arguments)))

    async def hand(
        self,
        fds: Sequence[Sequence[int]],
        operation: Callable[..., T],
        *arguments: object,
        flow: int | None = None,
    ) -> T:
        """Do as `ask`, and hand descriptors over to the operation, which are this object's from now on.

        Args:
            fds: The descriptors, of the one stack that there is.
            operation: The operation.
            arguments: Its arguments.
            flow: The flow that it is about.
        """
        # whoever takes them out has them: the engine, or this if the engine does not come to it
        box = list(fds)
        done = operation.__qualname__
        try:
            return cast(
                "T", await self.driver.call(lambda: self._control.do(done, *arguments, fds=box.pop()))
            )
        except BaseException:
            with suppress(IndexError):
                for fd in box.pop():
                    os.close(fd)
            raise

    async def close(self) -> None:
        """Close the gateway and the engine, when nothing drives the engine any more."""
        self.driver.finish(self._end)

    def _end(self) -> None:
        try:
            self._control.close()
        finally:
            self._engine.close()
