"""No unit of traffic costs more work than it did, nor so much less that the record is out of date."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.work import SCENARIOS, VERSION, Meter, Recorded, Work, compare, record, recorded

pytestmark = pytest.mark.usefixtures("leaks")


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_unit_costs_what_it_did(name: str) -> None:
    scenario = SCENARIOS[name]
    wrong = compare(scenario.work(), recorded()[name], scenario.unit)
    assert not wrong, "\n".join(f"{name}: {each}" for each in wrong)


@pytest.mark.parametrize("name", ["tcp exchange", "udp exchange"])
def test_a_policy_costs_a_known_flow_nothing(name: str) -> None:
    assert SCENARIOS[f"{name}, 1000 rules"].work() == SCENARIOS[name].work()


def test_every_scenario_is_recorded(pytestconfig: pytest.Config) -> None:
    record = recorded()
    assert record.keys() == SCENARIOS.keys()
    without = [name for name, each in record.items() if VERSION not in each.instructions]
    if without:
        terminal = pytestconfig.get_terminal_writer()
        terminal.line(
            f"\nno instructions of Python {VERSION} are recorded, none compared: {', '.join(without)}"
        )


# -- the comparison ---------------------------------------------------------------------------------------

BEFORE = Recorded(100, {"recv": 10, "send": 10}, {"3.11": 1000})


def work(instructions: int = 1000, calls: int = 100, recv: int = 10, send: int = 10, poll: int = 0) -> Work:
    return Work(4, instructions, calls, Counter({"recv": recv, "send": send, "poll": poll}))


@pytest.mark.parametrize(
    "same",
    [
        work(),
        work(instructions=1030, calls=103),
        work(instructions=900, calls=90),
        work(recv=9, send=9),
    ],
)
def test_a_little_is_nothing(same: Work) -> None:
    assert compare(same, BEFORE, "MiB", "3.11") == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (work(instructions=1031), "257.75 instructions per MiB, 250.00 are recorded, 3.1% more"),
        (work(instructions=899), "224.75 instructions per MiB, 250.00 are recorded, 10.1% less"),
        (work(calls=104), "26.00 calls per MiB, 25.00 are recorded, 4.0% more"),
        (work(calls=80), "20.00 calls per MiB, 25.00 are recorded, 20.0% less"),
        (work(recv=11), "2.75 times recv per MiB, 2.50 are recorded"),
        (work(recv=9, poll=1), "0.25 times poll per MiB, 0.00 are recorded"),
        (work(recv=8, send=9), "4.25 system calls per MiB, 5.00 are recorded, 15.0% less"),
    ],
)
def test_more_is_told_and_much_less_too(other: Work, said: str) -> None:
    (line,) = compare(other, BEFORE, "MiB", "3.11")
    assert line.startswith(said)
    assert "python -m tests.work --record" in line


def test_instructions_of_another_version_are_not_compared() -> None:
    assert compare(work(instructions=9999), BEFORE, "MiB", "3.99") == []
    assert len(compare(work(instructions=9999, calls=104), BEFORE, "MiB", "3.99")) == 1


# -- the counting -----------------------------------------------------------------------------------------


def test_the_meter_counts_what_is_called_and_below() -> None:
    def below(sizes: tuple[int, ...]) -> int:
        return len(sizes)

    def called() -> None:
        below((1, 2, 3))
        below((1, 2))

    meter = Meter()
    meter.run(called)
    once = meter.work.instructions
    assert (meter.work.calls, meter.work.system_calls) == (5, Counter())
    assert once > 10
    meter.run(called)
    assert (meter.work.calls, meter.work.instructions) == (10, 2 * once)


# -- the record -------------------------------------------------------------------------------------------


def test_what_is_no_longer_true_of_other_versions_is_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tests.work.RECORD", tmp_path / "work.json")
    works = dict.fromkeys(SCENARIOS, work())
    record({"3.10": works, "3.9": works})
    record({"3.10": {**works, "idle": work(instructions=999)}})
    assert recorded()["idle"].instructions == {"3.10": 999}
    assert recorded()["dns"] == Recorded(
        100, {"recv": 10, "send": 10, "poll": 0}, {"3.9": 1000, "3.10": 1000}
    )


def test_calls_are_the_same_for_every_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.work.RECORD", tmp_path / "work.json")
    works = dict.fromkeys(SCENARIOS, work())
    with pytest.raises(AssertionError, match=r"3\.10 differs"):
        record({"3.11": works, "3.10": {**works, "dns": work(calls=101)}})
