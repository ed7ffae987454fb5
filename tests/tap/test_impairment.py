"""BadLink: what must hold for every seed, and each fault alone."""

from __future__ import annotations

import math
import pickle
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.errors import ArgumentError, NetnsKitError
from netns_kit.tap.impairment import REORDER_DEPTH, REORDER_HOLD, BadLink, Impairment

chances = st.sampled_from([0.0, 0.05, 0.3, 1.0])
seconds = st.sampled_from([0.0, 0.001, 0.1])


@st.composite
def impairments(draw: st.DrawFn, /, **fixed: float) -> Impairment:
    values = {name: draw(chances) for name in ("loss", "duplicate", "reorder", "corrupt")}
    values |= {"delay": draw(seconds), "jitter": draw(seconds)} | fixed
    return Impairment(
        **values, rate=draw(st.sampled_from([None, 1e4, 1e6])), queue=draw(st.sampled_from([5, 1000])),
        seed=draw(st.integers(0, 1 << 32)),
    )  # fmt: skip


def numbered(count: int, size: int = 60) -> list[bytes]:
    return [number.to_bytes(14, "big") + bytes(size - 14) for number in range(count)]


def number(frame: bytes) -> int:
    return int.from_bytes(frame[:14], "big")


sends = st.lists(st.sampled_from([0.0, 0.0001, 0.01]), max_size=60).map(
    lambda gaps: [(sum(gaps[: n + 1]), frame) for n, frame in enumerate(numbered(len(gaps)))]
)


def run(
    impairment: Impairment, frames: list[tuple[float, bytes]]
) -> tuple[BadLink, list[tuple[float, bytes]]]:
    """Send each frame at its time and receive whenever something is due."""
    link = BadLink(impairment)
    out: list[tuple[float, bytes]] = []

    def receive_until(end: float) -> None:
        while link.deadline <= end and link.deadline < math.inf:
            at = link.deadline
            due = link.receive(at)
            assert due, "a deadline at which nothing is due"
            out.extend((at, frame) for frame in due)

    for now, frame in frames:
        receive_until(now)
        link.send(frame, now)
    receive_until(math.inf)
    return link, out


@given(impairments(), sends)
def test_every_frame_is_accounted_for(impairment: Impairment, frames: list[tuple[float, bytes]]) -> None:
    link, out = run(impairment, frames)
    assert len(out) == len(frames) - link.lost - link.overflowed + link.duplicated
    assert {number(frame) for _, frame in out} <= set(range(len(frames)))


@given(impairments(loss=0.0), sends)
def test_a_link_without_loss_loses_only_what_its_queue_cannot_hold(
    impairment: Impairment, frames: list[tuple[float, bytes]]
) -> None:
    link, out = run(impairment, frames)
    assert link.lost == 0
    if not link.overflowed:
        assert {number(frame) for _, frame in out} == set(range(len(frames)))


@given(impairments(), sends)
def test_the_same_seed_gives_the_same_result(
    impairment: Impairment, frames: list[tuple[float, bytes]]
) -> None:
    assert run(impairment, frames)[1] == run(pickle.loads(pickle.dumps(impairment)), frames)[1]


@given(impairments(reorder=0.0), sends)
def test_without_reordering_frames_leave_in_order_whatever_the_jitter(
    impairment: Impairment, frames: list[tuple[float, bytes]]
) -> None:
    numbers = [number(frame) for _, frame in run(impairment, frames)[1]]
    assert numbers == sorted(numbers)


@given(impairments(), sends)
def test_no_frame_comes_early_or_is_held_forever(
    impairment: Impairment, frames: list[tuple[float, bytes]]
) -> None:
    for at, frame in run(impairment, frames)[1]:
        earliest = frames[number(frame)][0] + impairment.delay
        assert at >= earliest
        if impairment.rate is None:
            assert at <= earliest + impairment.jitter + REORDER_HOLD + 1e-9


@given(impairments(), sends)
def test_the_rate_is_never_exceeded(impairment: Impairment, frames: list[tuple[float, bytes]]) -> None:
    """From any frame on, what leaves fits the time since the first frame could have begun to."""
    if impairment.rate is None or not frames:
        return
    total = 0
    for at, frame in run(impairment, frames)[1]:
        total += len(frame)
        assert total <= impairment.rate * (at - frames[0][0]) * (1 + 1e-9) + 1e-6


@given(impairments(corrupt=1.0), st.binary(max_size=100), st.integers(0, 40))
def test_corruption_flips_one_bit_behind_the_headers(
    impairment: Impairment, frame: bytes, protect: int
) -> None:
    link = BadLink(impairment, protect=protect)
    link.send(frame, 0.0)
    for damaged in link.receive(1e9):
        assert damaged[:protect] == frame[:protect]
        differences = [(a ^ b).bit_count() for a, b in zip(frame, damaged, strict=True)]
        assert sum(differences) == (1 if len(frame) > protect else 0)


def test_a_link_without_faults_is_a_wire() -> None:
    frames = numbered(20)
    link = BadLink(Impairment())
    assert link.deadline == math.inf
    for frame in frames:
        link.send(frame, 7.0)
    assert link.deadline == 7.0
    assert link.receive(7.0) == frames
    assert link.deadline == math.inf
    assert link.receive(8.0) == []


def test_delay_is_the_deadline() -> None:
    link = BadLink(Impairment(delay=0.25))
    link.send(b"frame", 1.0)
    assert link.deadline == 1.25
    assert link.receive(1.2499) == []
    assert link.receive(1.25) == [b"frame"]


def test_a_rate_spaces_frames() -> None:
    link = BadLink(Impairment(rate=1000))
    for frame in numbered(3, size=100):
        link.send(frame, 0.0)
    assert [len(link.receive(at)) for at in (0.09, 0.11, 0.21, 0.31)] == [0, 1, 1, 1]
    link.send(bytes(100), 5.0)
    assert link.deadline == pytest.approx(5.1), "an idle link saves nothing up"


def test_a_full_queue_drops() -> None:
    link = BadLink(Impairment(delay=1, queue=3))
    for frame in numbered(5):
        link.send(frame, 0.0)
    assert [number(frame) for frame in link.receive(1.0)] == [0, 1, 2]
    assert link.overflowed == 2


def test_a_held_frame_is_overtaken_by_a_few() -> None:
    frames = numbered(1000)
    link, out = run(Impairment(reorder=0.1, seed=3), [(n * 0.001, frame) for n, frame in enumerate(frames)])
    numbers = [number(frame) for _, frame in out]
    overtaken = [sum(later > early for later in numbers[:at]) for at, early in enumerate(numbers)]
    assert link.reordered == pytest.approx(100, abs=40)
    assert sum(map(bool, overtaken)) == pytest.approx(link.reordered, abs=1), (
        "the last one may have no follower"
    )
    assert 1 < max(overtaken) <= 2 * REORDER_DEPTH, "those held meanwhile may follow close"


def test_a_held_frame_leaves_though_nothing_follows() -> None:
    link = BadLink(Impairment(reorder=1.0, delay=0.5))
    link.send(b"alone", 0.0)
    assert link.deadline == 0.5 + REORDER_HOLD
    assert link.receive(link.deadline) == [b"alone"]


def test_a_frame_costs_the_same_however_many_are_held() -> None:
    """Else a guest could take all of the time by a flood, on a link that holds back much."""
    link = BadLink(Impairment(reorder=1.0, delay=10.0, queue=10**6))

    def lines_of_one() -> int:
        count = 0

        def trace(*_: object) -> Any:
            nonlocal count
            count += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            link.send(bytes(60), 0.0)
            link.receive(0.0)
        finally:
            sys.settrace(before)
        return count

    first = lines_of_one()
    for frame in numbered(500):
        link.send(frame, 0.0)
    assert lines_of_one() <= first + 10


def test_probabilities_are_kept() -> None:
    link, _ = run(
        Impairment(loss=0.05, duplicate=0.05, corrupt=0.05, seed=1), [(0.0, frame) for frame in numbered(900)]
    )
    for count in (link.lost, link.duplicated, link.corrupted):
        assert 20 < count < 80


def test_one_fault_does_not_change_whom_another_strikes() -> None:
    frames = [(0.0, frame) for frame in numbered(500)]
    plain = {number(frame) for _, frame in run(Impairment(loss=0.3, seed=9), frames)[1]}
    worse = {
        number(frame)
        for _, frame in run(
            Impairment(loss=0.3, duplicate=0.3, reorder=0.3, corrupt=0.3, jitter=1, seed=9), frames
        )[1]
    }
    assert plain == worse


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", 1.1), ("loss", -0.1), ("duplicate", math.nan), ("reorder", 5), ("corrupt", math.inf),
        ("delay", -1), ("delay", math.inf), ("jitter", math.nan), ("rate", 0), ("rate", -5), ("queue", 0),
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_itself(name: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=f"{name}={value}") as caught:
        Impairment(**{name: value})  # type: ignore[arg-type]  # the wrong type is the point
    assert isinstance(caught.value, NetnsKitError)
    assert isinstance(caught.value, ValueError)


def test_neighbours_in_time_keep_their_order() -> None:
    link = BadLink(Impairment(delay=1))
    for frame in numbered(100):
        link.send(frame, 0.0)
    assert all(number(a) < number(b) for a, b in pairwise(link.receive(1.0)))
