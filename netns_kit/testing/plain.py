"""The ground of a plain test: the synchronous forms of what an async test has.

Everything lives on the event loop of `netns_kit.sync`, on a thread of its own.  The fixtures open it, and close it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

import pytest

from netns_kit.errors import FeatureUnavailable
from netns_kit.namespace.background import Openable
from netns_kit.sync.facade import Facade, given_options, synchronized, synchronous
from netns_kit.sync.loop_thread import loop_thread

from .clock import ManualClock
from .confined import Child, Confined, Outcome
from .ground import Ground, Networks
from .pair import TapPair

if TYPE_CHECKING:
    import ssl

    import httpx


class Over(BaseException):
    """The end of a test whose rest was run in a child."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class PlainGround(Ground):
    """What one plain test has been given.

    Args:
        directory: Makes a directory for captures.
    """

    def __init__(self, directory: Callable[[], Path]) -> None:
        super().__init__(directory)
        self._closing = ExitStack()
        self._child: Child | None = None
        self._thread: int | None = None

    def fake_internet(self) -> Any:
        """Return the internet of the test."""
        return synchronized(self.internet)

    def networks(self) -> Any:
        """Return a factory of networks."""
        factory = Networks(self)

        @wraps(Networks.__call__)
        def network(**options: Any) -> Any:
            async def make() -> Openable:  # as `sync.Network` does it
                return factory(**given_options(options))

            made = self._form_of(loop_thread().call("network", make))
            self._closing.callback(made.close)
            return made

        return network

    def clock(self, *, autojump: bool) -> ManualClock:
        """Raise FeatureUnavailable: what a plain test calls has the kernel's clock."""
        cause = "manual_clock sets the clock of a test's event loop, and a plain test has none"
        raise FeatureUnavailable(cause, fix="write `async def`")

    def _give(self, made: Openable) -> Any:
        given = self._form_of(made)
        given.open()
        self._closing.callback(given.close)
        return given

    def _form_of(self, made: Openable) -> Any:
        """Return the synchronous form of what the test is given, which is that of its own class."""
        base: Any = synchronous(type(made))
        given: Any = object.__new__(_extended(made, base))
        given._wrapped, given._loop = made, loop_thread()
        return given

    def run(self, item: pytest.Function) -> Generator[None, object, object]:
        """Surround a test function, whose rest may be run in a child.

        Args:
            item: The test.
        """
        __tracebackhide__ = True
        self._thread = get_ident()
        try:
            result = yield
        except Over as over:
            return over.outcome.result() or True
        except BaseException as error:
            if self._child is not None:
                shown = item.repr_failure(pytest.ExceptionInfo.from_exception(error))
                self._child.end(Outcome(None, error, str(shown)))
            raise
        if self._child is not None:
            self._child.end(Outcome())
        return result

    def rest(self, made: Callable[[], Child]) -> None:
        """Return in a child; in this process, raise `Over` when the child has ended.

        Args:
            made: Makes the child, which is done once.

        Raises:
            FeatureUnavailable: The caller is not the test function.
        """
        if self._child is not None:
            return
        if get_ident() != self._thread:
            cause = "rest() was called in another thread than the test function's, or by a fixture"
            raise FeatureUnavailable(cause, fix="call it in the test function")
        child = made()
        if child.fork():
            self._child = child
        else:
            raise Over(child.wait())

    def conclude(self) -> list[tuple[str, str]]:
        """Return headings and texts for the report of a test that has failed."""
        self.has_failed = True
        loop_thread().call("test", self.evidence.write_down)
        return super().conclude()

    def close(self) -> None:
        """Close what is open."""
        self._closing.close()
        super().close()


def _extended(made: Openable, base: type[Facade]) -> type[Facade]:
    """Return a class with what the synchronous form has beside."""
    if isinstance(made, Confined):
        return _of_confined(base)
    return _of_pair(base) if isinstance(made, TapPair) else base


def _of_confined(base: type[Facade]) -> type[Facade]:
    class PlainConfined(base):  # type: ignore[valid-type, misc]  # it is made as the program runs
        __slots__ = ()

        def rest(self) -> None:
            """Run the rest of the test in a child process that has no network but this one.

            What happens there is the outcome of the test.  Fixtures are torn down in this process, as ever.  Of the
            threads of this process the child has that of the test alone.  Calling it again is allowed.

            Raises:
                FeatureUnavailable: The caller is not the test function, but another thread or a fixture.
                NamespaceGone, StackClosed: The network is not open.
            """
            self._wrapped.ground.rest(lambda: self._loop.call("confined", self._wrapped.child))

    return PlainConfined


def _of_pair(base: type[Facade]) -> type[Facade]:
    class PlainPair(base):  # type: ignore[valid-type, misc]  # the same
        __slots__ = ()

        def httpx_transport(
            self, *, verify: ssl.SSLContext | bool = True, retries: int = 0
        ) -> httpx.HTTPTransport:
            """Return what an httpx client connects by: `httpx.Client(transport=tap_pair.httpx_transport())`.

            Args:
                verify: As for `httpx.HTTPTransport`.
                retries: As for `httpx.HTTPTransport`.

            Raises:
                ImportError: There is no httpx.
            """
            from .plain_http import transport

            return transport(self._loop, self._wrapped.connect_tcp, verify, retries)

    return PlainPair
