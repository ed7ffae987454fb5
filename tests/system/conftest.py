"""Fixtures of tests with a whole network: a module that wants other drivers has its own."""

from __future__ import annotations

import pytest

from tests.support import LONG
from tests.support.connections import driver, every_descriptor, net

__all__ = ["driver", "every_descriptor", "net"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have trio drive the loop's engine alone in tests marked `engine`; with NETNS_KIT_LONG=1 every pair is there."""
    if not LONG:
        config.hook.pytest_deselected(items=[each for each in items if _is_stood_for(each)])
        items[:] = [each for each in items if not _is_stood_for(each)]


def _is_stood_for(item: pytest.Item) -> bool:
    """Whether another pair of event loop and driver tells the same."""
    if item.get_closest_marker("engine") is None or not isinstance(item, pytest.Function):
        return False
    given = item.callspec.params if hasattr(item, "callspec") else {}
    engine = next((given[name] for name in ("driver", "options", "net") if name in given), "loop")
    return given.get("anyio_backend") == "trio" and engine != "loop"
