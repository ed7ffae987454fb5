"""What an interceptor costs: `python -m benchmarks.intercept SECONDS [DRIVER]`.

Three connections send as fast as they can, out of a namespace and then into one: a plain one, one that a handler has
looked at and joined to its way out, and one that a handler copies both ways in Python.  They take turns, a quarter
of a second each: the others are held up meanwhile.  It prints the medians in Gbit/s, and the medians of the ratios to
the slot of the plain one beside it, as one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median
from typing import cast

import anyio
from anyio.abc import ByteStream

from netns_kit import InterceptedStream, Network, Uplink
from netns_kit.gateway.setup import DriverName

SLOT = 0.25
KINDS = ("plain", "joined", "copied")
SERVER = """
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
def serve(sock):
    {serve}
while True:
    threading.Thread(target=serve, args=[server.accept()[0]], daemon=True).start()
"""
RECEIVE = "room = bytearray(1 << 20)\n    while sock.recv_into(room): pass"
SEND = "data = bytes(1 << 20)\n    while True: sock.sendall(data)"
CLIENT = """
import socket, sys, time
socks = [socket.create_connection(("10.0.2.2", int(sys.argv[1])), 60) for _ in range(3)]
for sock in socks:
    sock.sendall(b".")
data, room = bytes(1 << 18), bytearray(1 << 18)
for line in sys.stdin:
    which, seconds = line.split()
    sock = socks[int(which)]
    for length in 0.1, float(seconds):  # what waits in buffers is gone after the first
        carried, began = 0, time.perf_counter()
        while (now := time.perf_counter()) < began + length:
            {work}
    print(carried / (now - began), flush=True)
"""
SEND_ONE = "sock.sendall(data); carried += len(data)"
RECEIVE_ONE = "carried += sock.recv_into(room)"


async def copy(stream: InterceptedStream) -> None:
    """Copy both ways, as a handler that changes bytes does."""

    async def carry(source: ByteStream, sink: ByteStream) -> None:
        async for data in source:
            await sink.send(data)
        await sink.send_eof()

    async with await stream.connect_upstream() as upstream, anyio.create_task_group() as tasks:
        tasks.start_soon(carry, stream, upstream)
        await carry(upstream, stream)


async def measure(driver: str, serve: str, work: str, seconds: float) -> dict[str, str]:
    """The rates of one direction."""
    opened = 0

    async def handler(stream: InterceptedStream) -> None:
        nonlocal opened
        opened += 1
        if opened == 1:
            await stream.join()
        elif opened == 2:
            upstream = await stream.connect_upstream()
            await stream.peek()
            await stream.join(upstream)
        else:
            await copy(stream)

    samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
    async with (
        Network(uplink=Uplink(allow_host_loopback=True), driver=cast("DriverName", driver)) as net,
        await anyio.open_process([sys.executable, "-c", SERVER.format(serve=serve)]) as outside,
        await net.stack.intercept("10.0.2.2", handler),
    ):
        assert outside.stdout is not None
        port = (await outside.stdout.receive()).decode().strip()
        command = [sys.executable, "-c", CLIENT.format(work=work), port]
        async with await net.popen(command, stdin=-1, stdout=-1) as inside:
            assert inside.stdin is not None
            assert inside.stdout is not None
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                turn = len(samples["plain"])
                for number, kind in sorted(enumerate(KINDS), key=lambda each: (each[0] + turn) % len(KINDS)):
                    await inside.stdin.send(f"{number} {SLOT}\n".encode())
                    samples[kind].append(float(await inside.stdout.receive()) * 8e-9)
            await inside.stdin.aclose()
        outside.kill()
    return {
        kind: f"{median(rates):.2f} Gbit/s, {median(map(_ratio, rates, samples['plain'])):.2f}"
        for kind, rates in samples.items()
    }


def _ratio(rate: float, plain: float) -> float:
    return rate / plain


async def main(seconds: float, *drivers: str) -> None:
    driver, *_ = *drivers, "thread"
    found = {
        "out": await measure(driver, RECEIVE, SEND_ONE, seconds / 2),
        "in": await measure(driver, SEND, RECEIVE_ONE, seconds / 2),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    anyio.run(main, float(sys.argv[1]), *sys.argv[2:3])
