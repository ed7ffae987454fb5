"""Workers: one for each queue of the tap, asked as if they were one.

A connection is the one worker's that `netns_kit.stack.steering` says; what there is once in a namespace (datagrams,
DHCP, forwarded ports) is the first's.  So what people ask is asked of the first, but for what each has its part
of: those answers are put together here.  Events of one flow come in order, those of two workers as they are fetched.

They live and die together: the end of one ends all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import anyio

from netns_kit.dhcp import DhcpSettings
from netns_kit.errors import StackClosed
from netns_kit.gateway.worker_links import pairs
from netns_kit.stack import Limits
from netns_kit.subnet import Subnet
from netns_kit.tap.frame_device import Device
from netns_kit.uplink.uplink import Uplink
from netns_kit.userstack.control import Control

from .main import Seat
from .owner import WorkerProcess

T = TypeVar("T")


class Workers:
    """A `WorkerProcess` for each queue of `tap`, with the same arguments."""

    def __init__(
        self,
        tap: Device,
        uplink: Uplink,
        subnet: Subnet,
        limits: Limits | None,
        dhcp: DhcpSettings | None,
        news: Callable[[int], None],
        *,
        required: tuple[str, ...] = (),
    ) -> None:
        """Start them.  Raises what a `WorkerProcess` does; nothing is left then."""
        count = len(tap.queues)
        if count > 1:
            limits = (limits or Limits()).divided(count)
        started: list[WorkerProcess] = []
        with ExitStack() as passed, ExitStack() as ours:
            inboxes, outboxes = pairs(count, passed) if count > 1 else ([], [])
            for number, queue in enumerate(tap.queues):
                seat = Seat(number, inboxes[number], tuple(outboxes)) if count > 1 else None
                started.append(
                    WorkerProcess(queue, uplink, subnet, limits, dhcp, news, required=required, seat=seat)
                )
                ours.callback(started[-1].kill)
            ours.pop_all()
        self.processes = tuple(started)
        self._ended = anyio.Event()

    @property
    def sandbox(self) -> Mapping[str, str]:
        """What they have given up: they are all alike."""
        return self.processes[0].sandbox

    async def run(self) -> None:
        """Hear them.  Raises what has ended the first of them that has."""
        failures: list[Exception] = []

        async def run(process: WorkerProcess) -> None:
            try:
                await process.run()
            except Exception as error:  # it ends by nothing else
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
        """Wait until all are."""
        for process in self.processes:
            await process.ready()

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have `Control` do it: the first's, or everybody's, also when cancelled.  Raises as `WorkerProcess.ask`."""
        join = _JOINED.get(operation.__name__)
        asked = self.processes if join is not None else self.processes[:1]
        try:
            questions = [process.put(operation, *arguments) for process in asked]  # of all, or of none
            answers = [await question.answer() for question in questions]
        except StackClosed:
            await self._ended.wait()  # what has ended it is to be raised first
            raise
        return answers[0] if join is None else cast("T", join(answers))

    async def close(self) -> None:
        """End them, see `WorkerProcess.close`."""
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for process in self.processes:
                    tasks.start_soon(process.close)


def _chained(answers: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(each for answer in answers for each in answer)


def _summed(answers: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for answer in answers:
        total.update(answer)
    return dict(total)


def _nothing(_: object) -> None:
    return None


def _first(answers: Sequence[Any]) -> Any:
    return answers[0]


_JOINED: Mapping[str, Callable[[Any], Any]] = {
    Control.flows.__name__: _chained,
    Control.end_flow.__name__: any,
    Control.stats.__name__: _summed,
    Control.subscribe.__name__: _nothing,
    Control.take_events.__name__: _chained,
    Control.unsubscribe.__name__: _nothing,
    Control.add_record.__name__: _nothing,
    Control.remove_records.__name__: _first,
}
"""What is asked of all, and how their answers become one."""
