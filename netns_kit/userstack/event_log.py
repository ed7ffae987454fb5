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
from typing import TextIO

import anyio.to_thread

from netns_kit import arguments
from netns_kit.errors import ArgumentTypeError, EventLogError

from .events import Event


class EventLog:
    """A file of events that is open for writing.

    Args:
        target: A path, whose file is made or appended to; or a file that is open for text, which stays open.

    Attributes:
        is_writing: Whether the file is being written, or a write was given up because it was cancelled.

    Raises:
        ArgumentTypeError: It is neither.
        EventLogError: The file cannot be opened.
    """

    def __init__(self, target: str | os.PathLike[str] | TextIO) -> None:
        self.is_writing = False
        self._text = ""  # what is to be written
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

    async def write(self, events: Iterable[Event]) -> None:
        """Write events, and flush.

        Raises:
            EventLogError: They cannot be written, or not all of them.

        Cancellation: They are written by the next call; or, if `is_writing`, as soon as the file takes them.
        """
        self._text += "".join(lines(events))
        if self._text:
            await anyio.to_thread.run_sync(self._write, abandon_on_cancel=True)

    def close(self) -> None:
        """Close the file, if it was opened here."""
        if self._path is not None and not self.is_writing:
            with suppress(OSError):  # what it could not write has been reported
                self._file.close()

    def _write(self) -> None:
        self.is_writing = True
        text, self._text = self._text, ""
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
        self.is_writing = False

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
