"""The tasks: what is measured of each subject.

A task is a list of `Measurement` objects, each yields one or more figures.  "Out" is from the namespace to
the host, "in" the other way; connections are made from inside, but for forwarded ports.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from .policy import POLICIES
from .processes import (
    Child,
    Failed,
    answer,
    child,
    cpu_seconds,
    line,
    memory,
    one_core,
    output,
    tell,
)
from .subjects import LOOPBACK, ROOT, Running, Subject, free_port

LOAD = (sys.executable, "-S", "-E", "-I", str(Path(__file__).with_name("load.py")))
PATIENCE = 15.0  # seconds beyond its time that a measurement may take
GIBIBYTE = 1 << 30
BURST_SECONDS = 12.0  # after which a connection of a burst is lost: SYNs are sent again after 1, 3 and 7
DIRECTIONS = ("out", "in")

Better = Literal["more", "less", "neither"]
Values = Sequence["float | None"]


@dataclass(frozen=True)
class Figure:
    """A row of a table: `better` says which way is better, or that it is no race."""

    table: str
    row: str
    unit: str
    better: Better


@dataclass(frozen=True)
class Measurement:
    """`measure` returns a value for each of `figures`, None where there is none, and raises `Failed`.

    `any_mtu`: it is not worth repeating for each MTU.  `fresh`: it wants a subject that has done nothing yet.
    """

    task: str
    figures: tuple[Figure, ...]
    measure: Callable[[Subject, Running], Values]
    any_mtu: bool = False
    fresh: bool = False
    applies: Callable[[Subject], bool] = lambda _: True


@dataclass(frozen=True)
class Settings:
    """Sizes; `seconds` is about what a sample takes, `settle` what is waited for traces of the last one to go."""

    seconds: float = 2.0
    streams: tuple[int, ...] = (1, 8, 64)
    connections: tuple[int, ...] = (1, 64)
    lanes: tuple[int, ...] = (1, 16)
    held: tuple[int, ...] = (500, 10_000)
    idle: int = 1000
    idle_seconds: float = 10.0
    starts: int = 5
    burst: int = 10_000
    ports: int = 5_000
    settle: float = 0.2

    @property
    def warm_up(self) -> float:
        """Seconds before each sample."""
        return min(0.5, self.seconds / 4)

    @property
    def whole_seconds(self) -> int:
        """For programs that take no fractions."""
        return max(1, round(self.seconds))

    @property
    def times(self) -> dict[str, object]:
        """As the load generator takes them."""
        return {"seconds": self.seconds, "warm_up": self.warm_up}


# One measurement


@contextmanager
def _ends(
    settings: Settings,
    running: Running,
    kind: str,
    *,
    server: dict[str, object] | None = None,
    client: dict[str, object] | None = None,
    forwarded: bool = False,
    **both: object,
) -> Iterator[tuple[Child, Child]]:
    """Both ends of the load generator, the server's and the client's options apart.

    The client runs inside; with `forwarded` the server does, and the client comes by the forwarded port.
    """
    outer, inner = running.forwarded
    here, there = ("0.0.0.0", LOOPBACK) if forwarded else (LOOPBACK, running.gateway)
    options = {**both, **(server or {}), "address": here, "port": inner if forwarded else 0}
    with child(*(running.enter if forwarded else ()), *_load(kind, "server", options)) as serving:
        port = answer(serving, PATIENCE)["port"]
        options = {**both, **(client or {}), "address": there, "port": outer if forwarded else port}
        with child(*(() if forwarded else running.enter), *_load(kind, "client", options)) as asking:
            yield serving, asking
    time.sleep(settings.settle)


def _load(kind: str, end: str, options: dict[str, object]) -> list[str]:
    return [*LOAD, kind, end, json.dumps(options)]


def _one_way(
    settings: Settings,
    running: Running,
    kind: str,
    direction: str,
    *,
    forwarded: bool = False,
    **both: object,
) -> dict[str, float]:
    """Figures of the end that receives, and the CPU seconds of the subject meanwhile."""
    client_sends = (direction == "out") != forwarded
    server: dict[str, object] = {"sends": not client_sends}
    client: dict[str, object] = {"sends": client_sends}
    before = cpu_seconds(running.pid) if running.pid else 0.0
    both |= settings.times
    with _ends(settings, running, kind, server=server, client=client, forwarded=forwarded, **both) as ends:
        found: dict[str, float] = answer(ends[0] if client_sends else ends[1], settings.seconds + PATIENCE)
        found["cpu"] = cpu_seconds(running.pid) - before if running.pid else 0.0
    return found


def _two_ways(settings: Settings, running: Running, kind: str, **options: Any) -> dict[str, float]:
    """Figures of the client: p50 and p99 in microseconds, and exchanges per second."""
    options |= settings.times
    with _ends(settings, running, kind, **options) as (_, client):
        found: dict[str, float] = answer(client, settings.seconds + PATIENCE)
    return found


# Tasks


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def bulk(settings: Settings) -> Iterator[Measurement]:
    for direction in DIRECTIONS:
        for count in settings.streams:
            row = f"{direction}, {_many(count, 'stream')}"
            figures = (
                Figure("bulk", row, "Gbit/s", "more"),
                Figure("cpu", row, "s/GiB", "less"),
            )
            yield Measurement("bulk", figures, partial(_bulk, settings, direction, count))


def _bulk(settings: Settings, direction: str, count: int, _: Subject, running: Running) -> Values:
    found = _one_way(settings, running, "bulk", direction, count=count)
    return _gigabits(found), found["cpu"] / found["total"] * GIBIBYTE if running.pid else None


def _gigabits(found: dict[str, float]) -> float:
    return found["bytes"] / found["seconds"] * 8 / 1e9


def rr(settings: Settings) -> Iterator[Measurement]:
    for count in settings.connections:
        row = _many(count, "connection")
        names = ["p50", "p99"]
        figures = [Figure("rr", f"{row}, {which}", "us", "less") for which in names]
        if count > 1:
            names.append("rate")
            figures.append(Figure("rr", row, "/s", "more"))
        yield Measurement("rr", tuple(figures), partial(_exchanges, settings, "rr", names, count))
    yield _on_one_core(settings, "rr")


def _on_one_core(settings: Settings, kind: str) -> Measurement:
    """One exchange at a time with no second core: what it costs, without what waking another core costs."""
    figures = tuple(Figure(kind, f"one core, {which}", "us", "less") for which in ("p50", "p99"))

    def measure(_: Subject, running: Running) -> Values:
        with one_core(running.pid):
            found = _two_ways(settings, running, kind)
        return found["p50"], found["p99"]

    return Measurement(kind, figures, measure)


def crr(settings: Settings) -> Iterator[Measurement]:
    for count in settings.lanes:
        figure = Figure("crr", f"{count} at a time", "/s", "more")
        yield Measurement("crr", (figure,), partial(_exchanges, settings, "crr", ("rate",), count))


def udp_rr(settings: Settings) -> Iterator[Measurement]:
    figures = tuple(Figure("udp_rr", which, "us", "less") for which in ("p50", "p99"))
    yield Measurement("udp_rr", figures, partial(_exchanges, settings, "udp_rr", ("p50", "p99"), 1))
    yield _on_one_core(settings, "udp_rr")


def _exchanges(
    settings: Settings, kind: str, names: Sequence[str], count: int, _: Subject, running: Running
) -> Values:
    found = _two_ways(settings, running, kind, count=count)
    return [found[name] for name in names]


def udp_64(settings: Settings) -> Iterator[Measurement]:
    yield from _datagrams("udp_64", settings, 64)


def udp_1400(settings: Settings) -> Iterator[Measurement]:
    yield from _datagrams("udp_1400", settings, 1400)


def _datagrams(task: str, settings: Settings, size: int) -> Iterator[Measurement]:
    for direction in DIRECTIONS:
        figure = Figure(task, direction, "/s", "more")
        yield Measurement(task, (figure,), partial(_rate, settings, direction, size))


def _rate(settings: Settings, direction: str, size: int, _: Subject, running: Running) -> Values:
    found = _one_way(settings, running, "flood", direction, size=size)
    return [found["datagrams"] / found["seconds"]]


def udp_gso(settings: Settings) -> Iterator[Measurement]:
    for direction in DIRECTIONS:
        figure = Figure("udp_gso", direction, "Gbit/s", "more")
        yield Measurement("udp_gso", (figure,), partial(_super_datagrams, settings, direction))


def _super_datagrams(settings: Settings, direction: str, _: Subject, running: Running) -> Values:
    return [_gigabits(_one_way(settings, running, "flood", direction, size=1400, offload=True))]


def forward(settings: Settings) -> Iterator[Measurement]:
    brief = replace(settings, seconds=settings.seconds / 4)  # for it has many rows
    for direction in DIRECTIONS:
        row = f"{direction}, 1 stream"
        figures = (
            Figure("forward", row, "Gbit/s", "more"),
            Figure("forward", f"{row}, CPU", "s/GiB", "less"),
        )
        yield Measurement("forward", figures, partial(_forward_bulk, brief, direction))
    rates = [("rr", count, f"exchanges by {_many(count, 'connection')}") for count in settings.connections]
    rates += [("crr", count, f"connects, {count} at a time") for count in settings.lanes]
    for kind, count, row in rates:
        figure = Figure("forward", row, "/s", "more")
        yield Measurement("forward", (figure,), partial(_forward_rate, brief, kind, count), any_mtu=True)
    row = f"burst of {settings.burst:,} connects"
    figures = (Figure("forward", f"{row}, lost", "connects", "neither"), Figure("forward", row, "s", "less"))
    yield Measurement("forward", figures, partial(_burst, settings), any_mtu=True)
    figure = Figure("forward", f"publishing {settings.ports:,} ports", "ms", "less")
    yield Measurement("forward", (figure,), partial(_publish, settings), any_mtu=True)


def _forward_bulk(settings: Settings, direction: str, _: Subject, running: Running) -> Values:
    found = _one_way(settings, running, "bulk", direction, forwarded=True)
    return _gigabits(found), found["cpu"] / found["total"] * GIBIBYTE if running.pid else None


def _forward_rate(settings: Settings, kind: str, count: int, _: Subject, running: Running) -> Values:
    return [_two_ways(settings, running, kind, count=count, forwarded=True)["rate"]]


def _burst(settings: Settings, _: Subject, running: Running) -> Values:
    with _ends(settings, running, "burst", forwarded=True, count=settings.burst, seconds=BURST_SECONDS) as (
        _server,
        client,
    ):
        found = answer(client, BURST_SECONDS + PATIENCE)
    return found["lost"], found["seconds"]


def _publish(settings: Settings, _: Subject, running: Running) -> Values:
    return [None if running.publish is None else running.publish(settings.ports) * 1000]


def memory_held(settings: Settings) -> Iterator[Measurement]:
    for count in settings.held:
        figures = (
            Figure("memory", f"{count:,} held, each", "KiB", "less"),
            Figure("memory", f"{count:,} held, all", "MiB", "less"),
            Figure("memory", f"{count:,} held, one core, p50 of another", "us", "less"),
            Figure("memory", f"{count:,} held, that is slower by", "%", "neither"),
        )
        yield Measurement("memory", figures, partial(_memory, settings, count), any_mtu=True, fresh=True)


def _memory(settings: Settings, count: int, _: Subject, running: Running) -> Values:
    def p50() -> float:
        with one_core(running.pid):
            return _two_ways(settings, running, "rr")["p50"]

    alone = p50()
    before = memory(running.pid)
    with _held(settings, running, count):
        after = memory(running.pid)
        beside = p50()
    return (after - before) / count, after / 1024, beside, (beside / alone - 1) * 100


@contextmanager
def _held(settings: Settings, running: Running, count: int) -> Iterator[None]:
    """So many idle connections."""
    with _ends(settings, running, "hold") as (_, client):
        tell(client, str(count))
        answer(client, PATIENCE + count / 100)
        time.sleep(settings.settle)
        yield


def idle(settings: Settings) -> Iterator[Measurement]:
    figure = Figure("idle", f"{settings.idle:,} connections held", "%", "less")
    yield Measurement("idle", (figure,), partial(_idle, settings), any_mtu=True, fresh=True)


def _idle(settings: Settings, _: Subject, running: Running) -> Values:
    with _held(settings, running, settings.idle):
        time.sleep(1)  # what has just happened is not idleness
        before = cpu_seconds(running.pid)
        time.sleep(settings.idle_seconds)
        return [(cpu_seconds(running.pid) - before) / settings.idle_seconds * 100]


def heartbeat(settings: Settings) -> Iterator[Measurement]:
    for direction in DIRECTIONS:
        figure = Figure("heartbeat", f"{direction}, 1 stream, p99.9", "ms", "less")
        yield Measurement("heartbeat", (figure,), partial(_heartbeat, settings, direction), any_mtu=True)


def _heartbeat(settings: Settings, direction: str, _: Subject, running: Running) -> Values:
    assert running.lateness is not None
    sends = direction == "out"
    server: dict[str, object] = {"sends": not sends}
    client: dict[str, object] = {"sends": sends}
    longer = {"seconds": settings.seconds + PATIENCE, "warm_up": 0.0}
    with _ends(settings, running, "bulk", server=server | longer, client=client | longer):
        time.sleep(settings.warm_up)
        return [running.lateness(settings.seconds) * 1000]


def start(settings: Settings) -> Iterator[Measurement]:
    def cold(subject: Subject, _: Running) -> Values:
        assert subject.cold is not None
        return [median(subject.cold() for _ in range(settings.starts)) * 1000]

    def tap(subject: Subject, _: Running) -> Values:
        assert subject.tap is not None
        return [median(subject.tap() for _ in range(settings.starts)) * 1000]

    def warm(subject: Subject, _: Running) -> Values:
        assert subject.warm is not None
        return [median(subject.warm(settings.starts)) * 1000]

    figure = Figure("start", "from nothing, a process of its own", "ms", "less")
    yield Measurement(
        "start", (figure,), cold, any_mtu=True, applies=lambda subject: subject.cold is not None
    )
    figure = Figure("start", "until the tap is there", "ms", "less")
    yield Measurement("start", (figure,), tap, any_mtu=True, applies=lambda subject: subject.tap is not None)
    figure = Figure("start", "with the library imported", "ms", "neither")
    yield Measurement(
        "start", (figure,), warm, any_mtu=True, applies=lambda subject: subject.warm is not None
    )


def policy(settings: Settings) -> Iterator[Measurement]:
    """What it takes to decide about a new flow."""
    figures = tuple(Figure("policy", name, "us", "less") for name in POLICIES)
    yield Measurement("policy", figures, partial(_policy, settings), any_mtu=True)


def _policy(settings: Settings, _: Subject, __: Running) -> Values:
    command = (sys.executable, "-m", "benchmarks.policy", str(settings.seconds))
    told = json.loads(output(command, settings.seconds + PATIENCE, cwd=ROOT))
    return [told[name] for name in POLICIES]


def calibrate(settings: Settings) -> Iterator[Measurement]:
    """The load generator beside other people's, over the host's loopback."""
    for count in (1, 8):
        rates = {"load.py": partial(_bulk_rate, settings, count), "iperf3": partial(_iperf3, settings, count)}
        for program, rate in rates.items():
            figure = Figure("calibrate", f"{_many(count, 'stream')}, {program}", "Gbit/s", "neither")
            yield Measurement("calibrate", (figure,), rate)
    for kind in ("rr", "udp_rr"):
        times: dict[str, Callable[[Subject, Running], Values]] = {
            "load.py": _on_one_core(settings, kind).measure,
            "sockperf": partial(_sockperf, settings, kind),
        }
        for program, time_of in times.items():
            row = f"{kind}, one core, {program}"
            figures = tuple(
                Figure("calibrate", f"{row}, {which}", "us", "neither") for which in ("p50", "p99")
            )
            yield Measurement("calibrate", figures, time_of)


def _bulk_rate(settings: Settings, count: int, _: Subject, running: Running) -> Values:
    return [_gigabits(_one_way(settings, running, "bulk", "out", count=count))]


def _iperf3(settings: Settings, count: int, _: Subject, __: Running) -> Values:
    port = str(free_port())
    with child(_tool("iperf3"), "-s", "-1", "-p", port, "--forceflush") as server:
        line(server, PATIENCE)
        words = [
            "-c",
            LOOPBACK,
            "-p",
            port,
            "-t",
            str(settings.whole_seconds),
            "-P",
            str(count),
            "-C",
            "cubic",
            "-J",
        ]
        report = json.loads(output([_tool("iperf3"), *words], settings.seconds + PATIENCE))
    return [report["end"]["sum_received"]["bits_per_second"] / 1e9]


def _sockperf(settings: Settings, kind: str, _: Subject, __: Running) -> Values:
    words = ["-i", LOOPBACK, "-p", str(free_port()), *(["--tcp"] if kind == "rr" else [])]
    with one_core(0), child(_tool("sockperf"), "server", *words) as server:
        line(server, PATIENCE)
        time.sleep(settings.settle)
        timing = ["-t", str(settings.whole_seconds), "-m", "64", "--full-rtt"]
        report = output([_tool("sockperf"), "ping-pong", *words, *timing], settings.seconds + PATIENCE)
    found = dict(re.findall(r"percentile (50|99)\.000 = +([0-9.]+)", report))
    if len(found) != 2:
        raise Failed("sockperf told no percentiles")
    return float(found["50"]), float(found["99"])


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise Failed(f"{name} is not installed")
    return path


TASKS: dict[str, Callable[[Settings], Iterator[Measurement]]] = {
    "bulk": bulk,
    "rr": rr,
    "crr": crr,
    "udp_rr": udp_rr,
    "udp_64": udp_64,
    "udp_1400": udp_1400,
    "udp_gso": udp_gso,
    "forward": forward,
    "memory": memory_held,
    "start": start,
    "idle": idle,
    "heartbeat": heartbeat,
    "policy": policy,
    "calibrate": calibrate,
}
