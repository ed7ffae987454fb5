"""Two real ends over a link that loses, duplicates, reorders and damages, with a clock of its own."""

from __future__ import annotations

import pytest

from netns_kit.stack import Limits, Offloads
from netns_kit.tap.impairment import Impairment
from tests.support import LONG
from tests.support.stack import VNET, Pair

MIB = 1 << 20
SIZE = (20 if LONG else 4) * MIB


def bad(seed: int, chance: float, *, corrupt: float = 0.0) -> Impairment:
    return Impairment(
        loss=chance, duplicate=chance, reorder=chance, corrupt=corrupt, delay=0.0005, queue=1 << 20, seed=seed
    )


def show(pair: Pair) -> str:
    return f"{pair.impairment} took {pair.now:.1f} s, stalled for {pair.longest_stall:.1f} s"


def run(seed: int, chance: float, size: int, **options: object) -> Pair:
    pair = Pair(bad(seed, chance), size, **options).run()  # type: ignore[arg-type]  # Pair's own fields
    pair.check()
    return pair


@pytest.mark.parametrize("seed", range(50))
def test_megabytes_each_way(seed: int) -> None:
    """5 % loss, 5 % duplication, 5 % reordering; every tenth seed without super-segments."""
    offloads = VNET if seed % 10 else None
    pair = run(seed, 0.05, SIZE, offloads=offloads, family=4 if seed % 2 else 6)
    assert pair.longest_stall < 5, show(pair)
    assert pair.now < SIZE / MIB, show(pair)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("offloads", [VNET, None], ids=["super-segments", "mss"])
def test_a_good_link_is_used_fully(family: int, offloads: Offloads | None) -> None:
    """1 MiB in each direction per round trip of 1 ms, as far as the window allows."""
    pair = run(1, 0.0, 20 * MIB, offloads=offloads, family=family)
    assert pair.now < 0.03, show(pair)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("offloads", [VNET, None], ids=["super-segments", "mss"])
def test_a_fifth_is_lost(seed: int, offloads: Offloads | None) -> None:
    pair = run(seed, 0.2, MIB, offloads=offloads, family=4 if seed % 2 else 6)
    assert pair.now < 60, show(pair)


@pytest.mark.parametrize("seed", range(10))
def test_damage_is_noticed(seed: int) -> None:
    """Checksums are complete where there are no offloads, so a flipped bit is a lost frame."""
    pair = Pair(bad(seed, 0.01, corrupt=0.05), MIB, family=4 if seed % 2 else 6).run()
    pair.check()
    assert sum(stack.dropped["checksum"] for stack in pair.stacks) > 10
    assert pair.now < 60, show(pair)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_left(seed: int) -> None:
    pair = run(seed, 0.05, MIB, offloads=VNET)
    end = pair.now + Limits().tcp_time_wait + 1000
    for stack in pair.stacks:
        while stack.deadline <= end:
            stack.handle_timers(stack.deadline)
        assert not stack.tcp
        assert len(stack.timers) == 0
