"""Child processes that end with the block, and what /proc says of them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

Child = subprocess.Popen[bytes]


class Failed(Exception):
    """A subject or the load generator did not do what it should; the text is for a footnote."""


@contextmanager
def child(*command: str, pass_fds: Sequence[int] = (), cwd: Path | None = None) -> Iterator[Child]:
    """A process with pipes for its standard streams, killed and reaped at the end of the block.

    Its standard error is a file: nobody reads it until the process has ended, however much that is.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            pass_fds=pass_fds,
            cwd=cwd,
        )
        process.stderr = os.fdopen(os.dup(errors.fileno()), "rb")
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def answer(process: Child, seconds: float) -> Any:
    """The next line that a process prints, which is JSON.  Raises `Failed` when it ends first or is too slow."""
    text = line(process, seconds)
    try:
        return json.loads(text)
    except ValueError as error:
        raise Failed(f"unexpected output: {text!r}") from error


def line(process: Child, seconds: float) -> str:
    """The next line of its standard output, as `answer`."""
    assert process.stdout is not None
    wait_readable(process.stdout, seconds)
    text = process.stdout.readline()
    if not text.endswith(b"\n"):
        raise Failed(_last_words(process))
    return text.decode().strip()


def output(command: Sequence[str], seconds: float, *, cwd: Path | None = None) -> str:
    """What a command prints.  Raises `Failed` when its status is not 0, or it takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=cwd)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{command[0]} took longer than {seconds:.0f} s") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise Failed(f"{command[0]}: {words or f'ended with status {done.returncode}'}")
    return done.stdout


def tell(process: Child, text: str) -> None:
    """Write a line to its standard input."""
    assert process.stdin is not None
    try:
        process.stdin.write(text.encode() + b"\n")
    except BrokenPipeError as error:
        raise Failed(_last_words(process)) from error


def wait_readable(stream: IO[bytes] | int, seconds: float) -> None:
    """Raises `Failed` when nothing comes in time."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    if not poll.poll(seconds * 1000):
        raise Failed(f"no answer within {seconds:.0f} s")


def _last_words(process: Child) -> str:
    """Why it ended: the last line of its standard error."""
    assert process.stderr is not None
    with suppress(subprocess.TimeoutExpired):
        process.wait(2)
    words = os.pread(process.stderr.fileno(), 1 << 16, 0).decode(errors="replace").strip()
    return words.rpartition("\n")[2] or f"ended with status {process.poll()}"


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                with suppress(OSError):
                    found += map(int, (task / "children").read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """Time that a process and its descendants have run, all their threads that there are: schedstat in proc(5).

    It counts nanoseconds, where proc_pid_stat(5) counts ticks of 10 ms.
    """
    total = 0
    for task in _tasks(pid):
        with suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def _tasks(pid: int) -> Iterator[Path]:
    """The threads of a process and its descendants."""
    for each in family(pid):
        with suppress(OSError):
            yield from Path(f"/proc/{each}/task").iterdir()


@contextmanager
def one_core(pid: int) -> Iterator[None]:
    """All threads of a process and its descendants, and what this process starts meanwhile, share one core.

    pid 0: only the latter.
    """
    cores = os.sched_getaffinity(0)
    tasks = [0, *(int(task.name) for task in _tasks(pid))] if pid else [0]
    _pin(tasks, {max(cores)})
    try:
        yield
    finally:
        _pin(tasks, cores)


def _pin(tasks: Sequence[int], cores: set[int]) -> None:
    for task in tasks:
        with suppress(ProcessLookupError):
            os.sched_setaffinity(task, cores)


def memory(pid: int) -> float:
    """KiB of memory of a process and its descendants: PSS, what is shared counted in part.

    A process that is not dumpable, a sandboxed one, hides its PSS from its own user: its RSS then, which is no less.
    """
    return float(sum(map(_memory_of, family(pid))))


def _memory_of(pid: int) -> int:
    for file, key in ("smaps_rollup", "Pss:"), ("status", "VmRSS:"):
        with suppress(OSError):
            for row in Path(f"/proc/{pid}/{file}").read_text().splitlines():
                if row.startswith(key):
                    return int(row.split()[1])
    return 0  # it has ended


def wait_for(path: Path, process: Child, seconds: float) -> None:
    """Wait until there is such a file that is not empty."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        if process.poll() is not None:
            raise Failed(_last_words(process))
        if time.monotonic() > end:
            raise Failed(f"not ready within {seconds:.0f} s")
        time.sleep(0.002)
