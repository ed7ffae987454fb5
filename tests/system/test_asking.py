"""People who are asked: a program in a namespace waits meanwhile, and goes on as they say, on each driver."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NoReturn

import anyio
import anyio.lowlevel
import pytest

from netns_kit import (
    Endpoint,
    FlowAnswer,
    FlowRequest,
    Network,
    Policy,
    PolicyError,
    Refusal,
    StackCrashed,
    Uplink,
)
from netns_kit.gateway.setup import DriverName
from tests.support import needs, needs_ping, needs_tun
from tests.support.connections import GATEWAY, dial, driver, every_driver, outcome
from tests.support.events import followed
from tests.support.servers import bounded, echo, tcp_server, udp_server

__all__ = ["driver"]  # a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

NOWHERE = "192.0.2.1"  # TEST-NET-1
ASKS = Policy.allow().ask(GATEWAY, NOWHERE, name="people")
RULE = ASKS.label(0)
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    print(connection.recv(100).decode())
"""


class Person:
    """Answers what it is told to, after a while, and remembers what it was asked."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked: list[FlowRequest] = []

    async def __call__(self, asked: FlowRequest) -> FlowAnswer:
        self.asked.append(asked)
        await anyio.lowlevel.checkpoint()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[return-value]  # or not: that is what is tested


def network(
    driver: DriverName,
    person: Callable[[FlowRequest], Awaitable[FlowAnswer]] | None,
    policy: Policy | None = ASKS,
    *,
    timeout: float = 30.0,
    queues: int = 1,
) -> Network:
    needs_tun()
    uplink = Uplink(allow_host_loopback=True, dns=[])
    return Network(
        uplink=uplink, driver=driver, policy=policy, queues=queues, on_flow=person, on_flow_timeout=timeout
    )


@asynccontextmanager
async def datagrams(net: Network, port: int, address: str = GATEWAY) -> AsyncIterator[socket.socket]:
    """A socket inside that is connected to that port."""
    with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((address, port))
        yield sock


async def error_of(sock: socket.socket) -> int:
    await anyio.wait_readable(sock)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


@every_driver
@bounded
async def test_a_program_goes_on_when_somebody_has_said_yes(driver: DriverName) -> None:
    person = Person(True)

    def hello(sock: socket.socket) -> None:
        sock.sendall(b"hello")

    with tcp_server(hello) as port:
        async with network(driver, person) as net:
            done = await net.run([sys.executable, "-c", CLIENT, GATEWAY, str(port)], stdout=-1)
            assert done.stdout == b"hello\n"
            [asked] = person.asked
    assert (asked.protocol, str(asked.remote), asked.rule) == ("tcp", f"{GATEWAY}:{port}", RULE)
    assert str(asked.guest.address) == "10.0.2.100"
    assert asked.name == "gateway.containers.internal"
    assert asked.process is not None
    assert (asked.process.name, asked.process.command) == (
        os.path.basename(sys.executable)[:15],
        sys.executable,
    )


@every_driver
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (False, errno.EHOSTUNREACH),
        (Refusal.RESET, errno.ECONNREFUSED),
        (Refusal.PROHIBITED, errno.EHOSTUNREACH),
    ],
    ids=str,
)
@bounded
async def test_or_is_told_no(driver: DriverName, answer: FlowAnswer, expected: int) -> None:
    person = Person(answer)
    async with network(driver, person) as net, followed(net.stack) as events:
        with await dial(net.namespace, 80, NOWHERE) as sock:
            assert await outcome(sock) == expected
        async with datagrams(net, 80, NOWHERE) as sock:
            sock.send(b"x")
            assert await error_of(sock) == expected
        seen = [await events.receive() for _ in range(4)]
    assert [asked.protocol for asked in person.asked] == ["tcp", "udp"]
    assert [(event.kind, event.rule) for event in seen] == [("opened", RULE), ("refused", RULE)] * 2


@every_driver
@bounded
async def test_or_is_led_elsewhere(driver: DriverName) -> None:
    with tcp_server(echo) as port, udp_server() as other:

        async def redirect(asked: FlowRequest) -> Endpoint:
            return Endpoint("127.0.0.1", port if asked.protocol == "tcp" else other)

        async with network(driver, redirect) as net:
            async with await net.namespace.connect_tcp(NOWHERE, 9) as stream:
                await stream.send(b"over there")
                assert await stream.receive() == b"over there"
            async with datagrams(net, 9, NOWHERE) as sock:
                sock.send(b"and there")
                await anyio.wait_readable(sock)
                assert sock.recv(100) == b"and there"


@every_driver
@bounded
async def test_first_datagrams_arrive_in_order_after_the_answer(driver: DriverName) -> None:
    asked, allowed = anyio.Event(), anyio.Event()

    async def later(_: FlowRequest) -> bool:
        asked.set()
        await allowed.wait()
        return True

    with udp_server() as port:
        async with network(driver, later) as net, datagrams(net, port) as sock:
            for number in range(5):
                sock.send(b"%d" % number)
            await asked.wait()
            [flow] = await net.stack.flows()
            assert (flow.rule, flow.host) == (RULE, None)
            allowed.set()
            got: list[bytes] = []
            while len(got) < 5:
                await anyio.wait_readable(sock)
                got.append(sock.recv(100))
    assert got == [b"%d" % number for number in range(5)]


@every_driver
@bounded
async def test_many_wait_at_once_and_nobody_for_another(driver: DriverName) -> None:
    waiting: dict[int, anyio.Event] = {}
    all_are, count = anyio.Event(), 20

    async def each_in_its_time(asked: FlowRequest) -> bool:
        waiting[asked.guest.port] = event = anyio.Event()
        if len(waiting) == count:
            all_are.set()
        await event.wait()
        return True

    with tcp_server(echo) as port:
        async with network(driver, each_in_its_time) as net:
            socks = [await dial(net.namespace, port) for _ in range(count)]
            await all_are.wait()
            assert (await net.stack.stats())["flows_asked"] == count
            for sock in reversed(socks):  # the last comes first
                waiting[sock.getsockname()[1]].set()
                assert await outcome(sock) == 0
                sock.close()


@every_driver
@bounded
async def test_ping_waits_too(driver: DriverName) -> None:
    needs("ping")
    needs_ping()
    person = Person(Endpoint("127.0.0.1", 0))
    async with network(driver, person) as net:
        done = await net.run(["ping", "-c1", "-W10", NOWHERE], stdout=-1, check=False)
    assert done.returncode == 0, done.stdout
    [asked] = person.asked
    assert asked.protocol == "icmp"
    assert asked.process is not None
    assert asked.process.name == "ping"


# -- what never lets a flow pass ----------------------------------------------------------------------


@every_driver
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (LookupError("a bug"), "LookupError: a bug"),
        (None, "on_flow has returned None: expected True, False, a Refusal or an Endpoint"),
        (1, "on_flow has returned 1"),
        ("yes", "on_flow has returned 'yes'"),
        ((GATEWAY, 80), "on_flow has returned"),
    ],
    ids=["raises", "none", "one", "text", "tuple"],
)
@bounded
async def test_who_answers_nonsense_says_no_and_it_is_logged_once(
    driver: DriverName, answer: object, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    person = Person(answer)
    with tcp_server(echo) as port:
        async with network(driver, person) as net:
            for _ in range(3):
                with await dial(net.namespace, port) as sock:
                    assert await outcome(sock) == errno.EHOSTUNREACH
            assert await echoes_elsewhere(net)
    assert len(person.asked) == 3
    [record] = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert RULE in record.getMessage()
    assert words in caplog.text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (SystemExit("enough"), "SystemExit: enough"),
        (GeneratorExit("enough"), "GeneratorExit: enough"),
        (asyncio.CancelledError("a task of the caller's"), "CancelledError: a task of the caller's"),
        (Endpoint._make(("nowhere", 80)), "address='nowhere': expected an IPv4 or IPv6 address"),
    ],
    ids=["exit", "generator", "cancelled", "endpoint"],
)
@bounded
async def test_nothing_that_on_flow_raises_ends_the_asking(
    driver: DriverName, answer: object, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The flow is refused at once, and the next one is asked about: with a time limit nobody lives to see."""
    person = Person(answer, True)
    with tcp_server(echo) as port:
        async with network(driver, person, timeout=3600) as net:
            with await dial(net.namespace, port) as sock:
                assert await outcome(sock) == errno.EHOSTUNREACH
            with await dial(net.namespace, port) as sock:
                assert await outcome(sock) == 0
    assert words in caplog.text


async def echoes_elsewhere(net: Network) -> bool:
    """Whether the stack still answers."""
    return (await net.stack.stats())["flows_asked"] == 0


@every_driver
@bounded
async def test_who_sleeps_says_no(driver: DriverName, caplog: pytest.LogCaptureFixture) -> None:
    cancelled = anyio.Event()

    async def sleep(_: FlowRequest) -> NoReturn:
        try:
            await anyio.sleep_forever()
            raise AssertionError("it never ends")
        finally:
            cancelled.set()

    async with network(driver, sleep, timeout=0.2) as net:
        with await dial(net.namespace, 80, NOWHERE) as sock:
            assert await outcome(sock) == errno.EHOSTUNREACH
        await cancelled.wait()
    [record] = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "on_flow has not answered within 0.2 s about tcp to " in record.getMessage()
    assert RULE in record.getMessage()


@pytest.mark.parametrize(
    ("anyio_backend", "driver"), [("asyncio", "thread"), ("asyncio", "worker"), ("trio", "thread")]
)
@bounded
async def test_who_blocks_the_event_loop_says_no_and_delays_nobody(driver: DriverName) -> None:
    """The engine refuses by its own clock."""
    is_over = anyio.Event()

    async def block(_: FlowRequest) -> bool:
        with select.epoll() as poll:
            poll.register(sock, select.EPOLLIN)
            poll.poll()
        is_over.set()
        return True

    async with network(driver, block, timeout=0.2) as net:
        with await dial(net.namespace, 80, NOWHERE) as sock:
            await is_over.wait()
            assert await outcome(sock) == errno.EHOSTUNREACH
            assert (await net.stack.stats())["flows_asked"] == 0
            assert await net.stack.flows() == ()


@pytest.mark.parametrize("driver", ["loop"])
@bounded
async def test_who_blocks_the_loop_that_is_the_engines_too_says_no_all_the_same(driver: DriverName) -> None:
    async def block(_: FlowRequest) -> bool:
        time.sleep(0.1)  # noqa: ASYNC251 - that is what is tested
        return True

    with tcp_server(echo) as port:
        async with network(driver, block, timeout=0.05) as net:
            with await dial(net.namespace, port) as sock:
                assert await outcome(sock) == errno.EHOSTUNREACH
            assert (await net.stack.stats())["flows_asked"] == 0


@every_driver
@bounded
async def test_a_program_that_gives_up_ends_the_question(driver: DriverName) -> None:
    asked, cancelled = anyio.Event(), anyio.Event()

    async def wait(_: FlowRequest) -> NoReturn:
        asked.set()
        try:
            await anyio.sleep_forever()
            raise AssertionError("it never ends")
        finally:
            cancelled.set()

    async with network(driver, wait) as net, datagrams(net, 80, NOWHERE) as sock:
        sock.send(b"x")
        await asked.wait()
        [flow] = await net.stack.flows()
        await net.stack.end_flow(flow.id)
        await cancelled.wait()


@every_driver
@bounded
async def test_closing_while_somebody_thinks(driver: DriverName) -> None:
    asked, cancelled = anyio.Event(), anyio.Event()

    async def wait(_: FlowRequest) -> NoReturn:
        asked.set()
        try:
            await anyio.sleep_forever()
            raise AssertionError("it never ends")
        finally:
            cancelled.set()

    async with network(driver, wait) as net:
        with await dial(net.namespace, 80, NOWHERE):
            await asked.wait()
    assert cancelled.is_set()


@bounded
async def test_a_worker_that_dies_lets_nothing_pass() -> None:
    asked = anyio.Event()
    answered: list[bool] = []

    async def late(_: FlowRequest) -> NoReturn:
        asked.set()
        try:
            await anyio.sleep_forever()
            raise AssertionError("it never ends")
        finally:
            answered.append(True)

    with pytest.raises(StackCrashed, match="killed by SIGKILL"):  # noqa: PT012  # closing raises it
        async with network("worker", late) as net:
            with await dial(net.namespace, 80, NOWHERE):
                await asked.wait()
                os.kill(net.stack.workers.processes[0].pid, signal.SIGKILL)
                with pytest.raises(StackCrashed):
                    await net.stack.wait_closed()
    assert answered == [True]


@every_driver
@bounded
async def test_a_new_policy_may_ask_only_where_somebody_answers(driver: DriverName) -> None:
    person = Person(False)
    async with network(driver, None, Policy.allow()) as net:
        with pytest.raises(PolicyError, match=r"rule 1 .people.*a function to ask"):
            await net.stack.set_policy(ASKS)
    async with network(driver, person, Policy.allow()) as net:
        async with datagrams(net, 9, NOWHERE) as sock:
            sock.send(b"x")
            while not await net.stack.flows():
                await anyio.lowlevel.checkpoint()
        assert person.asked == []
        await net.stack.set_policy(ASKS)
        with await dial(net.namespace, 80, NOWHERE) as sock:
            assert await outcome(sock) == errno.EHOSTUNREACH
    assert [asked.rule for asked in person.asked] == [RULE]


@every_driver
@bounded
async def test_without_a_policy_all_are_asked_about(driver: DriverName) -> None:
    person = Person(True)
    with tcp_server(echo) as port:
        async with (
            network(driver, person, None) as net,
            await net.namespace.connect_tcp(GATEWAY, port) as stream,
        ):
            await stream.send(b"x")
            assert await stream.receive() == b"x"
    assert [asked.rule for asked in person.asked] == [Policy.ask().label(None)]


@bounded
async def test_each_of_several_workers_asks() -> None:
    person = Person(True)
    with tcp_server(echo) as port:
        async with network("worker", person, queues=2) as net:
            for _ in range(30):  # the kernel draws a queue for each
                async with await net.namespace.connect_tcp(GATEWAY, port) as stream:
                    await stream.send(b"x")
                    assert await stream.receive() == b"x"
    assert len(person.asked) == 30
    assert {asked.id % 2 for asked in person.asked} == {0, 1}, "both have asked"
    assert {asked.name for asked in person.asked} == {"gateway.containers.internal"}
