"""Signals that are sent to this process and passed on.

They are blocked, in this thread and in all that it starts, and a thread waits for them (sigwaitinfo(2)).  So they
never interrupt the program, a fault of the program itself still ends it, each real-time signal counts, and a notice
can be written to a terminal from the background, where a handler of SIGTTOU would be called for ever.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from types import TracebackType

import anyio
from typing_extensions import Self

from .program import UNBLOCKABLE, raise_unblocked

ALL = frozenset(signal.valid_signals() - UNBLOCKABLE)
_WAKE = signal.SIGURG  # which has no effect by default
_CHILD_CHANGED = range(1, 7)  # CLD_EXITED to CLD_CONTINUED, sigaction(2)


class Signals:
    """The signals `numbers` that this process does not ignore, while the block is open.

    Until `keep` is called each has its default effect, at once.  From then on `received` yields them.  The block is
    entered in the main thread, before any other thread is started.
    """

    def __init__(self, numbers: Iterable[int] = ALL) -> None:
        python = {signal.SIGPIPE, signal.SIGXFSZ}  # ignores them for itself
        self._numbers = {
            number for number in numbers if number in python or signal.getsignal(number) is not signal.SIG_IGN
        }
        self._kept = self._ended = False

    def __enter__(self) -> Self:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers | {_WAKE})
        self._out, self._in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._wait, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Stop waiting; pending signals still have their default effect."""
        self._ended = True
        signal.pthread_kill(self._thread.ident or 0, _WAKE)
        self._thread.join()
        os.close(self._in)
        os.close(self._out)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _wait(self) -> None:
        while True:
            info = signal.sigwaitinfo(self._numbers | {_WAKE})
            if self._ended:
                return
            number = info.si_signo
            if number not in self._numbers or (
                number == signal.SIGCHLD and info.si_code in _CHILD_CHANGED  # a child of ours, not sent to us
            ):
                continue
            if self._kept:
                self._hand_out(number)
            else:
                raise_unblocked(number)

    def _hand_out(self, number: int) -> None:
        with suppress(BlockingIOError):  # tens of thousands wait already
            os.write(self._in, bytes([number]))

    def keep(self) -> None:
        """Have the signals reported by `received` from now on, without other effect."""
        self._kept = True

    async def received(self) -> AsyncIterator[int]:
        """Yield the numbers of the signals that come, for ever."""
        while True:
            await anyio.wait_readable(self._out)
            for number in os.read(self._out, 4096):
                yield number

    async def cancel(self, scope: anyio.CancelScope) -> None:
        """Cancel a scope at the first signal that comes."""
        await anext(self.received())
        scope.cancel()
