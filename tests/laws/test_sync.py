"""The synchronous objects are the async ones: none is missing, and type checkers see what there is."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest

import netns_kit
from netns_kit import sync
from netns_kit.sync import facade
from tests import sync_stub

PROTOCOLS = {"Askable", "Device"}
"""What callers may implement, in async code."""


def is_async(kind: type) -> bool:
    return any(
        inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value)
        for each in kind.__mro__
        for value in vars(each).values()
    )


def names() -> list[str]:
    return list(vars(netns_kit)["__all__"])


def test_whatever_is_async_has_a_synchronous_form() -> None:
    found = {name for name in names() if inspect.isclass(kind := getattr(netns_kit, name)) and is_async(kind)}
    assert found - PROTOCOLS == facade.FORMS - {"FakeFlow", "FakeInternet"}, "these two lead to a FakeHost"
    assert not [name for name in names() if inspect.iscoroutinefunction(getattr(netns_kit, name))]
    for name in names():
        assert isinstance(getattr(sync, name), type) == isinstance(getattr(netns_kit, name), type)
        assert (getattr(sync, name) is getattr(netns_kit, name)) == (name not in facade.FORMS)


def test_type_checkers_see_what_there_is() -> None:
    written = sync_stub.STUB.read_text(encoding="utf-8")
    assert written == sync_stub.stub(), "run python -m tests.sync_stub"


def members(node: ast.ClassDef) -> set[str]:
    return {
        each.name if isinstance(each, ast.FunctionDef) else ast.unparse(each.target)
        for each in node.body
        if isinstance(each, ast.FunctionDef | ast.AnnAssign)
    }


@pytest.mark.parametrize("name", sorted(facade.FORMS))
def test_what_type_checkers_see_is_there(name: str) -> None:
    (node,) = (
        each
        for each in ast.parse(sync_stub.STUB.read_text(encoding="utf-8")).body
        if isinstance(each, ast.ClassDef) and each.name == name
    )
    form = getattr(sync, name)
    assert not [member for member in members(node) if not hasattr(form, member)]
    assert not [
        member
        for member in vars(form)
        if not member.startswith("_") and not any(member in members(each) for each in [node, *above(node)])
    ]
    for member in members(node):
        if callable(getattr(form, member, None)) and not member.startswith("_"):
            assert getattr(form, member).__doc__ or member == "extra", member


def above(node: ast.ClassDef) -> list[ast.ClassDef]:
    bases = {ast.unparse(base) for base in node.bases}
    body = ast.parse(sync_stub.STUB.read_text(encoding="utf-8")).body
    return [each for each in body if isinstance(each, ast.ClassDef) and each.name in bases]


def loaded(code: str) -> list[str]:
    code += "; import sys; print(*(name for name in sys.modules if name.startswith(('netns_kit.', 'anyio'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_nothing_is_loaded_before_it_is_used() -> None:
    assert loaded("import netns_kit") == []
    assert loaded("from netns_kit import sync; dir(sync)") == ["netns_kit.sync"]
    assert "netns_kit.userstack.fake_internet" not in loaded("from netns_kit.sync import Network")
