"""A process that is netns_kit and nothing else, so that its time and its memory can be told from the benchmark's.

    python -m benchmarks.ours BACKEND DRIVER MTU QUEUES [MODE SPEC]   a Network, until standard input ends
    python -m benchmarks.ours BACKEND DRIVER MTU QUEUES --times N     seconds from nothing to ready, N times
    python ours.py --activated PORT COMMAND...                        a command inside that has a port of the host

It prints one JSON object: the pid of a process inside, or the times.  A Network answers each line of its standard
input: `late SECONDS`, with how late a heartbeat on its event loop was meanwhile; `publish SPEC`, with the seconds
until it listens on these ports.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from typing import cast

import anyio
import anyio.to_thread

from netns_kit import Namespace, Network, Uplink
from netns_kit.forwarder.ports import Mode
from netns_kit.gateway.setup import DriverName


def network(driver: str, mtu: str, queues: str) -> Network:
    return Network(
        uplink=Uplink(allow_host_loopback=True),
        mtu=int(mtu),
        queues=int(queues),
        driver=cast("DriverName", driver),
    )


async def hold(driver: str, mtu: str, queues: str, mode: str = "stack", *specs: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with network(driver, mtu, queues) as net:
        await net.forwarder.add(*specs, mode=cast("Mode", mode))
        print(json.dumps({"pid": net.namespace.pid}), flush=True)
        await anyio.wait_readable(sys.stdin)
        while text := os.read(0, 1024).decode():
            what, argument = text.split()
            found = await (
                publishing(net, cast("Mode", mode), argument)
                if what == "publish"
                else lateness(float(argument))
            )
            print(json.dumps({what: found}), flush=True)
            await anyio.wait_readable(sys.stdin)


async def publishing(net: Network, mode: Mode, spec: str) -> float:
    """Seconds that it takes to listen on these ports; they are free again."""
    began = time.perf_counter()
    forwards = await net.forwarder.add(spec, mode=mode)
    took = time.perf_counter() - began
    for forward in forwards:
        await net.forwarder.remove(forward)
    return took


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
        async with network(driver, mtu, queues):
            found.append(time.perf_counter() - began)
    print(json.dumps({"times": found[1:]}), flush=True)  # the first one warms up


async def activated(port: str, command: list[str]) -> None:
    """Run a command that has a listening socket of the host, by mode "fd": no tap, no stack."""
    with socket.create_server(("127.0.0.1", int(port)), backlog=4096) as server:
        async with Namespace.create() as ns:
            await ns.run(command, stdin=None, stdout=None, listen=[server])


if __name__ == "__main__":
    if sys.argv[1] == "--activated":
        anyio.run(activated, sys.argv[2], sys.argv[3:])
    else:
        backend, driver, mtu, queues, *rest = sys.argv[1:]
        if rest[:1] == ["--times"]:
            anyio.run(times, driver, mtu, queues, int(rest[1]), backend=backend)
        else:
            anyio.run(hold, driver, mtu, queues, *rest, backend=backend)
