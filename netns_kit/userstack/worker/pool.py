"""Workers: one worker for each queue of the tap, used as if they were one.

`netns_kit.stack.steering` decides which worker has a connection.  What exists only once in a namespace (datagrams,
DHCP, forwarded ports) belongs to the first worker.  So an operation is asked of the first worker, or of all if each
has a part of the answer; the operation tells how the answers are joined (see `netns_kit.operations`).  Events of one
flow are in order; events of different workers are in the order in which they are fetched.

If one worker ends, all are ended.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import TypeVar, cast

import anyio

from netns_kit.errors import StackClosed
from netns_kit.frozen import replace
from netns_kit.gateway.setup import Setup
from netns_kit.gateway.worker_links import WorkerLinks, connect
from netns_kit.operations import join_of

from .owner import WorkerProcess

T = TypeVar("T")


class Workers:
    """A `WorkerProcess` for each queue of the tap, all with the same settings."""

    def __init__(self, setup: Setup, news: Callable[[int], None]) -> None:
        """Start the workers.  Raises what `WorkerProcess` raises; nothing is left open."""
        queues = setup.tap.queues
        count = len(queues)
        started: list[WorkerProcess] = []
        with ExitStack() as passed, ExitStack() as ours:
            links: list[WorkerLinks] | list[None] = connect(count, passed) if count > 1 else [None]
            for number, (queue, peers) in enumerate(zip(queues, links, strict=True)):
                supplies = setup.supplies[number : number + 1]
                share = replace(setup, tap=queue, limits=setup.limits.divided(count), supplies=supplies)
                if started:  # published ports belong to the first
                    share = replace(share, supply=None)
                started.append(WorkerProcess(share, news, peers))
                ours.callback(started[-1].kill)
            ours.pop_all()
        self.processes = tuple(started)
        self._ended = anyio.Event()

    @property
    def sandbox(self) -> Mapping[str, str]:
        """The layers of the workers' sandboxes, which are all alike."""
        return self.processes[0].sandbox

    async def run(self) -> None:
        """Receive the workers' messages.  Raises what ends the first of them that ends."""
        failures: list[Exception] = []

        async def run(process: WorkerProcess) -> None:
            try:
                await process.run()
            except Exception as error:  # `run` ends by raising
                failures.append(error)
                tasks.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                for process in self.processes:
                    tasks.start_soon(run, process)
        finally:
            self._ended.set()
        if failures:
            raise failures[0]

    async def ready(self) -> None:
        """Wait until all workers are ready."""
        for process in self.processes:
            await process.ready()

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have an operation done by the first worker, or by all, and return the joined result.

        If cancelled, it is done all the same.  Raises what `WorkerProcess.ask` raises.
        """
        join = join_of(operation)
        asked = self.processes if join is not None else self.processes[:1]
        try:
            # if one fails, none is waited for
            questions = [process.put(operation, *arguments) for process in asked]
            answers = [await question.answer() for question in questions]
        except StackClosed:
            await self._ended.wait()  # `run` raises the reason first
            raise
        return answers[0] if join is None else cast("T", join(answers))

    async def hand(
        self,
        fds: Sequence[Sequence[int]],
        operation: Callable[..., T],
        *arguments: object,
        flow: int | None = None,
    ) -> T:
        """Do as `ask`, and hand descriptors over to the operation, which are this object's from now on.

        Args:
            fds: The descriptors for each worker that is asked: all are, or the one that the operation is for.
            operation: The operation.
            arguments: Its arguments.
            flow: The flow that it is about, whose worker is asked; None: the first one, or all, as it is marked.
        """
        join = join_of(operation)
        at = 0 if flow is None else (flow - 1) % len(self.processes)  # as flows are numbered
        asked = self.processes[at : at + 1] if join is None else self.processes
        left = deque(fds)  # which nobody has yet
        try:
            questions = [process.put(operation, *arguments, fds=left.popleft()) for process in asked]
            answers = [await question.answer() for question in questions]
        except StackClosed:
            await self._ended.wait()  # `run` raises the reason first
            raise
        finally:
            for fd in chain(*left):
                os.close(fd)
        return cast("T", answers[0] if join is None else join(answers))

    async def close(self) -> None:
        """End the workers, as `WorkerProcess.close` does."""
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for process in self.processes:
                    tasks.start_soon(process.close)
