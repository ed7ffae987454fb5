"""What a capture costs: `python -m benchmarks.capture SECONDS [DRIVER]`.

One connection sends as fast as it can, out of a namespace and then into one.  Meanwhile nothing is captured, 128
bytes of each frame, or whole frames, a quarter of a second each in turn, many times over.  It prints the medians in
Gbit/s, the median of the ratios to the slots without a capture just before, and the same ratio of the bytes that each
CPU second of ours has carried, as one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from statistics import median
from typing import cast

import anyio

from netns_kit import Network, Uplink
from netns_kit.gateway.setup import DriverName
from netns_kit.userstack.capture import Capture

SLOT = 1.0
KINDS = {"off": 0, "256 bytes of each frame": 256, "whole frames": 1 << 18}
SEND = "data = bytes(1 << 20)\nwhile True: sock.sendall(data)"
RECEIVE = "room = bytearray(1 << 20)\nwhile sock.recv_into(room): pass"
SERVER = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
sock = server.accept()[0]
"""
CLIENT = 'import socket, sys\nsock = socket.create_connection(("10.0.2.2", int(sys.argv[1])))\n'


async def carried(net: Network) -> int:
    """Bytes of all flows so far."""
    return sum(flow.bytes_from_guest + flow.bytes_to_guest for flow in await net.stack.flows())


def cpu(net: Network) -> float:
    """CPU seconds of this process and its workers so far."""
    found = time.process_time()
    if net.stack.setup.driver == "worker":
        for process in net.stack.workers.processes:
            with open(f"/proc/{process.pid}/schedstat", encoding="ascii") as file:
                found += int(file.read().split()[0]) * 1e-9
    return found


async def slot(net: Network, snaplen: int, path: str) -> tuple[float, float, int]:
    """Gbit/s of one slot, Gbit for each CPU second, and the frames lost."""
    async with AsyncExitStack() as stack:
        capture: Capture | None = None
        if snaplen:
            capture = await stack.enter_async_context(net.stack.capture(path, snaplen=snaplen))
        before, began, used = await carried(net), time.perf_counter(), cpu(net)
        await anyio.sleep(SLOT)
        found = (await carried(net) - before) * 8e-9
        rate, work = found / (time.perf_counter() - began), found / (cpu(net) - used)
    return rate, work, capture.lost if capture else 0


async def measure(driver: str, server: str, client: str, seconds: float) -> dict[str, str]:
    """The rates of one direction."""
    samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
    works: dict[str, list[float]] = {kind: [] for kind in KINDS}
    lost = dict.fromkeys(KINDS, 0)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "capture.pcapng")
        async with (
            Network(uplink=Uplink(allow_host_loopback=True), driver=cast("DriverName", driver)) as net,
            await anyio.open_process([sys.executable, "-c", SERVER + server]) as outside,
        ):
            assert outside.stdout is not None
            port = (await outside.stdout.receive()).decode().strip()
            async with await net.popen([sys.executable, "-c", CLIENT + client, port]):
                await anyio.sleep(0.5)
                end = time.perf_counter() + seconds
                while time.perf_counter() < end:
                    for kind, snaplen in KINDS.items():
                        rate, work, missed = await slot(net, snaplen, path)
                        await anyio.Path(path).unlink(missing_ok=True)
                        samples[kind].append(rate)
                        works[kind].append(work)
                        lost[kind] += missed
            with suppress(ProcessLookupError):
                outside.kill()
    return {
        kind: f"{median(rates):.2f} Gbit/s, {median(map(_ratio, rates, samples['off'])):.2f}; for each CPU second "
        f"{median(map(_ratio, works[kind], works['off'])):.2f}; {lost[kind]} lost"
        for kind, rates in samples.items()
    }


def _ratio(rate: float, off: float) -> float:
    return rate / off


async def main(seconds: float, *drivers: str) -> None:
    driver, *_ = *drivers, "thread"
    found = {
        "out": await measure(driver, RECEIVE, SEND, seconds / 2),
        "in": await measure(driver, SEND, RECEIVE, seconds / 2),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    anyio.run(main, float(sys.argv[1]), *sys.argv[2:3])
