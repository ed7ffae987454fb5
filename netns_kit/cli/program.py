"""What every command of ours does as a process: its standard streams, its notices, how it ends.

It imports next to nothing, for the sake of those commands that others wait for.
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
    """Have SIGINT end this process without a word, as it ends other programs; and reserve the numbers of standard
    streams that are closed.

    Their place is taken by /dev/null, which no child inherits: a command that is started finds them closed, as they
    were given, and nothing private comes to be where somebody writes what he has to say.  `sys.stderr` is one that
    never fails, whoever writes there: the parser of the command line, a log.
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
    """Standard error; see `notice`."""

    def fileno(self) -> int:
        return 2

    def write(self, text: str) -> int:
        if takes(2):
            _write(text)
        return len(text)


def notice(text: str) -> None:
    """Write a line to standard error.  It is lost if that is closed, full or not read: no command waits for it."""
    if takes(2):
        _write(f"{text}\n")


def last_words(text: str) -> None:
    """Write the same where there is nothing to wait: if it is not read, this process waits for that."""
    _write(f"{text}\n")


def _write(text: str) -> None:
    try:
        os.write(2, text.encode(errors="backslashreplace"))
    except OSError:  # nobody can be told
        pass


def takes(fd: int) -> bool:
    """Whether a few lines can be written to `fd` without blocking: a pipe of which that is so takes 4096 bytes."""
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def end(status: int) -> NoReturn:
    """End this process now, once what it has printed is written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        end_unread(error)
    os._exit(status)


def end_unread(error: OSError) -> NoReturn:
    """End this process since standard output takes no more: with 125, or by SIGPIPE if nobody reads."""
    if isinstance(error, BrokenPipeError):
        end_by(SIGPIPE)
    last_words(f"netns-kit: standard output: {error.strerror}")
    os._exit(125)


def end_by(number: int) -> NoReturn:
    """End this process as signal `number` ends one, but without a core dump: that would not be the command's.

    Where no signal can, in the first process of a container, the exit status is what a shell makes of that.
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
    """Do to this process what signal `number` does where it is not blocked: end it, stop it, or nothing."""
    before = pthread_sigmask(SIG_UNBLOCK, [number])
    raise_signal(number)
    pthread_sigmask(SIG_SETMASK, before)
