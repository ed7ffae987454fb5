"""The table of mutations keeps up with the code; `python -m tests.mutations` applies them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.mutations import applied, changes, definitions, forget_definitions, located, mutations, parsed
from tests.support import ROOT

ALL_BROKEN = ("test_icmp.py", "test_tcp_closing.py", "test_tcp_data.py", "test_tcp_opening.py", "test_udp.py")
"""Of tests/system: what the guest sees of each protocol."""


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_kept() -> Iterator[None]:
    yield
    forget_definitions()


def test_each_breaks_one_place_and_has_its_test() -> None:
    """One test for all of them, for it needs the syntax trees of all modules."""
    modules = [each.node for each in definitions() if isinstance(each.node, ast.Module)]
    whole = {id(statement) for each in modules for statement in each.body}
    wrong = []
    for mutation in mutations():
        try:
            path, tree = applied(mutation)
            assert isinstance(tree, ast.Module)
            changed = [each for each in tree.body if id(each) not in whole]
            compile(ast.fix_missing_locations(ast.Module(changed, [])), str(path), "exec")
            located(mutation.test)
        except (LookupError, SyntaxError) as error:
            wrong.append(f"{mutation}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", ALL_BROKEN)
def test_what_the_guest_sees_is_broken_in_every_test(file: str) -> None:
    named = re.findall(
        r"^(?:async )?def (test_\w+)",
        (ROOT / "tests/system" / file).read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    tests = {located(each.test).partition("[")[0] for each in mutations()}
    assert named
    assert not [each for each in named if f"tests/system/{file}::{each}" not in tests]


@pytest.mark.parametrize(
    ("line", "source", "broken"),
    [
        ("drop f(...)", "f(1, a=2)\ng()", "g()"),
        ("drop if a", "if a:\n    f()\nelse:\n    g()", "g()"),
        ("drop for x in y", "def f():\n    for x in y:\n        g()\n        h()", "def f():\n    pass"),
        ("before a = ... -> b = 1; c()", "a = 2", "b = 1\nc()\na = 2"),
        ("after a = ... -> b()", "a = 2", "a = 2\nb()"),
        ("without b", "x = a and b and c", "x = a and c"),
        ("without b", "x = a or b", "x = a"),
        ("without A", "x = A | B", "x = B"),
        ("without c=", "f(b, c=1)", "f(b)"),
        ("without b", "f(a, b)", "f(a)"),
        ("without b", "x = [a, b]", "x = [a]"),
        ("without a", "x = {a: 1, b: 2}", "x = {b: 2}"),
        ("without a.ok", "x = [a for a in b if a.ok]", "x = [a for a in b]"),
        ("condition -> False", "while a:\n    f()", "while False:\n    f()"),
        ("condition a < ... -> True", "x = 1 if a < b else 2", "x = 1 if True else 2"),
        ("result -> 0", "def f():\n    return a + 1", "def f():\n    return 0"),
        ("value -> 10", "a: int = 4096", "a: int = 10"),
        ("value a.b -> 10", "a.b = 1\nb = 2", "a.b = 10\nb = 2"),
        ("value 'b' -> 10", "x = {'a': 1, 'b': 2}", "x = {'a': 1, 'b': 10}"),
        ("argument 1 of f -> 0", "f(a, b)", "f(a, 0)"),
        ("argument b of a.f -> 0", "a.f(1, b=2)", "a.f(1, b=0)"),
        ("compare < -> <=", "x = a < b == c > d", None),
        ("compare < -> <=", "x = a < b or c > d", "x = a <= b or c > d"),
        ("caught -> B", "try:\n    f()\nexcept A:\n    g()", "try:\n    f()\nexcept B:\n    g()"),
        ("change a.b -> a.c", "x = f(a.b) + 1", "x = f(a.c) + 1"),
        ("change f(); g(...) -> g()", "f()\ng(1)\nh()", "g()\nh()"),
        ("change f() -> return", "if a:\n    f()", "if a:\n    return"),
    ],
)
def test_what_an_operator_makes(line: str, source: str, broken: str | None) -> None:
    found = [
        ast.unparse(each)
        for each in changes(ast.parse(source), parsed(f"f: {line}", "").change)
        if isinstance(each, ast.AST)
    ]
    assert found == ([] if broken is None else [broken])


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("applied_to_nothing: drop return", "nothing is called applied_to_nothing"),
        ("tests.mutations.mutations: drop g()", "0 places in .* of tests/mutations.py are so"),
        ("tests.mutations.located: change paths -> 1", "[2-9] places in .* of tests/mutations.py are so"),
    ],
)
def test_it_must_be_in_one_place(line: str, error: str) -> None:
    with pytest.raises(LookupError, match=error):
        applied(parsed(line, ""))


def test_what_is_broken_has_a_name() -> None:
    for name in ("Mutation.__str__", "mutations.Mutation.__str__", "tests.mutations.Mutation.__str__"):
        path, tree = applied(parsed(f"{name}: value what -> ''", ""))
        assert str(path) == "tests/mutations.py"
        assert "        what = ''\n" in ast.unparse(tree)


@pytest.mark.parametrize("line", ["f", "f: shorten x", "f drop x", "f: drop"])
def test_a_line_that_is_none(line: str) -> None:
    with pytest.raises(ValueError, match=r"Qualified\.name: operator what -> new"):
        parsed(line, "")


def test_a_test_is_named_so_that_there_is_one() -> None:
    name = "test_a_line_that_is_none[f]"
    assert located(name) == located(f"test_mutations.py::{name}") == f"tests/laws/test_mutations.py::{name}"
    with pytest.raises(LookupError, match="must be in one file, and is in"):
        located("test_law.py::test_a_line_that_is_none[f]")
