"""Answering: flows that wait are put to the caller's `on_flow`, each in a task of its own.

The engine is the authority (`netns_kit.gateway.asking`): it refuses a flow that is not answered in time, whatever
happens here.  A flow that waits no more has its task cancelled.  Whatever `on_flow` does but answer refuses the flow
and is logged, once for each rule and kind of error.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio
import anyio.lowlevel

from netns_kit import arguments
from netns_kit.errors import NetnsKitError
from netns_kit.gateway.asking import Asking, FlowAnswer, FlowRequest, OnFlow
from netns_kit.operations import Asked
from netns_kit.stack import Refusal
from netns_kit.uplink.flow import Endpoint

logger = logging.getLogger(__name__)


class Answering:
    """The caller's side of asking.

    Args:
        stack: The stack whose flows wait.
        on_flow: The caller's function.
        completed: Returns a request with what is known of it on this side.
    """

    def __init__(
        self, stack: Asked, on_flow: OnFlow, completed: Callable[[FlowRequest], Awaitable[FlowRequest]]
    ) -> None:
        self._stack = stack
        self._on_flow = on_flow
        self._completed = completed
        self._news = anyio.Event()
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._logged: set[tuple[str | None, type[BaseException]]] = set()

    def set(self) -> None:
        """Note that there are flows to ask about, or some that wait no more."""
        self._news.set()

    async def run(self, number: int) -> None:
        """Ask about flows until this is cancelled, or the stack is closed.

        Args:
            number: The number by which the stack knows this subscriber.
        """
        async with anyio.create_task_group() as tasks:
            with suppress(NetnsKitError):  # the stack has ended, and others tell why
                await self._stack.ask(Asking.listen, number)
                while True:
                    await self._news.wait()
                    self._news = anyio.Event()
                    for each in await self._stack.ask(Asking.take):
                        if isinstance(each, FlowRequest):
                            tasks.start_soon(self._answer, each)
                        elif each in self._scopes:
                            self._scopes[each].cancel()
            tasks.cancel_scope.cancel()

    async def _answer(self, asked: FlowRequest) -> None:
        """Ask about one flow, and pass the answer on.  A flow that waits no more is not answered."""
        with anyio.CancelScope() as scope:
            self._scopes[asked.id] = scope
            try:
                answer = await self._ask(asked)
            finally:
                del self._scopes[asked.id]
            with suppress(NetnsKitError):  # the stack has ended, and others tell why
                await self._stack.ask(Asking.answer, asked.id, answer)

    async def _ask(self, asked: FlowRequest) -> FlowAnswer:
        try:
            answer: object = await self._on_flow(await self._completed(asked))
            if answer is True or answer is False or isinstance(answer, Refusal):
                return answer
            if isinstance(answer, Endpoint):
                return Endpoint(*answer)  # `_make` does not check
            expected = "expected True, False, a Refusal or an Endpoint"
            raise TypeError(f"on_flow has returned {arguments.shown(answer)}: {expected}")
        except KeyboardInterrupt:  # it is meant for the program
            raise
        except BaseException as error:  # not even SystemExit may end the asking
            await anyio.lowlevel.checkpoint_if_cancelled()  # else what on_flow waited for was cancelled
            if (asked.rule, type(error)) not in self._logged:
                self._logged.add((asked.rule, type(error)))
                what = f"{asked.protocol} to {asked.remote} ({asked.rule})"
                logger.warning("flows are refused: on_flow failed about %s", what, exc_info=error)
            return False
