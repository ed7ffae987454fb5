"""The benchmarks: every task measures us, briefly; and what is made of samples is right."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import measure
from benchmarks.load import KINDS, Latencies, Options, accept, connect, tcp
from benchmarks.processes import Failed, answer, child, cpu_seconds, family, line, memory, one_core, tell
from benchmarks.report import (
    BEGIN,
    END,
    TITLES,
    Sample,
    as_json,
    from_json,
    lines,
    number,
    plot,
    tables,
)
from benchmarks.subjects import HOST, MTUS, NO_MTU, Running, Subject, find
from benchmarks.tasks import TASKS, Figure, Measurement, Settings, Values
from netns_kit.forwarder.ports import MODES
from tests.support import ROOT, needs, needs_congestion_control, needs_tun

RECORDED = ROOT / "tests" / "benchmarks.json"
TINY = Settings(
    seconds=0.15,
    streams=(1, 2),
    connections=(1, 2),
    lanes=(1, 2),
    held=(20,),
    idle=10,
    idle_seconds=0.1,
    starts=1,
    burst=50,
    ports=30,
    settle=0,
)
SUBJECTS = {subject.name: subject for subject in find({})}
OURS = [name for name in SUBJECTS if name.startswith("netns_kit")]


def quickly(name: str, *tasks: str, mtu: int = MTUS[0]) -> list[Sample]:
    """One round of these tasks; nothing has failed."""
    needs("unshare", "nsenter")
    needs_tun()
    needs_congestion_control("cubic")
    tests = [test for task in tasks for test in TASKS[task](TINY)]
    samples = list(measure([SUBJECTS[name]], tests, 1, [mtu]))
    assert not [(sample.row, sample.error) for sample in samples if sample.error]
    return samples


# Measuring


@pytest.mark.parametrize("task", [task for task in TASKS if task != "calibrate"])
def test_every_task_measures_us(task: str, leaks: None) -> None:
    name = "netns_kit stack" if task == "forward" else "netns_kit thread"
    samples = quickly(name, task)
    subject = SUBJECTS[name]
    expected = [figure for test in TASKS[task](TINY) if test.applies(subject) for figure in test.figures]
    assert [sample.figure for sample in samples] == expected
    assert all(sample.value is not None for sample in samples)
    if task not in {"memory", "idle"}:  # where nothing at all is a result
        assert all((sample.value or 0) > 0 for sample in samples if not sample.row.endswith("lost"))


@pytest.mark.parametrize("name", [name for name in OURS if "udp_rr" in SUBJECTS[name].tasks])
def test_every_driver_is_measured(name: str) -> None:
    assert quickly(name, "udp_rr", mtu=MTUS[1])


@pytest.mark.parametrize("name", [f"netns_kit {mode}" for mode in MODES])
def test_every_mode_of_a_forwarded_port_is_measured(name: str) -> None:
    rows = {sample.row: sample.value for sample in quickly(name, "forward")}
    assert rows["burst of 50 connects, lost"] == 0


@pytest.mark.parametrize("name", ["slirp4netns", "pasta"])
def test_the_peers_are_measured(name: str) -> None:
    needs(name)
    if name == "pasta" and os.geteuid() == 0:
        pytest.skip("as root, pasta becomes nobody, who may not enter this namespace")
    assert {sample.table for sample in quickly(name, "udp_rr", "forward")} == {"udp_rr", "forward"}


def test_the_host_has_no_mtu_and_the_load_generator_is_compared_with_iperf3() -> None:
    needs("iperf3")
    tests = [test for test in TASKS["calibrate"](TINY) if "1 stream" in test.figures[0].row]
    ours, theirs = measure([SUBJECTS[HOST]], tests, 1)
    assert ours.mtu == theirs.mtu == NO_MTU
    assert ours.value, ours.error
    assert theirs.value, theirs.error


def test_what_fails_is_a_sample_with_the_reason() -> None:
    figures = (Figure("bulk", "out", "Gbit/s", "more"), Figure("cpu", "out", "s/GiB", "less"))

    @contextmanager
    def start(mtu: int) -> Iterator[Running]:
        if mtu == MTUS[1]:
            raise Failed("no such device")
        yield Running((), os.getpid(), "127.0.0.1", (1, 1))

    def fail(_: Subject, __: Running) -> Values:
        raise Failed("no answer")

    subject = Subject("odd", start, frozenset({"bulk"}))
    tests = [Measurement("bulk", figures, fail), Measurement("bulk", figures, lambda _, __: (1.0, None))]
    found = [
        (sample.mtu, sample.table, sample.value, sample.error) for sample in measure([subject], tests, 1)
    ]
    broken = "did not start: no such device"
    assert found == [
        (1500, "bulk", None, "no answer"),
        (1500, "cpu", None, "no answer"),
        (65520, "bulk", None, broken),
        (65520, "cpu", None, broken),
        (1500, "bulk", 1.0, None),
        (65520, "bulk", None, broken),
        (65520, "cpu", None, broken),
    ]


def test_rounds_interleave_subjects_and_what_is_fresh_has_a_start_of_its_own() -> None:
    started: list[tuple[str, int]] = []

    def subject(name: str) -> Subject:
        @contextmanager
        def start(mtu: int) -> Iterator[Running]:
            started.append((name, mtu))
            yield Running((), 0, "", (0, 0))

        return Subject(name, start, frozenset({"rr", "idle"}))

    figure = Figure("rr", "p50", "us", "less")
    once = Figure("idle", "held", "%", "less")
    tests = [
        Measurement("rr", (figure,), lambda _, __: [1.0]),
        Measurement("rr", (replace(figure, table="udp_rr"),), lambda _, __: [1.0]),
        Measurement("idle", (once,), lambda _, __: [1.0], any_mtu=True, fresh=True),
        Measurement("idle", (replace(once, table="memory"),), lambda _, __: [1.0], any_mtu=True, fresh=True),
        Measurement("bulk", (figure,), lambda _, __: [1.0]),
    ]
    samples = list(measure([subject("a"), subject("b")], tests, 2))
    shared = [(name, mtu) for name in "ab" for mtu in (1500, 65520)]
    assert started == [*shared, *[("a", 1500), ("b", 1500)] * 2] * 2
    turn = [*((name, mtu, table) for table in ("rr", "udp_rr") for name, mtu in shared)]
    turn += [(name, 1500, table) for table in ("idle", "memory") for name in "ab"]
    assert [(sample.subject, sample.mtu, sample.table) for sample in samples] == turn * 2
    assert [sample.round for sample in samples] == [1] * len(turn) + [2] * len(turn)


@pytest.mark.usefixtures("default_signals")
def test_interrupted_it_leaves_nothing_running() -> None:
    needs("unshare", "nsenter")
    needs_tun()
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "rr",
        "--only",
        "thread",
        "--seconds",
        "0.1",
        "--rounds",
        "999",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.readline().startswith("round 1: netns_kit thread, MTU 1500: rr")
        process.send_signal(signal.SIGINT)
        assert re.search(r"^interrupted after \d+ samples$", process.stderr.read(), re.MULTILINE)
    assert process.wait(100) == 130  # and no_process_left sees to the rest


def test_a_child_that_dies_says_why() -> None:
    with (
        child(sys.executable, "-S", "-c", "raise SystemExit('out of luck')") as process,
        pytest.raises(Failed, match="out of luck"),
    ):
        answer(process, 10)
    with child("cat") as process:
        tell(process, "hello")
        assert line(process, 10) == "hello"
        with pytest.raises(Failed, match="no answer within"):
            line(process, 0.01)
        tell(process, "hello")
        with pytest.raises(Failed, match="unexpected output"):
            answer(process, 10)


def test_time_and_memory_are_those_of_a_process_and_its_descendants() -> None:
    burn = "import time; blob = bytearray(b'x') * (20 << 20)\nwhile time.process_time() < 0.1: pass\n"
    burn += "print(1, flush=True); input()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {burn!r}])"
    with child(sys.executable, "-S", "-c", nested) as process:
        line(process, 10)
        assert len(family(process.pid)) == 2
        assert cpu_seconds(process.pid) > 0.1
        assert memory(process.pid) > 20 << 10
        cores = os.sched_getaffinity(0)
        with one_core(process.pid):
            pinned = [os.sched_getaffinity(pid) for pid in (0, *family(process.pid))]
            assert pinned == [{max(cores)}] * 3
        assert all(os.sched_getaffinity(pid) == cores for pid in (0, *family(process.pid)))
        tell(process, "")  # the inner one is not ours to kill
        process.wait(100)


def test_the_load_generator_knows_all_that_is_asked_of_it() -> None:
    assert KINDS.keys() == {"bulk", "rr", "crr", "burst", "udp_rr", "flood", "hold"}
    assert TITLES.keys() >= {
        figure.table for task in TASKS.values() for test in task(TINY) for figure in test.figures
    }


def test_the_warm_up_is_forgotten_and_percentiles_are_of_all_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    latencies = Latencies(Options({"warm_up": 0, "seconds": 0}))
    for phase, _ in enumerate(latencies.phases()):
        for microseconds in range(1000):
            latencies.append([9.0, microseconds / 1e6][phase])
    latencies.say()
    found = json.loads(capsys.readouterr().out)
    assert (round(found["p50"]), round(found["p99"])) == (500, 990)
    assert found["rate"] > 1000


def test_both_ends_speak_cubic() -> None:
    needs_congestion_control("cubic")
    with tcp() as server:
        assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"cubic"
        server.bind(("127.0.0.1", 0))
        server.listen()
        with connect(Options({"port": server.getsockname()[1]})) as client, accept(server) as accepted:
            for sock in (client, accepted):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"cubic")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="second"):
        Options({"second": 1})


# What is made of samples


@pytest.fixture
def samples() -> Sequence[Sample]:
    return from_json(RECORDED.read_text(encoding="utf-8"))[0]


def test_a_line_has_medians_at_the_lowest_mtu_and_at_each_sides_best(samples: Sequence[Sample]) -> None:
    found = {(line.figure.table, line.mtu): line for line in lines(samples)}
    assert found["bulk", "1500"].medians == {
        "netns_kit thread": 20.0,
        "netns_kit loop asyncio": 16.0,
        "slirp4netns": 2.0,
        "host": 84.0,
    }
    assert found["bulk", "best"].medians == {
        "netns_kit thread": 25.0,
        "netns_kit loop asyncio": 16.0,
        "slirp4netns": 10.0,
        "pasta": 7.5,
        "host": 84.0,
    }
    assert found["rr", "best"].medians == {
        "netns_kit thread": 45.0,
        "slirp4netns": 25.0,
        "pasta": 27.0,
        "host": 12.5,
    }
    assert found["forward", "1500"].medians == {"netns_kit thread": 22.0, "rootlesskit": 11.0}


def test_a_ratio_is_to_the_best_peer_and_more_is_better(samples: Sequence[Sample]) -> None:
    found = {(line.figure.table, line.mtu): line for line in lines(samples)}
    assert found["bulk", "1500"].ratio("netns_kit thread") == 10.0
    assert found["bulk", "best"].ratio("netns_kit thread") == 2.5
    assert found["rr", "best"].ratio("netns_kit thread") == 25 / 45
    assert found["rr", "best"].ratio("netns_kit worker") is None
    assert found["memory", "1500"].ratio("netns_kit thread") is None  # no race
    alone = replace(found["bulk", "1500"], medians={"netns_kit thread": 20.0, "host": 84.0})
    assert alone.ratio("netns_kit thread") is None  # the host is no peer


def test_the_table_shows_what_failed(samples: Sequence[Sample]) -> None:
    text = tables(samples)
    assert text.startswith(
        f"""### {TITLES["bulk"]}

| | MTU | netns_kit thread | netns_kit loop asyncio | slirp4netns | pasta | host |
|---|---|---|---|---|---|---|
| out, 1 stream, Gbit/s | 1500 | 20.0 (**10.00**) | 16.0 (**8.00**) | 2.00 | - [1] | 84.0 |
| out, 1 stream, Gbit/s | best | 25.0 (**2.50**) | 16.0 (**1.60**) | 10.0 | 7.50 [1] | 84.0 |

1. pasta, MTU 1500: nothing came back

### {TITLES["rr"]}
"""
    )
    assert "| in, 1 stream, Gbit/s | best | 22.0 (**2.00**) | - [1] | 11.0 |" in text
    assert "1. slirp4netns, MTU 1500: did not start: no such file" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.001234, "0.00123"),
        (1.5, "1.50"),
        (-12.34, "-12.3"),
        (999.6, "1,000"),
        (123456.7, "123,457"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_the_plot_is_an_svg_with_a_point_for_each_ratio(samples: Sequence[Sample]) -> None:
    root = ET.fromstring(plot(samples))
    space = "{http://www.w3.org/2000/svg}"
    points = root.findall(f"{space}circle/{space}title")
    assert [point.text for point in points] == [
        "netns_kit thread: 2.50",
        "netns_kit loop asyncio: 1.60",
        "netns_kit thread: 0.56",
        "netns_kit thread: 2.00",
    ]
    style = root.find(f"{space}style")
    assert style is not None
    assert "prefers-color-scheme: dark" in (style.text or "")
    unit = next(each for each in root.iter(f"{space}line") if each.get("class") == "one").get("x1")
    better = [
        float(each.get("cx", 0)) > float(unit or 0) for each in root.iter(f"{space}circle") if len(each)
    ]
    assert better == [True, True, False, True]


def test_json_has_everything_and_comes_back(samples: Sequence[Sample]) -> None:
    text = RECORDED.read_text(encoding="utf-8")
    again, facts = from_json(text)
    assert as_json(again, facts) == text
    whole = json.loads(text)
    assert whole.keys() == {"machine", "versions", "rounds", "seconds", "samples", "lines"}
    assert all(
        type(each[key]) is str for each in whole["samples"] for key in ("subject", "table", "row", "unit")
    )
    assert all((each["value"] is None) != (each["error"] is None) for each in whole["samples"])
    assert whole["lines"][1] == {
        "table": "bulk",
        "row": "out, 1 stream",
        "unit": "Gbit/s",
        "mtu": "best",
        "medians": {
            "netns_kit thread": 25.0,
            "netns_kit loop asyncio": 16.0,
            "slirp4netns": 10.0,
            "pasta": 7.5,
            "host": 84.0,
        },
        "ratios": {"netns_kit thread": 2.5, "netns_kit loop asyncio": 1.6},
    }


def test_a_page_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks", "--from", str(RECORDED), "--write", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n![")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text
    assert done.stdout.strip() in text
    assert "rounds: 3, of 2 s each. 2 cores (a processor)," in text
    assert ET.fromstring((tmp_path / "page.svg").read_text(encoding="utf-8")).tag.endswith("svg")


def test_the_page_of_the_project_has_its_marks_once() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index(END)
