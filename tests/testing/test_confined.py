"""Functions of a test in a child that has no network but the test's: what comes back, and what cannot."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import anyio
import pytest

from netns_kit import FeatureUnavailable
from netns_kit.testing import Confined
from tests.support import needs_tun, needs_userns
from tests.support.servers import bounded

pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture
def machine() -> None:
    needs_userns()
    needs_tun()


@pytest.fixture
def echo(fake_internet: Any) -> None:
    """A host that sends back what it gets."""

    async def handler(stream: Any) -> None:
        async for data in stream:
            await stream.send(data)

    fake_internet.host("echo.example.org").serve_tcp(7, handler)


def exchange() -> bytes:
    with socket.create_connection(("echo.example.org", 7), 20) as connection:
        connection.sendall(b"hello")
        return connection.recv(100)


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_it_has_the_network_of_the_test_and_no_other(confined: Confined, echo: None) -> None:
    def interfaces() -> list[str]:
        return [name for _, name in socket.if_nameindex()]

    assert await confined.call(exchange) == b"hello"
    assert sorted(await confined.call(interfaces)) == ["lo", "tap0"]
    with pytest.raises(OSError, match="unreachable"):
        await confined.call(socket.create_connection, ("192.0.2.1", 80), 20)


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_an_async_function_has_an_event_loop_of_its_own(confined: Confined, echo: None) -> None:
    async def ask() -> bytes:
        async with await anyio.connect_tcp("echo.example.org", 7) as stream:
            await stream.send(b"hello")
            return await stream.receive()

    assert await confined.call(ask) == b"hello"


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_it_is_the_same_user_and_directory_and_a_process_of_its_own(confined: Confined) -> None:
    def seen() -> tuple[int, str, int]:
        assert os.readlink("/proc/self") == str(os.getpid())
        return os.getuid(), os.getcwd(), threading.active_count()

    assert await confined.call(seen) == (os.getuid(), os.getcwd(), 1)


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_what_it_raises_is_raised_with_the_childs_traceback(confined: Confined) -> None:
    def fail() -> None:
        raise LookupError("not there")

    with pytest.raises(LookupError, match="not there") as caught:
        await confined.call(fail)
    assert "in fail" in str(caught.value.__cause__)


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_what_cannot_be_pickled_is_told(confined: Confined) -> None:
    class Local(Exception):
        pass

    def fail() -> None:
        raise Local("of this test")

    with pytest.raises(TypeError, match="the result cannot be pickled"):
        await confined.call(threading.Lock)
    with pytest.raises(RuntimeError, match="Local: of this test"):
        await confined.call(fail)


class Mute:
    """What says nothing of itself."""

    def __repr__(self) -> str:
        raise KeyboardInterrupt

    def __reduce__(self) -> str:
        raise SystemExit(3)


class MuteError(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    def __reduce__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_what_says_nothing_of_itself_is_told_by_its_class(confined: Confined) -> None:
    def fail() -> None:
        raise MuteError

    with pytest.raises(TypeError, match="the result cannot be pickled: <Mute>: 3"):
        await confined.call(Mute)
    with pytest.raises(RuntimeError, match="MuteError: <MuteError>"):
        await confined.call(fail)


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_a_result_of_many_bytes_comes_whole(confined: Confined) -> None:
    value = bytearray(range(256)) * (1 << 18)
    assert len(value) == 64 << 20
    assert await confined.call(bytearray, value) == value


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_a_function_may_close_its_output(confined: Confined, monkeypatch: pytest.MonkeyPatch) -> None:
    def close() -> int:
        sys.stdout.close()
        return 3

    assert await confined.call(close) == 3
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert await confined.call(len, "four") == 4


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGRTMIN + 1), f"status {128 + signal.SIGRTMIN + 1}"),
        (lambda: os._exit(3), "status 3"),
        (lambda: os._exit(255), "status 255"),
    ],
)
async def test_a_child_that_ends_early_is_told(confined: Confined, end: Any, told: str) -> None:
    with pytest.raises(ChildProcessError, match=told):
        await confined.call(end)


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_a_cancelled_call_kills_the_child(confined: Confined) -> None:
    with anyio.move_on_after(0.2) as scope:
        await confined.call(time.sleep, 1000)
    assert scope.cancelled_caught
    assert await confined.call(len, "and another one") == 15


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_what_a_child_leaves_running_is_not_waited_for_and_ends_with_the_network(
    confined: Confined,
) -> None:
    def leave() -> None:
        subprocess.Popen(["sleep", "1000"])
        if os.fork() == 0:  # with the pipe to the parent
            time.sleep(1000)

    await confined.call(leave)


def test_the_rest_of_a_test(confined: Any, fake_internet: Any) -> None:
    def handler(stream: Any) -> None:
        with stream:
            stream.send(stream.receive())

    fake_internet.host("echo.example.org").serve_tcp(7, handler)
    parent = os.getpid()
    confined.rest()
    assert os.getpid() != parent
    assert exchange() == b"hello"
    program = "import socket; socket.create_connection(('192.0.2.1', 80), 20)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "unreachable" in done.stderr


def test_the_rest_of_a_test_with_threads(confined: Any) -> None:
    let_go, caught = threading.Event(), list[BaseException]()

    def refused() -> None:
        try:
            confined.rest()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=refused)
    thread.start()
    thread.join()
    assert isinstance(caught[0], FeatureUnavailable), caught
    waiting = threading.Thread(target=let_go.wait)
    waiting.start()
    try:
        confined.rest()
        parent = os.getpid()
        confined.rest()
        assert (os.getpid(), threading.active_count()) == (parent, 1)
    finally:
        let_go.set()
        waiting.join()


def test_a_plain_network_takes_synchronous_objects(network: Any, fake_internet: Any) -> None:
    asked = []

    def on_flow(request: Any) -> bool:
        asked.append(request.remote.port)
        return False

    fake_internet.host("echo.example.org")
    program = "import socket; socket.create_connection(('echo.example.org', 7), 20)"
    with network(uplink=fake_internet, on_flow=on_flow) as net:
        done = net.run([sys.executable, "-c", program], check=False)
    assert done.stderr.endswith(b"No route to host\n"), done.stderr
    assert asked == [7]
