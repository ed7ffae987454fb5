"""Frozen records beside the dataclasses that they stand for: whoever looks sees no difference."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any, ClassVar

import pytest

from netns_kit import (
    FlowInfo,
    Follow,
    Limits,
    PortForward,
    Record,
    StaticLease,
    Subnet,
    Subnet6,
    UnixSocket,
)
from netns_kit.frozen import field, frozen, replace
from netns_kit.uplink.flow import Flow, Target


@frozen
class Ours:
    """A record."""

    KNOWN: ClassVar[int] = 7
    x: int
    y: int = 5
    seen: list[int] = field(default_factory=list, compare=False)
    total: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.x + self.y)

    @property
    def twice(self) -> int:
        return 2 * self.x


@dataclasses.dataclass(frozen=True, slots=True)
class Theirs:
    """A record."""

    KNOWN: ClassVar[int] = 7
    x: int
    y: int = 5
    seen: list[int] = dataclasses.field(default_factory=list, compare=False)
    total: int = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.x + self.y)

    @property
    def twice(self) -> int:
        return 2 * self.x


BOTH = pytest.mark.parametrize("kind", [Ours, Theirs])


@BOTH
def test_it_is_made_shown_and_compared(kind: Any) -> None:
    one = kind(1)
    assert (one.x, one.y, one.seen, one.total, one.twice, kind.KNOWN) == (1, 5, [], 6, 2, 7)
    assert repr(one) == f"{kind.__name__}(x=1, y=5, seen=[], total=6)"
    assert one == kind(x=1, seen=[3]) == kind(1, y=5)
    assert one != kind(1, 6)
    assert one != (1, 5)
    assert hash(one) == hash(kind(1, 5, [1])) == hash((1, 5))
    assert kind(1).seen is not kind(1).seen
    assert not hasattr(one, "__dict__")
    match one:
        case kind(x, 5):
            assert x == 1
        case _:
            pytest.fail("no match")


@BOTH
@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((1, 2, [], 4), {}), ((1,), {"x": 1}), ((1,), {"z": 1}), ((1,), {"total": 1})],
)
def test_wrong_arguments_are_a_type_error(
    kind: Any, values: tuple[object, ...], named: dict[str, object]
) -> None:
    with pytest.raises(TypeError, match=r"argument"):
        kind(*values, **named)


@BOTH
def test_it_never_changes(kind: Any) -> None:
    one = kind(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.x = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del one.x
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        one.other = 2
    assert one.x == 1


@BOTH
def test_copies_and_pickles_are_equal(kind: Any) -> None:
    one = kind(1, seen=[4])
    for other in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other == one
        assert (other.seen, other.total) == ([4], 6)


@BOTH
def test_it_is_a_dataclass_for_who_asks(kind: Any) -> None:
    one: Any = kind(1)
    known: list[bool] = [dataclasses.is_dataclass(each) for each in (kind, one)]
    assert known == [True, True]
    assert [each.name for each in dataclasses.fields(one)] == ["x", "y", "seen", "total"]
    assert [each.type for each in dataclasses.fields(kind)] == ["int", "int", "list[int]", "int"]
    assert dataclasses.replace(one, x=7) == kind(7)
    assert dataclasses.asdict(one) == {"x": 1, "y": 5, "seen": [], "total": 6}
    assert list(inspect.signature(kind).parameters) == ["x", "y", "seen"]
    assert kind.__match_args__ == ("x", "y", "seen")


def test_an_instance_may_be_asked_first() -> None:
    @frozen
    class Fresh:
        x: int

    assert [each.name for each in dataclasses.fields(Fresh(1))] == ["x"]


def test_it_is_replaced_and_its_fields_are_named() -> None:
    assert replace(Ours(1), y=2) == Ours(1, 2)
    assert Ours.__match_args__ == ("x", "y", "seen")
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        replace(Ours(1), z=2)


@pytest.mark.parametrize(
    "kind",
    [FlowInfo, Follow, Limits, PortForward, Record, StaticLease, Subnet, Subnet6, UnixSocket, Flow, Target],
)
def test_public_records_are_such(kind: Any) -> None:
    assert len(dataclasses.fields(kind)) >= 1
    assert "values" not in inspect.signature(kind).parameters
    assert "__slots__" in vars(kind)


@frozen
class Nothing:
    """A record without fields."""


def test_a_record_may_have_no_fields() -> None:
    assert repr(Nothing()) == "Nothing()"
    assert Nothing() == Nothing() == pickle.loads(pickle.dumps(Nothing()))
    assert len({Nothing(), Nothing()}) == 1
