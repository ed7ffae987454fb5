"""One TCP stream over a link that loses frames: through us, and between two kernels with no stack of ours between.

    python benchmarks/loss.py [--delay 0.01] [--seconds 3] [--write docs/transport.md]

The link is the same `Impairment` each time, seeded, in both directions, so that acknowledgements are lost as well;
two kernels on it are the measure of what can be had.  Beside it the same without SACK (net.ipv4.tcp_sack of the
namespaces), which is what SACK is worth.  The digits belong to the machine, the ratios to the programs.
"""

from __future__ import annotations

import argparse
import platform
import socket
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from ipaddress import IPv4Interface
from pathlib import Path

import anyio
import anyio.to_thread

from netns_kit import Impairment, Namespace, TapDevice, Uplink, UserStack
from netns_kit.gateway.engine import IN, Engine
from netns_kit.tap.frame_device import FRAME_MAX, Device
from netns_kit.tap.impaired import ImpairedTap

LOSSES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
COLUMNS = ("out", "in", "kernels")
BEGIN, END = "<!-- loss: begin -->", "<!-- loss: end -->"
WARM_UP = 1.0
_RESET = struct.pack("ii", 1, 0)

Ends = tuple[socket.socket, socket.socket]


@asynccontextmanager
async def through_us(impairment: Impairment, sack: bool) -> AsyncIterator[Ends]:
    """The guest's end of a connection, and the host's."""
    async with (
        Namespace.create() as namespace,
        TapDevice.open(namespace).impaired(replace(impairment, loss=0)) as tap,
        UserStack(tap, Uplink(allow_host_loopback=True)),
    ):
        await namespace.set_sysctl("net.ipv4.tcp_sack", int(sack))
        with socket.create_server(("127.0.0.1", 0)) as server:
            async with _connected(namespace, server, ("10.0.2.2", server.getsockname()[1])) as ends:
                _impair(tap, impairment)
                yield ends


@asynccontextmanager
async def between_kernels(impairment: Impairment, sack: bool) -> AsyncIterator[Ends]:
    """The ends of a connection between two namespaces whose taps are one cable."""
    clean = replace(impairment, loss=0)
    async with (
        Namespace.create() as first,
        Namespace.create() as second,
        TapDevice.open(first, mac="02:00:00:00:00:01").impaired(clean) as near,
        TapDevice.open(second, mac="02:00:00:00:00:02").impaired(clean) as far,
    ):
        for number, namespace in enumerate((first, second), start=1):
            await namespace.configure_link("tap0", address=IPv4Interface(f"192.0.2.{number}/24"))
            await namespace.set_sysctl("net.ipv4.tcp_sack", int(sack))
        with _cable(near, far), await second.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
            server.bind(("192.0.2.2", 0))
            server.listen()
            async with _connected(first, server, server.getsockname()) as ends:
                _impair(near, impairment)
                _impair(far, impairment)
                yield ends


def _impair(tap: ImpairedTap, impairment: Impairment) -> None:
    """From now on: connections are made while nothing is lost, lest their luck decide the rest."""
    tap.transmit.impairment = tap.receive.impairment = impairment


@asynccontextmanager
async def _connected(
    namespace: Namespace, server: socket.socket, address: tuple[str, int]
) -> AsyncIterator[Ends]:
    with await namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(60)
        server.settimeout(60)
        await anyio.to_thread.run_sync(client.connect, address)
        accepted, _ = await anyio.to_thread.run_sync(server.accept)
        with accepted:
            yield client, accepted
            for sock in (client, accepted):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


@contextmanager
def _cable(near: Device, far: Device) -> Iterator[None]:
    """What one end sends, the other gets: half of the impairment is on each."""
    engine, buffer = Engine(), memoryview(bytearray(FRAME_MAX))
    stop = threading.Event()

    def carry(source: Device, target: Device) -> None:
        while (size := source.read_into(buffer)) is not None:
            target.write(buffer[:size])

    def run() -> None:
        while not stop.is_set():
            due = min(near.deadline, far.deadline) - time.monotonic()
            engine.dispatch(engine.poll(min(max(due, 0.0), 0.1)), time.monotonic())
            for source, target in ((near, far), (far, near)):
                if source.deadline <= time.monotonic():
                    source.advance(time.monotonic())
                    carry(source, target)

    engine.add(near.fileno(), lambda _: carry(near, far), IN)
    engine.add(far.fileno(), lambda _: carry(far, near), IN)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        engine.close()


async def rate(sender: socket.socket, receiver: socket.socket, seconds: float) -> float:
    """MiB/s received."""
    received, stop = 0, threading.Event()

    def send() -> None:
        block = bytes(1 << 18)
        sender.settimeout(0.2)
        while not stop.is_set():
            try:
                sender.send(block)
            except TimeoutError:
                continue

    def receive() -> None:
        nonlocal received
        receiver.settimeout(0.2)
        while not stop.is_set():
            try:
                received += len(receiver.recv(1 << 18))
            except TimeoutError:
                continue

    threads = [threading.Thread(target=run) for run in (send, receive)]
    for thread in threads:
        thread.start()
    await anyio.sleep(WARM_UP)
    before = received
    await anyio.sleep(seconds)
    found = (received - before) / seconds / (1 << 20)
    stop.set()
    for thread in threads:
        await anyio.to_thread.run_sync(thread.join)
    return found


async def measure(column: str, loss: float, delay: float, sack: bool, seconds: float) -> float:
    if (
        column == "kernels"
    ):  # half of the delay at each end of the cable; frames are lost once, on their way in
        impairment = Impairment(loss=1 - (1 - loss) ** 0.5, delay=delay / 2, queue=1 << 20, seed=7)
        async with between_kernels(impairment, sack) as (client, server):
            return await rate(client, server, seconds)
    impairment = Impairment(loss=loss, delay=delay, queue=1 << 20, seed=7)
    async with through_us(impairment, sack) as (guest, host):
        return await rate(*((guest, host) if column == "out" else (host, guest)), seconds)


async def table(delay: float, seconds: float) -> str:
    names = ("namespace to host", "host to namespace", "two kernels")
    head = "| loss | " + " | ".join([*names, *(f"{name}, no SACK" for name in names)]) + " |"
    lines = [head, "|---" * 7 + "|"]
    for loss in LOSSES:
        rates = []
        for sack in (True, False):
            for column in COLUMNS:
                with anyio.fail_after(120):
                    rates.append(await measure(column, loss, delay, sack, seconds))
        lines.append(f"| {loss:.0%} | " + " | ".join(f"{each:.3g}" for each in rates) + " |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--delay", type=float, default=0.01, help="seconds, each way")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--write", type=Path, help="a page to put the table into, between its marks")
    options = parser.parse_args()
    result = anyio.run(table, options.delay, options.seconds)
    result += f"\n\nMiB/s, MTU 1500, {options.delay * 1000:g} ms each way, the system's congestion control; "
    result += f"CPython {platform.python_version()}, Linux {platform.release().partition('-')[0]}."
    print(result)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n{result}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
