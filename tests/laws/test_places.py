"""The places that ARCHITECTURE.md sends its readers to exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support import PACKAGE, ROOT

TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.partition("| what | where | test |\n|---|---|---|\n")[2]
    .partition("\n\n")[0]
    .splitlines()
]
PLACE = re.compile(r"`([\w/.]+\.py):([\w.]+)`")


def is_in(file: str, name: str) -> bool:
    """Whether `file` defines `name`: a function, a class, what is assigned, or a method, as `Class.method`."""
    inside: ast.AST = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        found = [each for each in ast.iter_child_nodes(inside) if part in names_of(each)]
        if not found:
            return False
        inside = found[-1]
    return True


def names_of(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Assign():
            return [ast.unparse(target) for target in node.targets]
        case ast.AnnAssign():
            return [ast.unparse(node.target)]
    return []


@pytest.mark.parametrize(("what", "where", "test"), ROWS, ids=[row[0] for row in ROWS])
def test_what_a_reader_is_sent_to_is_there(what: str, where: str, test: str) -> None:
    """One or two places, a test; more would be another row."""
    places, tests = PLACE.findall(where), PLACE.findall(test)
    assert len(places) in (1, 2), "two hops at most"
    assert len(tests) == 1
    assert where.count("`:") == 0
    for file, name in places:
        assert is_in(f"{PACKAGE}/{file}", name), (file, name)
    for file, name in tests:
        assert is_in(file, name), (file, name)


def test_what_readers_ask_first_is_answered() -> None:
    """The questions of somebody who has never seen the project."""
    assert len(ROWS) > 20
    asked = " ".join(row[0].lower() for row in ROWS)
    for each in ("frame", "allowed", "socks5", "`-p` mode", "dhcp option", "counter", "setting", "doctor"):
        assert each in asked, each


@pytest.mark.parametrize(
    ("file", "name", "there"),
    [
        ("tests/laws/test_places.py", "PLACE", True),
        ("tests/laws/test_places.py", "is_in", True),
        ("tests/support/bench.py", "Bench.step", True),
        ("tests/support/bench.py", "Bench.stepp", False),
        ("tests/support/bench.py", "step", False),
    ],
)
def test_what_is_there_is_found(file: str, name: str, there: bool) -> None:
    assert is_in(file, name) is there
