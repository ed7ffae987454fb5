"""All kinds of traffic at once through a network of real kernels, for a while; then everybody falls silent.

Meanwhile memory and descriptors stay as they are, nothing fails, and afterwards nobody runs: connections that are
held open cost no processor time.  Short by default, 1.5 s on each event loop and 1 s of silence; with
NETNS_KIT_LONG=1: 300 s and 30 s.
"""

from __future__ import annotations

import gc
import hashlib
import os
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import pytest
from dnslib import DNSRecord

from netns_kit import Uplink
from netns_kit.gateway.setup import DriverName
from netns_kit.stack import Limits
from tests.support import LONG, needs_ping, needs_tun
from tests.support.load import (
    GATEWAY,
    MIB,
    RESOLVER,
    Door,
    Ends,
    Rig,
    door,
    open_descriptors,
    receive,
    resident,
    rig,
    send,
)
from tests.support.servers import dns_server, host_address, udp_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks"), pytest.mark.timeout(900 if LONG else 300)]

SECONDS = 300.0 if LONG else 1.5
IDLE = 30.0 if LONG else 1.0
WINDOWS = 10
HELD = 50
"""Connections held open in silence, of each of the two ways."""
PATIENCE = 10.0 if LONG else 3.0
"""How long a flow may be idle: if a busy machine took longer for an answer, it would be lost."""
LIMITS = Limits(
    tcp_time_wait=0.2, udp_one_way=PATIENCE, udp_stream=PATIENCE, udp_one_shot=PATIENCE, echo=PATIENCE
)
BULK = os.urandom(2 * MIB)
DIGEST = hashlib.sha256(BULK).digest()
NAMES = {"a.example": "192.0.2.1", "b.example": "192.0.2.2"}


@dataclass
class Traffic:
    """What goes on until the time is over, or longer, until each has been done three times."""

    network: Rig
    doors: tuple[Door, Door]
    until: float
    echo_port: int
    done: Counter[str] = field(default_factory=Counter)
    numbers: Any = field(default_factory=count)

    def goes_on(self, what: str) -> bool:
        self.done[what] += 1
        return self.done[what] <= 3 or anyio.current_time() < self.until

    async def hear(self, sock: socket.socket) -> bytes:
        """What comes next, and it comes soon."""
        with anyio.fail_after(20):
            return await receive(sock)

    async def bulk(self, which: int) -> None:
        """Megabytes both ways at once, and both half-close."""
        while self.goes_on(f"bulk {which}"):
            ends = await self.doors[which]()
            with ends[0], ends[1]:
                async with anyio.create_task_group() as tasks:
                    for side in (0, 1):
                        tasks.start_soon(self._say, ends[side])
                        tasks.start_soon(self._hear, ends[side])

    async def _say(self, sock: socket.socket) -> None:
        await send(sock, BULK)
        sock.shutdown(socket.SHUT_WR)

    async def _hear(self, sock: socket.socket) -> None:
        sha = hashlib.sha256()
        while data := await self.hear(sock):
            sha.update(data)
        assert sha.digest() == DIGEST

    async def short(self, which: int) -> None:
        while self.goes_on(f"short {which}"):
            ends = await self.doors[which]()
            with ends[0], ends[1]:
                for asks, answers in (ends, ends[::-1]):
                    await send(asks, b"a question")
                    assert await self.hear(answers) == b"a question"

    async def datagrams(self) -> None:
        while self.goes_on("datagrams"):
            with await self.network.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                for number in range(20):
                    payload = b"datagram %d" % number * (number * 20)
                    sock.sendto(payload, (GATEWAY, self.echo_port))
                    assert await self.hear(sock) == payload

    async def names(self) -> None:
        while self.goes_on("names"):
            with await self.network.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                for name, address in NAMES.items():
                    sock.sendto(DNSRecord.question(name).pack(), (RESOLVER, 53))
                    assert str(DNSRecord.parse(await self.hear(sock)).a.rdata) == address

    async def pings(self, address: str) -> None:
        """By a raw socket: those inside are root there."""
        with await self.network.namespace.socket(
            socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP
        ) as sock:
            sock.connect((address, 0))
            while self.goes_on("pings"):
                number = next(self.numbers)
                words = (
                    0x0800,
                    0,
                    number >> 16 & 0xFFFF,
                    number & 0xFFFF,
                )  # echo request, identifier, sequence
                total = sum(words)
                check = ~(total + (total >> 16)) & 0xFFFF
                await send(sock, struct.pack("!4H", words[0], check, *words[2:]))
                while (await self.hear(sock))[24:28] != struct.pack("!2H", *words[2:]):
                    pass
                await anyio.sleep(0.002)


def work(thread: threading.Thread) -> tuple[float, int]:
    """Seconds of processor time of a thread, and how often it has been woken: voluntary context switches,
    proc_pid_status(5)."""
    seconds = time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    for line in Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "voluntary_ctxt_switches":
            return seconds, int(value)
    raise LookupError("voluntary_ctxt_switches")


def ticks(pid: int) -> int:
    """Processor time of another process, in hundredths of a second, proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_a_soak(anyio_backend_name: str, record_property: Any) -> None:
    needs_tun()
    needs_ping()
    driver: DriverName = "thread" if anyio_backend_name == "asyncio" else "loop"
    with ExitStack() as servers:
        echo_port = servers.enter_context(udp_server())
        resolver = servers.enter_context(dns_server(NAMES))
        uplink = Uplink(allow_host_loopback=True, dns=[f"127.0.0.1:{resolver}"])
        with anyio.fail_after(SECONDS + IDLE + 120):
            async with (
                rig(driver, uplink=uplink, limits=LIMITS) as network,
                door(network, "out") as go_out,
                door(network, "in") as come_in,
            ):
                before = open_descriptors()
                traffic = Traffic(network, (go_out, come_in), anyio.current_time() + SECONDS, echo_port)
                sizes, descriptors = await soak(traffic)
                record_property("done", dict(traffic.done))
                record_property("resident_mib", [round(size / MIB) for size in sizes])
                record_property("descriptors", descriptors)
                for values, most in (sizes, 8 * MIB), (descriptors, 60):
                    middle, end = values[WINDOWS // 2 : WINDOWS * 3 // 4], values[WINDOWS * 3 // 4 :]
                    assert max(end) - max(middle) < most, values
                await network.gone(20.0)
                assert open_descriptors() == before
                await silence(network, (go_out, come_in), record_property)
                await network.gone(20.0)
                assert open_descriptors() == before


async def soak(traffic: Traffic) -> tuple[list[int], list[int]]:
    """Memory and descriptors, window by window."""
    sizes, descriptors = [], []
    async with anyio.create_task_group() as tasks:
        for which in (0, 1):
            tasks.start_soon(traffic.bulk, which)
            for _ in range(3):
                tasks.start_soon(traffic.short, which)
        for _ in range(2):
            tasks.start_soon(traffic.datagrams)
            tasks.start_soon(traffic.names)
        for address in (GATEWAY, host_address()):
            if address is not None:
                tasks.start_soon(traffic.pings, address)
        for _ in range(WINDOWS):
            most = 0
            for _ in range(5):
                await anyio.sleep(SECONDS / WINDOWS / 5)
                most = max(most, open_descriptors())
            gc.collect()
            sizes.append(resident())
            descriptors.append(most)
    return sizes, descriptors


async def silence(network: Rig, doors: tuple[Door, Door], record_property: Any) -> None:
    """Connections are held open, and nobody says anything."""
    held: list[Ends] = []
    try:
        for connect in doors:
            for _ in range(HELD):
                held.append(await connect())
                for sock, other in (held[-1], held[-1][::-1]):
                    await send(sock, b"x")
                    assert await receive(other) == b"x"
        engine = network.stack.gateway.engine
        while await network.stack.local.driver.call(lambda: engine.deadline - engine.now) < IDLE:  # noqa: ASYNC110
            await anyio.sleep(0.1)  # timers of segments that have been answered since
        thread = next((thread for thread in threading.enumerate() if thread.name == "netns_kit engine"), None)
        start, process, agent = anyio.current_time(), time.process_time(), ticks(network.namespace.pid)
        at_work = thread and work(thread)
        await anyio.sleep(IDLE)
        spent = (time.process_time() - process) / (anyio.current_time() - start)
        record_property("idle_cpu", round(spent, 5))
        assert spent < 0.01
        assert ticks(network.namespace.pid) == agent
        if thread and at_work:
            seconds, wakings = work(thread)
            assert wakings - at_work[1] <= 2
            assert seconds - at_work[0] < 0.001
        assert len(await network.stack.flows()) == 2 * HELD
    finally:
        for ends in held:
            for sock in ends:
                sock.close()
