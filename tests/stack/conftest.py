"""Fixtures are states: a guest as it stands before the first line of a diagram."""

from __future__ import annotations

import pytest

from tests.support.stack import Guest


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
def guest(family: int) -> Guest:
    """A guest that has said nothing yet."""
    return Guest(family)


@pytest.fixture
def tcp(family: int) -> Guest:
    """ESTABLISHED: guest at 1000 with a window of 65536, we at 9000 with a window of 1 MiB."""
    return Guest(family).established()
