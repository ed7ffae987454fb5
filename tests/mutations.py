"""The code broken on purpose, each time in one place, and the test that notices.

    python -m tests.mutations [WORDS...]

applies each mutation of tests/mutations.json, alone, to a copy of the tree, and runs its test there: a test that
passes has noticed nothing, and fails the run.  WORDS choose those whose name begins with one of them; rows are the
numbers in the tests' names.  Run it as an ordinary user; all of them take a quarter of an hour.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

TABLE = ROOT / "tests" / "mutations.json"
SECONDS = 120
FAILED = 1  # pytest's exit status when tests have failed
_IGNORED = shutil.ignore_patterns(".*", "__pycache__")


class Mutation(NamedTuple):
    """In `file`, `old`, which occurs once, becomes `new`; then `test` fails."""

    name: str
    file: str
    old: str
    new: str
    test: str


def mutations() -> list[Mutation]:
    return [Mutation(**each) for each in json.loads(TABLE.read_text(encoding="utf-8"))]


def noticed(mutation: Mutation) -> bool:
    """Whether its test fails on a copy that is broken that way."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=_IGNORED)
        broken = copy / mutation.file
        broken.write_text(
            broken.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8"
        )
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.test]
        child = subprocess.run(command, cwd=copy, capture_output=True, timeout=SECONDS, check=False)
        return child.returncode == FAILED


def main(words: list[str]) -> int:
    chosen = [each for each in mutations() if not words or each.name.startswith(tuple(words))]
    missed = 0
    for each in chosen:
        found = noticed(each)
        missed += not found
        print(f"{'noticed' if found else 'NOT NOTICED'}: {each.name}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
