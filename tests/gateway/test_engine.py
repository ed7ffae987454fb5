"""The engine: one epoll, one step at a time, all of it bounded."""

from __future__ import annotations

import math
import os
import select
import socket
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from netns_kit.gateway.engine import EDGE, EVENTS_PER_STEP, HANG_UP, IN, OUT, READ_HANG_UP, Engine, ReadBudget
from tests.support.servers import SECONDS

pytestmark = pytest.mark.usefixtures("leaks")


@pytest.fixture
def engine(leaks: None) -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture
def pair(leaks: None) -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


class Timer:
    def __init__(self) -> None:
        self.timer_at = self.timer_entry = math.inf
        self.rung: list[float] = []

    def handle_timer(self, now: float) -> None:
        self.rung.append(now)


def _note(seen: list[int], fd: int, _: int) -> None:
    seen.append(fd)


def is_readable(engine: Engine) -> bool:
    poll = select.poll()
    poll.register(engine.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def test_it_is_one_descriptor_to_wait_on(engine: Engine, pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    seen: list[int] = []
    engine.add(here.fileno(), seen.append, IN | OUT | EDGE)
    engine.step(1.0)
    assert seen == [OUT]
    assert not is_readable(engine)
    there.send(b"x")
    assert is_readable(engine)
    engine.step(2.0)
    assert seen == [OUT, IN | OUT]
    assert not is_readable(engine), "an edge is reported once"
    there.close()
    engine.step(3.0)
    assert seen[2] & (IN | READ_HANG_UP | HANG_UP)
    engine.remove(here.fileno())


def test_what_is_modified_and_removed(engine: Engine, pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    seen: list[int] = []
    engine.add(here.fileno(), seen.append, 0)
    there.send(b"x")
    engine.step(1.0)
    assert seen == []
    engine.modify(here.fileno(), IN)
    engine.step(2.0)
    engine.step(3.0)
    assert seen == [IN, IN], "not an edge: as long as it is so"
    engine.remove(here.fileno())
    engine.step(4.0)
    assert len(seen) == 2


def test_a_late_event_of_what_was_removed_is_dropped(
    engine: Engine, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Both are ready in one step, and whoever comes first removes and closes the other."""
    here, there = pair
    seen: list[socket.socket] = []

    def handler(me: socket.socket, other: socket.socket) -> None:
        seen.append(me)
        engine.remove(other.fileno())
        other.close()

    engine.add(here.fileno(), lambda _: handler(here, there), OUT)
    engine.add(there.fileno(), lambda _: handler(there, here), OUT)
    events = engine.poll(0)
    assert len(events) == 2
    engine.dispatch(events, 1.0)
    assert len(seen) == 1
    engine.remove(seen[0].fileno())


def test_again_is_the_next_step_and_not_this_one(engine: Engine) -> None:
    done: list[float] = []

    def more() -> None:
        done.append(engine.now)
        if len(done) < 3:
            engine.again(more)

    engine.again(more)
    assert engine.deadline == -math.inf
    engine.step(1.0)
    assert done == [1.0]
    assert engine.deadline == -math.inf
    engine.step(2.0)
    engine.step(3.0)
    assert done == [1.0, 2.0, 3.0]
    assert engine.deadline == math.inf


def test_the_deadline_is_the_earliest(engine: Engine) -> None:
    timer = Timer()
    other = Timer()
    assert engine.deadline == math.inf
    engine.timers.arm(timer, 5.0)
    assert engine.deadline == 5.0
    engine.timers.arm(other, 4.0)
    assert engine.deadline == 4.0
    engine.step(4.5)
    assert timer.rung == []
    assert other.rung == [4.5]
    engine.step(5.0)
    assert timer.rung == [5.0]
    assert engine.deadline == math.inf


def test_the_order_of_a_step(engine: Engine, pair: tuple[socket.socket, socket.socket]) -> None:
    order: list[str] = []
    timer = Timer()
    engine.timers.arm(timer, 1.0)
    engine.after_step.append(lambda: order.append(f"end, timer {timer.rung}"))
    engine.again(lambda: order.append(f"left over, timer {timer.rung}"))
    engine.add(pair[0].fileno(), lambda _: order.append("socket"), OUT)
    engine.step(1.0)
    assert order == ["socket", "left over, timer []", "end, timer [1.0]"]
    engine.remove(pair[0].fileno())


def test_a_step_is_bounded(engine: Engine) -> None:
    seen: list[int] = []
    ends = [end for _ in range(EVENTS_PER_STEP) for end in socket.socketpair()]
    for end in ends:
        engine.add(end.fileno(), partial(_note, seen, end.fileno()), OUT)
    engine.step(1.0)
    assert len(seen) == EVENTS_PER_STEP
    engine.step(2.0)
    assert len(set(seen)) == 2 * EVENTS_PER_STEP, "the others come first in the next"
    for end in ends:
        engine.remove(end.fileno())
        end.close()


def test_a_call_from_another_thread_wakes_it(engine: Engine) -> None:
    where: list[threading.Thread] = []
    caller = threading.Thread(target=lambda: engine.call(lambda: where.append(threading.current_thread())))
    caller.start()
    engine.dispatch(engine.poll(SECONDS), 1.0)
    caller.join(SECONDS)
    assert where == [threading.current_thread()]
    assert not is_readable(engine)


def test_many_calls_from_many_threads_all_run_in_order(engine: Engine) -> None:
    done: list[tuple[int, int]] = []

    def work(number: int) -> None:
        for count in range(200):
            engine.call(partial(done.append, (number, count)))

    callers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    while len(done) < 800:
        events = engine.poll(SECONDS)
        assert events, "woken in vain"
        engine.dispatch(events, 1.0)
    for caller in callers:
        caller.join(SECONDS)
    for number in range(4):
        assert [count for who, count in done if who == number] == list(range(200))


def test_a_call_made_by_a_call_is_the_next_steps(engine: Engine) -> None:
    done: list[int] = []

    def first() -> None:
        done.append(1)
        engine.call(lambda: done.append(2))

    engine.call(first)
    engine.step(1.0)
    assert done == [1]
    assert is_readable(engine)
    engine.step(2.0)
    assert done == [1, 2]


def test_closing_forgets_what_waits_and_frees_its_descriptors() -> None:
    before = set(os.listdir("/proc/self/fd"))
    engine = Engine()
    done: list[int] = []
    engine.call(lambda: done.append(1))
    engine.close()
    engine.call(lambda: done.append(2))
    assert done == []
    engine.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_same_descriptor_twice_is_a_mistake(
    engine: Engine, pair: tuple[socket.socket, socket.socket]
) -> None:
    engine.add(pair[0].fileno(), lambda _: None, IN)
    with pytest.raises(FileExistsError):
        engine.add(pair[0].fileno(), lambda _: None, IN)
    engine.remove(pair[0].fileno())
    with pytest.raises(KeyError):
        engine.remove(pair[0].fileno())


def test_what_has_more_is_read_more_of(engine: Engine) -> None:
    budget = ReadBudget(engine)
    sizes = []
    for _ in range(5):
        engine.step(1.0)
        sizes.append(budget.size(10))
    assert sizes == [1, 2, 4, 8, 10]
    budget.exhausted()
    engine.step(1.0)
    assert budget.size(10) == 1
    engine.step(1.0)
    engine.step(1.0)
    assert budget.size(10) == 1


def test_with_many_descriptors_each_has_its_turn_later(engine: Engine) -> None:
    """A step takes so many events and no more."""
    ends = [socket.socketpair() for _ in range(EVENTS_PER_STEP)]
    budget = ReadBudget(engine)
    for near, far in ends:
        engine.add(near.fileno(), lambda _: None, IN)
        far.close()
    engine.step(1.0)
    assert budget.size(10) == 1
    engine.step(1.0)
    engine.step(1.0)
    assert budget.size(10) == 2
    for near, _ in ends:
        engine.remove(near.fileno())
        near.close()
    engine.step(1.0)
    engine.step(1.0)
    assert budget.size(10) == 1
