"""Ground: what one test has been given, and when that is opened and closed.

    fixture setup    objects are made, and none is open: there may be no event loop yet
    the test begins  what must be open is opened, in the task of the test; then its clock is set
    the test fails   what its networks know is written down for the report, while they are open
    the test ends    all that was opened until then is closed, also if the test was cancelled

A plain test has the synchronous forms of the same objects (`netns_kit.sync`), whose event loop is on a thread of its
own.  So its fixtures open them, and close them.

What the machine does not give, namespaces above all, skips the test with the reason; where the environment variable
CI is set it fails the test.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Generator
from contextlib import AsyncExitStack, suppress
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import anyio
import pytest
from typing_extensions import Self

from netns_kit.errors import NotPrivileged, TunUnavailable, UserNamespaceDenied
from netns_kit.namespace.background import Openable
from netns_kit.namespace.namespace import Namespace
from netns_kit.network.network import Network
from netns_kit.userstack.fake_internet import FakeInternet
from netns_kit.userstack.userstack import UserStack

from .clock import ManualClock
from .confined import Confined
from .evidence import Evidence
from .pair import TapPair

LACKING = (UserNamespaceDenied, TunUnavailable, NotPrivileged)
"""What opening raises where the machine does not give a namespace or a tap."""
PATIENCE = 5.0  # seconds for writing down what the networks of a failed test know


def missing(reason: object) -> NoReturn:
    """Skip the test with the reason, or fail it in CI.

    Args:
        reason: An error, or text.
    """
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (CI is set: nothing may be missing)", pytrace=False)
    pytest.skip(str(reason))


def is_async(item: pytest.Item) -> bool:
    """Return whether a test is a coroutine function."""
    return inspect.iscoroutinefunction(getattr(item, "obj", None))


def is_failure(error: BaseException | None) -> bool:
    """Return whether a test that ends with this exception fails: cancelled ones do, skipped ones do not."""
    return error is not None and not isinstance(error, (pytest.skip.Exception, pytest.xfail.Exception))


class Tested(Openable):
    """A base of what a test is given that has a stack, which is watched."""

    __test__ = False  # pytest is not to collect the subclasses
    ground: Ground
    name: str
    stack: UserStack
    _has_failed = False

    async def _open(self) -> None:
        try:
            await super()._open()  # type: ignore[safe-super]  # the class that this one is put before
        except LACKING as error:
            missing(error)
        await self.ground.evidence.watch(self.name, self.stack)

    async def _close(self) -> None:
        failed = self._has_failed or self.ground.has_failed
        with anyio.move_on_after(PATIENCE):
            await self.ground.evidence.leave(getattr(self, "stack", None), failed=failed)
        await super()._close()  # type: ignore[safe-super]  # the same

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_failed = is_failure(error)
        await super().__aexit__(kind, error, trace)


class TestedPair(Tested, TapPair):
    """The pair of a test."""


class TestedConfined(Tested, Confined):
    """The network for the children of a test."""


class TestedNamespace(Namespace):
    """The namespace of a test."""

    async def _open(self) -> None:
        try:
            await super()._open()
        except LACKING as error:
            missing(error)


class TestedNetwork(Tested, Network):
    """A network of a test: `async with network() as net`, or `net = await network()`, which is open until it ends."""

    def __await__(self) -> Generator[Any, Any, Self]:
        return self._kept().__await__()

    async def _kept(self) -> Self:
        opened = self.ground.opened
        opened.push_async_exit(self)
        return await self.open()


class Networks:
    """A factory of networks that lead to the test's internet.  It is the fixture `network`.

        async with network() as net:        # for a block; `with network() as net` in a plain test
            ...
        net = await network()               # until the test ends; `net = network().open()` in a plain test

    Args:
        ground: The ground of the test.
    """

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._made = 0

    def __call__(self, **options: Any) -> TestedNetwork:
        """Return a new network, to open.

        Args:
            options: Those of `Network`.  Without an `uplink` it leads to the internet of the test.

        Raises:
            ArgumentError, ArgumentTypeError, AddressError, PortSpecError, RecordError: As `Network` raises them.
        """
        if not options.get("internal"):
            options.setdefault("uplink", self._ground.internet)
        made = TestedNetwork(**options)
        self._ground.namespaces.append(made.namespace)
        self._made += 1
        made.ground, made.name = self._ground, f"network-{self._made}"
        return made


class Ground:
    """What one test has been given.

    Args:
        directory: Makes a directory for captures.
    """

    def __init__(self, directory: Callable[[], Path]) -> None:
        self.internet: Any = FakeInternet()
        self.evidence = Evidence(self.internet, directory)
        self.opened = AsyncExitStack()
        """What is closed when the test ends."""
        self.has_failed = False
        self.namespaces: list[Namespace] = []
        """Those that were made for the test."""
        self._given: list[Openable] = []
        self._clock: ManualClock | None = None

    def fake_internet(self) -> Any:
        """Return the internet of the test."""
        return self.internet

    def networks(self) -> Any:
        """Return a factory of networks."""
        return Networks(self)

    def pair(self) -> Any:
        """Return a pair that is open when the test begins."""
        made = TestedPair(self.internet)
        made.ground, made.name = self, "tap_pair"
        return self._give(made)

    def confined(self) -> Any:
        """Return a network for children of the test that is open when the test begins."""
        made = TestedConfined(uplink=self.internet)
        self.namespaces.append(made.namespace)
        made.ground, made.name = self, "confined"
        return self._give(made)

    def namespace(self) -> Any:
        """Return a namespace that is open when the test begins."""
        made = TestedNamespace.create()
        self.namespaces.append(made)
        return self._give(made)

    def clock(self, *, autojump: bool) -> ManualClock:
        """Return the clock of the test's event loop, which stands still when the test begins.

        Args:
            autojump: Whether it jumps.
        """
        self._clock = ManualClock(autojump=autojump)
        return self._clock

    def _give(self, made: Openable) -> Any:
        self._given.append(made)
        return made

    def around(self, test: Callable[..., Any]) -> Callable[..., Any]:
        """Return a test function that opens what the test is given, and closes it.

        Args:
            test: The test function.
        """

        @wraps(test)
        async def surrounded(**arguments: object) -> None:
            async with self.opened:
                for each in self._given:
                    await self.opened.enter_async_context(each)
                try:
                    if self._clock is not None:
                        self._clock.start()
                    await test(**arguments)
                except BaseException as error:
                    self.has_failed = is_failure(error)
                    raise
                finally:
                    if self._clock is not None:
                        self._clock.stop()

        return surrounded

    def run(self, item: pytest.Function) -> Generator[None, object, object]:
        """Surround the call of a test function.

        Args:
            item: The test.
        """
        return (yield)

    def conclude(self) -> list[tuple[str, str]]:
        """Return headings and texts for the report of a test that has failed."""
        self.evidence.conclude()
        return self.evidence.sections

    def close(self) -> None:
        """End the namespaces that are left when the fixtures are torn down.

        There are such if the test never came to its end, because its event loop did not: a time limit may do that.
        """
        for each in self.namespaces:
            if each.supervisor.condition not in ("closed", "not open"):
                with suppress(OSError):  # it has ended
                    each._agent.hang_up()
