"""Fixtures of every test: both event loops, and nothing left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support import GRACE, Possessions, children, wait_exit

PR_SET_CHILD_SUBREAPER = 36


def pytest_configure() -> None:
    """Become the parent of whatever a test orphans, so that `no_process_left` sees it (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Every test marked anyio runs on both event loops."""
    backend: str = request.param
    return backend


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """No test leaves a child process running, nor a descendant; what is left is named and killed."""
    before = children().keys()
    yield
    running = wait_exit(children().keys() - before, time.monotonic() + GRACE)
    names = [f"{pid} {name}" for pid, name in children().items() if pid in running]
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    wait_exit(running, time.monotonic() + GRACE)
    assert not names, f"processes left: {', '.join(names)}"


@pytest.fixture
def leaks() -> Iterator[None]:
    """The test ends with the descriptors, child processes and threads that it began with."""
    before = Possessions()
    yield
    difference = before.difference()
    assert not difference, "\n".join(["not as it was before:", *difference])
