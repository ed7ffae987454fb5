"""Ctrl-C interrupts a call and nothing else, and what is open when the interpreter exits is closed."""

from __future__ import annotations

import _thread
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from netns_kit import NamespaceGone, sync
from netns_kit.sync.facade import synchronized
from netns_kit.sync.loop_thread import loop_thread
from tests.support import ROOT, needs_tun, needs_userns, wait_exit

SECONDS = 60.0


@pytest.fixture
def interrupting(default_signals: None) -> Iterator[Callable[[Callable[[], object]], threading.Thread]]:
    """A function that has this process interrupted, as by Ctrl-C, when another function returns."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = list[threading.Thread]()

    def interrupt(ready: Callable[[], object]) -> threading.Thread:
        def wait() -> None:
            ready()
            os.kill(os.getpid(), signal.SIGINT)

        begun.append(threading.Thread(target=wait))
        begun[-1].start()
        return begun[-1]

    yield interrupt
    for thread in begun:
        thread.join()
    signal.signal(signal.SIGINT, before)


Interrupting = Callable[[Callable[[], object]], threading.Thread]


def until(done: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_command_is_interrupted_and_nothing_else(
    net: sync.Network, interrupting: Interrupting, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    with net.popen(["sleep", "600"]) as other:
        interrupting(lambda: until(told.exists))
        with pytest.raises(KeyboardInterrupt):
            net.run(["sh", "-c", f"echo $$ >{told}; exec sleep 601"])
        seen = net.run("cat /proc/[0-9]*/cmdline", check=False).stdout
        assert b"600" in seen
        assert b"601" not in seen, "it was killed before the call ended"
        assert other.returncode is None
    assert net.stack.flows() == ()


def test_waiting_is_interrupted(net: sync.Network, interrupting: Interrupting) -> None:
    with net.popen(["sleep", "600"]) as command:
        interrupting(lambda: time.sleep(0.2))
        with pytest.raises(KeyboardInterrupt):
            command.wait()
        assert command.returncode is None
        interrupting(lambda: time.sleep(0.2))
        with pytest.raises(KeyboardInterrupt), net.stack.events() as events:
            next(events)
        interrupting(lambda: time.sleep(0.2))
        with pytest.raises(KeyboardInterrupt):
            net.wait_closed()
        command.kill()
        assert command.wait() == -signal.SIGKILL


def test_a_signal_that_came_just_before_the_waiting_is_seen(
    net: sync.Network, interrupting: Interrupting
) -> None:
    """As it is when CPython has noted it, and the thread was not in a system call that it ends."""
    with net.popen(["sleep", "600"]) as command:
        noted = threading.Timer(0.5, _thread.interrupt_main)
        noted.start()
        with pytest.raises(KeyboardInterrupt):
            command.wait()
        noted.join()


def test_opening_is_interrupted(left: None, interrupting: Interrupting) -> None:
    """At any moment: what is not returned is closed."""
    needs_userns()
    needs_tun()
    opened = 0
    for step in range(10):
        try:
            interrupting(lambda step=step: time.sleep(step * 0.006))  # type: ignore[misc]  # of this round
            with sync.Network():
                opened += 1
                time.sleep(SECONDS)
        except KeyboardInterrupt:
            pass
    assert opened < 10


def test_closing_is_interrupted_when_it_is_done(left: None, interrupting: Interrupting) -> None:
    needs_userns()
    needs_tun()
    net = sync.open_network()
    pid = net.namespace.pid
    interrupting(lambda: until(lambda: "closed" in repr(net)))
    with suppress(KeyboardInterrupt):
        net.close()
        time.sleep(SECONDS)
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(NamespaceGone):
        net.run(["true"])


def test_a_second_interruption_ends_the_waiting(net: sync.Network, interrupting: Interrupting) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def policy(_: sync.Flow) -> None:
        begun.set()
        go_on.wait()

    other = sync.open_network(uplink=sync.Uplink(policy=policy))
    with other.popen(["bash", "-c", "</dev/tcp/192.0.2.1/9"]):
        assert begun.wait(SECONDS)
        interrupting(lambda: time.sleep(0.2))
        interrupting(lambda: time.sleep(0.6))
        with pytest.raises(KeyboardInterrupt):
            other.close()  # which waits for the policy
        assert not go_on.is_set()
        go_on.set()
    other.close()


def test_what_nobody_waits_for_any_more_is_closed(left: None, interrupting: Interrupting) -> None:
    let_go, ending, closed = threading.Event(), threading.Event(), threading.Event()
    loop = loop_thread()

    class Thing:
        async def close(self) -> None:
            closed.set()

    made = Thing()

    async def opening() -> Thing:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                ending.set()
                while not let_go.is_set():  # noqa: ASYNC110  # it is set by a thread
                    await anyio.sleep(0.01)
            loop.opened(made)
            return made  # noqa: B012  # it is too late to be cancelled

    interrupting(lambda: time.sleep(0.2))
    interrupting(ending.wait)
    with pytest.raises(KeyboardInterrupt):
        loop.call("thing", opening)
    assert not closed.is_set()
    let_go.set()
    assert closed.wait(SECONDS)


def test_an_iteration_whose_step_was_interrupted_twice_is_closed(
    left: None, interrupting: Interrupting
) -> None:
    let_go, ending = threading.Event(), threading.Event()

    async def slow() -> AsyncGenerator[int, None]:
        try:
            await anyio.sleep_forever()
            yield 1
        finally:
            with anyio.CancelScope(shield=True):
                ending.set()
                while not let_go.is_set():  # noqa: ASYNC110  # it is set by a thread
                    await anyio.sleep(0.01)

    iteration = synchronized(slow())
    interrupting(lambda: time.sleep(0.2))
    interrupting(ending.wait)
    with pytest.raises(KeyboardInterrupt):
        next(iteration)
    threading.Timer(0.1, let_go.set).start()
    iteration.close()
    assert list(iteration) == []


# -- the end of the interpreter --------------------------------------------------------------------------

OPEN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from netns_kit import sync
net = sync.open_network(ports=["127.0.0.1:0:80"])
command = net.popen(["sleep", "600"], stdin=None, stdout=None, stderr=None)
member = net.add_member("web")
print(net.namespace.pid, member.namespace.pid, command.pid, net.forwarder.list()[0].host_port, flush=True)
"""
CLOSED = """
import atexit, sys, threading
from concurrent.futures import ThreadPoolExecutor
atexit.register(lambda: (print(repr(net), flush=True), str(net), net._repr_html_()))
"""


def started(*arguments: str, code: str = "", alone: bool = False) -> subprocess.Popen[str]:
    needs_userns()
    needs_tun()
    child = subprocess.Popen(
        [sys.executable, "-W", "error", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHON_COLORS": "0"},
        start_new_session=alone,
    )  # fmt: skip
    assert child.stdin is not None
    child.stdin.write(code)
    child.stdin.flush()
    return child


def opened_in(child: subprocess.Popen[str]) -> list[int]:
    assert child.stdout is not None
    for line in child.stdout:  # of a prompt there are others
        if found := re.search(r"(\d+) (\d+) (\d+) (\d+)$", line):
            return list(map(int, found.groups()))
    pytest.fail(str(child.communicate()))


def nothing_is_left(numbers: list[int]) -> None:
    *pids, port = numbers
    assert len(pids) == 3
    assert wait_exit(set(pids), time.monotonic() + SECONDS) == set()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("raise ZeroDivisionError", 1),
        ("net.run(['false'])", 1),
        ("net.close()", 0),
        ("capture = net.stack.capture('/dev/null'); capture.__enter__()", 0),
        ("atexit.register(net.close)", 0),
        ("threading.Thread(target=net.run, args=(['sleep', '1'],)).start()", 0),
        ("threading.Thread(target=sys.exit, args=(3,)).start()", 0),
        ("pool = ThreadPoolExecutor(); pool.submit(net.run, ['true']).result()", 0),
    ],
)
def test_a_script_that_ends_leaves_nothing(ending: str, status: int) -> None:
    child = started("-c", CLOSED + OPEN + ending)
    numbers = opened_in(child)
    out, err = child.communicate(timeout=SECONDS)
    assert child.returncode == status, err
    assert out == "<sync Network 10.0.2.0/24, 1 forwarded: closed>\n"
    assert (err != "") == (status == 1), err
    nothing_is_left(numbers)


def test_what_a_daemon_thread_opened_is_closed() -> None:
    code = OPEN.replace("signal.signal(", "(")  # which the main thread alone may call
    begin = f"opener = threading.Thread(target=exec, args=({code!r}, globals()), daemon=True)\n"
    child = started("-c", CLOSED + begin + "opener.start(); opener.join()")
    numbers = opened_in(child)
    out, err = child.communicate(timeout=SECONDS)
    assert (child.returncode, out, err) == (0, "<sync Network 10.0.2.0/24, 1 forwarded: closed>\n", "")
    nothing_is_left(numbers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_script_that_is_killed_leaves_nothing(number: int) -> None:
    child = started("-c", OPEN + "net.run(['sleep', '601'])")
    numbers = opened_in(child)
    child.send_signal(number)
    _, err = child.communicate(timeout=SECONDS)
    assert child.returncode == -number
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
    nothing_is_left(numbers)


INTERRUPTED = """
try:
    net.run(["sleep", "601"], stdout=None, stderr=None)
except KeyboardInterrupt:
    print(net.run(["echo", "there"]).stdout, command.returncode, flush=True)
"""


@pytest.mark.parametrize("driver", ["thread", "loop", "worker"])
def test_a_terminal_interrupts_a_call_and_nothing_else(driver: str) -> None:
    """It sends the signal to all of its foreground process group."""
    code = OPEN.replace("open_network(", f"open_network(driver={driver!r}, ")
    child = started("-c", code + INTERRUPTED, alone=True)
    numbers = opened_in(child)
    until(lambda: "601" in inside(numbers[0]))
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=SECONDS)
    assert (child.returncode, out) == (0, "b'there\\n' None\n"), err
    nothing_is_left(numbers)


def inside(holder: int) -> str:
    """The commands in the PID namespace of a process."""
    where = os.stat(f"/proc/{holder}/ns/pid")
    found = ""
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.path.samestat(os.stat(each / "ns" / "pid"), where):
                found += (each / "cmdline").read_text()
    return found


@pytest.mark.parametrize("arguments", [("-i", "-q"), ("-m", "asyncio")])
def test_a_prompt_that_ends_leaves_nothing(arguments: tuple[str, ...]) -> None:
    child = started(*arguments, code=OPEN + "net.run(['echo', 'there']).stdout\n")
    numbers = opened_in(child)
    out, err = child.communicate(timeout=SECONDS)
    assert child.returncode == 0, err
    assert "there" in out
    nothing_is_left(numbers)


@pytest.mark.parametrize("ending", ["raise SystemExit", "os._exit(0)"])
def test_a_forked_child_that_ends_closes_nothing_of_its_parent(ending: str) -> None:
    code = f"import os\npid = os.fork()\nif not pid: {ending}\nos.waitpid(pid, 0)\n"
    several = (
        "-Wignore:This process:DeprecationWarning"  # it has threads, which CPython 3.12 and later warn of
    )
    after = "print(net.run(['echo', 'there']).stdout, command.returncode)"
    child = started(several, "-Walways::ResourceWarning", "-c", OPEN + code + after)
    numbers = opened_in(child)
    out, err = child.communicate(timeout=SECONDS)
    assert (child.returncode, out, err) == (0, "b'there\\n' None\n", "")
    nothing_is_left(numbers)


def test_what_failed_in_the_background_is_said_at_the_end() -> None:
    child = started("-c", OPEN + "import os; os.kill(net.namespace.pid, 9)")
    opened_in(child)
    _, err = child.communicate(timeout=SECONDS)
    assert "NamespaceGone" in err


FATAL = """
import sys
from netns_kit import StackClosed, sync

def policy(_):
    raise KeyboardInterrupt

CLIENT = [sys.executable, "-c", "import socket; socket.create_connection(('192.0.2.1', 9))"]
net = sync.open_network(uplink=sync.Uplink(policy=policy), driver="loop")
for call in (lambda: net.run(CLIENT), net.stack.flows, net.close):
    try:
        call()
    except StackClosed as error:
        print(error)
print(sync.open_network().run(["echo", "others work"]).stdout)
"""


def test_what_ends_the_event_loop_is_said_by_each_call() -> None:
    """No call waits for a loop that is no more, and new objects have a new one."""
    child = started("-c", FATAL)
    out, err = child.communicate(timeout=SECONDS)
    *said, last = out.splitlines()
    assert said == 3 * [
        "the event loop of netns_kit.sync has ended by an error, which its thread has written; make new objects"
    ], err
    assert last == "b'others work\\n'"
    assert "in policy" in err
