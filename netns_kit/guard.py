"""Guard: background tasks bound to an `async with` block.

The first task to fail cancels the block, and its error is raised in the block's place.  Errors are always
bare, never in an exception group: neither a task's nor the body's own.

Two scopes do it.  The tasks live in a task group that is entered by hand and never sees an exception of the
body, so it has none to wrap; around the body is a cancel scope of its own, which a failed task cancels and
which takes back exactly the cancellation it caused.  Leaving, the body's scope is left first and then the
tasks are cancelled and awaited.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType

import anyio
from typing_extensions import Self, TypeVarTuple, Unpack

__all__ = ["Guard"]

Args = TypeVarTuple("Args")


class Guard:
    """An async context manager that runs tasks beside its body, for as long as the body runs.

    A cancellation from outside ends the body first: the tasks are shielded from it, so that cleaning up in the body
    finds what they serve.  Leaving, it cancels the tasks and waits for them.  Then it raises the first of: the
    body's own exception, the error of the first task that failed, the cancellation that ended the body from
    outside.
    """

    def __init__(self) -> None:
        self._failure: Exception | None = None
        self._shields: list[anyio.CancelScope] = []

    async def __aenter__(self) -> Self:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._body = anyio.CancelScope()
        self._body.__enter__()
        return self

    def start_soon(
        self, func: Callable[[Unpack[Args]], Awaitable[object]], *args: Unpack[Args], name: str | None = None
    ) -> None:
        """Start a task.  That it returns means nothing; that it raises ends the block."""
        shield = anyio.CancelScope(shield=True)
        self._shields.append(shield)
        self._tasks.start_soon(self._supervise, shield, func, args, name=name)

    async def _supervise(
        self,
        shield: anyio.CancelScope,
        func: Callable[[Unpack[Args]], Awaitable[object]],
        args: tuple[Unpack[Args]],
    ) -> None:
        with shield:
            try:
                await func(*args)
            except Exception as exc:
                if self._failure is None:
                    self._failure = exc
                self._body.cancel()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        outcome = exc
        try:
            self._body.__exit__(exc_type, exc, tb)  # what it takes back, a failure has caused: raised below
        except BaseException as rest:  # of a group, when our cancellation has been taken out of it
            outcome = rest
        for shield in self._shields:
            shield.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        except anyio.get_cancelled_exc_class() as late:
            if outcome is None:
                outcome = late
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                if outcome is None or isinstance(outcome, anyio.get_cancelled_exc_class()):
                    raise failure
                if outcome.__context__ is None:
                    outcome.__context__ = failure
            if outcome is not exc and outcome is not None:
                raise outcome
        finally:
            del failure, outcome  # they hold this frame, and it them
