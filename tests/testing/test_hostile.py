"""Tests that end badly, and event loops that live longer than a test: nothing is left, and no other test is hurt."""

from __future__ import annotations

import os
import select
from pathlib import Path

import pytest

from tests.support import needs, needs_tun, needs_userns
from tests.support.pytest_runs import RUNNERS, needs_runner, run_pytest

COMMON = """
import os, subprocess, sys, time
import anyio
import pytest
"""
"""What every source begins with."""

BAD_ENDS = (
    COMMON
    + """
opened = []

def note(thing):
    opened.append(thing)
    return thing

async def test_cancelled(tap_pair, network):
    note(tap_pair), note(await network())
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anyio.sleep(1)
    assert scope.cancelled_caught

async def fail():
    raise ValueError("in the background")

async def test_failed_in_the_background(tap_pair, network):
    note(tap_pair), note(await network())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fail)
        await anyio.sleep_forever()

async def test_out_of_time(tap_pair, network):
    note(tap_pair), note(await network())
    with anyio.fail_after(0.05):
        await anyio.sleep_forever()

async def test_that_fails_inside_a_block(network):
    async with network() as net:
        note(net)
        await net.run("sleep 1000 > /dev/null 2>&1 &")
        assert False

async def test_that_leaks(network, netns, confined):
    net = note(await network())
    await net.run("sleep 1000 > /dev/null 2>&1 &")
    await net.run([sys.executable, "-c", LISTEN])
    await confined.call(leave)
    note(netns), note(confined)
    await net.stack.serve_tcp("192.0.2.7", 7, anyio.sleep_forever)

LISTEN = '''
import os, socket, time
listener = socket.create_server(("", 80))
if os.fork() == 0:
    os.closerange(0, 3)
    time.sleep(1000)
'''

def leave():
    subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
    if os.fork() == 0:
        time.sleep(1000)

def test_nothing_is_left():
    assert opened
    for each in opened:
        assert "closed" in repr(each), each
    left = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args"], capture_output=True, text=True).stdout
    assert "sleep" not in left and "agent" not in left, left
"""
)
TWO = (
    COMMON
    + """
CLIENT = '''
import socket
with socket.create_connection(("echo.example.org", 7)) as connection:
    connection.send(b"hello")
    print(connection.recv(9).decode())
'''

async def test_two_networks(network, fake_internet):
    host = fake_internet.host("echo.example.org")

    @host.tcp(7)
    async def echo(stream):
        async for data in stream:
            await stream.send(data)

    first, second = await network(), await network()
    for net in first, second:
        done = await net.run([sys.executable, "-c", CLIENT])
        assert done.stdout == b"hello\\n"
    assert first.namespace.pid != second.namespace.pid
    assert len(fake_internet.flows) == 2

class TestInAClass:
    async def test_it(self, tap_pair, fake_internet):
        fake_internet.host("api.example.org")
        assert await tap_pair.resolve("api.example.org")
"""
)
SCOPES = (
    COMMON
    + """
pytestmark = pytest.mark.asyncio(loop_scope="{scope}")

async def test_one(tap_pair, manual_clock):
    await anyio.sleep(100)
    assert manual_clock.elapsed == pytest.approx(100)

async def test_two(network):
    began = time.monotonic()
    net = await network()
    await net.run(["true"])
    await anyio.sleep(0.05)
    assert time.monotonic() - began > 0.04

async def test_three(tap_pair, manual_clock, fake_internet):
    fake_internet.host("api.example.org").down()
    with pytest.raises(OSError): await tap_pair.connect_tcp("api.example.org", 80)
    await anyio.sleep(1000)
    assert manual_clock.elapsed == pytest.approx(1000)
"""
)
PARAMETRISED = (
    COMMON
    + """
pytestmark = pytest.mark.anyio

@pytest.fixture(scope="module", params=["asyncio", ("trio", dict(restrict_keyboard_interrupt_to_checkpoints=True))])
def anyio_backend(request): return request.param

@pytest.fixture(scope="module")
async def lasting(anyio_backend):
    await anyio.sleep(0)
    yield "the event loop of the module"

async def test_one(tap_pair, manual_clock, lasting):
    await anyio.sleep(100)
    assert manual_clock.elapsed == pytest.approx(100)

async def test_two(network, lasting):
    net = await network()
    await anyio.sleep(0.01)
    await net.run(["true"])
"""
)
SPREAD = (
    COMMON
    + """
import pathlib

@pytest.mark.parametrize("number", range(6))
async def test_it(network, tap_pair, number):
    net = await network()
    (pathlib.Path(__file__).parent / f"pid{number}").write_text(str(net.namespace.pid))
    await net.run(["true"])
    if number == 3:
        os.kill(os.getpid(), 9)
"""
)


def ends(pid: int) -> bool:
    """Wait for the end of a process that is no child of this one, and return whether it has come."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        waiting = select.poll()
        waiting.register(pidfd, select.POLLIN)
        return bool(waiting.poll(30_000))
    finally:
        os.close(pidfd)


LATE = (
    COMMON
    + """
pytestmark = pytest.mark.timeout(3, method="signal")

def test_a_plain_one(confined):
    confined.run(["sleep", "1000"])

def test_the_rest_of_one(confined):
    confined.rest()
    time.sleep(1000)

async def test_an_async_one(network, netns, confined):
    net = await network()
    await net.run("sleep 1000 > /dev/null 2>&1 &")
    await anyio.sleep_forever()

@pytest.mark.timeout(60)
def test_nothing_is_left():
    for _ in range(500):
        command = ["ps", "--ppid", str(os.getpid()), "-o", "stat=,args="]
        shown = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        left = [line for line in shown if "python" in line and not line.startswith("Z")]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(str(left))
"""
)


@pytest.mark.parametrize("runner", RUNNERS)
def test_what_ends_badly_leaves_nothing(runner: str, tmp_path: Path) -> None:
    needs("ps")
    needs_userns()
    needs_tun()
    run = run_pytest(tmp_path, BAD_ENDS, *needs_runner(runner))
    twice = 2 if runner == "anyio" else 1
    assert run.counts == {"passed": 2 * twice + 1, "failed": 3 * twice}, run.text


@pytest.mark.parametrize("runner", ["pytest_asyncio", "pytest_trio"])
def test_a_time_limit_ends_the_namespaces_of_the_test(runner: str, tmp_path: Path) -> None:
    """Also where it ends the event loop from outside, so that nothing more of the test runs."""
    needs("ps")
    needs_userns()
    needs_tun()
    run = run_pytest(tmp_path, LATE, *needs_runner(runner), "-W", "default")
    assert run.counts == {"passed": 1, "failed": 3}, run.text
    assert run.text.count("from pytest-timeout") >= 3


@pytest.mark.parametrize("runner", RUNNERS)
def test_two_networks_in_one_test(runner: str, tmp_path: Path) -> None:
    needs_userns()
    needs_tun()
    run = run_pytest(tmp_path, TWO, *needs_runner(runner))
    assert set(run.counts) == {"passed"}, run.text


@pytest.mark.parametrize("scope", ["function", "module", "session"])
def test_the_event_loops_of_pytest_asyncio(scope: str, tmp_path: Path) -> None:
    """In its strict mode, in which tests are marked."""
    needs_userns()
    needs_tun()
    needs_runner("pytest_asyncio")
    options = (
        "-p",
        "asyncio",
        "-o",
        "asyncio_mode=strict",
        "-o",
        f"asyncio_default_fixture_loop_scope={scope}",
    )
    run = run_pytest(tmp_path, SCOPES.replace("{scope}", scope), *options)
    assert run.counts == {"passed": 3}, run.text


def test_the_backends_of_anyio(tmp_path: Path) -> None:
    needs_userns()
    needs_tun()
    run = run_pytest(tmp_path, PARAMETRISED, "-p", "anyio")
    assert run.counts == {"passed": 4}, run.text


def test_a_worker_of_xdist_that_crashes_takes_its_namespaces_with_it(tmp_path: Path) -> None:
    needs_userns()
    needs_tun()
    run = run_pytest(tmp_path, SPREAD, *RUNNERS["anyio"], "-p", "xdist", "-k", "asyncio", "-n", "2")
    assert run.counts == {"passed": 5, "failed": 1}, run.text
    assert "crashed" in run.text
    pids = [int(each.read_text()) for each in tmp_path.glob("pid*")]
    assert len(pids) == 6
    assert all(map(ends, pids))
