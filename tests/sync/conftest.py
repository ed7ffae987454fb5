"""Fixtures: synchronous networks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from netns_kit import DriverName, sync
from netns_kit.sync.loop_thread import loop_thread
from tests.support import needs_tun, needs_userns
from tests.support.drivers import driver

__all__ = ["driver"]


@pytest.fixture(scope="session")
def loop() -> None:
    """The event loop, which stays: no test leaks it."""
    loop_thread()


@pytest.fixture
def left(loop: None, leaks: None) -> None:
    """The test leaves nothing but the event loop."""


@pytest.fixture
def net(left: None) -> Iterator[sync.Network]:
    needs_userns()
    needs_tun()
    with sync.Network() as net:
        yield net


@pytest.fixture
def driven(left: None, driver: DriverName) -> Iterator[sync.Network]:
    with sync.Network(driver=driver) as net:
        yield net
