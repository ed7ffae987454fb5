"""Floods from inside a namespace, and what others notice of them.

    python -m benchmarks.floods [--seconds 4] [--driver thread] [--only SYNs ...] [--write docs/security.md]

Two networks in one process, in a world that has no route out: first a network namespace is made for all of this, its
routes are printed, and only then does anything start.  A program in the first network floods; meanwhile, and for two
seconds after, one in each network connects to a server of the "host", exchanges a byte and closes, over and over.
What is told: how long that takes and how often it fails, how late the event loop of the process is, and what the
flood makes the process keep, as it is counted (`UserStack.stats`) and as it is (its resident set).
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread

from netns_kit import Namespace, Network, Uplink
from netns_kit.gateway.setup import DriverName

from .flooder import KINDS, NDP
from .processes import child, line

BEGIN, END = "<!-- floods: begin -->", "<!-- floods: end -->"
INSIDE = "NETNS_KIT_FLOODS"
AFTER = 2.0  # seconds
PROBE = """
import socket, sys, threading, time
port, seconds, after = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
began, held = time.monotonic(), socket.create_connection(("10.0.2.2", port), timeout=10)
held.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
rows = []
def exchange(sock, kind):
    now = time.monotonic()
    try:
        with sock or socket.create_connection(("10.0.2.2", port), timeout=2) as sock:
            sock.sendall(b"x")
            sock.recv(1)
            if sock is held:
                sock.detach()
        rows.append((kind, int(now > began + seconds), time.monotonic() - now))
    except OSError:
        rows.append((kind, int(now > began + seconds), -1))
def hold():
    held.settimeout(5)
    while (now := time.monotonic()) < began + seconds + after:
        held.sendall(b"x")
        held.recv(1)
        rows.append(("held", int(now > began + seconds), time.monotonic() - now))
        time.sleep(0.01)
threads = [threading.Thread(target=hold)]
threads[0].start()
while time.monotonic() < began + seconds + after:
    threads.append(threading.Thread(target=exchange, args=(None, "new")))
    threads[-1].start()
    time.sleep(0.03)
for thread in threads:
    thread.join()
for row in rows:
    print(*row)
"""

ECHO = """
import resource, socket, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
server = socket.create_server(("127.0.0.1", 0), backlog=4096)
print(server.getsockname()[1], flush=True)
def serve(sock):
    try:
        while data := sock.recv(3):
            sock.sendall(bytes(1 << 20) if data == b"GET" else data)
    except OSError:
        pass
    sock.close()
while True:
    try:
        sock, _ = server.accept()
    except OSError:
        continue
    try:
        threading.Thread(target=serve, args=(sock,), daemon=True).start()
    except RuntimeError:
        sock.close()
"""
"""The host's server: every byte comes back, and "GET" brings a MiB."""


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else float("nan")


def resident() -> float:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / (1 << 20)


async def late(found: list[float], period: float = 0.005) -> None:
    """How late the loop is, as whoever sleeps on it finds out."""
    while True:
        began = time.monotonic()
        await anyio.sleep(period)
        found.append(time.monotonic() - began - period)


async def measure(kind: str, seconds: float, driver: DriverName, port: int) -> list[str]:
    """The row of one flood."""
    uplink = Uplink(allow_host_loopback=True, dns=["127.0.0.1:9"])
    loop: list[float] = []
    async with (
        Network(uplink=uplink, driver=driver, ipv6=kind == NDP) as flooded,
        Network(uplink=uplink, driver=driver) as other,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(late, loop)
        peak = {"counted": 0.0, "used": 0.0, "fds": 0.0}
        before = resident()
        tasks.start_soon(watch, flooded, peak, before)
        times, probes = os.times(), {}

        async def probe(net: Network) -> None:
            words = [str(port), str(seconds), str(AFTER)]
            probes[net] = (await net.run([sys.executable, "-c", PROBE, *words])).stdout.decode()

        async def flood() -> None:
            command = [sys.executable, "-m", "benchmarks.flooder", kind, str(seconds), str(port)]
            sent.append(int((await flooded.run(command)).stdout))

        sent: list[int] = []
        async with anyio.create_task_group() as three:
            three.start_soon(probe, flooded)
            three.start_soon(probe, other)
            three.start_soon(flood)
        spent = os.times()
        tasks.cancel_scope.cancel()
    cpu = (spent.user + spent.system - times.user - times.system) / (seconds + AFTER)
    cells = [kind, f"{sent[0] / seconds / 1000:.0f} k/s", f"{100 * cpu:.0f} %"]
    cells += [f"{peak['counted']:.1f} / {peak['used']:.0f}", f"{peak['fds']:.0f}"]
    for net in (flooded, other):
        rows = [each.split() for each in probes[net].splitlines()]
        for phase in "01":
            for sort in ("new", "held"):
                taken = [float(row[2]) for row in rows if row[:2] == [sort, phase]]
                good = [each for each in taken if each >= 0]
                cell = " / ".join(f"{1e3 * quantile(good, share):.1f}" for share in (0.5, 0.99))
                cells.append(f"{cell}, {len(taken) - len(good)} of {len(taken)}" if sort == "new" else cell)
    cells.append(" / ".join(f"{1e3 * quantile(loop, share):.1f}" for share in (0.5, 0.99)))
    return cells


async def watch(net: Network, peak: dict[str, float], before: float) -> None:
    while True:
        with suppress(Exception):
            stats = await net.stack.stats()
            counted = (stats["tcp_memory"] + stats["fragments"]) / (1 << 20)
            peak["counted"] = max(peak["counted"], counted)
        peak["used"] = max(peak["used"], resident() - before)
        peak["fds"] = max(peak["fds"], len(os.listdir("/proc/self/fd")))
        await anyio.sleep(0.1)


HEAD = (
    "flood",
    "sent",
    "CPU",
    "MiB counted / resident",
    "descriptors",
    "new connections: p50 / p99 ms, failed",
    "one that is held",
    "2 s after, new",
    "held",
    "in the neighbour: new",
    "held",
    "2 s after, new",
    "held",
    "loop late, p50 / p99 ms",
)


async def run(options: argparse.Namespace) -> int:
    async with Namespace.current() as world:
        for link in await world.links():
            print(f"link {link.name}", file=sys.stderr)
        routes = await world.routes()
        for route in routes:
            print(f"route {route.destination} via {route.gateway}", file=sys.stderr)
        if any(route.gateway is not None or route.destination.prefixlen == 0 for route in routes):
            print("this world has a way out: nothing is started", file=sys.stderr)
            return 1
    rows = []
    with child(sys.executable, "-c", ECHO) as server:
        port = int(line(server, 5))
        for kind in KINDS:
            if any(part in kind for part in options.only):
                rows.append(await measure(kind, options.seconds, options.driver, port))
                print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in [HEAD, ["---"] * len(HEAD), *rows])
    print(table)
    if options.write is not None:
        text = options.write.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        options.write.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}", encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.floods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="that a flood takes (%(default)s)")
    parser.add_argument("--driver", choices=("thread", "loop", "worker"), default="thread")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="PART", help="floods with that in their name"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args()
    if INSIDE not in os.environ:
        unshare = ["unshare", "--user", "--map-root-user", "--net", "--", "sh", "-c"]
        again = [sys.executable, "-m", "benchmarks.floods", *sys.argv[1:]]
        os.environ[INSIDE] = "1"
        os.execvp("unshare", [*unshare, 'ip link set lo up && exec "$@"', "sh", *again])
    return anyio.run(run, options)


if __name__ == "__main__":
    sys.exit(main())
