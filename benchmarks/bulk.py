"""One TCP stream between a namespace and the host, through us and through the peers found on this machine.

    python benchmarks/bulk.py [--rounds 3] [--seconds 3] [--write docs/performance.md]

Needs iperf3; slirp4netns and pasta are measured if they are there.  All run in turn within each round, each at MTU
1500 and at 65520, cubic on both ends, and what is quoted is the median and its ratio to the best peer at that MTU:
the digits belong to the machine, the ratios to the programs.  Run it as an ordinary user, who must be allowed cubic:
sysctl net.ipv4.tcp_allowed_congestion_control.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

MTUS = (1500, 65520)
DIRECTIONS = {"out": [], "in": ["-R"]}
GATEWAY = "10.0.2.2"
BEGIN, END = "<!-- bulk: begin -->", "<!-- bulk: end -->"
Client = list[str]
Runner = Callable[[int, Client], str]


def netns_kit(mtu: int, client: Client) -> str:
    command = [sys.executable, "-m", "netns_kit", "run", "--mtu", str(mtu), "--host-loopback", "--", *client]
    return _output(command)


def pasta(mtu: int, client: Client) -> str:
    address = ["-a", "10.0.2.100", "-n", "24", "-g", GATEWAY]
    return _output(["pasta", "--config-net", "-q", "-m", str(mtu), *address, "--", *client])


def slirp4netns(mtu: int, client: Client) -> str:
    with _process(
        "unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo; exec sleep 120"
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()  # the namespace is there
        ready = ["sh", "-c", f"exec slirp4netns -c -r 3 --mtu={mtu} {holder.pid} tap0 3>&1 >/dev/null 2>&1"]
        with _process(*ready) as slirp:
            assert slirp.stdout is not None
            slirp.stdout.read(1)
            enter = ["nsenter", "--preserve-credentials", "--user", "--net", "--target", str(holder.pid)]
            return _output([*enter, *client])


RUNNERS: dict[str, Runner] = {"netns_kit": netns_kit, "slirp4netns": slirp4netns, "pasta": pasta}


@contextmanager
def _process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def measure(rounds: int, seconds: int, port: int) -> dict[tuple[str, int, str], list[float]]:
    """Gbit/s received, by program, MTU and direction."""
    found: dict[tuple[str, int, str], list[float]] = {}
    server = subprocess.Popen(["iperf3", "-s", "-p", str(port), "--forceflush"], stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        server.stdout.readline()
        for number in range(rounds):
            for name, run in RUNNERS.items():
                if name != "netns_kit" and shutil.which(name) is None:
                    continue
                for mtu in MTUS:
                    for direction, flags in DIRECTIONS.items():
                        client = [
                            "iperf3",
                            "-c",
                            GATEWAY,
                            "-p",
                            str(port),
                            "-t",
                            str(seconds),
                            "-C",
                            "cubic",
                            "-J",
                        ]
                        try:
                            report = json.loads(run(mtu, [*client, *flags]))
                            rate = report["end"]["sum_received"]["bits_per_second"] / 1e9
                        except (subprocess.SubprocessError, ValueError, KeyError) as error:
                            print(f"round {number + 1}: {name} {mtu} {direction}: {error}", file=sys.stderr)
                            continue
                        found.setdefault((name, mtu, direction), []).append(rate)
                        print(f"round {number + 1}: {name} {mtu} {direction}: {rate:.2f}", file=sys.stderr)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    return found


def table(found: dict[tuple[str, int, str], list[float]]) -> str:
    """Medians, and ours as a multiple of the best peer's in the same column."""
    columns = [(mtu, direction) for mtu in MTUS for direction in DIRECTIONS]
    medians = {key: median(rates) for key, rates in found.items()}
    lines = ["| Gbit/s | " + " | ".join(f"MTU {mtu}, {direction}" for mtu, direction in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in RUNNERS:
        cells = [_cell(medians, (name, mtu, direction)) for mtu, direction in columns]
        if cells != ["-"] * len(columns):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    ratios = []
    for column in columns:
        peers = [
            rate for (name, *rest), rate in medians.items() if name != "netns_kit" and tuple(rest) == column
        ]
        ours = medians.get(("netns_kit", *column))
        ratios.append(f"{ours / max(peers):.1f}" if peers and ours else "-")
    lines.append("| netns_kit / best peer | " + " | ".join(f"**{ratio}**" for ratio in ratios) + " |")
    return "\n".join(lines)


def _cell(medians: dict[tuple[str, int, str], float], key: tuple[str, int, str]) -> str:
    return f"{medians[key]:.2f}" if key in medians else "-"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--port", type=int, default=5311)
    parser.add_argument("--write", type=Path, help="a page to put the table into, between its marks")
    options = parser.parse_args()
    result = table(measure(options.rounds, options.seconds, options.port))
    result += f"\n\nMedians of {options.rounds} rounds of {options.seconds} s; CPython {platform.python_version()}, "
    result += f"Linux {platform.release().partition('-')[0]}."
    print(result)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n{result}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
