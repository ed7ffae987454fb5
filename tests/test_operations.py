"""Operations: what may be asked of a stack, and how each feature says so."""

from __future__ import annotations

import pytest

from netns_kit.gateway.capture_filter import CaptureFilter
from netns_kit.gateway.captures import Captures
from netns_kit.gateway.gateway import Gateway
from netns_kit.gateway.leasing import Leasing
from netns_kit.operations import chained, join_of, operation, operations_of, same, summed, types_of
from netns_kit.userstack.control import OPERATIONS


class Shop:
    """A feature."""

    @operation(summed)
    def sales(self) -> dict[str, int]:
        """Asked of all."""
        return {}

    @operation()
    def buy(self, what: str, now: float) -> bool:
        """Asked of the first, at a time."""
        return bool(what)

    def steal(self) -> None:
        """Not to be asked for."""


def test_what_is_marked_may_be_asked_for_and_nothing_else() -> None:
    assert operations_of(Shop) == {"Shop.sales": Shop.sales, "Shop.buy": Shop.buy}


def test_the_time_is_no_argument_of_the_asker() -> None:
    assert types_of(Shop.buy) == ((str,), bool)


def test_what_is_given_beside_is_no_argument() -> None:
    assert types_of(Captures.begin) == ((int, int, CaptureFilter | None, str), type(None))


def test_how_answers_become_one() -> None:
    assert join_of(Shop.buy) is None
    assert join_of(Shop.sales) is summed
    assert summed([{"a": 1, "b": 2}, {"b": 3}]) == {"a": 1, "b": 5}
    assert chained([(1,), (), (2, 3)]) == (1, 2, 3)
    assert same([True, True]) is True


def test_every_feature_is_there() -> None:
    """And an answer of one worker alone is one of what only the first has: each other names its join."""
    assert {name.partition(".")[0] for name in OPERATIONS} == {
        "Gateway",
        "Leasing",
        "Zone",
        "Asking",
        "Forwards",
        "Events",
        "Serving",
        "Captures",
        "FaultBlocks",
    }
    alone = {name for name, each in OPERATIONS.items() if join_of(each) is None}
    assert alone == {
        "Forwards.add", "Forwards.adopt", "Forwards.disown", "Forwards.list", "Forwards.list_all", "Forwards.remove",
        "Forwards.remove_all", "Forwards.reverse", "Forwards.target", "Forwards.settle",
        "Gateway.names", "Leasing.leases", "Leasing.reserve",
        "Leasing.revoke", "Serving.accept", "Serving.connect", "Serving.dial", "Serving.echoed",
        "Serving.go_on", "Serving.hold", "Serving.resolved", "Serving.refuse", "Serving.release",
        "Serving.turn_back", "Zone.records",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["Gateway.close", "Gateway.make_room", "Leasing.guest", "os.system", "", "Gateway"]
)
def test_what_is_not_marked_has_no_name(name: str) -> None:
    assert name not in OPERATIONS
    assert Gateway.flows.__qualname__ in OPERATIONS
    assert Leasing.leases.__qualname__ in OPERATIONS
