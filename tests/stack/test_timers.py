"""The heap of timers beside the obvious way to do it: look at all of them."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from netns_kit.stack.timers import SWEEP, Timers


class Owner:
    def __init__(self) -> None:
        self.timer_at = self.timer_entry = math.inf
        self.fired: list[float] = []

    def handle_timer(self, now: float) -> None:
        self.fired.append(now)


times = st.integers(0, 40).map(float)
steps = st.one_of(
    st.tuples(st.just("arm"), st.integers(0, 3), times),
    st.tuples(st.just("later"), st.integers(0, 3), times),
    st.tuples(st.just("stop"), st.integers(0, 3), st.just(0.0)),
    st.tuples(st.just("expire"), st.just(0), st.integers(0, 8).map(float)),
    st.tuples(st.just("sweep"), st.just(0), st.just(0.0)),
)


@settings(max_examples=300)
@given(st.lists(steps, max_size=40))
def test_whatever_is_due_fires_once_and_in_time(script: list[tuple[str, int, float]]) -> None:
    timers, owners, now = Timers(), [Owner() for _ in range(4)], 0.0
    due: list[float] = [math.inf] * 4
    fired: list[list[float]] = [[], [], [], []]
    for what, number, value in script:
        owner = owners[number]
        if what == "arm":
            due[number] = now + value
            timers.arm(owner, due[number])
        elif what == "later" and owner.timer_at < math.inf:
            due[number] = owner.timer_at = owner.timer_at + value  # allowed: it is not earlier
        elif what == "stop":
            due[number] = owner.timer_at = math.inf
        elif what == "sweep":
            timers._sweep()
        elif what == "expire":
            now += value
            assert timers.deadline <= min(due)
            timers.expire(now)
            for each in range(4):
                if due[each] <= now:
                    fired[each].append(now)
                    due[each] = math.inf
        assert [each.fired for each in owners] == fired
        assert timers.deadline <= min(due)


def test_the_dead_are_not_kept() -> None:
    timers = Timers()
    for number in range(50 * SWEEP):
        owner = Owner()
        timers.arm(owner, 7200.0 + number)
        owner.timer_at = math.inf
    assert len(timers) <= SWEEP
    living = [Owner() for _ in range(4 * SWEEP)]
    for number, owner in enumerate(living):
        timers.arm(owner, float(number))
    timers.expire(1e9)
    assert all(owner.fired == [1e9] for owner in living)
    assert len(timers) == 0
    assert timers.deadline == math.inf


def test_a_handler_may_arm_again() -> None:
    timers = Timers()

    class Again(Owner):
        def handle_timer(self, now: float) -> None:
            super().handle_timer(now)
            timers.arm(self, now + 1)

    owner = Again()
    timers.arm(owner, 1.0)
    for now in range(1, 5):
        timers.expire(float(now))
    assert owner.fired == [1, 2, 3, 4]


def test_who_was_swept_may_come_back() -> None:
    timers, owner = Timers(), Owner()
    timers.arm(owner, 5.0)
    owner.timer_at = math.inf
    timers._sweep()
    assert timers.deadline == math.inf
    timers.arm(owner, 9.0)
    assert timers.deadline == 9.0
    timers.expire(9.0)
    assert owner.fired == [9.0]
