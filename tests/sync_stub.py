"""What type checkers and editors see of `netns_kit.sync`, written from the classes that it stands for.

`python -m tests.sync_stub` writes `netns_kit/sync/__init__.pyi`.  `tests/laws/test_sync.py` holds that it is current.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import netns_kit
from netns_kit.sync import facade
from tests.support import ROOT

STUB = ROOT / "netns_kit" / "sync" / "__init__.pyi"
PARTS = [getattr(netns_kit, name) for name in sorted(facade.FORMS)]
STREAMS = {each.__name__: each for each in facade.STREAMS}
ALIASES = {
    "OnFlow": "Callable[[FlowRequest], FlowAnswer]",
    "StreamHandler": "Callable[[SocketStream], object]",
    "TcpGuestHandler": "Callable[[GuestStream], object]",
    "TcpInterceptHandler": "Callable[[InterceptedStream], object]",
    "UdpGuestHandler": "Callable[[GuestDatagrams], object]",
    "UdpInterceptHandler": "Callable[[InterceptedDatagrams], object]",
}
"""Functions of the caller, which are plain ones here."""
REPLACED = {
    "Askable": "UserStack",
    "Device": "TapDevice | ImpairedTap",
    "T": "_Function",
    "T_co": "bytes",
    "Uplink": "Uplink | FakeInternet",
}
WRITTEN = {
    "__aiter__": "def __iter__(self) -> Self",
    "extra": "def extra(self, attribute: _T, default: object = ...) -> _T",
}
"""Methods whose annotations say less, or other things."""
HEAD = """
# `python -m tests.sync_stub` writes this file.
from collections.abc import Callable, Iterator
from typing import Generic, TypeAlias, TypeVar

from typing_extensions import Self
"""
BODY = """
_T = TypeVar("_T")
_Function = TypeVar("_Function", bound=Callable[..., object])

class Iteration(Iterator[_T], Generic[_T]):
    def __next__(self) -> _T: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
"""


class Annotation(NamedTuple):
    """An annotation's text, and the module whose names it has."""

    text: str
    module: str


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(Path(str(import_module(module).__file__)).read_text(encoding="utf-8"))


@cache
def homes(module: str) -> dict[str, tuple[str, str]]:
    """What the names of a module mean: a module and a name in it, or a module and nothing."""
    is_package = Path(str(import_module(module).__file__)).stem == "__init__"
    package = module if is_package else module.rpartition(".")[0]
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            home = (
                resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            )
            found.update({each.asname or each.name: (str(home), each.name) for each in node.names})
        elif isinstance(node, ast.Import):
            found.update(
                {each.name.partition(".")[0]: (each.name.partition(".")[0], "") for each in node.names}
            )
    for node in tree(module).body:
        match node:
            case ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = module, name
            case ast.Assign(targets=[ast.Name(id=name)]):
                found[name] = module, name
    return found


class Names(ast.NodeTransformer):
    """Rewrites annotations so that they mean in the stub what they mean in their modules, and collects imports."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.module = ""

    def text(self, annotation: Annotation) -> str:
        self.module = annotation.module
        return ast.unparse(self.visit(ast.parse(annotation.text, mode="eval").body))

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if ast.unparse(node.value) == "anyio.abc" and node.attr in STREAMS:
            return ast.Name(node.attr)
        return ast.Attribute(self.visit(node.value), node.attr)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if ast.unparse(node.value) == "AsyncGenerator":
            item = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
            return ast.Subscript(ast.Name("Iteration"), self.visit(item))
        if ast.unparse(node.value) == "Literal":
            self.imports.add("from typing import Literal as _Literal")
            return ast.Subscript(ast.Name("_Literal"), node.slice)
        return ast.Subscript(self.visit(node.value), self.visit(node.slice))

    def visit_Name(self, node: ast.Name) -> ast.expr:
        name = node.id
        if name in REPLACED:
            return ast.parse(REPLACED[name], mode="eval").body
        if name in facade.FORMS or name in STREAMS or name == "Self":
            return node
        home, original = homes(self.module).get(name, ("", ""))
        if not home:
            assert hasattr(builtins, name), f"{name} of {self.module}"
            self.imports.add("import builtins as _builtins")
            return (
                ast.Attribute(ast.Name("_builtins"), name) if hasattr(type, name) or name == "list" else node
            )
        if not original:
            self.imports.add(f"import {home} as _{home}")
            return ast.Name(f"_{home}")
        if original in netns_kit.__all__:  # type: ignore[attr-defined]  # no type checker sees it
            return ast.Name(original)
        self.imports.add(f"from {home} import {original} as _{original}")
        return ast.Name(f"_{original}")


def bare(function: Any) -> FunctionType:
    """A function with the signature that its text has."""
    copy = FunctionType(function.__code__, {}, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, dict(function.__annotations__)
    return copy


def fields(name: str, module: str) -> Iterator[tuple[str, Annotation]]:
    """The fields of a TypedDict, by its text."""
    home, original = homes(module)[name]
    (node,) = (each for each in tree(home).body if isinstance(each, ast.ClassDef) and each.name == original)
    for base in node.bases:
        if ast.unparse(base) != "TypedDict":
            yield from fields(ast.unparse(base), home)
    for each in node.body:
        if isinstance(each, ast.AnnAssign):
            yield ast.unparse(each.target), Annotation(ast.unparse(each.annotation), home)


def parameters(function: Any, names: Names) -> str:
    found, is_keyword = list[str](), False
    for each in inspect.signature(bare(function)).parameters.values():
        text = str(each.annotation)
        default = "" if each.default is each.empty else " = ..."
        if "TaskStatus" in text:
            continue
        if each.kind is each.VAR_KEYWORD and text.startswith("Unpack["):
            found += [] if is_keyword else ["*"]
            for name, annotation in fields(text[7:-1], function.__module__):
                if f"{name}:" not in [word.split()[0] for word in found if " " in word]:
                    found.append(f"{name}: {names.text(annotation)} = ...")
            continue
        if each.kind is each.KEYWORD_ONLY and not is_keyword:
            is_keyword = True
            found += ["*"] if not any(word.startswith("*") for word in found) else []
        star = "*" if each.kind is each.VAR_POSITIONAL else "**" if each.kind is each.VAR_KEYWORD else ""
        about = (
            "" if each.annotation is each.empty else f": {names.text(Annotation(text, function.__module__))}"
        )
        found.append(f"{star}{each.name}{about}{default}")
    return ", ".join(found)


def definition(name: str, function: Any, names: Names, decorator: str = "") -> str:
    returns = names.text(Annotation(function.__annotations__["return"], function.__module__))
    return f"{decorator}    def {name}({parameters(function, names)}) -> {returns}: ...\n"


def annotation_of(kind: type, name: str) -> Annotation:
    for each in kind.__mro__:
        annotations = inspect.get_annotations(each)
        if name in annotations:
            return Annotation(annotations[name], each.__module__)
    return Annotation(type(getattr(kind, name)).__name__, kind.__module__)


def attribute(kind: type, name: str, value: Any, names: Names) -> str:
    shown = facade.RENAMED.get(name, name)
    if isinstance(value, classmethod):
        return definition(shown, value.__func__, names, "    @classmethod\n")
    if isinstance(value, property):
        return definition(shown, value.fget, names, "    @property\n")
    if name in WRITTEN:
        return f"    {WRITTEN[name]}: ...\n"
    if inspect.isfunction(value):
        return definition(shown, value, names)
    return f"    {shown}: {names.text(annotation_of(kind, name))}\n"


def class_text(kind: type, names: Names) -> str:
    above = next((each for each in facade.lineage(kind) if each is not kind), None)
    inherited: dict[str, object] = {} if above is None else facade.public(above)
    text = f"class {kind.__name__}{'' if above is None else f'({above.__name__})'}:\n"
    if kind.__name__ in facade.MADE_BY_CALLERS:
        text += f"    def __init__({parameters(getattr(kind, '__init__'), names)}) -> None: ...\n"  # noqa: B009
    for name, value in sorted(facade.public(kind).items()):
        if name not in inherited or value is not inherited[name]:
            text += attribute(kind, name, value, names)
    return text


def stub() -> str:
    """The text of the stub."""
    names = Names()
    classes = "\n".join(class_text(kind, names) for kind in [*PARTS, *STREAMS.values()])
    opened = parameters(netns_kit.Network.__init__, names).removeprefix("self, ")
    public = [
        name
        for name in netns_kit.__all__  # type: ignore[attr-defined]  # no type checker sees it
        if name not in facade.FORMS and name not in ALIASES
    ]
    imports = sorted(names.imports, key=lambda line: (line.startswith("from"), line))
    imports.append(f"from netns_kit import {', '.join(f'{name} as {name}' for name in sorted(public))}")
    aliases = "".join(f"{name}: TypeAlias = {meaning}\n" for name, meaning in ALIASES.items())
    function = f"def open_network({opened}) -> Network: ...\n"
    text = "\n".join([HEAD, *imports, BODY, aliases, classes, function])
    return formatted(text)


def formatted(text: str) -> str:
    for command in ("check --select I --fix-only --quiet".split(), ["format"]):
        command = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(STUB), "-"]
        text = subprocess.run(
            command, cwd=ROOT, input=text, capture_output=True, text=True, check=True
        ).stdout
    return text


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
