"""EventLog: events as lines of JSON in a file.

A line is what `FlowEvent.as_dict` or `QueryEvent.as_dict` returns.  Where events were lost, a line of the kind "lost"
has their number, before the line of the next event.  Lines are ASCII: what programs inside have named is escaped, so
that a log may be shown on a terminal.  The file is written in a thread, since it may be a pipe that is full.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Protocol, TextIO

import anyio
import anyio.to_thread

from netns_kit import arguments
from netns_kit.errors import ArgumentTypeError, EventLogError, StackClosed

from .events import Event


class Source(Protocol):
    """Events that happen."""

    async def wait(self) -> object:
        """Wait until there is something to take, or `wake` is called."""

    def wake(self) -> None:
        """End the wait."""

    async def take(self) -> tuple[Event, ...]:
        """Return the events since the last call."""

    async def under_way(self) -> tuple[Event, ...]:
        """Return an event for each flow that is under way."""


class EventLog:
    """A file of events that is open for writing.

    Args:
        target: A path, whose file is made or appended to; or a file that is open for text, which stays open.

    Raises:
        ArgumentTypeError: It is neither.
        EventLogError: The file cannot be opened.
    """

    def __init__(self, target: str | os.PathLike[str] | TextIO) -> None:
        self._is_writing = self._is_closed = False
        self._thread = anyio.CapacityLimiter(1)  # its own: a pipe that is full takes none of the program's
        self._path: str | None = None
        if isinstance(target, str | os.PathLike):
            self._path = os.fspath(target)
            try:
                self._file: TextIO = open(self._path, "a", encoding="ascii")  # noqa: SIM115 - `close` closes it
            except OSError as error:
                raise self._failure(error) from error
        else:
            for method in ("write", "flush"):
                if not callable(getattr(target, method, None)):
                    expected = "expected a path, or a file that is open for text"
                    raise ArgumentTypeError(expected, "target", arguments.shown(target))
            self._file = target

    async def run(self, source: Source, patience: float) -> None:
        """Write what happens, until the stack is closed or this is cancelled.

        Args:
            source: The events.
            patience: Seconds that the file may take for the rest, once this is cancelled.

        Raises:
            EventLogError: The file cannot be written.

        Cancellation: The rest is written, and a line for each flow that is under way.
        """
        failures: list[Exception] = []
        stopping = False

        async def write() -> None:
            with writing:  # it ends between two writes, or when its patience does
                try:
                    while not stopping:
                        await source.wait()
                        await self.write(await source.take())
                    await self.write([*await source.take(), *await source.under_way()])
                except StackClosed:
                    pass
                except Exception as error:
                    failures.append(error)
            ended.set()

        writing, ended = anyio.CancelScope(shield=True), anyio.Event()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(write)
                try:
                    await ended.wait()
                except anyio.get_cancelled_exc_class():
                    stopping = True
                    writing.deadline = anyio.current_time() + patience
                    source.wake()
                    raise
        finally:  # also if it was the rest, after a cancellation, that could not be written
            if failures:
                raise failures[0]

    async def write(self, events: Iterable[Event]) -> None:
        """Write events, and flush.

        Raises:
            EventLogError: They cannot be written, or not all of them.

        Cancellation: They are written when the file takes them, and then it is closed.
        """
        text = "".join(lines(events))
        if text:
            self._is_writing = True
            await anyio.to_thread.run_sync(self._write, text, abandon_on_cancel=True, limiter=self._thread)

    def close(self) -> None:
        """Close the file, if it was opened here."""
        self._is_closed = True
        if self._path is not None and not self._is_writing:
            with suppress(OSError):  # what it could not write has been reported
                self._file.close()

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error
        except ValueError as error:  # so Python says that a file is closed
            raise self._failure(OSError(errno.EBADF, str(error))) from error
        except TypeError as error:
            expected = "expected a file that is open for text"
            raise ArgumentTypeError(expected, "target", arguments.shown(self._file)) from error
        finally:
            self._is_writing = False
            if self._is_closed:
                self.close()

    def _failure(self, error: OSError) -> EventLogError:
        what = f"the event log cannot be written: {error.strerror or error}"
        name = self._path if self._path is not None else getattr(self._file, "name", None)
        fix = "make room, or write to another file" if error.errno in _FULL else None
        return EventLogError(what, None if name is None else "the file", name, fix, error.errno)


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def lines(events: Iterable[Event]) -> Iterator[str]:
    """Yield a line for each event, and one before it if others were lost."""
    for event in events:
        if event.missed:
            lost = {"time": round(event.time, 6), "kind": "lost", "count": event.missed}
            yield json.dumps(lost) + "\n"
        yield json.dumps(event.as_dict()) + "\n"
