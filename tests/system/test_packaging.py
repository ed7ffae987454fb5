"""What is published: a wheel and an sdist that are complete, hold nothing else, and work where they are installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import PACKAGE, ROOT, needs

NOT_FOR_OTHERS = (".ci/",)
"""What the sdist leaves out."""

IMPORT_ALL = """
import ast, importlib, importlib.util, pathlib, pkgutil, netns_kit
for name in netns_kit.__all__:
    getattr(netns_kit, name)
for found in pkgutil.walk_packages(netns_kit.__path__, "netns_kit."):
    absent = set()
    for node in ast.walk(ast.parse(pathlib.Path(found.module_finder.find_spec(found.name).origin).read_text())):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        absent.update(top for top in (name.partition(".")[0] for name in names) if not importlib.util.find_spec(top))
    print(found.name, *absent)
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        assert error.name in ABSENT, found.name
"""
"""Import every module, and print of each what it imports, also in its functions, that is not installed."""

TESTS = """
def test_the_fixtures_are_found(fake_internet, tap_pair):
    fake_internet.host("www.example.org")
    assert tap_pair.resolve("www.example.org")
"""


OF_USERS = {
    "namespace": {"trio"},
    "notebook": {"IPython", "ipywidgets", "matplotlib"},
    "testing": {"pytest", "httpx", "httpcore", "trio"},
}
"""What the parts of the package import beyond its dependencies: trio only where it is the event loop."""


class Built(NamedTuple):
    """What has been built: a wheel and an sdist, which `directory` also has unpacked."""

    wheel: Path
    sdist: Path
    source: Path
    python: Path
    """That of a virtual environment which has the wheel, and its dependencies, and nothing else."""


def run(*words: str | Path, cwd: Path) -> str:
    """Run a command and return what it has printed, where nothing is importable but what is installed."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "PYTEST_"))}
    done = subprocess.run(
        words, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needed(requirements: list[str]) -> Iterator[Distribution]:
    """What is installed here of these requirements, and of what those require, and so on; of no extra."""
    seen: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if (name := canonicalize_name(requirement.name)) not in seen:
            seen.add(name)
            yield (found := distribution(name))
            waiting += map(Requirement, found.requires or ())


def provide(python: Path, distributions: Iterator[Distribution]) -> None:
    """Let `python`, of a virtual environment, import these distributions, as if they were installed in it."""
    (packages,) = python.parent.parent.glob("lib/python3*/site-packages")
    for each in distributions:
        tops = {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not (link := packages / top).exists():
                link.symlink_to(Path(str(each.locate_file(top))))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    top = tmp_path_factory.mktemp("packaging")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", top / "dist", ROOT, cwd=top)
    (wheel,) = (top / "dist").glob("*.whl")
    (sdist,) = (top / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(top)
    run(sys.executable, "-m", "venv", "--without-pip", top / "venv", cwd=top)
    python = top / "venv" / "bin" / "python"
    install = (
        "--python",
        python,
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-index",
    )
    run(sys.executable, "-m", "pip", *install, wheel, cwd=top)
    (metadata,) = top.glob("venv/lib/python3*/site-packages/netns_kit-*.dist-info")
    provide(python, needed(Distribution.at(metadata).requires or []))
    return Built(wheel, sdist, top / sdist.name.removesuffix(".tar.gz"), python)


def test_the_metadata_is_fit_to_be_published(built: Built) -> None:
    """Strictly: a warning is an error."""
    run(
        sys.executable,
        "-m",
        "twine",
        "--no-color",
        "check",
        "--strict",
        built.wheel,
        built.sdist,
        cwd=built.source,
    )


def test_the_sdist_is_the_tree_and_the_wheel_its_package(built: Built) -> None:
    needs("git")
    listed = run(
        *("git", "-c", "core.excludesFile=/dev/null", "ls-files", "-z", "--cached", "--others"),
        "--exclude-standard",
        cwd=ROOT,
    )
    tree = {
        file for file in listed.split("\0") if (ROOT / file).is_file() and not file.startswith(NOT_FOR_OTHERS)
    }
    source = {str(file.relative_to(built.source)) for file in built.source.rglob("*") if file.is_file()}
    assert source - {"PKG-INFO"} == tree
    with zipfile.ZipFile(built.wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name and ".data/" not in name}
    assert inside == {file for file in tree if file.startswith(f"{PACKAGE}/")}
    assert {f"{PACKAGE}/py.typed", f"{PACKAGE}/sync/__init__.pyi"} <= inside


def test_everything_is_imported_with_the_dependencies_alone(built: Built) -> None:
    """Modules for notebooks and tests import what their users have; the others do so where there is another way."""
    script = f"ABSENT = {set().union(*OF_USERS.values())}\n{IMPORT_ALL}"
    said = run(built.python, "-W", "error", "-c", script, cwd=built.source.parent)
    absent: dict[str, set[str]] = {}
    for module, *names in map(str.split, said.splitlines()):
        absent.setdefault(module.split(".")[1], set()).update(names)
    assert {part: names for part, names in absent.items() if names} == OF_USERS


def test_the_commands_start(built: Built) -> None:
    programs = built.python.parent
    version = Distribution.at(next(built.python.parents[1].glob("lib/*/site-packages/netns_kit-*"))).version
    made = run(programs / "netns-kit", "--version", cwd=built.source.parent)
    assert made == f"netns-kit {version}\n"
    assert run(built.python, "-m", PACKAGE, "--version", cwd=built.source.parent) == made
    assert f"netns-kit {version}" in run(
        programs / "netns-kit-slirp4netns", "--version", cwd=built.source.parent
    )


def test_pytest_finds_the_fixtures(built: Built, tmp_path: Path) -> None:
    provide(built.python, needed(["pytest"]))
    (tmp_path / "test_it.py").write_text(TESTS)
    said = run(
        built.python, "-m", "pytest", "-q", "-W", "error", "--rootdir", tmp_path, tmp_path, cwd=tmp_path
    )
    assert "1 passed" in said


def test_the_sdist_tests_itself(built: Built) -> None:
    """Its tests, docs and examples are there, and its own package is what they test."""
    where = run(sys.executable, "-c", "import netns_kit; print(netns_kit.__file__)", cwd=built.source)
    assert where.strip() == str(built.source / PACKAGE / "__init__.py")
    files = ("tests/test_subnet.py", "tests/test_domain_names.py")
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=built.source)
    assert re.search(r"\d{2,} passed", said), said
    for directory in ("docs/notebooks", "examples", "benchmarks"):
        assert any((built.source / directory).iterdir())
