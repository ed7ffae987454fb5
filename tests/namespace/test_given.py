"""How a command is told of the descriptors that it is activated with, beside those of ours."""

from __future__ import annotations

import os

import pytest

from netns_kit.errors import ArgumentError
from netns_kit.namespace.given import announce

OURS = str(os.getpid())


def activated(count: int, names: str | None = None, pid: str = OURS) -> dict[str, str]:
    """The environment of a process that was activated."""
    environment = {"LISTEN_PID": pid, "LISTEN_FDS": str(count), "LISTEN_PIDFDID": "5", "A": "b"}
    return environment if names is None else {**environment, "LISTEN_FDNAMES": names}


@pytest.mark.parametrize(
    ("environment", "numbers", "names"),
    [
        ({"A": "b"}, [3, 4], "x:y"),
        (activated(1, "first"), [4, 5], "first:x:y"),
        (activated(2), [5, 6], "unknown:unknown:x:y"),
        (activated(2, "too:many:names"), [5, 6], "unknown:unknown:x:y"),
        (activated(0), [3, 4], "x:y"),
        (activated(1, "not-ours", pid="1"), [3, 4], "x:y"),
        (activated(9, "not-there"), [3, 4], "x:y"),
        ({"A": "b", "LISTEN_FDS": "nonsense"}, [3, 4], "x:y"),
    ],
)
def test_what_is_given_comes_behind_what_we_were_activated_with(
    environment: dict[str, str], numbers: list[int], names: str
) -> None:
    """If that is there, and ours."""
    fds = {number: 100 + number for number in (0, 1, 2, *range(3, numbers[0]))}
    before = dict(fds)
    assert announce(environment, fds, [("x", 50), ("y", 51)]) == "LISTEN_PID"
    assert fds == {**before, numbers[0]: 50, numbers[1]: 51}
    environment.pop("LISTEN_PID", None)
    assert environment == {"A": "b", "LISTEN_FDS": str(numbers[1] - 2), "LISTEN_FDNAMES": names}


def test_what_we_were_activated_with_is_handed_on() -> None:
    environment = activated(1, "first")
    assert announce(environment, {3: 3}, []) == "LISTEN_PID"
    assert environment == {"A": "b", "LISTEN_PID": OURS, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "first"}


@pytest.mark.parametrize("count", ["2", "9" * 5000, "-1", "", "¹"])
def test_what_is_not_there_is_not_promised(count: str) -> None:
    environment = {**activated(2, "first"), "LISTEN_FDS": count}
    assert announce(environment, {3: 3}, []) is None
    assert environment == {"A": "b"}


def test_what_is_somebody_elses_stays() -> None:
    environment = activated(1, "first", pid="1")
    before = dict(environment)
    assert announce(environment, {3: 3}, []) is None
    assert environment == before


def test_a_descriptor_has_one_number() -> None:
    match = (
        "pass_fds=4: expected none of 3 to 4, which `listen` and `open_files` take; pass it by another number"
    )
    with pytest.raises(ArgumentError, match=match):
        announce({}, {4: 4}, [("x", 50), ("y", 51)])
