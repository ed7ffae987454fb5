"""Evidence: what the networks of a test know, for the report of its failure.

Each stack is watched from its opening on: its events are followed, and a capture keeps its last frames in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import aclosing, suppress
from pathlib import Path

from netns_kit.dns.message import Rcode
from netns_kit.errors import NetnsKitError
from netns_kit.userstack.capture import Capture
from netns_kit.userstack.display import events_view
from netns_kit.userstack.events import Event, under_way
from netns_kit.userstack.fake_internet import FakeInternet
from netns_kit.userstack.userstack import UserStack

KEPT = 1 << 18  # bytes of frames
SNAPLEN = 1 << 14
EVENTS = 50
QUERIES = 20
PACKETS = 24
COLUMNS = 140  # of a table of flows
USUAL = {"dropped_ipv6_off", "dropped_ndp_type"}
"""Counters of what every kernel sends, and nobody misses."""


class _Watched:
    """A stack, and what is noted of it."""

    def __init__(self, name: str, stack: UserStack) -> None:
        self.name = name
        self.stack = stack
        self.capture: Capture = stack.capture(None, max_bytes=KEPT, snaplen=SNAPLEN)
        self.events: deque[Event] = deque(maxlen=EVENTS)

    async def follow(self) -> None:
        with suppress(NetnsKitError):  # the stack has ended
            async with aclosing(self.stack.events()) as events:
                async for event in events:
                    if event.kind != "opened":
                        self.events.append(event)


class Evidence:
    """What is known of the networks of a test.

    Args:
        internet: The test's internet.
        directory: Makes a directory for captures.
    """

    def __init__(self, internet: FakeInternet, directory: Callable[[], Path]) -> None:
        self._internet = internet
        self._directory = directory
        self._made: Path | None = None
        self._watched: dict[UserStack, _Watched] = {}
        self.sections: list[tuple[str, str]] = []
        """Headings and texts, for the report."""

    async def watch(self, name: str, stack: UserStack) -> None:
        """Watch a stack, which is open, from now on.

        Args:
            name: Its name in the report.
            stack: The stack.
        """
        watched = _Watched(name, stack)
        await watched.capture.__aenter__()
        stack.supervisor.start(watched.follow)
        self._watched[stack] = watched

    async def write_down(self) -> None:
        """Write down what all stacks know that are still open."""
        for stack in list(self._watched):
            await self.leave(stack, failed=True)

    async def leave(self, stack: UserStack | None, *, failed: bool) -> None:
        """Watch a stack no more, since it is about to be closed.

        Args:
            stack: The stack, or None if there was none.
            failed: Whether the test fails, so that what is known of the stack is written down.
        """
        watched = None if stack is None else self._watched.pop(stack, None)
        if watched is None:
            return
        if failed:
            await self._write_down(watched)
        with suppress(NetnsKitError):
            await watched.capture.__aexit__(None, None, None)

    async def _write_down(self, watched: _Watched) -> None:
        stack, name = watched.stack, watched.name
        events = list(watched.events)
        with suppress(NetnsKitError):  # it has ended, and its error is the test's
            events += [under_way(flow, None) for flow in await stack.flows()]
            counted = {key: value for key, value in (await stack.stats()).items() if value and _is_bad(key)}
            self._add(f"{name}: drops", "\n".join(f"{key} {value}" for key, value in counted.items()))
        if events:
            self._add(f"{name}: flows", events_view(events).text(COLUMNS))
        with suppress(NetnsKitError, OSError):  # the disk may be full, and the test has an error of its own
            if packets := await watched.capture.packets():
                self._made = self._made or self._directory()
                path = self._made / f"{name}.pcapng"
                await watched.capture.dump(path)
                self._add(f"{name}: last packets", f"{packets[-PACKETS:]}\nthe whole capture: {path}")

    def conclude(self) -> None:
        """Write down what is known of the internet, which is there without a network too."""
        refused = [each for each in self._internet.queries if each.rcode is not Rcode.NOERROR]
        lines = [f"{each.name} {each.type}: {each.rcode.name}" for each in refused[-QUERIES:]]
        self._add("names that were refused", "\n".join(dict.fromkeys(lines)))

    def _add(self, heading: str, text: str) -> None:
        if text:
            self.sections.append((heading, text))


def _is_bad(counter: str) -> bool:
    """Return whether a counter of `Stats` tells of something that was dropped or refused."""
    return counter not in USUAL and any(each in counter for each in ("drop", "refused", "lost", "malformed"))
