"""Measure us and the peers found on this machine, side by side.

Everything runs in turn within each round; what is quoted is the median, and for us its ratio to the best peer in the
same run: the digits belong to the machine, the ratios to the programs.  Run it as an ordinary user, who must be
allowed cubic: sysctl net.ipv4.tcp_allowed_congestion_control.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from .processes import Failed
from .report import Sample, as_json, from_json, machine, number, tables, write_page
from .subjects import MTUS, NO_MTU, PEERS, Running, Subject, find, versions
from .tasks import TASKS, Measurement, Settings


def measure(
    subjects: Sequence[Subject], tests: Sequence[Measurement], rounds: int, mtus: Sequence[int] = MTUS
) -> Iterator[Sample]:
    """All of it, interleaved: in each round all subjects stand beside each other, and each measurement goes round.

    So what is compared was measured within seconds.  Those that want a fresh start come when the others have gone.
    All that are started may have as many descriptors as this process may.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for turn in range(1, rounds + 1):
        for fresh in (False, True):
            group = [test for test in tests if test.fresh == fresh]
            with ExitStack() as standing:
                started: dict[tuple[str, int], Running | str] = {}
                for test in group:
                    for subject, mtu in _chosen(subjects, mtus, test):
                        with ExitStack() as own:
                            place = subject.name, mtu
                            if fresh or place not in started:
                                started[place] = _start(own if fresh else standing, subject, mtu)
                            yield from _samples(turn, subject, mtu, test, started[place])


def _chosen(
    subjects: Sequence[Subject], mtus: Sequence[int], test: Measurement
) -> Iterator[tuple[Subject, int]]:
    """What `test` is for, at which MTU."""
    for subject in subjects:
        if test.task in subject.tasks and test.applies(subject):
            chosen = [mtu for mtu in subject.mtus if mtu in {NO_MTU, *mtus}]
            for mtu in chosen[:1] if test.any_mtu else chosen:
                yield subject, mtu


def _start(stack: ExitStack, subject: Subject, mtu: int) -> Running | str:
    """What runs, or why it does not."""
    try:
        return stack.enter_context(subject.start(mtu))
    except (Failed, OSError) as error:
        return f"did not start: {error}"


def _samples(
    turn: int, subject: Subject, mtu: int, test: Measurement, running: Running | str
) -> Iterator[Sample]:
    """One measurement; a failure is a sample of every figure that it cost."""
    values: Sequence[float | None] = [None] * len(test.figures)
    failure = None
    if isinstance(running, str):
        failure = running
    else:
        try:
            values = test.measure(subject, running)
        except (Failed, OSError) as error:
            failure = str(error) or type(error).__name__
    for each, value in zip(test.figures, values, strict=True):
        if failure is not None or value is not None:
            where = (turn, subject.name, mtu, each.table, each.row, each.unit, each.better)
            yield Sample(*where, value, failure)


def show(sample: Sample) -> None:
    """Progress."""
    value = sample.error if sample.value is None else f"{number(sample.value)} {sample.unit}"
    where = f"round {sample.round}: {sample.subject}, MTU {sample.mtu or '-'}"
    print(f"{where}: {sample.table}, {sample.row}: {value}", file=sys.stderr)


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if unknown := set(options.tasks) - TASKS.keys():
        parser.error(f"no such task: {', '.join(sorted(unknown))}")
    if options.recorded:
        samples, facts = from_json(options.recorded.read_text(encoding="utf-8"))
    else:
        binaries = dict(each.split("=", 1) for each in options.peer)
        facts = {
            "machine": machine(),
            "versions": versions(binaries),
            "rounds": options.rounds,
            "seconds": options.seconds,
        }
        samples = []
        subjects = [each for each in find(binaries) if any(part in each.name for part in options.only)]
        settings = Settings(seconds=options.seconds)
        chosen = [task for name, task in TASKS.items() if name in (options.tasks or TASKS)]
        tests = [test for task in chosen for test in task(settings)]
        try:
            for sample in measure(subjects, tests, options.rounds, options.mtu or MTUS):
                show(sample)
                samples.append(sample)
        except KeyboardInterrupt:
            print(f"interrupted after {len(samples)} samples", file=sys.stderr)
            return 130
    print(tables(samples))
    if options.json:
        options.json.write_text(as_json(samples, facts), encoding="utf-8")
    if options.write:
        write_page(options.write, samples, facts)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="that a sample takes (%(default)s)")
    parser.add_argument("--mtu", type=int, action="append", choices=MTUS, help="only this one")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="NAME", help="subjects with that in their names"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"a program to use as {', '.join(PEERS)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the results into this page")
    parser.add_argument(
        "--from", type=Path, dest="recorded", metavar="FILE", help="samples from --json, instead of measuring"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
