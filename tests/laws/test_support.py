"""What tests lean on: it says the truth about this machine, and hides nothing of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, child_pids, children, needs, reap, see_administrators_programs


@pytest.fixture
def sbin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of administrators' programs that is not in an ordinary user's path."""
    program = tmp_path / "sbin" / "a-daemon"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho found\n")
    program.chmod(0o755)
    monkeypatch.setattr("tests.support.SBIN", (str(program.parent),))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("CI", raising=False)
    return program.parent


def test_a_program_is_there_where_it_can_be_started(sbin: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"^not installed: a-daemon$"):
        needs("sh", "a-daemon")
    with pytest.raises(FileNotFoundError):
        subprocess.run(["a-daemon"], check=True)
    see_administrators_programs()
    needs("sh", "a-daemon")
    assert subprocess.run(["a-daemon"], check=True, capture_output=True).stdout == b"found\n"


def test_the_users_own_programs_come_first_and_nothing_comes_twice(sbin: Path) -> None:
    for _ in range(2):
        see_administrators_programs()
    assert os.environ["PATH"] == f"/usr/bin:/bin:{sbin}"


def test_what_is_missing_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="not installed: no-such-program"):
        needs("no-such-program")


@pytest.fixture
def nohup() -> Iterator[None]:
    """This process ignores what `nohup` and a shell's `&` have it ignore."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.mark.usefixtures("nohup", "default_signals")
def test_a_program_that_a_test_starts_can_be_ended_by_signals() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGHUP)"
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGHUP)  # which does nothing to this process
    done = subprocess.run([sys.executable, "-ISc", code], check=False)
    assert done.returncode == -signal.SIGHUP


def ended_orphan() -> int:
    """The pid of a process that has come to this one, has ended, and for which nobody has waited."""
    before = child_pids()
    subprocess.run([sys.executable, "-ISc", "import os; os.fork()"], check=True, stdout=subprocess.PIPE)
    (orphan,) = child_pids() - before
    os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
    return orphan


def test_ended_children_are_waited_for_but_those_from_before() -> None:
    another = ended_orphan()
    before = child_pids()
    orphan = ended_orphan()
    assert orphan not in children()
    reap(before)
    assert orphan not in child_pids()
    assert os.waitpid(another, 0) == (another, 0)


ORPHANS: set[int] = set()


@pytest.mark.parametrize("which", ["one", "the other"])
def test_no_orphan_outlives_the_test_it_came_in(which: str) -> None:
    """Each case looks for the orphan of the other, if that has run before."""
    assert not ORPHANS & child_pids()
    ORPHANS.add(ended_orphan())


IMPORT_OF_A_TEST = re.compile(
    r"^ *(?:from|import) +[\w.]*\btest_\w+|[\"'; ]from tests[\w.]*\.test_\w+ import", re.MULTILINE
)


def test_what_tests_share_is_in_no_test() -> None:
    """It is in tests/support, a fixture in a conftest.py.  Nor does a program that a test starts import a test."""
    paths = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    found = {
        f"{path.relative_to(ROOT)}: {match[0].strip()}"
        for path in paths
        for match in IMPORT_OF_A_TEST.finditer(path.read_text(encoding="utf-8"))
    }
    assert not found, found
