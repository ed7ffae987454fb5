"""The magics and the live view, in a real kernel, and in a shell of IPython."""

from __future__ import annotations

import _thread
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from IPython.core.error import UsageError
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from typing_extensions import Self

from netns_kit.notebook import magics
from tests.support import ROOT, needs_tun, needs_userns, wait_exit

SECONDS = 60


class Kernel:
    """A kernel whose cells are executed one by one."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.is_sync = True

    def run(self, text: str) -> Any:
        """Execute a cell, and return it with its outputs."""
        self._client.nb.cells.append(new_code_cell(text))
        return self._client.execute_cell(self._client.nb.cells[-1], len(self._client.nb.cells) - 1)

    def said(self, text: str, name: str = "stdout") -> str:
        """What a cell writes."""
        return "".join(each["text"] for each in self.run(text).outputs if each.get("name") == name)

    def value(self, text: str) -> Any:
        """What the last output of a cell shows, by its kind."""
        return self.run(text).outputs[-1]["data"]

    def interrupt_when(self, path: Path) -> threading.Thread:
        """Interrupt it when there is such a file."""

        def interrupt() -> None:
            deadline = time.monotonic() + SECONDS
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(self._client.km.provisioner.pid, 2)  # as Jupyter does

        thread = threading.Thread(target=interrupt)
        thread.start()
        return thread


@pytest.fixture(scope="module")
def bare_kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    needs_userns()
    needs_tun()
    with pytest.MonkeyPatch.context() as patch:
        for name in "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR":
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.setenv("PYTHONPATH", str(ROOT))
        client = NotebookClient(new_notebook(), timeout=SECONDS, kernel_name="python3")
        with client.setup_kernel():
            kernel = Kernel(client)
            kernel.run("%load_ext netns_kit\nfrom netns_kit import Network, sync")
            yield kernel


@pytest.fixture(params=["sync", "async"])
def kernel(bare_kernel: Kernel, request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """A kernel with a network of either kind, which is called net."""
    bare_kernel.is_sync = is_sync = request.param == "sync"
    bare_kernel.run("net = sync.open_network()" if is_sync else "net = await Network().open()")
    yield bare_kernel
    bare_kernel.run("net.close()" if is_sync else "await net.close()")


@pytest.fixture(autouse=True)
def _signals(default_signals: None) -> None:
    """Kernels are interrupted by SIGINT."""


def test_a_cell_runs_inside(kernel: Kernel) -> None:
    assert kernel.said("%%inside net\nhostname -I\ncat /etc/resolv.conf").startswith("10.0.2.100")
    assert kernel.said("%%inside net\necho told >&2", "stderr") == "told\n"
    assert kernel.run("%%inside net\ntrue").outputs == []
    assert kernel.said("%%inside net cat -n\none\ntwo") == "     1\tone\n     2\ttwo\n"
    assert kernel.said(f"%%inside net {sys.executable} -\nprint('\\N{{SNOWMAN}}')") == "\N{SNOWMAN}\n"
    assert kernel.said("%%inside net head -c 1\n" + "x" * 100_000) == "x"


def test_its_status_is_an_error(kernel: Kernel) -> None:
    with pytest.raises(CellExecutionError, match=r"CommandFailed.*non-zero exit status 3"):
        kernel.run("%%inside net\nexit 3")
    assert kernel.said("%%inside net --no-check\nexit 3", "stderr") == "status 3\n"
    assert kernel.said("%%inside net --no-check cat\nhello") == "hello\n"


def test_what_it_writes_is_shown_as_it_comes(kernel: Kernel, tmp_path: Path) -> None:
    """The cell waits for a file that is made when its first line was shown."""
    seen = tmp_path / "seen"

    def output(outs: Any, msg: Any, display_id: Any, index: Any, process: Any = None) -> Any:
        if "first" in str(msg["content"]):
            seen.touch()
        return before(outs, msg, display_id, index)

    before, kernel._client.output = kernel._client.output, output
    try:
        script = f"echo first; until [ -e {seen} ]; do sleep 0.1; done; echo second"
        assert kernel.said(f"%%inside net\n{script}") == "first\nsecond\n"
    finally:
        kernel._client.output = before


def test_an_interrupted_cell_kills_its_command_and_nothing_else(kernel: Kernel, tmp_path: Path) -> None:
    told = tmp_path / "told"
    interrupting = kernel.interrupt_when(told)
    with pytest.raises(CellExecutionError, match=r"KeyboardInterrupt|CancelledError"):
        kernel.run(f"%%inside net\ntouch {told}; exec sleep 601")
    interrupting.join()
    assert "601" not in kernel.said("%%inside net\ncat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -v grep")


def test_flows(kernel: Kernel) -> None:
    kernel.run("%%inside net\n(exec 3<>/dev/tcp/10.0.2.3/53) 2>/dev/null || true")
    assert "<b>Flows</b>" in kernel.value("%flows net")["text/html"]
    assert kernel.said("found = %flows net\nprint(type(found).__name__)") == "Flows\n"


def test_packets(kernel: Kernel) -> None:
    call = "net.run" if kernel.is_sync else "await net.run"
    kernel.run(f"%%capture_packets net found\ndone = {call}('getent hosts host.containers.internal')")
    assert kernel.said("print(len(found) > 0, done.returncode)") == "True 0\n"
    shown = kernel.value(f"%%capture_packets net\n{call}('getent hosts host.containers.internal');")
    assert "host.containers.internal" in shown["text/html"]
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        kernel.run("%%capture_packets net found\n1 / 0")
    ipv4 = "[each for each in found if each.data[12:14] == bytes((8, 0))]"  # beside it, a kernel looks for neighbours
    assert kernel.said(f"print({ipv4})") == "[]\n"


def test_a_live_view_ends_with_its_network(kernel: Kernel) -> None:
    kernel.run("view = get_ipython().run_line_magic('live', 'net 0.1')")
    until(kernel, "'<svg' in view.chart.value and view.flows.value")
    assert kernel.said("print(view.state.value)") == "open\n"
    shown = kernel.value("view")
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert "%flows" in shown["text/plain"], "what a terminal shows"
    kernel.run("net.close()" if kernel.is_sync else "await net.close()")
    until(kernel, "view.state.value == 'ended'")


def test_a_live_view_is_stopped(kernel: Kernel) -> None:
    kernel.run("view = get_ipython().run_line_magic('live', 'net 0.1')")
    until(kernel, "view.chart.value")
    kernel.run("view.widget.children[-1].click()")
    until(kernel, "view.state.value == 'ended'")


def until(kernel: Kernel, expression: str) -> None:
    """Wait until an expression is true; the kernel's event loop runs between two looks."""
    deadline = time.monotonic() + SECONDS
    while kernel.said(f"print(bool({expression}))") != "True\n":
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%flows", "expected the name of a network, as in %flows net"),
        ("%%inside\ntrue", "expected the name of a network, as in %%inside net"),
        (
            "%flows nobody",
            "name 'nobody' is not defined; expected a network, a member or another object that is open",
        ),
        ("%flows None much", "expected no more words: much"),
        ("%live None soon", "soon: expected seconds between two looks, as in %live net 0.5"),
        ("%live None inf", "inf: expected seconds between two looks"),
        ("%live None -1", "-1: expected seconds between two looks"),
        ("%flows 'net", "No closing quotation: 'net"),
        ("new = Network()\n%flows new", "new is async: use this in a cell behind"),
    ],
)
def test_mistakes_say_what_is_expected(bare_kernel: Kernel, cell: str, said: str) -> None:
    with pytest.raises(CellExecutionError, match=re.escape(said)):
        bare_kernel.run(cell)


TERMINAL = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="NoColor")
for cell in (
    "%load_ext netns_kit",
    "%reload_ext netns_kit",
    "from netns_kit import Network, sync; net = sync.open_network()",
    "%%inside net\\necho one",
    "found = %flows net\\nprint(len(found))",
    "net.close()",
    "net = await Network().open()",
    "%%inside net\\necho two",
    "%%capture output\\nprint('three')",
    "print(output.stdout)",
    "await net.close()",
    "net = sync.open_network(); print(net.namespace.pid)",
):
    assert shell.run_cell(cell).success, cell
"""


def test_a_shell_of_ipython(tmp_path: Path) -> None:
    needs_userns()
    needs_tun()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, "-c", TERMINAL]
    child = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert child.returncode == 0, child.stdout + child.stderr
    *said, pid = child.stdout.split()
    assert said == ["one", "0", "two", "three"]
    assert wait_exit({int(pid)}, time.monotonic() + SECONDS) == set(), "closed, when the shell has ended"


def test_a_live_view_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(sys.modules, "netns_kit.notebook.live", raising=False)
    with pytest.raises(
        UsageError, match=r"ipywidgets.*; install ipywidgets and matplotlib, or netns-kit\[notebook]"
    ):
        magics.live(None, None, [])


DRAWING = """
import threading, time
from netns_kit import sync
from netns_kit.notebook import live

begun = threading.Event()

def drawn(*_):
    begun.set()
    time.sleep(0.5)
    print("drawn", flush=True)
    return ""

live.drawn = drawn
net = sync.open_network()
view = live.LiveView(net, net.stack, 3600)
print(repr(view), flush=True)
begun.wait()
"""


def test_an_interpreter_that_exits_waits_for_a_view_that_draws(tmp_path: Path) -> None:
    """A thread that is stopped within C++ code takes the whole process down with it."""
    needs_userns()
    needs_tun()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", DRAWING],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == [
        "<LiveView: open; Jupyter shows it as it changes, elsewhere there is %flows>",
        "drawn",
    ]


class Endless:
    """A command that writes without end, until it is closed."""

    def __init__(self) -> None:
        self.written = 0
        self.is_closed = False
        self.stdout: Iterator[bytes] = self._output()
        self.stderr: Iterator[bytes] = iter(())

    def popen(self, command: list[str], **options: Any) -> Endless:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True

    def _output(self) -> Iterator[bytes]:
        while not self.is_closed and self.written < 100_000:
            self.written += 1
            yield b"y\n"


class Stopped(io.StringIO):
    """A cell that is interrupted at its first output."""

    def write(self, text: str) -> int:
        time.sleep(0.5)
        raise KeyboardInterrupt


def test_a_command_waits_until_its_output_is_shown_and_its_threads_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thing, before = Endless(), set(threading.enumerate())
    monkeypatch.setattr(sys, "stdout", Stopped())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        magics._run(thing, ["yes"], b"")
    for thread in set(threading.enumerate()) - before:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert thing.written < 2 * magics.PIECES_MOST


def test_an_interruption_noted_before_the_waiting_is_seen(
    monkeypatch: pytest.MonkeyPatch, default_signals: None
) -> None:
    thing, never = Endless(), threading.Event()
    thing.stdout = (b"" for _ in iter(never.wait, None))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    noted = threading.Timer(0.5, _thread.interrupt_main)
    noted.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            magics._run(thing, ["true"], b"")
    finally:
        never.set()
        noted.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("after", range(40))
def test_it_may_be_interrupted_at_any_line(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    thing, before = Endless(), set(threading.enumerate())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    left = after

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code is not magics._run.__code__:
            return None
        left -= event == "line"
        if left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    def run() -> None:
        sys.settrace(trace)
        try:
            with pytest.raises(KeyboardInterrupt):
                magics._run(thing, ["yes"], b"")
        finally:
            sys.settrace(None)
            ended.set()

    ended = threading.Event()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ended.wait(SECONDS), "it waits for output that nobody reads"
    for each in set(threading.enumerate()) - before - {thread}:
        each.join(SECONDS)
        assert not each.is_alive()


def test_a_character_that_is_cut_off_and_streams_that_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    thing, output = Endless(), io.StringIO()
    thing.stdout, thing.stderr = iter([b"\xe2", b"\x98\x83 \xe2\x98"]), iter([b"", b"told"])
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", output)
    monkeypatch.setattr(thing, "wait", lambda: 0, raising=False)
    assert magics._run(thing, ["true"], b"") == 0
    assert sorted(output.getvalue()) == sorted("\N{SNOWMAN} \N{REPLACEMENT CHARACTER}told")
