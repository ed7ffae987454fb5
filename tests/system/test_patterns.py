"""Patterns of traffic that have stalled, leaked or killed others: many small lines, slow readers, every teardown.

Each both outbound and through a forwarded port.  Short by default, with each driver: 20,000 lines, readers that sleep
1.5 s, 100 connections; with NETNS_KIT_LONG=1: 400,000 lines, 10 s, 1,000 connections.
"""

from __future__ import annotations

import gc
import hashlib
import socket
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from random import Random
from typing import Literal

import anyio
import anyio.lowlevel
import pytest

from netns_kit.gateway.setup import DriverName
from netns_kit.stack import Limits, State
from netns_kit.tap.impaired import ImpairedTap
from netns_kit.tap.impairment import Impairment
from tests.support import LONG, needs_tun
from tests.support.load import (
    MIB,
    Door,
    Ends,
    Rig,
    Way,
    door,
    open_descriptors,
    receive,
    resident,
    rig,
    send,
)
from tests.support.servers import content, digest, reset

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks"), pytest.mark.timeout(300)]

SECONDS = 240 if LONG else 120  # a keepalive probe that is lost comes again after 30
LINES = 400_000 if LONG else 20_000
SLEEP = 5.0 if LONG else 0.5
CONNECTIONS = 1000 if LONG else 100
LIMITS = Limits(tcp_time_wait=0.2, tcp_half_closed=0.5, tcp_idle=0.5, tcp_pending_time=1.0)
TIMERS = 20.0
"""Longer than any of these timers, for whoever must repeat a segment first."""


@pytest.fixture
def driver(anyio_backend_name: str) -> DriverName:
    """Each once, and each event loop once."""
    needs_tun()
    return "thread" if anyio_backend_name == "asyncio" else "loop"


@pytest.fixture
async def net(leaks: None, driver: DriverName) -> AsyncIterator[Rig]:
    async with rig(driver, limits=LIMITS) as network:
        yield network


def finish(sock: socket.socket) -> None:
    """There is no more to say.  If the other is gone already, reading will tell."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


# -- psql COPY ----------------------------------------------------------------------------------------


def line(number: int) -> bytes:
    return b"%d\tand what stands in row %d\n" % (number, number % 97)


def reply(number: int) -> bytes:
    return b"%d rows are here; the last: " % (number + 1) + 8 * line(number)[:-1] + b"\n"


class Client:
    """Writes line by line, as `psql` does for COPY, and reads only when it could not write for a moment."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._cannot_write = anyio.Event()
        self.heard = hashlib.sha256()
        self.stalls = 0

    async def write(self) -> None:
        for number in range(LINES):
            left = line(number)
            while left:
                await anyio.lowlevel.checkpoint()
                try:
                    left = left[self._sock.send(left) :]
                except BlockingIOError:
                    with anyio.move_on_after(0.05) as moment:
                        await anyio.wait_writable(self._sock)
                    if moment.cancelled_caught:
                        self._cannot_write.set()
                        self.stalls += 1
                        await anyio.wait_writable(self._sock)
                        self._cannot_write = anyio.Event()
        finish(self._sock)
        self._cannot_write.set()

    async def read(self) -> None:
        data = b"x"
        while data:
            await self._cannot_write.wait()
            data = await receive(self._sock, 1 << 14)
            self.heard.update(data)


async def answer_each_line(sock: socket.socket) -> None:
    left, number = b"", 0
    while data := await receive(sock):
        *lines, left = (left + data).split(b"\n")
        for text in lines:
            assert text + b"\n" == line(number)
            await send(sock, reply(number))
            number += 1
    assert (number, left) == (LINES, b"")
    finish(sock)


@pytest.mark.parametrize("turned", [False, True] if LONG else [False])
async def test_small_lines_and_their_answers(net: Rig, anyio_backend_name: str, turned: bool) -> None:
    """The answers' direction is full from end to end, and so is the other with as many lines as the long form has;
    all goes on as soon as the client reads.
    """
    way: Way = "out" if (anyio_backend_name == "asyncio") != turned else "in"
    expected = hashlib.sha256()
    for number in range(LINES):
        expected.update(reply(number))
    with anyio.fail_after(SECONDS):
        async with door(net, way) as connect:
            guest, host = await connect()
            client, server = (guest, host) if way == "out" else (host, guest)
            with client, server:
                for sock in (
                    client,
                    server,
                ):  # and not SO_RCVBUF: a small one chokes on small segments, ACKs and all
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                program = Client(client)
                async with anyio.create_task_group() as tasks:
                    for each in (program.write, program.read):
                        tasks.start_soon(each)
                    tasks.start_soon(answer_each_line, server)
                assert program.heard.digest() == expected.digest()
                assert program.stalls or not LONG
        await net.gone(TIMERS)


# -- slow readers -------------------------------------------------------------------------------------

SLOW_MIB = 30


@dataclass
class Reader:
    """Reads some, sleeps, and reads the rest."""

    sock: socket.socket
    before: int
    wake: anyio.Event
    sha: str = ""

    async def run(self) -> None:
        sha, left = hashlib.sha256(), self.before
        while left:
            data = await receive(self.sock, min(left, 1 << 18))
            sha.update(data)
            left -= len(data)
        await self.wake.wait()
        while data := await receive(self.sock):
            sha.update(data)
        self.sha = sha.hexdigest()


async def test_readers_that_sleep(net: Rig) -> None:
    """30 MiB each, at once: both directions, opened from either side; half sleep from the first byte on,
    against a window of zero, and half in mid-stream.

    While they sleep nobody's memory grows, nobody spins, and what they have not read has not been sent.
    """
    wake = anyio.Event()
    readers: list[Reader] = []
    written: list[int] = []
    size = resident()

    async def write(sock: socket.socket, index: int) -> None:
        for block in content(SLOW_MIB):
            await send(sock, block)
            written[index] += 1
        finish(sock)

    async def open_all(way: Way, stack: ExitStack) -> list[socket.socket]:
        """Who writes."""
        writers = []
        async with door(net, way, buffer=1 << 18) as connect:
            for outward in (True, False):
                for before in (0, 5 * MIB):
                    guest, host = [stack.enter_context(sock) for sock in await connect()]
                    writer, reader = (guest, host) if outward else (host, guest)
                    writers.append(writer)
                    readers.append(Reader(reader, before, wake))
                    written.append(0)
        return writers

    with anyio.fail_after(SECONDS):
        with ExitStack() as stack:
            writers = await open_all("out", stack) + await open_all("in", stack)
            async with anyio.create_task_group() as tasks:
                for index, writer in enumerate(writers):
                    tasks.start_soon(write, writer, index)
                    tasks.start_soon(readers[index].run)
                stood: list[int] = []
                while stood != written:
                    start, cpu, stood = anyio.current_time(), time.process_time(), list(written)
                    await anyio.sleep(SLEEP)
                spent = (time.process_time() - cpu) / (anyio.current_time() - start)
                assert max(written) < SLOW_MIB - 5
                assert resident() - size < 64 * MIB
                assert spent < 0.05
                wake.set()
        assert [reader.sha for reader in readers] == [digest(SLOW_MIB)] * 8
        await net.gone(TIMERS)


# -- teardown in any order ----------------------------------------------------------------------------


def ask(sock: socket.socket) -> None:
    """Look after the other end every second: of a reset that is lost nobody tells who does not ask."""
    for option, value in (socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


End = Literal["finish", "answer", "close", "reset"]


@dataclass
class Side:
    """One end of a connection: what it has to say, how far it gets, and how it ends.

    `finish`: it says all, half-closes, and reads on to the end.  `answer`: it hears the other to the end first,
    and says all then.  `close` and `reset`: it says some, reads a little or nothing, and is gone.
    """

    sock: socket.socket
    words: bytes
    end: End
    hears: int  # bytes, before it closes or resets
    heard: bytes = b""
    told: str = ""  # how it learnt of the other's end: "end" or "error"

    async def run(self) -> None:
        for option, value in (
            (socket.TCP_KEEPIDLE, 1),
            (socket.TCP_KEEPINTVL, 1),
        ):  # a lost RST is told to who asks
            self.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with self.sock:
            try:
                await self._live()
            except ConnectionError:
                self.told = "error"
            if self.end == "reset":
                reset(self.sock)

    async def _live(self) -> None:
        if self.end == "finish":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._say)
                await self._hear_all()
        elif self.end == "answer":
            await self._hear_all()
            await self._say()
        else:
            await send(self.sock, self.words)
            while len(self.heard) < self.hears and not self.told:
                await self._hear()

    async def _say(self) -> None:
        try:
            await send(self.sock, self.words)
        except ConnectionError:
            self.told = "error"
        else:
            finish(self.sock)

    async def _hear_all(self) -> None:
        while not self.told:
            await self._hear()

    async def _hear(self) -> None:
        try:
            data = await receive(self.sock)
        except ConnectionError:
            self.told = "error"
            return
        self.heard += data
        if not data and not self.told:
            self.told = "end"

    def check(self, other: Side) -> None:
        """What it heard is what the other said, from the beginning; and an end is only told when it is one."""
        assert other.words.startswith(self.heard)
        if self.told == "end":
            assert other.end != "reset"
            assert self.heard == other.words
        if self.end in ("finish", "answer"):
            assert self.told
            if other.end in ("finish", "answer"):
                assert (self.told, self.heard) == ("end", other.words)


def sides(random: Random, ends: Ends, most: int) -> tuple[Side, Side]:
    kinds: list[End] = [random.choice(("finish", "answer", "close", "reset")) for _ in ends]
    if kinds == ["answer", "answer"]:  # each would wait for the other
        kinds[random.randrange(2)] = "finish"
    words = [random.randbytes(random.choice((0, 1, random.randrange(most)))) for _ in ends]
    hears = [
        0 if kinds[1 - side] == "answer" else random.randint(0, min(len(words[1 - side]), 1000))
        for side in (0, 1)
    ]
    guest, host = (Side(ends[side], words[side], kinds[side], hears[side]) for side in (0, 1))
    return guest, host


def left() -> list[object]:
    """Relays that exist, and connections that are not over.  One that is over may wait in the heap of timers for
    the entry of a timer it has needed no more, a minute at most."""
    gc.collect()
    things = [thing for thing in gc.get_objects() if type(thing).__name__ in ("TcpConnection", "TcpRelay")]
    over = State.CLOSED, State.TIME_WAIT  # of which the table keeps a record, and no connection
    return [thing for thing in things if getattr(thing, "state", None) not in over]


MOST = 60_000  # bytes: two that say all before they hear anything wait for nobody, if buffers hold it


@pytest.mark.parametrize("bad", [False, True], ids=["in order", "out of order"])
async def test_every_order_of_teardown(leaks: None, driver: DriverName, bad: bool) -> None:
    """FIN, RST and half-close from either side, early or late, over a good link and over one that loses,
    reorders and duplicates; afterwards no flow, descriptor, connection or buffer remains.
    """
    random = Random(20 + bad)
    lives: list[tuple[Side, Side]] = []
    clean, spoiled = (
        Impairment(queue=1 << 16, loss=chance, reorder=10 * chance, duplicate=5 * chance)
        for chance in (0.0, 0.02)
    )

    async def some(network: Rig, doors: list[Door], count: int) -> None:
        """So many at a time, opened while the link is good."""
        some = [sides(random, await random.choice(doors)(), 20_000 if bad else MOST) for _ in range(count)]
        lives.extend(some)
        if bad:
            await network.weather(spoiled)
        async with anyio.create_task_group() as tasks:
            for side in random.sample([side for pair in some for side in pair], 2 * count):
                tasks.start_soon(side.run)
        if bad:
            await network.weather(clean)

    with anyio.fail_after(SECONDS):
        async with (
            rig(driver, limits=LIMITS, offloads=not bad, impaired=clean if bad else None) as network,
            door(network, "out") as go_out,
            door(network, "in") as come_in,
        ):
            descriptors = open_descriptors()
            for _ in range(CONNECTIONS // 50):
                await some(network, [go_out, come_in], 25 if bad else 50)
            for guest, host in lives:
                guest.check(host)
                host.check(guest)
            await network.gone(TIMERS)
            assert open_descriptors() == descriptors
            stats = await network.stack.stats()
            assert not [name for name, count in stats.items() if name.startswith("tcp_") and count], stats
            assert left() == []


async def test_resets_that_are_lost(leaks: None, driver: DriverName) -> None:
    """Nobody says anything afterwards; the one that is left finds out, ours by a keepalive probe."""
    with anyio.fail_after(SECONDS):
        async with (
            rig(driver, limits=LIMITS, impaired=Impairment()) as network,
            door(network, "out") as connect,
        ):
            ours, theirs = await connect(), await connect()
            with ours[0], ours[1], theirs[0], theirs[1]:
                for guest, host in (ours, theirs):
                    ask(guest)
                    await send(guest, b"x")
                    assert await receive(host) == b"x"
                await network.weather(Impairment(loss=1.0))
                reset(ours[0])
                reset(theirs[1])
                lost = network.tap
                assert isinstance(lost, ImpairedTap)
                while not (lost.transmit.lost and lost.receive.lost):  # noqa: ASYNC110 - counters tell nobody
                    await anyio.sleep(0.01)
                await network.weather(Impairment())
                for left in (ours[1], theirs[0]):
                    with pytest.raises(ConnectionResetError):
                        await receive(left)
            await network.gone(TIMERS)
