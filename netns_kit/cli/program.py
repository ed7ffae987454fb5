"""The process of a command of ours: its standard streams, its notices, and its end.

It imports almost nothing, because some commands must start fast.
"""

from __future__ import annotations

import io
import os
import sys
from _signal import (  # type: ignore[import-not-found]  # of `signal`, what makes no enums of them: that takes 4 ms
    SIG_DFL,
    SIG_SETMASK,
    SIG_UNBLOCK,
    SIGINT,
    SIGKILL,
    SIGPIPE,
    SIGSTOP,
    default_int_handler,
    getsignal,
    pthread_sigmask,
    raise_signal,
    signal,
)

TYPE_CHECKING = False  # as type checkers know it, without importing `typing`

if TYPE_CHECKING:
    from typing import NoReturn

UNBLOCKABLE = {SIGKILL, SIGSTOP}


def begin() -> None:
    """Have SIGINT end this process without a traceback, and reserve the numbers of closed standard streams.

    /dev/null takes the place of a closed stream, and no child inherits it.  So a command finds the stream closed, as
    it was given, and no private descriptor gets a number to which a library writes messages.  `sys.stderr` becomes a
    stream that never fails, for the parser of the command line and for logs.
    """
    if getsignal(SIGINT) is default_int_handler:
        signal(SIGINT, SIG_DFL)
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) < 3:
        pass
    os.close(fd)
    if sys.stdout is None:  # closed: what is printed goes to /dev/null, not to a library that expects a file
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    sys.stderr = _Notices()


class _Notices(io.TextIOBase):
    """A standard error that never fails; see `notice`."""

    def fileno(self) -> int:
        return 2

    def write(self, text: str) -> int:
        if takes(2):
            _write(text)
        return len(text)


def notice(text: str) -> None:
    """Write a line to standard error.  It is lost if that is closed, full or not read, so that no command waits."""
    if takes(2):
        _write(f"{text}\n")


def last_words(text: str) -> None:
    """Write a line to standard error before this process ends, and wait until it is read."""
    _write(f"{text}\n")


def _write(text: str) -> None:
    try:
        os.write(2, text.encode(errors="backslashreplace"))
    except OSError:  # it is closed
        pass


def takes(fd: int) -> bool:
    """Return whether a few lines can be written to `fd` without blocking: a writable pipe takes 4096 bytes."""
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def end(status: int) -> NoReturn:
    """End this process now, after its output is written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        end_unread(error)
    os._exit(status)


def end_unread(error: OSError) -> NoReturn:
    """End this process because standard output failed: with status 125, or by SIGPIPE if the reader has gone."""
    if isinstance(error, BrokenPipeError):
        end_by(SIGPIPE)
    last_words(f"netns-kit: standard output: {error.strerror}")
    os._exit(125)


def end_by(number: int) -> NoReturn:
    """End this process by a signal, without a core dump, which would not be the command's.

    In the first process of a container, which no signal ends, the exit status is the one that a shell reports for it.
    """
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard:  # 1 is too little for a file, and to the kernel a sign to start no helper (core(5))
        resource.setrlimit(resource.RLIMIT_CORE, (1, hard))
    if number in UNBLOCKABLE:
        os.kill(os.getpid(), number)
    else:
        signal(number, SIG_DFL)
        raise_unblocked(number)
    os._exit(128 + number)


def raise_unblocked(number: int) -> None:
    """Send this process a signal with its effect as if it were not blocked: end it, stop it, or nothing."""
    before = pthread_sigmask(SIG_UNBLOCK, [number])
    raise_signal(number)
    pthread_sigmask(SIG_SETMASK, before)
