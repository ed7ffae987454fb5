"""What docs/pytest.md shows: each recipe runs, with each plugin of event loops."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT, needs, needs_tun, needs_userns
from tests.support.pytest_runs import INSTALLED, RUNNERS, needs_runner, run_pytest

PAGE = (ROOT / "docs" / "pytest.md").read_text(encoding="utf-8")
SOURCE = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
TESTS = re.findall(r"^(?:async )?def (test_\w+)", SOURCE, re.MULTILINE)


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_recipe_passes(runner: str, tmp_path: Path) -> None:
    needs("curl")
    needs_userns()
    needs_tun()
    options = needs_runner(runner)
    run = run_pytest(tmp_path, SOURCE, *options, *INSTALLED[runner], every_plugin=True)
    plain = len(re.findall(r"^def test_", SOURCE, re.MULTILINE))
    backends = 2 if runner == "anyio" else 1
    assert run.counts == {"passed": (len(TESTS) - plain) * backends + plain}, run.text
    assert len(TESTS) > 12


def test_the_tests_of_a_real_client_are_short() -> None:
    """Under 40 lines, without the client itself."""
    example = re.findall(r"## A real client\n.*?```python\n(.*?)```", PAGE, re.DOTALL)[0]
    tests = [node for node in ast.parse(example).body if getattr(node, "name", "") != "fetch"]
    lines = [line for node in tests for line in ast.unparse(node).splitlines()]
    assert 20 < len(lines) < 40
