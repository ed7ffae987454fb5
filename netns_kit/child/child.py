"""Child: a process that executes a module of this package, how it is spoken to, and how it ends.

The agent of a namespace, a worker and the doctor's probe are started here, by a plain exec in the calling thread.
The child has one end of a `Channel`, a pidfd of this process, by which it learns of its owner's end, and the
descriptors that it is given, all above 2; standard input and output are /dev/null.  Of our environment it has what it
needs (`netns_kit.host.environment`), and all signals are blocked until it decides on them.

A fork may hold a copy of our end of the channel, so the channel is shut down, not only closed, and the child watches
the pidfd beside it.  PR_SET_PDEATHSIG would not do: it follows the thread that has started the child.
"""

from __future__ import annotations

import fcntl
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from netns_kit.host import diagnosis
from netns_kit.host.environment import child_environment

from .channel import Channel

PATIENCE = 2.0
"""Seconds that a child may take to end before it is killed."""
ERRORS_SIZE = 1 << 20
BOOT = """\
import os, sys
sys.path.append(sys.argv[1])
__import__(sys.argv[2])
os._exit(sys.modules[sys.argv[2]].main(*map(int, sys.argv[3:])))
"""
"""What a child executes.  Modules are compiled once, a script would be each time.  The package is found after the
standard library, so that nothing beside it takes a name of that.  What Python does at its end is left out."""
_HOME = str(Path(__file__).parents[__name__.count(".")])  # where the package is


class Child:
    """A child process.  `errors` is what it writes on standard error, where that was asked for: non-blocking.

    Whoever makes one closes it in the end; what still runs then is killed.  `stop` gives it time to end by itself.
    """

    errors: io.FileIO

    def __init__(
        self,
        module: str,
        fds: Sequence[int] = (),
        *,
        watched: bool = True,
        errors: bool = False,
        new_session: bool = False,
    ) -> None:
        """Execute `main` of `module` with the numbers of the descriptors: channel, owner, and those of `self.fds`.

        Args:
            module: The full name of the module.
            fds: Descriptors for the child, beside the first two.  They stay the caller's.
            watched: The child has a pidfd of its owner, and the owner one of it: then `ended` and `stop` can wait.
            errors: Standard error is a pipe to here, and not the caller's.  The child never waits for its reader.
            new_session: The child is not in the caller's session and process group.

        Raises:
            FeatureUnavailable: There are no pidfds.
            OSError: There are too few descriptors, or no process can be made.  Nothing is left, whatever is raised.
        """
        with ExitStack() as owned, ExitStack() as passed:
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.channel = Channel(mine)
            owned.callback(self.channel.close)
            passed.callback(theirs.close)
            given = [theirs.fileno()]
            if watched:
                given.append(_own_pidfd())
                passed.callback(os.close, given[1])
            numbers: list[int] = []
            for fd in (*given, *fds):
                numbers.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))  # 0 to 2 are free in a daemon
                passed.callback(os.close, numbers[-1])
            self.fds = numbers[len(given) :]
            stderr = None if is_inherited(2) else subprocess.DEVNULL
            if errors:
                self.errors, stderr = _pipe_of_errors()
                passed.callback(os.close, stderr)
                owned.callback(self.errors.close)
            with _signals_blocked():
                self._popen = subprocess.Popen(
                    [sys.executable, "-ISc", BOOT, _HOME, module, *map(str, numbers)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    pass_fds=numbers,
                    env=child_environment(),
                    start_new_session=new_session,
                )
            owned.callback(self._collect)
            if watched:
                self._pidfd = io.FileIO(os.pidfd_open(self._popen.pid))
                owned.callback(self._pidfd.close)
            self._owned = owned.pop_all()

    @property
    def pid(self) -> int:
        """Process id of the child, as this process counts."""
        return self._popen.pid

    async def ended(self) -> None:
        """Wait until the child has ended; it can be collected without waiting then (`wait`)."""
        import anyio

        await anyio.wait_readable(self._pidfd)

    async def stop(self) -> int:
        """Hang up, and wait until the child has ended; kill it if that takes longer than `PATIENCE`.  Return its
        status, as `subprocess` has it.

        Cancellation:
            The child is left as it is.
        """
        import anyio

        self.channel.shutdown()
        self._popen.send_signal(signal.SIGCONT)  # somebody may have stopped it
        with anyio.move_on_after(PATIENCE):
            await self.ended()
        if self._popen.poll() is None:
            self._popen.kill()
            await self.ended()
        return self.wait()

    def kill(self) -> None:
        """Send the child SIGKILL."""
        self._popen.kill()

    def _collect(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()

    def wait(self) -> int:
        """Block until the child has ended, and return its status, as `subprocess` has it."""
        return self._popen.wait()

    def close(self) -> None:
        """Close the descriptors that lead to the child; kill it, and block until it has ended, if it still runs."""
        self._owned.close()


def _own_pidfd() -> int:
    try:
        return os.pidfd_open(os.getpid())
    except OSError as error:
        raise diagnosis.feature("pidfds", error, "5.3", "pidfd_open") from error


def _pipe_of_errors() -> tuple[io.FileIO, int]:
    """Return the ends of a large pipe that never blocks."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    with suppress(OSError):  # a user may not have many pipes as large as that, pipe(7)
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, ERRORS_SIZE)
    return io.FileIO(reading), writing


def is_inherited(fd: int) -> bool:
    """Whether a child is to have that standard stream of ours.

    It is not, if it is closed, or if its number went to something private, as to a daemon's event loop.
    """
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block all signals: a child started meanwhile has them blocked from its first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
