"""Fixtures: a network on each driver in turn, for what must be alike on all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from netns_kit import Network
from netns_kit.gateway.setup import DriverName
from tests.support import needs_tun


@pytest.fixture(params=["thread", "loop", "worker"])
def driver(request: pytest.FixtureRequest) -> DriverName:
    needs_tun()
    driver: DriverName = request.param
    return driver


@pytest.fixture
async def net(leaks: None, driver: DriverName) -> AsyncIterator[Network]:
    async with Network(driver=driver) as net:
        yield net
