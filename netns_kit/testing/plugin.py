"""The plugin of pytest: fixtures, markers, and what a failing test shows.

pytest imports this module in every run where the package is installed (entry point `netns_kit`).  So it imports
nothing but pytest; all else is imported by the first test that asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

TYPE_CHECKING = False  # as type checkers know it, without importing `typing`

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from netns_kit.checkup.checkup import Report

    from .clock import ManualClock
    from .ground import Ground

_GROUND: pytest.StashKey[Ground] = pytest.StashKey()
_REPORT: pytest.StashKey[Report] = pytest.StashKey()
_OF_THE_KERNEL = {"confined", "netns", "network"}
"""Fixtures of which other processes and the kernel are a part, whose clocks are their own."""


def pytest_configure(config: pytest.Config) -> None:
    """Describe the markers."""
    text = (
        "needs_netns(*findings): skip the test where doctor finds one of these missing, by default all that "
    )
    config.addinivalue_line(
        "markers", text + "a Network needs; fail it where the environment variable CI is set"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test, or fail it, for want of what its marker says."""
    for marker in item.iter_markers("needs_netns"):
        from netns_kit.checkup.checkup import doctor
        from netns_kit.errors import NetnsKitError, NotFound

        from .ground import missing

        report = item.config.stash.get(_REPORT, None)
        if report is None:
            report = item.config.stash[_REPORT] = doctor()
        try:
            report.require(*marker.args)
        except NotFound:  # the marker is wrong
            raise
        except NetnsKitError as error:
            missing(error)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before a plugin of an event loop looks at the function
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Have a test's networks opened and closed around it, and show what they know if it fails."""
    ground = item.stash.get(_GROUND, None)
    if ground is None or not isinstance(item, pytest.Function):
        return (yield)
    from .ground import is_async, is_failure

    test = item.obj
    if is_async(item):
        item.obj = ground.around(test)
    try:
        return (yield)
    except BaseException as error:
        if is_failure(error):
            for heading, text in ground.conclude():
                item.add_report_section("call", f"netns_kit {heading}", text)
        raise
    finally:
        item.obj = test


@pytest.hookimpl(wrapper=True, trylast=True)  # as near to the function as can be
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Take the outcome of a plain test from the child in which its rest was run."""
    ground = pyfuncitem.stash.get(_GROUND, None)
    if ground is None:
        return (yield)
    return (yield from ground.run(pyfuncitem))


@pytest.fixture(name="_netns_kit_ground")
def ground_of_test(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ground]:
    """Return what the test has been given; for the fixtures of this plugin."""
    from .ground import Ground, is_async

    def directory() -> Path:
        return tmp_path_factory.mktemp("netns_kit")

    if is_async(request.node):
        ground = Ground(directory)
    else:
        from .plain import PlainGround

        ground = PlainGround(directory)
    request.node.stash[_GROUND] = ground
    yield ground
    ground.close()


@pytest.fixture
def fake_internet(_netns_kit_ground: Ground) -> Any:
    """An internet of the test's own, in this process: names, servers, hosts that are down (`FakeInternet`)."""
    return _netns_kit_ground.fake_internet()


@pytest.fixture
def network(_netns_kit_ground: Ground) -> Any:
    """A factory of networks that lead to `fake_internet` (`Networks`)."""
    return _netns_kit_ground.networks()


@pytest.fixture
def tap_pair(_netns_kit_ground: Ground) -> Any:
    """A client and its network in memory, which leads to `fake_internet`; without any privilege (`TapPair`)."""
    return _netns_kit_ground.pair()


@pytest.fixture
def confined(_netns_kit_ground: Ground) -> Any:
    """A network that leads to `fake_internet`, for programs and functions that shall have no other (`Confined`)."""
    return _netns_kit_ground.confined()


@pytest.fixture
def netns(_netns_kit_ground: Ground) -> Any:
    """A network namespace with nothing but its loopback (`Namespace`)."""
    return _netns_kit_ground.namespace()


@pytest.fixture
def manual_clock(request: pytest.FixtureRequest, _netns_kit_ground: Ground) -> ManualClock:
    """The clock of the test's event loop: it stands still, and jumps to the next timeout when every task waits."""
    return _netns_kit_ground.clock(autojump=_OF_THE_KERNEL.isdisjoint(request.fixturenames))
