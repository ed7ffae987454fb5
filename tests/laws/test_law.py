"""The law of ARCHITECTURE.md, read from there and applied to every module of netns_kit."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import PACKAGE, ROOT, dotted, files

SLIRP = ".cli.slirp4netns"
ALWAYS = {"__future__", "typing", "types"}


class Restriction(NamedTuple):
    """Who may import a module, and how."""

    only_in: tuple[str, ...]
    lazy: bool
    types: bool


class Law(NamedTuple):
    """What ARCHITECTURE.md says."""

    order: list[str]
    restricted: dict[str, Restriction]
    pure: dict[str, set[str]]
    types: dict[str, set[str]]


def rows(text: str, heading: str) -> Iterator[list[str]]:
    """The cells of the table whose first heading is `heading`."""
    table = re.search(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, f"ARCHITECTURE.md has no table with the heading {heading!r}"
    for line in table[1].splitlines():
        yield [cell.strip() for cell in line.strip("|").split("|")]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def law() -> Law:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"^```law\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block, "ARCHITECTURE.md has no block marked law"
    restricted = {
        name: Restriction(tuple(quoted(only_in)), lazy="lazy" in how, types="types" in how)
        for names, only_in, how in rows(text, "import")
        for name in quoted(names)
    }
    pure = {name: set(quoted(allowed)) for names, allowed in rows(text, "pure") for name in quoted(names)}
    types = {name: set(quoted(named)) for names, named in rows(text, "module") for name in quoted(names)}
    return Law([line.split()[0] for line in block[1].splitlines() if line.strip()], restricted, pure, types)


FOLDER_HEADINGS = "| folder | what it is | imports |\n|---|---|---|\n"


def folder(file: str) -> str:
    """The folder below the package that a file is in; a file at the top is a folder of its own."""
    return file.partition("/")[0].removesuffix(".py")


def folder_graph() -> dict[str, set[str]]:
    """Which folders each folder imports from, also for type checkers alone."""
    known = {dotted(file): folder(file) for file in files()}
    graph: dict[str, set[str]] = {}
    for file in files():
        source = (ROOT / PACKAGE / file).read_text(encoding="utf-8")
        found = {known[each.module] for each in imports(file, source) if each.module in known}
        graph.setdefault(folder(file), set()).update(found - {folder(file)})
    return graph


class Import(NamedTuple):
    """One import statement's module, and where it stands."""

    line: int
    module: str
    lazy: bool
    types: bool


class Imports(ast.NodeVisitor):
    """Collects the imports of one module."""

    def __init__(self, file: str, known: set[str]) -> None:
        self.package = dotted(str(Path(file).with_name("__init__.py")))
        self.known, self.found = known, list[Import]()
        self.lazy = self.types = False

    def add(self, node: ast.stmt, module: str) -> None:
        self.found.append(Import(node.lineno, module, self.lazy, self.types))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            module = resolve_name("." * node.level + module, self.package)
        for alias in node.names:
            inner = f"{module}.{alias.name}"
            self.add(node, inner if inner in self.known else module)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outside, self.lazy = self.lazy, True
        self.generic_visit(node)
        self.lazy = outside

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_If(self, node: ast.If) -> None:
        outside = self.types
        self.types = outside or ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.body:
            self.visit(child)
        self.types = outside
        for child in node.orelse:
            self.visit(child)


def imports(file: str, source: str) -> list[Import]:
    visitor = Imports(file, {dotted(listed) for listed in law().order})
    visitor.visit(ast.parse(source))
    return visitor.found


def is_in(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a module (`stack/seq`) is one of those that the patterns (`stack/*`, `tap`) mean."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def verdict(file: str, found: Import) -> str | None:
    """What the law has against one import in `file`, or nothing."""
    name = file.removesuffix(".py")
    root = found.module.partition(".")[0]
    order = [dotted(listed) for listed in law().order]
    restriction = law().restricted.get(found.module) or law().restricted.get(root)

    if restriction and found.types and restriction.types:
        return None
    if restriction:
        if not is_in(name, restriction.only_in):
            return f"{found.module} may be imported only in {', '.join(restriction.only_in) or 'no module'}"
        if restriction.lazy and not (found.lazy or found.types):
            return f"{found.module} is imported lazily: inside a function"
    if root == PACKAGE:
        if found.module not in order:
            return f"{found.module} is not in the list"
        if found.types and any(dotted(each) == found.module for each in law().types.get(name, ())):
            return None
        if order.index(found.module) <= order.index(dotted(file)):
            return f"{found.module} is not below {name}"
    elif not restriction and root not in sys.stdlib_module_names:
        return f"{root} is neither in the standard library nor in the table"

    for pattern, allowed in law().pure.items():
        own = f"{PACKAGE}.{pattern.removesuffix('/*')}" if pattern.endswith("/*") else None
        if not is_in(name, (pattern,)) or {found.module, root} & (allowed | ALWAYS):
            continue
        if not (own and (found.module + ".").startswith(own + ".")):
            return f"{name} is pure: {found.module} is not what it may import"
    return None


def test_every_module_is_listed_and_every_listed_module_exists() -> None:
    order = law().order
    assert len(order) == len(set(order)), "a module is listed twice"
    assert sorted(set(files()) - set(order)) == [], "not in the list"
    assert sorted(set(order) - set(files())) == [], "in the list, but no such file"


def test_the_folders_are_drawn_as_they_are() -> None:
    """The table of folders has every folder, in an order in which each imports only from those below it."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawn = {
        name: {each for cell in (cells[1],) for each in quoted(cell)}
        for names, *cells in rows(text, "folder")
        for name in quoted(names)
    }
    assert drawn == folder_graph()
    order = list(drawn)
    assert [
        f"{above} -> {below}"
        for above in drawn
        for below in drawn[above]
        if order.index(below) <= order.index(above)
    ] == []


def test_each_folder_stands_together_in_the_list() -> None:
    folders = [folder(file) for file in law().order]
    together = [name for name, before in zip(folders, [None, *folders], strict=False) if name != before]
    assert sorted(together) == sorted(set(folders))


def test_every_pattern_of_the_tables_means_a_module() -> None:
    names = [file.removesuffix(".py") for file in files()]
    patterns = {pattern for rule in law().restricted.values() for pattern in rule.only_in} | law().pure.keys()
    assert not [pattern for pattern in patterns if not any(is_in(name, (pattern,)) for name in names)]


@pytest.mark.parametrize("file", files())
def test_imports_keep_the_law(file: str) -> None:
    found = imports(file, (ROOT / PACKAGE / file).read_text(encoding="utf-8"))
    broken = [f"line {each.line}: {why}" for each in found if (why := verdict(file, each))]
    assert not broken, f"{PACKAGE}/{file}:\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("errors.py", "import netns_kit.tap.device", "not below"),
        ("errors.py", "from netns_kit.tap import device", "not below"),
        ("errors.py", "def f():\n    from netns_kit.tap import device", "not below"),
        ("errors.py", "if TYPE_CHECKING:\n    from netns_kit.tap.device import TapDevice", "not below"),
        ("tap/device.py", "from netns_kit import TapDevice", "not below"),
        ("tap/device.py", "import netns_kit.tap.device", "not below"),
        ("tap/device.py", "import netns_kit.nowhere", "not in the list"),
        ("network/network.py", "from netns_kit.namespace.agent import main", "only in"),
        ("namespace/agent.py", "from netns_kit.tap.device import TapDevice", "not below"),
        ("stack/stack.py", "from netns_kit.errors import NetnsError", "is pure"),
        ("stack/stack.py", "from ..errors import NetnsError", "is pure"),
        ("stack/wire/__init__.py", "from ..stack import Stack", "not below"),
        ("stack/stack.py", "import socket", "only in"),
        ("stack/stack.py", "import ipaddress", "is pure"),
        ("stack/stack.py", "import os.path", "is pure"),
        ("gateway/engine.py", "import anyio.abc", "only in"),
        ("gateway/engine.py", "import time", "only in"),
        ("network/network.py", "import select", "only in"),
        ("network/network.py", "async def f():\n    import pyroute2.netlink", "only in"),
        ("namespace/namespace_links.py", "import pyroute2", "lazily"),
        ("namespace/namespace.py", "import requests", "neither"),
    ],
)
def test_the_law_forbids(file: str, source: str, why: str) -> None:
    found = imports(file, source)
    assert any(why in (verdict(file, each) or "") for each in found), [verdict(file, each) for each in found]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("namespace/namespace_links.py", "import socket\ndef f():\n    from pyroute2 import IPRoute"),
        (
            "network/network.py",
            "import anyio.abc\nfrom netns_kit.tap import device\nfrom netns_kit.errors import NetnsError",
        ),
        ("network/network.py", "if TYPE_CHECKING:\n    from typing_extensions import Self"),
        (
            "stack/stack.py",
            "import struct\nfrom collections.abc import Iterator\nfrom netns_kit.stack import wire",
        ),
        ("namespace/agent.py", "import os, select, socket"),
    ],
)
def test_the_law_allows(file: str, source: str) -> None:
    assert [verdict(file, each) for each in imports(file, source) if verdict(file, each)] == []


SIZES = {4, 8, 12, 16, 32, 36}
"""Bytes of an address, of a packet's two, and of a flow key, of either family."""
WIRE = ("stack/wire/*", "dhcp/*", "dns/*", "policy/addresses")
"""Where packed addresses are taken apart and put together: those of packets, of two protocols' messages, of rules."""


def counted_addresses(source: str) -> Iterator[str]:
    """Where a module counts on the length of an address: compares it, looks it up, or slices keys and addresses."""

    def is_length(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) == "len"

    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare(left=left, comparators=[right]) if is_length(left) or is_length(right):
                found = any(isinstance(each, ast.Constant) and each.value in SIZES for each in (left, right))
            case ast.BinOp(left=left, right=ast.Constant(value=2 | 4)):
                found = any(is_length(each) and "key" in ast.unparse(each) for each in ast.walk(left))
            case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=ast.Slice()):
                found = name in ("key", "address", "addresses")
            case ast.Subscript(slice=index) if not isinstance(index, ast.Slice):
                found = any(
                    is_length(each) and re.search("key|address", ast.unparse(each))
                    for each in ast.walk(index)
                )
            case _:
                continue
        if found:
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("file", [each for each in files() if not is_in(each.removesuffix(".py"), WIRE)])
def test_nothing_above_the_wire_knows_how_long_an_address_is(file: str) -> None:
    assert list(counted_addresses((ROOT / PACKAGE / file).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "if len(address) == 4: pass",
        "half = (len(flow.key) - 4) // 2",
        "guest = flow.key[:4]",
        "mss = DEFAULT_MSS[len(key) - 4]",
        "destination = self.addresses[size:]",
    ],
)
def test_the_length_of_an_address_is_found(source: str) -> None:
    assert list(counted_addresses(source))


def definitions(file: str) -> Iterator[str]:
    """The names that a module defines at its top: classes, functions, assignments."""
    for node in ast.parse((ROOT / PACKAGE / file).read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.name
            case ast.Assign():
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case _:
                pass


def test_every_public_name_is_defined_once() -> None:
    package = import_module(PACKAGE)
    everywhere = Counter(name for file in files() for name in definitions(file))
    assert [name for name, times in Counter(package.__all__).items() if times > 1] == []
    assert {name: everywhere[name] for name in package.__all__ if everywhere[name] != 1} == {}
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


def test_a_name_is_imported_from_where_it_is_defined() -> None:
    """`mypy --strict` lets nobody import what a module has imported itself, unless `__all__` lists it."""
    modules = [file for file in files() if Path(file).name != "__init__.py"]
    listed = {
        (file, name)
        for file in modules
        for name in getattr(import_module(dotted(file)), "__all__", ())
        if name not in definitions(file)
    }
    assert not listed


def test_importing_the_package_is_cheap() -> None:
    names = "import netns_kit; print([name for name in sys.modules if name.startswith('netns_kit.')])"
    assert loaded(names) == "[]"
    everything = (
        "from netns_kit import *; print({'asyncio', 'dnslib', 'pyroute2', 'trio'} & sys.modules.keys())"
    )
    assert loaded(everything) == "set()"


TAP_WITHOUT = set(
    "collections contextlib ctypes dataclasses enum functools ipaddress json re selectors signal socket"
    " typing".split()
)
READY_WITHOUT = set(
    "anyio argparse ast asyncio dataclasses dnslib getopt gettext hashlib inspect json linecache logging random"
    " subprocess textwrap threading tokenize traceback weakref".split()
)
AT_BOTH_MOMENTS = """
import _socket, os
ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
before = set(sys.modules)
from netns_kit.cli.slirp4netns import command, tap_fetch

def show(*_):
    print(*sorted(set(sys.modules) - before))

tap_fetch.TapFetch.__init__ = lambda self: None
tap_fetch.TapFetch.open = show
tap_fetch.TapFetch.configure = lambda *_, **__: None
tap_fetch.TapFetch.result = lambda self: (ours.fileno(), 3)
command.print = lambda *_, **__: None  # the banner
os.write = lambda fd, data: show() or os._exit(0) if fd == 99 else None
sys.stdout.reconfigure(line_buffering=True)
command.run(["-c", "--ready-fd=99", "1", "tap0"], "slirp4netns")
"""


def test_what_is_loaded_when_the_tap_is_asked_for_and_at_ready() -> None:
    """Callers wait for both: each module here takes a millisecond, more or less, of every container's start."""
    at_tap, at_ready = loaded(AT_BOTH_MOMENTS, "-S", "-E", "-I").splitlines()
    ours = {name for name in at_tap.split() if name.startswith(PACKAGE)}
    assert ours == {
        f"{PACKAGE}{name}"
        for name in ("", ".cli", ".cli.program", SLIRP, f"{SLIRP}.command", f"{SLIRP}.tap_fetch", ".frozen")
    }
    assert TAP_WITHOUT & set(at_tap.split()) == set()
    assert READY_WITHOUT & set(at_ready.split()) == set()
    later = {
        *(
            "cli.slirp4netns.api_socket",
            "tap.impairment",
            "namespace.agent",
            "namespace.namespace",
            "namespace.watch",
        ),
        *("userstack.userstack", "userstack.worker.main", "userstack.worker.sandbox"),
    }
    assert {f"{PACKAGE}.{name}" for name in later} & set(at_ready.split()) == set()


def test_the_child_that_opens_the_tap_imports_next_to_nothing() -> None:
    code = """
before = set(sys.modules)
from netns_kit.cli.slirp4netns import tap_fetch
import os
def opened(*_):
    print(*sorted(set(sys.modules) - before), flush=True)
    os._exit(0)
tap_fetch._opened = opened
tap_fetch._join = lambda *_: __import__("ctypes")
tap_fetch._fetch(None, "/proc/self/ns/net", "tap0", None)
"""
    found = set(loaded(code, "-S", "-E", "-I").split())
    assert {name for name in found if name.startswith(PACKAGE)} == {
        f"{PACKAGE}{name}" for name in ("", ".cli", ".host", ".host.abi", SLIRP, f"{SLIRP}.tap_fetch")
    }
    assert (TAP_WITHOUT - {"ctypes"}) & found == set()


def test_a_program_loads_what_the_page_says_and_the_standard_library() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    programs = {name: quoted(cell) for names, cell in rows(text, "program") for name in quoted(names)}
    assert programs
    for program, expected in programs.items():
        code = f"import {dotted(program + '.py')}; print(*sys.modules)"
        found = loaded(code, "-S", "-E", "-I").split()
        assert {name for name in found if name.startswith(PACKAGE)} == {
            PACKAGE,
            *(dotted(f"{each}.py") for each in expected),
        }
        others = {name.partition(".")[0] for name in found} - {PACKAGE, "__main__"}
        assert others <= sys.stdlib_module_names


def loaded(code: str, *flags: str) -> str:
    """What `code` prints in an interpreter of its own."""
    command = [sys.executable, *flags, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return child.stdout.strip()


def test_each_public_name_is_where_the_package_looks_for_it() -> None:
    package = import_module(PACKAGE)
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for_checkers = {
        (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for_checkers.remove(("errors", "*"))
    for_checkers |= {("errors", name) for name in import_module(f"{PACKAGE}.errors").__all__}
    homes = {(home, name) for home, names in vars(package)["_HOMES"].items() for name in names.split()}
    assert for_checkers == homes
    assert {name for _, name in homes} == set(package.__all__)
