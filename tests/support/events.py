"""Events of flows, as those that follow them want them."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream

from netns_kit import FlowEvent, Member, UserStack


async def flow_events(
    stack: UserStack | Member, *, processes: bool = False
) -> AsyncGenerator[FlowEvent, None]:
    """What `UserStack.events` says of flows."""
    async with aclosing(stack.events(processes=processes)) as events:
        async for event in events:
            if isinstance(event, FlowEvent):
                yield event


@asynccontextmanager
async def followed(
    stack: UserStack | Member, *, processes: bool = False
) -> AsyncIterator[MemoryObjectReceiveStream[FlowEvent]]:
    """What it says from now on."""
    into, out_of = anyio.create_memory_object_stream[FlowEvent](math.inf)

    async def follow() -> None:
        async with into, aclosing(flow_events(stack, processes=processes)) as events:
            async for event in events:
                await into.send(event)

    async with out_of, anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        await anyio.wait_all_tasks_blocked()
        await stack.flows()  # what was asked first is answered first: it is subscribed
        yield out_of
        tasks.cancel_scope.cancel()
