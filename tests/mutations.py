"""The code broken on purpose, each time in one place, and the test that notices.

    python -m tests.mutations [WORDS...]

applies each mutation of tests/mutations.txt, alone, to a copy of the tree, and runs its test there: a test that
passes has noticed nothing, and fails the run.  WORDS choose those that contain one of them, in their own line or in
that of their test.  Run it as an ordinary user; all of them take a quarter of an hour.

A mutation is a change of the syntax tree, in what has a qualified name.  docs/testing.md says how a line is read;
the functions of OPERATORS say what each word does.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.support import ROOT, adopt_orphans, children

TABLE = ROOT / "tests" / "mutations.txt"
PLACES = "netns_kit", "benchmarks", "tests"
SECONDS = 120
PASSED, FAILED = 0, 1  # pytest's exit status
_IGNORED = shutil.ignore_patterns(".*", "__pycache__")
_LINE = re.compile(r"([\w.]+): (\w+)(?: (.+?))??(?: -> (.+))?")

Node = TypeVar("Node", bound=ast.AST)
Change = ast.AST | list[ast.stmt]
"""What a node becomes; a statement may become several, or none."""
Put = Callable[[Change], ast.AST]
"""Makes what is around a node anew, around what the node becomes."""


class Mutation(NamedTuple):
    """In what is called `where`, `operator` makes of `what` something `new`; then `test` fails."""

    where: str
    operator: str
    what: str
    new: str
    test: str

    def change(self, node: ast.AST) -> Iterator[Change]:
        return OPERATORS[self.operator](node, self.what, self.new)

    def __str__(self) -> str:
        what = f" {self.what}" if self.what else ""
        return f"{self.where}: {self.operator}{what}" + (f" -> {self.new}" if self.new else "")


def parsed(line: str, test: str) -> Mutation:
    found = _LINE.fullmatch(line)
    if found is not None:
        where, operator, what, new = (each or "" for each in found.groups())
        is_whole = bool(new) is (operator not in _LEAVE_OUT) and (what or operator in _ALONE)
        if operator in OPERATORS and is_whole:
            return Mutation(where, operator, what, new, test)
    form = f"'Qualified.name: operator what -> new' with an operator of {', '.join(OPERATORS)}"
    raise ValueError(f"{line!r} is not {form}")


def mutations() -> list[Mutation]:
    """Return those of the table: below each test, the lines of what it must notice."""
    found, test = [], ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            found.append(parsed(line.strip(), test))
        elif line and not line.startswith("#"):
            test = line
    return found


# -- patterns: source in which `...` stands for any expression, arguments, elements or statements


@cache
def _statements(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except SyntaxError:
        return ast.parse(text + ": ...").body


@cache
def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _is_any(pattern: object) -> bool:
    if isinstance(pattern, ast.Expr):
        pattern = pattern.value
    return isinstance(pattern, ast.Constant) and pattern.value is ...


def matches(node: object, pattern: object) -> bool:
    """Whether that is the code of the pattern, whatever its format."""
    if isinstance(node, list) and isinstance(pattern, list):
        if pattern and _is_any(pattern[-1]):
            pattern = pattern[:-1]
            node = node[: len(pattern)]
        return len(node) == len(pattern) and all(map(matches, node, pattern))
    if isinstance(pattern, ast.AST) and _is_any(pattern):
        return True
    if type(node) is not type(pattern):
        return False
    if not isinstance(node, ast.AST):
        return node == pattern
    ignored = {"ctx", "kind", "type_comment"}
    if isinstance(pattern, ast.Call) and any(map(_is_any, pattern.args)):
        ignored.add("keywords")
    if isinstance(pattern, ast.stmt) and any(map(_is_any, getattr(pattern, "body", ()))):
        ignored.add("orelse")
    return all(
        matches(getattr(node, each, None), getattr(pattern, each, None))
        for each in node._fields
        if each not in ignored
    )


def _is(node: ast.AST | None, text: str) -> bool:
    return node is not None and (not text or matches(node, _expression(text)))


def _with(node: Node, **fields: Any) -> Node:
    return type(node)(**{**vars(node), **fields})


# -- operators: all that can become of one node, mostly nothing

Operator = Callable[[ast.AST, str, str], Iterator[Change]]


def drop(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`drop STATEMENT`: it is left out; of an `if` the `else` stays.  Of `if`, `for` ... their first line will do."""
    if isinstance(node, ast.stmt) and matches([node], _statements(what)):
        yield node.orelse if isinstance(node, ast.If) else []


def before(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`before STATEMENT -> STATEMENTS`: these are put there."""
    if isinstance(node, ast.stmt) and matches([node], _statements(what)):
        yield [*_statements(new), node]


def after(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`after STATEMENT -> STATEMENTS`: these are put there."""
    if isinstance(node, ast.stmt) and matches([node], _statements(what)):
        yield [node, *_statements(new)]


def without(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`without PART`: an operand, an argument (`name=`), element, key with its value, or filter is left out."""
    if what.endswith("="):
        if isinstance(node, ast.Call):
            for i, keyword in enumerate(node.keywords):
                if keyword.arg == what[:-1]:
                    yield _with(node, keywords=_put(node.keywords, i))
    elif isinstance(node, ast.BinOp):
        if _is(node.left, what):
            yield node.right
        if _is(node.right, what):
            yield node.left
    elif isinstance(node, ast.Dict):
        for i, key in enumerate(node.keys):
            if _is(key, what):
                yield _with(node, keys=_put(node.keys, i), values=_put(node.values, i))
    else:
        for name in ("values", "args", "elts", "ifs"):
            field = getattr(node, name, None)
            parts = field if isinstance(field, list) else []
            for i, part in enumerate(parts):
                if _is(part, what):
                    left = _put(parts, i)
                    yield left[0] if name == "values" and len(left) == 1 else _with(node, **{name: left})


def condition(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`condition [WHAT] -> NEW`: that of an `if`, a `while` or a conditional expression."""
    if isinstance(node, ast.If | ast.While | ast.IfExp) and _is(node.test, what):
        yield _with(node, test=_expression(new))


def result(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`result [WHAT] -> NEW`: what is returned."""
    if isinstance(node, ast.Return) and _is(node.value, what):
        yield _with(node, value=_expression(new))


def value(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`value [WHAT] -> NEW`: what is assigned to WHAT, or stands at that key."""
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(_is(each, what) for each in targets):
            yield _with(node, value=_expression(new))
    elif isinstance(node, ast.Dict) and what:
        for i, key in enumerate(node.keys):
            if _is(key, what):
                yield _with(node, values=_put(node.values, i, _expression(new)))


def argument(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`argument NUMBER|NAME of FUNCTION -> NEW`: what that is called with."""
    which, _, function = what.partition(" of ")
    if isinstance(node, ast.Call) and _is(node.func, function):
        if which in map(str, range(len(node.args))):
            yield _with(node, args=_put(node.args, int(which), _expression(new)))
        for i, keyword in enumerate(node.keywords):
            if which == keyword.arg:
                changed = _with(keyword, value=_expression(new))
                yield _with(node, keywords=_put(node.keywords, i, changed))


def compare(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`compare OPERATOR -> OPERATOR`: the only comparison of that kind is of another."""
    if isinstance(node, ast.Compare) and matches(node.ops, _comparison(what)):
        yield _with(node, ops=_comparison(new))


def caught(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`caught [WHAT] -> NEW`: what an `except` catches."""
    if isinstance(node, ast.ExceptHandler) and _is(node.type, what):
        yield _with(node, type=_expression(new))


def change(node: ast.AST, what: str, new: str) -> Iterator[Change]:
    """`change WHAT -> NEW`: an expression, or statements that follow one another, whatever they are."""
    old, made = _statements(what), _statements(new)
    if isinstance(old[0], ast.Expr) and isinstance(made[0], ast.Expr) and len(old) == len(made) == 1:
        if isinstance(node, ast.expr) and matches(node, old[0].value):
            yield made[0].value
        return
    for name, field in ast.iter_fields(node):
        if isinstance(field, list):
            for i in range(len(field) - len(old) + 1):
                if matches(field[i : i + len(old)], old):
                    yield _with(node, **{name: [*field[:i], *made, *field[i + len(old) :]]})


def _put(parts: list[Any], i: int, *new: ast.AST) -> list[Any]:
    return [*parts[:i], *new, *parts[i + 1 :]]


def _comparison(text: str) -> list[ast.cmpop]:
    compared = _expression(f"a {text} b")
    assert isinstance(compared, ast.Compare), text
    return compared.ops


_all = drop, before, after, without, condition, result, value, argument, compare, caught, change
OPERATORS: dict[str, Operator] = {each.__name__: each for each in _all}
_LEAVE_OUT = {"drop", "without"}  # and make nothing new
_ALONE = {"condition", "result", "value", "caught"}  # can be the only one of their kind


# -- where


class Definition(NamedTuple):
    """A function, a class, a module, or a name assigned outside of functions."""

    path: Path
    name: str
    node: ast.AST
    put: Put

    def is_called(self, name: str) -> bool:
        """Whether it is: by its own name, or by that and as much of its module's as it takes to tell it apart."""
        if not name.endswith(f".{self.name}"):
            return name == self.name
        return f".{_dotted(self.path)}.{self.name}".endswith(f".{name}")


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, Put]]:
    """Yield each, with what makes the node anew around what the child becomes."""

    def put(name: str, i: int | None, new: Change) -> ast.AST:
        if i is None:
            return _with(node, **{name: new})
        parts = _put(getattr(node, name), i, *(new if isinstance(new, list) else [new]))
        return _with(node, **{name: parts or ([ast.Pass()] if name == "body" else [])})

    for name, field in ast.iter_fields(node):
        if isinstance(field, ast.AST):
            yield field, partial(put, name, None)
        elif isinstance(field, list):
            for i, each in enumerate(field):
                if isinstance(each, ast.AST):
                    yield each, partial(put, name, i)


def changes(node: ast.AST, operator: Callable[[ast.AST], Iterator[Change]]) -> Iterator[Change]:
    """Yield what a node becomes when the operator changes it, or one node in it."""
    yield from operator(node)
    for child, put in _children(node):
        yield from map(put, changes(child, operator))


def _definitions(path: Path, node: ast.AST, put: Put, *names: str) -> Iterator[Definition]:
    for child, put_child in _children(node):
        make = partial(_around, put, put_child)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield Definition(path, ".".join((*names, child.name)), child, make)
            yield from _definitions(path, child, make, *names, child.name)
        elif isinstance(child, ast.Assign | ast.AnnAssign) and isinstance(node, ast.Module | ast.ClassDef):
            for target in child.targets if isinstance(child, ast.Assign) else [child.target]:
                yield Definition(path, ".".join((*names, ast.unparse(target))), child, make)
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _definitions(path, child, make, *names)


def _around(put: Put, put_child: Put, new: Change) -> ast.AST:
    return put(put_child(new))


@cache
def definitions() -> list[Definition]:
    found = []
    for path in sorted(each for place in PLACES for each in (ROOT / place).rglob("*.py")):
        if not path.name.startswith("test_"):
            module = ast.parse(path.read_text(encoding="utf-8"))
            path = path.relative_to(ROOT)
            found += [Definition(path, _dotted(path), module, _itself), *_definitions(path, module, _itself)]
    return found


@cache
def _by_last_word() -> dict[str, list[Definition]]:
    found: dict[str, list[Definition]] = {}
    for each in definitions():
        found.setdefault(each.name.rpartition(".")[2], []).append(each)
    return found


def forget_definitions() -> None:
    """Let go of the syntax trees of all modules, which are many objects."""
    definitions.cache_clear()
    _by_last_word.cache_clear()


def _dotted(path: Path) -> str:
    return ".".join(part for part in path.with_suffix("").parts if part != "__init__")


def _itself(new: Change) -> ast.AST:
    assert isinstance(new, ast.AST)
    return new


def applied(mutation: Mutation) -> tuple[Path, ast.AST]:
    """Return the module that it breaks, and what that becomes.

    Raises:
        LookupError: it is not in exactly one place.
    """
    where = mutation.where
    named = [each for each in _by_last_word().get(where.rpartition(".")[2], ()) if each.is_called(where)]
    found = [(each.path, each.put(made)) for each in named for made in changes(each.node, mutation.change)]
    if not named:
        raise LookupError(f"{mutation}: nothing is called {where}")
    if len(found) != 1:
        files = ", ".join(sorted({str(each.path) for each in named}))
        raise LookupError(f"{mutation}: {len(found)} places in {where} of {files} are so, and not one")
    return found[0]


# -- tests


@cache
def _tests() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    begin = re.compile(r"^(?:async )?def (test_\w+)\(", re.MULTILINE)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in begin.findall(path.read_text(encoding="utf-8")):
            found.setdefault(name, []).append(path.relative_to(ROOT))
    return found


def located(test: str) -> str:
    """Return it as pytest wants it named.  Of tests with one name, the file's name tells which: `test_a.py::test_b`.

    Raises:
        LookupError: there is no such test, or several.
    """
    file, _, name = test.rpartition("::")
    paths = [each for each in _tests().get(name.partition("[")[0], ()) if not file or each.name == file]
    if len(paths) != 1:
        raise LookupError(f"{test}: a test of that name must be in one file, and is in {[*map(str, paths)]}")
    return f"{paths[0]}::{name}"


def failures(tests: Iterable[str], modules: Iterable[tuple[Path, ast.AST]]) -> str:
    """Return what pytest says of tests that fail on a copy in which modules are like that; nothing if they pass."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=_IGNORED)
        for path, tree in modules:
            (copy / path).write_text(ast.unparse(tree), encoding="utf-8")
        names = sorted({located(each) for each in tests})
        first = ["-x"] if len(names) == 1 else []  # of its cases the first that fails will do
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *first, *names]
        try:
            child = subprocess.run(
                command, cwd=copy, capture_output=True, text=True, timeout=SECONDS * len(names), check=False
            )
        except subprocess.TimeoutExpired as hanging:
            return str(hanging)
        finally:
            _end_orphans()
        if child.returncode not in (PASSED, FAILED):
            raise ChildProcessError(child.stdout + child.stderr)
        return child.stdout if child.returncode else ""


def _end_orphans() -> None:
    """Kill what broken code has left running: it is a child of this process, since `main`."""
    while left := children():
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def main(words: list[str]) -> int:
    adopt_orphans()
    lines = [(each, f"{each.test}: {each}") for each in mutations()]
    chosen = [(each, line) for each, line in lines if not words or any(word in line for word in words)]
    if not chosen:
        print("no line contains any of these words")
        return 1
    whole = [(each.path, each.node) for each in definitions() if isinstance(each.node, ast.Module)]
    if anyhow := failures((each.test for each, _ in chosen), whole):
        print(anyhow, "What fails with nothing broken has noticed nothing.", sep="\n")
        return 1
    missed = 0
    for each, line in chosen:
        found = failures([each.test], [applied(each)])
        missed += not found
        print(f"{'noticed' if found else 'NOT NOTICED'}: {line}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
