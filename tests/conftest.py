"""Fixtures of every test: both event loops, and nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import (
    GRACE,
    Possessions,
    adopt_orphans,
    child_pids,
    children,
    reap,
    see_administrators_programs,
    wait_exit,
    wait_new_children,
)


def pytest_configure() -> None:
    """Prepare this process: what a test orphans is its child, for `no_process_left` to see."""
    adopt_orphans()
    see_administrators_programs()
    # How long an example may take says more about what else the machine does than about the code.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two for each core: while tests of one wait, for a program or a kernel's timer, the other's have it."""
    return 2 * len(os.sched_getaffinity(0))


def pytest_collection_finish() -> None:
    """Keep the tests themselves from the garbage collector: they live to the end.

    Else it would look at all of them each time, here and in each process that a test forks.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every test marked anyio runs on both event loops."""
    backend: str = request.param
    return backend


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """No test leaves a child process running, nor a descendant; what is left is named and killed."""
    before = child_pids()
    yield
    running = wait_new_children(before, time.monotonic() + GRACE)
    names = [f"{pid} {name}" for pid, name in children().items() if pid in running]
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    wait_exit(running, time.monotonic() + GRACE)
    reap(before)
    assert not names, f"processes left: {', '.join(names)}"


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Give what the test starts the default action of SIGHUP and SIGINT, of which nohup or a shell's `&` rob it.

    A handler that does nothing becomes the default with exec(2), while this process goes on ignoring the signal.
    """
    ignored = [
        number for number in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) is signal.SIG_IGN
    ]
    for number in ignored:
        signal.signal(number, lambda number, frame: None)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for the path of a socket, which has room for 107 bytes (unix(7)): TMPDIR may be longer."""
    with tempfile.TemporaryDirectory(prefix="nk", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def leaks() -> Iterator[None]:
    """The test ends with the descriptors, child processes and threads that it began with."""
    before = Possessions()
    yield
    difference = before.difference()
    assert not difference, "\n".join(["not as it was before:", *difference])
