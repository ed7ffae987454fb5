"""Fixtures of the tests of stacks."""

from __future__ import annotations

import pytest

from netns_kit.gateway.setup import DriverName


@pytest.fixture(params=["thread", "loop", "worker"])
def driver(request: pytest.FixtureRequest) -> DriverName:
    driver: DriverName = request.param
    return driver
