"""What the package shows: public signatures are made of public names, reprs help, and every mistake is told early."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import netns_kit
from tests.support import PACKAGE

PUBLIC: list[str] = vars(netns_kit)["__all__"]

MADE_FOR_CALLERS = {
    "FakeHost",
    "GuestDatagrams",
    "GuestServer",
    "GuestStream",
    "Interceptor",
    "InterceptedDatagrams",
    "InterceptedStream",
    "Namespace",
    "Process",
    "UpstreamStream",
}
"""Classes whose objects a call returns: nobody is to call their constructors."""


FOR_PARTS_OF_THE_LIBRARY = {
    "Captured", "Carriage", "Disturbed", "Index", "MemberSetup", "Members", "NamespaceSockets",
    "SocketDiagnostics", "SocketSource", "Supervisor",
}  # fmt: skip
"""Types of attributes and methods that say so."""


def own_names(tree: ast.Module) -> set[str]:
    """The names of a module which are this library's: defined there, or imported from within."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(PACKAGE)):
            found |= {alias.asname or alias.name for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def annotated(node: ast.ClassDef | ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """What the public signatures and fields of a class, or a function, are annotated with; where that stands."""
    for each in [node] if isinstance(node, ast.FunctionDef) else node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            if not each.target.id.startswith("_"):
                yield each.target.id, each.annotation
        elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            made = each.name in ("__init__", "__new__") and node.name not in MADE_FOR_CALLERS
            if not each.name.startswith("_") or made:
                given = each.args
                for one in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
                    if one is not None and one.annotation is not None:
                        yield f"{each.name}({one.arg})", one.annotation
                if each.returns is not None:
                    yield each.name, each.returns


def definitions() -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef, set[str]]]:
    """Every public class and function, its definition, and the own names of its module."""
    for name in PUBLIC:
        value = getattr(netns_kit, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            tree = ast.parse(Path(sys.modules[value.__module__].__file__ or "").read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                    yield name, node, own_names(tree)


def test_public_signatures_have_public_names() -> None:
    """Whoever wraps one of our calls can annotate the wrapper."""
    hidden = {
        f"{name}.{where}: {each.id}"
        for name, node, own in definitions()
        for where, annotation in annotated(node)
        for each in ast.walk(annotation)
        if isinstance(each, ast.Name)
        and each.id in own
        and each.id not in {*PUBLIC, *FOR_PARTS_OF_THE_LIBRARY, "T"}
    }
    assert not hidden
    assert len(list(definitions())) > 40, "the walk finds them"


def test_exceptions_that_callers_meet_are_public() -> None:
    """Every class of exception that the library's modules define, but for those that end where they are caught."""
    inner = {
        "Missing",
        "Over",
        "Refused",
        "BadPacket",
        "BadParameter",
        "BadMessage",
        "BadDhcpMessage",
        "DecodeError",
        "Wrong",
        "Failed",
        "Fault",
        "Unmapped",
        "_Unexpected",
    }
    found = set()
    for path in Path(netns_kit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).rpartition(".")[2].endswith(("Error", "Exception")) for base in node.bases
            ):
                found.add(node.name)
    assert found - inner - {"_SystemError"} <= set(PUBLIC)
