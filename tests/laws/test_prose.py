"""The law of prose: how public docstrings begin, which sections they have, and what messages of errors say.

A name is public if it is in `netns_kit.__all__`, or a member without underscore of a class that is.

- A docstring of a function begins with a verb, of a class with a noun.  Of a property or a field it does not begin
  with a word that needs another sentence before it.
- Every parameter has a line under "Args:".  Every error of the library that a function raises, itself or through what
  it calls by name, has a line under "Raises:".  A coroutine function says under "Cancellation:" what a cancelled call
  leaves.
- A field of a record has its own text behind it, or a line under "Args:".
- An error about an argument says what was expected and what was given.

Of every docstring of the package, public or not: a line under "Args:", "Raises:" or "Attributes:" begins with a
capital letter.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import netns_kit
from netns_kit import ArgumentError, Forwarder, errors
from tests.support import PACKAGE, ROOT, dotted, files

PUBLIC: list[str] = vars(netns_kit)["__all__"]

VERBS = set(
    "Add Allow Answer Apply Ask Attach Begin Bind Change Check Close Connect Copy Count Create Deliver Detach"
    " Divide Do Drop End Enter Explain Fetch Find Forget Forward Get Give Hand Have Hold Join Keep Kill Leave"
    " Let Listen Make Mark Mount Move Note Open Parse Pass Publish Put Raise Read Refuse Release Remove"
    " Replace Report Reserve Reset Restore Return Revoke Run Send Serve Set Show Signal Split Start Stop Take"
    " Tell Try Turn Undo Use Wait Watch Write Yield".split()
)
NOUNS = set("A An The Bounds Counters Gauges Ports Settings".split())
UNFIT = set(
    "And As At Because But By For From How If In Is It Its Of On Or See That This To What Where Whether Which Who"
    " Whom Whose Why With".split()
)
"""Words that neither the text of a property nor that of a field begins with."""

MADE_BY_CALLS = {"Namespace", "Process", "Flow", "FlowInfo", "FlowEvent"}
"""Classes whose objects are returned by calls: nobody is to call their constructors."""

CHECKED_BEFORE = {
    **{
        f"{uplink}Uplink.{each}": {"ArgumentError", "ArgumentTypeError", "DomainNameError"}
        for uplink in ("", "Chooser", "Indirect", "Socks5", "HttpConnect", "Namespace")
        for each in ("route", "way_for", "dial", "dial_resolver", "carriage")
    },
    "FakeInternet.route": {"ArgumentError", "ArgumentTypeError"},
    "ImpairedTap.at": {"ArgumentError"},
}
"""Errors that cannot be raised, because what they are about was checked before: a flow's endpoints, say."""

ELSEWHERE = {"CommandFailed"}
"""Exceptions that are not in errors.py: this one is a `subprocess.CalledProcessError`, which would have to be
imported.
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


# -- where things are defined -----------------------------------------------------------------------------


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(Path(sys.modules[module].__file__ or "").read_text(encoding="utf-8"))


@cache
def definitions(module: str) -> dict[str, ast.AST]:
    """The functions and classes of a module by their qualified names."""
    found: dict[str, ast.AST] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for each in ast.iter_child_nodes(node):
            if isinstance(each, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.setdefault(prefix + each.name, each)
                if isinstance(each, ast.ClassDef):
                    visit(each, f"{prefix}{each.name}.")
            elif isinstance(each, ast.If | ast.Try):
                visit(each, prefix)

    visit(tree(module), "")
    return found


class Public(NamedTuple):
    """A public class, function or property: its node, the class it is in, and its docstring."""

    name: str
    module: str
    node: ast.ClassDef | Function
    owner: ast.ClassDef | None
    doc: str

    @property
    def is_property(self) -> bool:
        return any("property" in ast.unparse(each) for each in self.node.decorator_list)


def public(name: str) -> Iterator[Public]:
    """What is public under one name of `netns_kit.__all__`; nothing for an alias, whose text tests/laws/test_docs.py
    asks for.
    """
    thing = getattr(netns_kit, name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)) or not thing.__module__.startswith(PACKAGE):
        return
    node = definitions(thing.__module__)[thing.__qualname__]
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    yield Public(name, thing.__module__, node, None, inspect.getdoc(thing) or "")
    if not inspect.isclass(thing):
        return
    seen = set()
    for base in thing.__mro__:
        if base.__module__.split(".")[0] != PACKAGE:
            continue
        owner = definitions(base.__module__).get(base.__qualname__)
        assert isinstance(owner, ast.ClassDef), base
        for each in owner.body:
            if isinstance(each, Function) and not each.name.startswith("_") and each.name not in seen:
                seen.add(each.name)
                doc = inspect.cleandoc(
                    ast.get_docstring(each) or inspect.getdoc(getattr(thing, each.name)) or ""
                )
                yield Public(f"{name}.{each.name}", base.__module__, each, owner, doc)


# -- what is raised ---------------------------------------------------------------------------------------

Raised = frozenset[str]
OURS = {
    name: value
    for name in PUBLIC
    if inspect.isclass(value := getattr(netns_kit, name)) and issubclass(value, netns_kit.NetnsKitError)
}


ABOUT_ARGUMENTS = {name for name, kind in OURS.items() if issubclass(kind, ArgumentError)}


def derived(node: Function) -> set[str]:
    """The names in a function whose values come from its arguments: only these can be wrong by the caller's fault."""
    makers = ("__init__", "__new__", "__post_init__")
    found = {*parameters(node), *(["self"] if node.name in makers else [])}
    while True:
        before = len(found)
        for each in ast.walk(node):
            match each:
                case ast.Assign(targets=targets, value=source):
                    pass
                case ast.For(target=target, iter=source) | ast.comprehension(target=target, iter=source):
                    targets = [target]
                case ast.AnnAssign(target=target, value=source) | ast.NamedExpr(target=target, value=source):
                    targets = [target]
                case _:
                    continue
            if source is not None and found & {
                name.id for name in ast.walk(source) if isinstance(name, ast.Name)
            }:
                found |= {
                    name.id for each in targets for name in ast.walk(each) if isinstance(name, ast.Name)
                }
        if len(found) == before:
            return found


def exception(name: str) -> type[BaseException] | None:
    found = OURS.get(name) or getattr(builtins, name, None)
    return found if inspect.isclass(found) and issubclass(found, BaseException) else None


@cache
def imported(module: str) -> dict[str, str]:
    """What names of the library a module imports, anywhere in it."""
    found: dict[str, str] = {}
    package = (
        module
        if Path(sys.modules[module].__file__ or "").name == "__init__.py"
        else module.rpartition(".")[0]
    )
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            home = ".".join(part for part in (base, node.module) if part)
            if home.split(".")[0] == PACKAGE:
                found |= {alias.asname or alias.name: f"{home}.{alias.name}" for alias in node.names}
    return found


def resolve(dots: str) -> tuple[str, str] | None:
    """The module and the qualified name that a dotted name of the library means."""
    module, names = dots, list[str]()
    while module:
        if module in sys.modules:
            name = ".".join(names)
            if name in definitions(module):
                return module, name
            further = imported(module).get(names[0]) if names else None
            return resolve(".".join([further, *names[1:]])) if further else None
        module, _, last = module.rpartition(".")
        names.insert(0, last)
    return None


def called(function: ast.expr, module: str, owner: str) -> tuple[str, str] | None:
    """The module and the qualified name of what is called, if that can be told from the text."""
    text = ast.unparse(function)
    head, _, rest = text.partition(".")
    if head in ("self", "cls"):
        name = f"{owner}.{rest}"
        return (module, name) if owner and name in definitions(module) else None
    if text in definitions(module):
        return module, text
    if head in imported(module):
        return resolve(".".join(part for part in (imported(module)[head], rest) if part))
    return None


@cache
def raises(module: str, name: str) -> Raised:
    """The library's errors that a function raises, or a class when it is made."""
    return _raises(module, name, frozenset())


def _raises(module: str, name: str, under_way: frozenset[tuple[str, str]]) -> Raised:
    if (module, name) in under_way:
        return frozenset()
    under_way |= {(module, name)}
    node = definitions(module)[name]
    if isinstance(node, ast.ClassDef):
        makers = [f"{name}.{maker}" for maker in ("__new__", "__init__", "__post_init__")]
        return frozenset().union(
            *(_raises(module, maker, under_way) for maker in makers if maker in definitions(module))
        )
    owner = name.rpartition(".")[0]
    given = derived(node) if isinstance(node, Function) else set()

    def of(part: ast.AST) -> Raised:
        found = set[str]()
        if isinstance(part, ast.Try):
            caught = [
                kind
                for handler in part.handlers
                for each in ([] if handler.type is None else ast.walk(handler.type))
                if isinstance(each, ast.Name) and (kind := exception(each.id))
            ]
            inside = frozenset().union(*map(of, part.body))
            found |= {each for each in inside if not issubclass(OURS[each], tuple(caught))}
            for each in (*part.handlers, *part.orelse, *part.finalbody):
                found |= of(each)
            return frozenset(found)
        if isinstance(part, ast.Raise) and part.exc is not None:
            for each in ast.walk(part.exc.func if isinstance(part.exc, ast.Call) else part.exc):
                if isinstance(each, ast.Name) and each.id in OURS:
                    found.add(each.id)
            if isinstance(part.exc, ast.Call) and (helper := called(part.exc.func, module, owner)):
                returned = getattr(definitions(helper[0])[helper[1]], "returns", None)
                found |= {returned.id} & OURS.keys() if isinstance(returned, ast.Name) else set()
        if isinstance(part, ast.Call) and (target := called(part.func, module, owner)):
            passed = {each.id for each in ast.walk(part) if isinstance(each, ast.Name)}
            found |= _raises(*target, under_way) - (set() if passed & given else ABOUT_ARGUMENTS)
        if isinstance(part, Function | ast.Lambda | ast.ClassDef):
            return frozenset()  # it is not called here
        for child in ast.iter_child_nodes(part):
            found |= of(child)
        return frozenset(found)

    return frozenset().union(*map(of, node.body)) if isinstance(node, Function) else frozenset()


# -- the law of docstrings --------------------------------------------------------------------------------


def sections(doc: str) -> dict[str, str]:
    """The texts under "Args:", "Raises:" and "Cancellation:", and under "" what stands before."""
    found, title = {"": ""}, ""
    for line in doc.splitlines():
        if match := re.match(r"(Args|Raises|Cancellation|Yields|Returns|Attributes):(.*)", line):
            title = match[1]
            found[title] = match[2]
        elif line and not line.startswith(" "):
            title = ""
            found[""] += line + "\n"
        else:
            found[title] += "\n" + line
    return found


def entries(section: str) -> set[str]:
    """The names at the beginning of a section's lines, before their colon."""
    found = set()
    for match in re.finditer(r"^ {4}(\w+(?:, \w+)*): ", section, re.MULTILINE):
        found |= set(match[1].split(", "))
    return found


def parameters(node: Function) -> list[str]:
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [each.arg for each in every if each is not None and each.arg not in ("self", "cls")]


def missing_parameters(node: Function, described: set[str]) -> list[str]:
    """The parameters that are not described.  Options of a TypedDict are, if it is named or each of them is."""
    missing = [each for each in parameters(node) if each not in described]
    given = node.args.kwarg
    if given is not None and given.arg in missing and given.annotation is not None:
        options = re.fullmatch(r"Unpack\[(\w+)\]", ast.unparse(given.annotation))
        if options and described.issuperset(getattr(netns_kit, options[1]).__annotations__):
            missing.remove(given.arg)
    return missing


def opening(doc: str) -> str:
    match = re.match(r"[\"`'(]*(\w+)", doc)
    return match[1] if match else ""


def fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The annotated fields of a class, and the text behind each."""
    for each, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)):
            continue
        if not each.target.id.startswith("_") and "ClassVar" not in ast.unparse(each.annotation):
            text = after.value if isinstance(after, ast.Expr) else None
            yield each.target.id, str(text.value) if isinstance(text, ast.Constant) else ""


def faults(thing: Public) -> Iterator[str]:
    """What the law has against one docstring."""
    node, name, told = thing.node, thing.name, sections(thing.doc)
    if not thing.doc:
        yield f"{name} has no docstring"
        return
    first = opening(thing.doc)
    summary = re.split(r"\n\s*\n", thing.doc)[0]
    if not re.search(r"[.:](\s|$)", summary):
        yield f"{name}: the first sentence does not end"
    if isinstance(node, ast.ClassDef):
        yield from faults_of_a_class(thing, first)
        return
    if thing.is_property:
        if first in UNFIT:
            yield f"{name} begins with {first!r}"
    elif first not in VERBS:
        yield f"{name} begins with {first!r}, which is no verb of the list"
    for each in missing_parameters(node, entries(told.get("Args", ""))):
        yield f"{name}: {each} is not under Args"
    qualified = f"{thing.owner.name}.{node.name}" if thing.owner else node.name
    yield from not_told(name, told, raises(thing.module, qualified))
    if isinstance(node, ast.AsyncFunctionDef) and "Cancellation" not in told:
        yield f"{name} has no Cancellation section"


def faults_of_a_class(thing: Public, first: str) -> Iterator[str]:
    node, name, told = thing.node, thing.name, sections(thing.doc)
    assert isinstance(node, ast.ClassDef)
    is_exception = name in OURS
    if first not in NOUNS and not is_exception:
        yield f"{name} begins with {first!r}, which is no noun of the list"
    makers = [
        each for each in node.body if isinstance(each, Function) and each.name in ("__new__", "__init__")
    ]
    if name in MADE_BY_CALLS:
        makers = []
    for maker in makers if not (is_exception and name in ELSEWHERE) else []:
        for each in parameters(maker):
            if each not in entries(told.get("Args", "")):
                yield f"{name}: {each} is not under Args"
    if not makers:
        for each, text in fields(node):
            if not text and each not in entries(told.get("Args", "")):
                yield f"{name}.{each} has no text"
            elif opening(text) in UNFIT:
                yield f"{name}.{each} begins with {opening(text)!r}"
    if name not in MADE_BY_CALLS:
        yield from not_told(name, told, raises(thing.module, node.name))


def not_told(name: str, told: dict[str, str], raised: Raised) -> Iterator[str]:
    named = [kind for each in entries(told.get("Raises", "")) if (kind := exception(each))]
    for each in sorted(raised - CHECKED_BEFORE.get(name, set())):
        if not issubclass(OURS[each], tuple(named)):
            yield f"{name}: {each} is not under Raises"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_keep_the_law(name: str) -> None:
    found = [each for thing in public(name) for each in faults(thing)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("specs: ", "specs is not under Args"),
        ("PortSpecError, ArgumentError: ", "PortSpecError is not under Raises"),
        ("Cancellation:", "no Cancellation section"),
        ("Listen on", "no verb"),
        ("Args:", "specs is not under Args"),
        ("Raises:", "ArgumentTypeError is not under Raises"),
    ],
)
def test_what_is_missing_is_found(lost: str, said: str) -> None:
    (add,) = (each for each in public("Forwarder") if each.name == "Forwarder.add")
    assert list(faults(add)) == []
    broken = add._replace(doc=add.doc.replace(lost, "Whatever ", 1))
    assert any(said in each for each in faults(broken)), list(faults(broken))


def test_what_is_raised_is_found_through_calls() -> None:
    assert raises(Forwarder.__module__, "Forwarder") == {"ArgumentTypeError"}
    assert "PrivilegedPortError" in raises(Forwarder.__module__, "Forwarder.add")
    (record,) = (each for each in public("Record") if each.name == "Record")
    assert {"DomainNameError", "RecordError", "ArgumentTypeError"} <= raises(record.module, "Record")
    assert "AddressError" not in raises(record.module, "_address"), "it is caught there"


def small(source: str) -> Iterator[str]:
    """The lines of sections that begin with a small letter."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            told = sections(ast.get_docstring(node) or "")
            for title in ("Args", "Raises", "Attributes"):
                yield from re.findall(r"^ {4}\w+(?:, \w+)*: [a-z].*", told.get(title, ""), re.MULTILINE)


def test_lines_of_sections_begin_with_a_capital_letter() -> None:
    found = {file for file in files() if [*small((ROOT / PACKAGE / file).read_text(encoding="utf-8"))]}
    assert not found


# -- the law of errors ------------------------------------------------------------------------------------


def test_exceptions_that_callers_catch_are_in_one_module() -> None:
    assert {name for name, kind in OURS.items() if kind.__module__ != errors.__name__} == ELSEWHERE
    assert set(errors.__all__) | ELSEWHERE == OURS.keys()


def begins(text: ast.expr | None, scope: list[ast.AST]) -> bool:
    """Whether a text certainly begins with the word "expected"; `scope` is where its names may have been assigned."""
    match text:
        case ast.Constant(value=str(value)):
            return value.startswith("expected ")
        case ast.JoinedStr(values=[first, *_]):
            return begins(first, scope)
        case ast.IfExp(body=one, orelse=other):
            return begins(one, scope) and begins(other, scope)
        case ast.Name(id=name):
            assigned = [
                node.value
                for each in scope
                for node in ast.walk(each)
                if isinstance(node, ast.Assign)
                and any(ast.unparse(target) == name for target in node.targets)
            ]
            return bool(assigned) and all(begins(each, scope) for each in assigned)
        case _:
            return False


def errors_about_arguments(source: str) -> Iterator[tuple[ast.Call, list[ast.AST]]]:
    """Each place that makes one, with the function and the module around it."""
    module = ast.parse(source)
    around = [node for node in ast.walk(module) if isinstance(node, Function)]
    for node in ast.walk(module):
        if (
            isinstance(node, ast.Call)
            and {ast.unparse(each) for each in ast.walk(node.func)} & ABOUT_ARGUMENTS
        ):
            inside = [each for each in around if each.lineno <= node.lineno <= (each.end_lineno or 0)]
            yield node, [*inside[-1:], *(each for each in module.body if isinstance(each, ast.Assign))]


def mute(source: str) -> list[str]:
    """The places where an error about an argument does not say what was expected, or what was given."""
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call, scope in errors_about_arguments(source)
        if len(call.args) + len(call.keywords) < 3 or not begins(call.args[0] if call.args else None, scope)
    ]


@pytest.mark.parametrize("file", files())
def test_errors_about_arguments_say_what_was_expected_and_what_was_given(file: str) -> None:
    assert mute((ROOT / PACKAGE / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "raise ArgumentError('no such number of queues', 'queues', '99')",
        "raise AddressError('expected an address')",
        "def f(why):\n    raise PortSpecError(why, 'port', 'x')",
        "raise ArgumentError(f'{what} expected', 'queues', 99)",
        "raise (ArgumentError if a else ArgumentTypeError)('a number', 'queues', 99)",
    ],
)
def test_an_error_that_does_not_say_it_is_found(source: str) -> None:
    assert len(mute(source)) == 1


def test_the_places_are_found() -> None:
    sources = [(ROOT / PACKAGE / file).read_text(encoding="utf-8") for file in files()]
    assert sum(len(list(errors_about_arguments(source))) for source in sources) > 40
    assert dotted("errors.py") == errors.__name__
