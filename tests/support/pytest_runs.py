"""Runs of pytest in processes of their own, for tests of our plugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT, missing

RUNNERS = {
    "anyio": ("-p", "anyio", "-o", "anyio_mode=auto"),
    "pytest_asyncio": (
        *("-p", "asyncio", "-o", "asyncio_mode=auto"),
        *("-o", "asyncio_default_fixture_loop_scope=function"),
    ),
    "pytest_trio": ("-p", "trio", "-o", "trio_mode=true"),
}
"""The plugins that run async tests, each with the options by which it runs all of them."""
INSTALLED = {
    "anyio": ("-p", "no:asyncio", "-p", "no:trio"),
    "pytest_asyncio": ("-p", "no:trio"),
    "pytest_trio": ("-p", "no:asyncio"),
}
"""What keeps the others away from a run with every plugin that is installed."""


class Run(NamedTuple):
    """The outcome of a run: how many tests have passed, failed and so on, and what pytest has said."""

    counts: dict[str, int]
    text: str


def run_pytest(
    directory: Path, source: str, *options: str, ci: bool = False, every_plugin: bool = False
) -> Run:
    """Run pytest with the plugin on the tests in `source`; warnings are errors.

    It has the plugins that `options` name, or every one that is installed, which takes three times as long to start.
    """
    (directory / "test_it.py").write_text(source)
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "--timeout=60", "-W", "error"),
        *(("-p", "no:randomly") if every_plugin else ("-p", "timeout", "-p", "netns_kit")),
        *("-p", "no:cacheprovider", "--rootdir", str(directory)),
        *("--basetemp", str(directory / "basetemp"), *options, str(directory / "test_it.py")),
    ]
    environ = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
    environ["PYTHONPATH"] = str(ROOT)  # also in a copy of the tree
    if not every_plugin:
        environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if ci:
        environ["CI"] = "true"
    done = subprocess.run(
        command, cwd=directory, env=environ, capture_output=True, text=True, timeout=110, check=False
    )
    text = done.stdout + done.stderr
    last = next((line for line in reversed(done.stdout.splitlines()) if " in " in line), "")
    counts = {
        what.rstrip("s"): int(number)
        for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)
    }
    assert counts, text
    return Run(counts, text)


def needs_runner(name: str) -> tuple[str, ...]:
    """Return the options for one of `RUNNERS`.  The running test is skipped if it is not installed."""
    if find_spec(name) is None:
        missing(f"not installed: {name.replace('_', '-')}")
    return RUNNERS[name]
