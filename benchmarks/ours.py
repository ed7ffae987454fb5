"""A process that is netns_kit and nothing else, so that its time and its memory can be told from the benchmark's.

    python -m benchmarks.ours BACKEND DRIVER MTU [SPEC...]     a Network, until standard input ends
    python -m benchmarks.ours BACKEND DRIVER MTU --times N     seconds from nothing to ready, N times

It prints one JSON object: the pid of a process inside, or the times.  A Network's answers each line of its standard
input, a number of seconds, with how late a heartbeat on its event loop was meanwhile.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import cast

import anyio
import anyio.to_thread

from netns_kit import Network, Uplink
from netns_kit.userstack.drivers import DriverName


def network(driver: str, mtu: str, queues: str, ports: list[str]) -> Network:
    return Network(
        uplink=Uplink(allow_host_loopback=True),
        ports=ports,
        mtu=int(mtu),
        queues=int(queues),
        driver=cast("DriverName", driver),
    )


async def hold(driver: str, mtu: str, queues: str, ports: list[str]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with network(driver, mtu, queues, ports) as net:
        print(json.dumps({"pid": net.namespace.pid}), flush=True)
        await anyio.wait_readable(sys.stdin)
        while text := os.read(0, 64):
            print(json.dumps({"late": await lateness(float(text))}), flush=True)
            await anyio.wait_readable(sys.stdin)


async def lateness(seconds: float) -> float:
    """Seconds that a task which wants to wake every millisecond is late, at the 99.9th percentile."""
    found = []
    due = anyio.current_time()
    end = due + seconds
    while due < end:
        due = max(due, anyio.current_time()) + 0.001
        await anyio.sleep_until(due)
        found.append(anyio.current_time() - due)
    return sorted(found)[len(found) * 999 // 1000]


async def times(driver: str, mtu: str, queues: str, count: int) -> None:
    found = []
    for _ in range(count + 1):
        began = time.perf_counter()
        async with network(driver, mtu, queues, []):
            found.append(time.perf_counter() - began)
    print(json.dumps({"times": found[1:]}), flush=True)  # the first one warms up


if __name__ == "__main__":
    backend, driver, mtu, queues, *rest = sys.argv[1:]
    if rest[:1] == ["--times"]:
        anyio.run(times, driver, mtu, queues, int(rest[1]), backend=backend)
    else:
        anyio.run(hold, driver, mtu, queues, rest, backend=backend)
