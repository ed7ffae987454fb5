"""Storms of datagrams: the programs inside, the servers outside, and a process that has few descriptors for them.

python -m tests.support.storms    is that process: it prints what became of the storm
"""

from __future__ import annotations

import json
import resource
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from netns_kit import Uplink
from netns_kit.gateway.setup import DriverName
from netns_kit.stack import Limits
from tests.support import LONG
from tests.support.load import Ends, Rig, door, open_descriptors, receive, rig, send
from tests.support.servers import udp_server

SECONDS = 240 if LONG else 120
BATCH = 64  # exchanges under way at a time
ROUND = 2 * BATCH  # exchanges while a slow answer is waited for
DESCRIPTORS = 256
"""What the process that has few may open."""

# Run inside.  It prints how many answers were right, how many questions were refused, how many answers were lost.
PROGRAMS = """
import json, resource, socket, sys
count, batch, steady, storm_port, steady_port, timeout = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
fate = dict.fromkeys(("answered", "refused", "lost", "steady", "names"), 0)

def program(port, server):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("10.0.2.100", port))
    sock.connect(server)
    sock.settimeout(timeout / 1000)
    return sock

def ask(sock, question):
    try:
        sock.send(question)
    except ConnectionRefusedError:  # of the question before
        sock.send(question)

def hear(sock, expected, name):
    try:
        answer = sock.recv(100)
    except ConnectionRefusedError:
        fate["refused"] += 1
    except TimeoutError:
        fate["lost"] += 1
    else:
        assert answer == expected, (name, answer, expected)
        fate[name] += 1

goes_on = [program(1024 + n, ("10.0.2.2", steady_port)) for n in range(steady)]
for round in range(count // (2 * batch)):
    for number, sock in enumerate(goes_on):
        ask(sock, b"steady %d %d" % (round, number))
    head = (round % 65535 + 1).to_bytes(2, "big")
    question = b"\\0\\1\\0\\0\\0\\0\\0\\0\\7example\\3org\\0\\0\\1\\0\\1"
    resolving = program(4096 + round, ("10.0.2.3", 53))
    resolving.send(head + b"\\1\\0" + question)
    for half in (0, 1):
        first = 10000 + (2 * round + half) * batch
        storm = [program(first + n, ("10.0.2.2", storm_port)) for n in range(batch)]
        for number, sock in enumerate(storm):
            sock.send(b"storm %d" % (first + number))
        for number, sock in enumerate(storm):
            hear(sock, b"storm %d" % (first + number), "answered")
            sock.close()
    for number, sock in enumerate(goes_on):
        hear(sock, b"steady %d %d" % (round, number), "steady")
    hear(resolving, head + b"\\x81\\x80" + question, "names")
    resolving.close()
    if fate["lost"] > 300:
        break
print(json.dumps(fate))
"""


class Servers:
    """One answers the storm at once.  Two are slow: they answer when a round of the storm has passed since, so
    that their flows are the oldest but for the questions that went through them."""

    def __init__(self, *, slow: bool = True) -> None:
        self._slow = slow
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        self._held: list[Callable[[], object]] = []
        self._served = self._asked = 0
        self.most = 0  # descriptors open at a time
        self.places: set[tuple[str, int]] = set()  # where those who go on have come from

    def storm(self, sock: socket.socket, payload: bytes, sender: tuple[str, int]) -> None:
        sock.sendto(payload, sender)
        with self._lock:
            self._served += 1
            if self._served % 20 == 0:
                self.most = max(self.most, open_descriptors())
            if self._served % ROUND == 0:
                for answer in self._held:
                    answer()
                self._held.clear()

    def steady(self, sock: socket.socket, payload: bytes, sender: tuple[str, int]) -> None:
        self.places.add(sender)
        self._later(int(payload.split()[1]), lambda: sock.sendto(payload, sender))

    def names(self, sock: socket.socket, payload: bytes, sender: tuple[str, int]) -> None:
        """The resolver.  Whose turn it is, it has learnt from what it was asked before."""
        self._later(self._asked, lambda: sock.sendto(payload[:2] + b"\x81\x80" + payload[4:], sender))
        self._asked += 1

    def _later(self, round: int, answer: Callable[[], object]) -> None:
        with self._lock:
            if self._slow and self._served // ROUND <= round:
                self._held.append(answer)
            else:
                answer()


@asynccontextmanager
async def storms(
    servers: Servers, driver: DriverName, **limits: Any
) -> AsyncIterator[tuple[Rig, Callable[..., Awaitable[dict[str, int]]]]]:
    """A network, and what runs `PROGRAMS` in it and tells what became of the questions."""
    with (
        udp_server(servers.storm) as storm_port,
        udp_server(servers.steady) as steady_port,
        udp_server(servers.names) as resolver,
    ):
        uplink = Uplink(allow_host_loopback=True, dns=[f"127.0.0.1:{resolver}"])
        async with rig(driver, uplink=uplink, limits=Limits(**limits)) as network:

            async def run(count: int, batch: int, steady: int, timeout: float) -> dict[str, int]:
                numbers = count, batch, steady, storm_port, steady_port, int(timeout * 1000)
                script = [sys.executable, "-ISc", PROGRAMS, *map(str, numbers)]
                done = await network.namespace.run(script, stderr=None)
                fate: dict[str, int] = json.loads(done.stdout)
                return fate

            yield network, run


# Run inside.  It connects until it is refused, asks for a name, and prints how many connections there were and
# whether the name was told.
CONNECTIONS = """
import errno, json, resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
held = []
try:
    while len(held) < 400:
        held.append(socket.create_connection(("10.0.2.2", int(sys.argv[1])), 5))
except OSError as error:
    assert error.errno == errno.ENETUNREACH, error
question = b"\\0\\1\\0\\0\\0\\0\\0\\0\\7example\\3org\\0\\0\\1\\0\\1"
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(2)
sock.connect(("10.0.2.3", 53))
sock.send(b"id\\1\\0" + question)
try:
    answer = sock.recv(100)
except OSError:
    answer = b""
print(json.dumps([len(held), answer == b"id\\x81\\x80" + question]))
"""


async def _starve() -> None:
    """The whole of it, in a process that may open few descriptors."""
    servers = Servers(slow=False)
    over = anyio.Event()

    async def speak(ends: Ends) -> None:
        while not over.is_set():
            await send(ends[0], b"still there")
            assert await receive(ends[1]) == b"still there"
            with anyio.move_on_after(0.01):
                await over.wait()

    with anyio.fail_after(SECONDS):
        async with storms(
            servers, "thread", udp_one_way=0.5, udp_stream=0.5, udp_one_shot=0.5, tcp_time_wait=0.2
        ) as (network, run):
            with socket.create_server(
                ("127.0.0.1", 0), backlog=1024
            ) as crowd:  # accepting takes descriptors, too
                script = [sys.executable, "-ISc", CONNECTIONS, str(crowd.getsockname()[1])]
                done = await network.namespace.run(script, stderr=None)
            await network.gone(5.0)
            async with door(network, "out") as connect:
                ends = await connect()
                with ends[0], ends[1]:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(speak, ends)
                        fate = await run(400, 200, 0, 0.02)
                        over.set()
                await network.gone(5.0)
                for ends in [await connect() for _ in range(20)]:
                    with ends[0], ends[1]:
                        await send(ends[0], b"again")
                        assert await receive(ends[1]) == b"again"
    connections, named = json.loads(done.stdout)
    told = {"connections": connections, "named": named, "fate": fate, "most": servers.most}
    print(json.dumps(told))  # noqa: T201 - the parent listens


def starve() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
    anyio.run(_starve)


if __name__ == "__main__":
    starve()
