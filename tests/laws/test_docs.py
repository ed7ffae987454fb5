"""Prose is executed: the pages' Python blocks, and the names that docstrings mention."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import errno
import importlib.util
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import symtable
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import get_origin

import pytest

import netns_kit
from docs.run_readme import FENCE, blocks
from netns_kit import FlowInfo
from tests.support import PACKAGE, ROOT, dotted, files, needs, needs_tun, needs_userns

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = re.compile(r'(?:run|popen)\(\[?"([\w-]+)')
"""A command that a page runs, whose first word is a program's name."""

# Words in backticks which are not Python: programs, constants of the kernel.  Sysctls (`net.ipv4.x`) need no
# mention here.
FOREIGN = """
    apt-get capsh curl dig docker hping3 ip iperf3 nc newgidmap newuidmap nft nginx pasta passt ping podman
    slirp4netns socat sysctl tcpdump traceroute udhcpc unshare nsenter
    root tap0 lo localhost
    CAP_NET_ADMIN CAP_NET_BIND_SERVICE CAP_NET_RAW CAP_SYS_ADMIN CAP_SYS_PTRACE
    CLONE_NEWNET CLONE_NEWNS CLONE_NEWUSER
    IFF_MULTI_QUEUE IFF_NO_PI IFF_TAP IFF_VNET_HDR TUNSETIFF TUNSETOFFLOAD TUNSETVNETHDRSZ
    NEEDS_CSUM TSO4 TSO6 TSO_ECN USO4 USO6 UDP_SEGMENT UDP_GRO PR_SET_PDEATHSIG
""".split()
SYSCTLS = ("net.", "kernel.", "user.", "vm.", "fs.")


def run_page(page: Path, *options: str) -> str:
    """Run the page's blocks in a process of their own, where whatever warns has failed; what they print."""
    command = [sys.executable, "-W", "error", str(ROOT / "docs" / "run_readme.py"), str(page), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}  # readline(3) may have set it
    child = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        input="y\n",  # what a person says whom an example asks
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert child.returncode == 0, f"{page.name}:\n{child.stdout}{child.stderr}"
    return child.stdout


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_every_block_of_a_page_runs(page: Path) -> None:
    if any(block.run for block in blocks(page)):
        needs(*PROGRAM.findall(page.read_text(encoding="utf-8")))
        needs_userns()
        needs_tun()
        run_page(page, "--all")


def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """A table of names, and those of the functions and classes in it."""
    yield table
    for child in table.get_children():
        yield from tables(child)


def made_and_used(code: str) -> tuple[set[str], set[str]]:
    """The names that a block makes, and those that it uses and does not make."""
    top = symtable.symtable(code, "block", "exec")
    made = {each.get_name() for each in top.get_symbols() if each.is_assigned() or each.is_imported()}
    used = {
        each.get_name()
        for table in tables(top)
        for each in table.get_symbols()
        if each.is_referenced() and (each.is_global() or table is top)
    }
    return made, used - made


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_a_page_whose_blocks_need_those_before_them_says_so(page: Path) -> None:
    """Else whoever copies one alone finds a name that is not defined."""
    text = page.read_text(encoding="utf-8")
    known: set[str] = set()
    needed: set[str] = set()
    for fence in FENCE.finditer(text):
        if fence["info"].startswith("python"):
            made, used = made_and_used(fence["body"])
            needed |= used & known
            known |= made
    assert bool(needed) == ("make one file" in text), sorted(needed)


@pytest.mark.parametrize(
    "options", [(), ("--backend", "trio"), ("--threads",), ("--backend", "trio", "--threads")]
)
def test_the_first_block_of_the_readme_runs(options: tuple[str, ...]) -> None:
    assert blocks(README), "README.md has no Python block"
    assert blocks(README)[0].run, "the first block is the quick start: it runs"
    needs_userns()
    needs_tun()
    run_page(README, *options)


def test_the_first_block_about_flows_lists_one() -> None:
    needs_userns()
    needs_tun()
    said = run_page(ROOT / "docs" / "observing.md")
    assert re.search(
        r"^tcp 10\.0\.2\.100:\d+ 10\.0\.2\.2:\d+ \S+\.containers\.internal 5 \d", said, re.MULTILINE
    )


def test_what_the_page_about_policies_shows_is_what_comes_out() -> None:
    """Each line that it shows behind an example, but for times and for ports that are chosen."""
    needs_userns()
    needs_tun()
    page = ROOT / "docs" / "policy.md"

    def steady(text: str) -> str:
        return re.sub(r'("(?:time|id|guest_port)": )[\d.]+', r"\1...", text)

    said = steady(run_page(page, "--all")).splitlines()
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    shown = [line[4:] for line in steady(text).splitlines() if line.startswith("    ")]
    shown = [line for line in shown if not line.startswith("netns-kit ")]
    assert len(shown) > 20
    assert [line for line in shown if line not in said] == []
    assert any("wants 192.0.2.1, tcp port 443: [y/N]" in line for line in said)


def test_what_the_page_about_displays_shows_is_what_comes_out() -> None:
    """But for numbers, and how much room they take."""
    needs_userns()
    needs_tun()
    page = ROOT / "docs" / "displays.md"

    def steady(line: str) -> str:
        return re.sub(r"[ ─]+", " ", re.sub(r"\d+", "0", line)).strip()

    said = {steady(line) for line in run_page(page).splitlines()}
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    shown = [steady(line) for line in text.splitlines() if line.startswith("    ")]
    assert len(shown) > 12
    assert [line for line in shown if line not in said] == []


def test_the_file_of_the_page_about_policies_is_the_policy_of_its_first_example() -> None:
    page = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    [toml] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    [made] = re.findall(r"^POLICY = (\(.*?^\))", page, re.DOTALL | re.MULTILINE)[:1]
    policy = eval(made, {name: getattr(netns_kit, name) for name in ("Policy", "METADATA")})
    assert toml == policy.to_toml()


def test_what_the_page_about_events_shows_is_what_comes_out() -> None:
    """Its lines of JSON, but for times, ports, and who the program is."""
    needs_userns()
    needs_tun()
    page = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    said = run_page(ROOT / "docs" / "observing.md", "--all")
    varying = ("time", "guest_port", "remote_port", "host_port", "age", "process")
    shown, printed = (
        [json.loads(line) for line in re.findall(rf'^{indent}({{"time".*}})$', text, re.MULTILINE)]
        for indent, text in (("    ", page), ("", said))
    )
    assert len(shown) == 2
    for each in (*shown, *printed):
        assert each["process"].keys() == {"pid", "inner_pid", "uid", "name", "command"}
        each.update((name, each[name] is None) for name in varying)
    assert printed == shown


@pytest.mark.parametrize("name", ["programming", "interception"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_what_the_pages_about_programming_show_is_what_comes_out(name: str, backend: str) -> None:
    needs_userns()
    needs_tun()
    page = ROOT / "docs" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"^(?:    \S.*\n)+", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    assert run_page(page, "--all", "--backend", backend) == "".join(shown).replace("    ", "")


@pytest.mark.parametrize(("name", "blocks"), [("faults", 2), ("sync", 4)])
def test_what_a_page_shows_is_what_comes_out(name: str, blocks: int) -> None:
    needs(*PROGRAM.findall((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")))
    needs_userns()
    needs_tun()
    page = ROOT / "docs" / f"{name}.md"
    shown = re.findall(
        r"^prints\n\n```\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(shown) == blocks
    assert run_page(page, "--all") == "".join(shown)


def test_every_fault_is_explained() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    for each in dataclasses.fields(netns_kit.Faults):
        assert f"`{each.name}`" in page, each.name


def test_every_field_of_a_flow_is_explained() -> None:
    """On the page, and behind the field where an editor looks."""
    page = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    fields = [each.name for each in dataclasses.fields(FlowInfo)]
    assert re.findall(r"^\| `(\w+)` \| .+ \|$", page.partition("## Events")[0], re.MULTILINE) == fields
    (body,) = (
        node.body
        for node in ast.walk(tree("gateway/gateway.py"))
        if isinstance(node, ast.ClassDef) and node.name == "FlowInfo"
    )
    explained = [
        field.target.id
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
    ]
    assert explained == fields


def test_make_has_the_targets_that_the_pages_name() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in [README, ROOT / "CONTRIBUTING.md"]:
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, f"{page.name} names {named - targets}"


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in [*PAGES, *ROOT.glob("*.md")]])
def test_links_lead_somewhere(page: Path) -> None:
    """Those within the repository: there is no other address yet."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            path = page.parent / link.partition("#")[0]
            assert path.exists(), f"{page.name}: {link}"
            assert path.resolve().is_relative_to(ROOT)


def test_every_test_that_the_threat_model_names_is_there() -> None:
    """A claim without a test is a hope."""
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    named = re.findall(
        r"`(tests/[\w/.]+|test_\w+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    )
    assert len(named) > 20
    for name in named:
        if name.startswith("tests/"):
            assert (ROOT / name).exists(), name
        else:
            assert any(re.search(rf"def {name}\(", text) for text in tests.values()), name


def test_every_bypass_of_a_policy_that_is_tried_is_in_the_threat_model() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    tried = (ROOT / "tests" / "system" / "test_policy_bypasses.py").read_text(encoding="utf-8")
    names = re.findall(r"^async def (test_\w+)", tried, re.MULTILINE)
    assert len(names) > 25
    assert not [name for name in names if f"`{name}`" not in page]


def test_the_readme_begins_with_the_short_form() -> None:
    """`Network`, in a few lines; the five objects it is made of are in the tutorial."""
    [first, *_] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert "Network(" in first
    assert len([line for line in first.splitlines() if line.strip()]) <= 8


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    """Each row is one of docs/performance.md, where it says "best" if there are two."""
    measured: dict[str, list[str]] = {}
    table: list[str] = []
    for line in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[1:2] == ["MTU"]:
            table = cells
        elif len(cells) == len(table) > 1 and cells[1] == "best":
            names = ("netns_kit thread", "slirp4netns", "pasta")
            measured.setdefault(cells[0], [cells[table.index(name)].partition(" ")[0] for name in names])
    rows = re.findall(
        r"^\| (.+) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.,]+) \|$",
        README.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) > 5
    for name, *figures in rows:
        assert figures == measured[name], name


# Names in docstrings


def own_attributes(tree: ast.Module) -> set[str]:
    """What cannot be seen from outside: parameters, what methods assign to self, fields of classes."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.arg(arg=name) | ast.Attribute(attr=name, ctx=ast.Store()):
                found.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case _:
                pass
    return found


@cache
def module(file: str) -> ModuleType:
    return importlib.import_module(dotted(file))


@cache
def vocabulary(file: str) -> frozenset[str]:
    """Every plain word that a docstring of this module may use: its own names and its classes' attributes."""
    here = module(file)
    classes = [value for value in vars(here).values() if isinstance(value, type)]
    attributes = {name for each in classes for name in dir(each)}
    package = file.removesuffix("__init__.py")  # whose theory of operation speaks of all its modules
    parts = [part for part in files() if part.startswith(package) and part != file != package]
    return frozenset(vars(here)).union(attributes, own_attributes(tree(file)), *map(vocabulary, parts))


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / PACKAGE / file).read_text(encoding="utf-8"))


def has(value: object, path: list[str]) -> bool:
    """Whether the attributes in `path` lead somewhere; what only an instance has counts by its name."""
    for name in path:
        if not hasattr(value, name):
            defined_in = getattr(value, "__module__", "")
            return path[-1] == name and any(
                defined_in == dotted(file) and name in own_attributes(tree(file)) for file in files()
            )
        value = getattr(value, name)
    return True


def resolves(file: str, word: str) -> bool:
    """Whether a word in backticks means something: here, anywhere in netns_kit, in Python or in the world."""
    head, *rest = word.split(".")
    if word in FOREIGN or word.startswith(SYSCTLS):
        return True
    if not rest and (
        word in vocabulary(file) or any(hasattr(each, word) for each in (builtins, socket, errno, signal))
    ):
        return True
    places = [module(file), builtins, *(module(other) for other in files())]
    if any(has(place, [head, *rest]) for place in places if hasattr(place, head)):
        return True
    if (
        head in own_attributes(tree(file)) and rest
    ):  # `self`'s attribute, or a parameter: its class is unknown
        return any(rest[-1] in vocabulary(other) for other in files())
    if importable(word) or importable(f"{PACKAGE}.{word}"):
        return True
    owner, _, name = word.rpartition(".")
    return bool(owner) and importable(owner) and hasattr(importlib.import_module(owner), name)


@cache
def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def docstrings(file: str) -> Iterator[tuple[str, str]]:
    """Every docstring of a module, with the name of what it documents."""
    for node in ast.walk(tree(file)):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield getattr(node, "name", "the module"), ast.get_docstring(node) or ""
            case _:
                pass


def names(text: str) -> Iterator[str]:
    """What stands in backticks and looks like a Python name or a call of one."""
    for word in re.findall(r"`+([^`\n]+)`+", text):
        if match := re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(\([^)]*\))?", word):
            yield match[1]


@pytest.mark.parametrize("file", files())
def test_names_in_docstrings_exist(file: str) -> None:
    stale = [
        f"`{name}` in {owner}"
        for owner, text in docstrings(file)
        for name in names(text)
        if not resolves(file, name)
    ]
    assert not stale, f"{PACKAGE}/{file}:\n" + "\n".join(stale)


@pytest.mark.parametrize(
    "word", ["Nowhere", "no_such_thing", "Path.nowhere", "socket.nothing", "nowhere.at_all"]
)
def test_a_stale_name_is_found(word: str) -> None:
    assert list(names(f"See `{word}`.")) == [word]
    assert not resolves("errors.py", word)


def public() -> list[str]:
    return list(getattr(importlib.import_module(PACKAGE), "__all__", []))


def described(file: str, name: str) -> bool:
    """Whether the module assigns `name`, and says in the next line what it is."""
    for node, after in pairwise(tree(file).body):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(each, ast.Name) and each.id == name for each in targets):
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


@pytest.mark.parametrize("name", public())
def test_what_is_public_is_documented(name: str) -> None:
    thing = getattr(importlib.import_module(PACKAGE), name)
    members = {name: thing}
    if not callable(thing) or not hasattr(thing, "__module__") or get_origin(thing) is not None:
        assert any(described(file, name) for file in files()), "an alias has its text behind it"
        return
    if isinstance(thing, type):
        members |= {
            f"{name}.{attribute}": getattr(thing, attribute)  # whose text it may have inherited
            for attribute, value in vars(thing).items()
            if not attribute.startswith("_")
            and (inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod))
        }
    assert [path for path, value in members.items() if not (inspect.getdoc(value) or "").strip()] == []
