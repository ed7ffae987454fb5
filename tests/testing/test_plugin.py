"""The plugin as pytest has it: what it costs, what it skips, what it shows, and whose fixtures it leaves alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import needs_tun, needs_userns
from tests.support.pytest_runs import RUNNERS, needs_runner, run_pytest

ANYIO = RUNNERS["anyio"]
LOADED = """
import sys

def test_it():
    print("loaded:", *sorted(sys.modules))
"""
WITHOUT_NAMESPACES = """
import pytest
from netns_kit import Namespace, UserNamespaceDenied

@pytest.fixture(autouse=True)
def denied(monkeypatch):
    async def deny(self):
        raise UserNamespaceDenied("namespaces are denied", "user.max_user_namespaces", 0, "raise it")
    monkeypatch.setattr(Namespace, "_open", deny)

async def test_async(confined): ...
def test_plain(network): network().open()
async def test_of_the_loopback(netns): ...
async def test_in_memory(tap_pair): ...
"""
MARKED = """
import pytest
from netns_kit import FeatureUnavailable
from netns_kit.checkup import checkup

class Report:
    def require(self, *names):
        assert names == ("members",)
        raise FeatureUnavailable("bridges are missing", fix="load the module")

@pytest.fixture(autouse=True, scope="session")
def doctor():
    checkup.doctor = Report

@pytest.fixture(scope="session")
def first(doctor): ...

class TestIt:
    def test_before(self, first): ...

    @pytest.mark.needs_netns("members")
    def test_marked(self): assert False, "it runs"
"""
FAILING = """
import pytest
from netns_kit import Policy, Refusal

async def test_it(fake_internet, tap_pair):
    api = fake_internet.host("api.example.org")
    await tap_pair.stack.set_policy(Policy(default="allow").deny("192.0.2.0/24"))
    with pytest.raises(OSError): await tap_pair.connect_tcp("nowhere.example.org", 80)
    with pytest.raises(OSError): await tap_pair.connect_tcp("api.example.org", 81)
    with pytest.raises(OSError): await tap_pair.connect_tcp("192.0.2.9", 443)
    assert False, "the reason"
"""
FAILING_PLAIN = """
import pytest

def test_it(fake_internet, tap_pair):
    fake_internet.host("api.example.org")
    for name in "nowhere.example.org", "api.example.org":
        with pytest.raises(OSError): tap_pair.connect_tcp(name, 81)
    assert False, "the reason"
"""
OWN_FIXTURES = """
import pytest

@pytest.fixture
def network(): return "ours"

@pytest.fixture
def netns(netns): return [netns]

def test_ours(network): assert network == "ours"
async def test_on_top(netns): assert "open" in repr(netns[0])
"""


def test_a_run_that_does_not_use_it_imports_nothing_more(tmp_path: Path) -> None:
    def loaded(*options: str) -> set[str]:
        run = run_pytest(tmp_path, LOADED, "-p", "no:asyncio", "-p", "no:trio", *options, every_plugin=True)
        return set(re.findall(r"^loaded: (.*)", run.text, re.MULTILINE)[0].split())

    without, unused = loaded("-p", "no:netns_kit"), loaded()
    assert unused - without == {"netns_kit", "netns_kit.testing", "netns_kit.testing.plugin"}


def test_what_the_machine_lacks_skips_a_test_and_says_why(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, WITHOUT_NAMESPACES, *ANYIO, "-k", "not trio")
    assert run.counts == {"skipped": 3, "passed": 1}, run.text
    assert "namespaces are denied; user.max_user_namespaces is 0; raise it" in run.text


def test_in_ci_nothing_may_be_missing(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, WITHOUT_NAMESPACES, *ANYIO, "-k", "not trio", ci=True)
    assert run.counts["passed"] == 1, run.text
    assert "skipped" not in run.counts
    assert "CI is set" in run.text


@pytest.mark.parametrize(("ci", "outcome"), [(False, "skipped"), (True, "error")])
def test_a_marker_asks_the_doctor(tmp_path: Path, ci: bool, outcome: str) -> None:
    run = run_pytest(tmp_path, MARKED, ci=ci)
    assert run.counts == {"passed": 1, outcome: 1}, run.text
    assert "bridges are missing; load the module" in run.text


def test_a_marker_that_names_nothing_is_an_error(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, "import pytest\n@pytest.mark.needs_netns('tunn')\ndef test_it(): ...")
    assert run.counts == {"error": 1}, run.text
    assert "there is no finding 'tunn'" in run.text


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_report_of_a_failure_has_what_the_network_knows(runner: str, tmp_path: Path) -> None:
    run = run_pytest(tmp_path, FAILING, *needs_runner(runner), "-k", "not asyncio or not trio")
    text = run.text
    assert set(run.counts) == {"failed"}
    assert "the reason" in text
    assert re.search(r" refused +tcp +10\.0\.2\.100:\d+ +203\.0\.113\.1:81 +api\.example\.org +reset ", text)
    assert re.search(
        r" refused +tcp +\S+ +192\.0\.2\.9:443 .* rule 1: deny 192\.0\.2\.0/24$", text, re.MULTILINE
    )
    assert re.search(r"^policy_refused 1$", text, re.MULTILINE)
    assert "nowhere.example.org A: NXDOMAIN" in text
    assert re.search(r"← +203\.0\.113\.1:81 +10\.0\.2\.100:\d+ +TCP +\d+ +RST ACK", text)
    for path in re.findall(r"^the whole capture: (.*)$", text, re.MULTILINE):
        assert Path(path).read_bytes()[:4] == b"\n\r\r\n"
    assert "the whole capture" in text


def test_the_report_of_a_plain_test_has_the_same(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, FAILING_PLAIN)
    assert run.counts == {"failed": 1}
    for said in (
        "81  api.example.org  reset ",
        "nowhere.example.org A: NXDOMAIN",
        "RST ACK",
        "the whole capture",
    ):
        assert said in run.text


def test_a_plain_test_that_fails_does_not_show_the_way_to_the_event_loop(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, "def test_it(tap_pair): tap_pair.resolve('nowhere.example.org')")
    assert run.counts == {"failed": 1}
    assert "pair.py" in run.text
    assert not re.findall(r"facade\.py|loop_thread\.py", run.text)


def test_what_passes_writes_no_capture(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, FAILING_PLAIN.replace("assert False", "assert True"))
    assert run.counts == {"passed": 1}, run.text
    assert not list(tmp_path.rglob("*.pcapng"))


def test_fixtures_of_the_same_names_win(tmp_path: Path) -> None:
    needs_userns()
    needs_tun()
    run = run_pytest(tmp_path, OWN_FIXTURES, *ANYIO)
    assert run.counts == {"passed": 3}, run.text


def test_a_plain_test_has_no_clock_to_set(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, "def test_it(manual_clock): ...")
    assert run.counts == {"error": 1}
    assert "write `async def`" in run.text
