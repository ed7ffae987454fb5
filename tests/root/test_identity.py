"""Who a command is in a namespace of somebody else's: the namespace's owner, or nothing runs.

These tests are root's, who alone can be everybody: `.ci/run` runs them as root, by themselves.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import ROOT, finds_the_callers_keys, missing, needs

OWNER, GROUP, CALLER, OTHER_GROUP = 42420, 42430, 42440, 42450
MINE, SPARE = 500_000, 600_000  # subordinate uids and gids

ATTACH = """
import anyio, re, sys
from netns_kit import NetnsKitError
from netns_kit.namespace.namespace import Namespace

async def main():
    try:
        async with Namespace.attach(pid=int(sys.argv[1]), pids=sys.argv[2]) as ns:
            async with await ns.popen(["sleep", "60"]) as process:
                for name in ("Uid", "Gid", "Groups"):
                    found = re.search(f"^{name}:(.*)$", open(f"/proc/{process.pid}/status").read(), re.MULTILINE)
                    print(*sorted(set(found[1].split()), key=int))
            done = await ns.run(["cat", *sys.argv[3:]], check=False)
            print(done.returncode)
    except NetnsKitError as error:
        print(type(error).__name__, error)

anyio.run(main)
"""

# How the owner makes the namespace; then what root writes to its maps, of uids and of gids.
NAMESPACES: dict[str, tuple[list[str], str, str]] = {
    "root": (["unshare", "-Urn"], "", ""),
    "itself": (["unshare", "-cUn"], "", ""),
    "nobody": (["unshare", "-Un"], "", ""),
    "uid without gid": (["unshare", "-Un"], f"0 {OWNER} 1", ""),
    "gid without uid": (["unshare", "-Un"], "", f"0 {GROUP} 1"),
    "another gid": (["unshare", "-Un"], f"0 {OWNER} 1", f"7 {GROUP} 1"),
    "another uid": (["unshare", "-Un"], f"7 {OWNER} 1", f"0 {GROUP} 1"),
    "ranges": (["unshare", "-Un"], f"0 {OWNER} 1\n1 {MINE} 65535", f"0 {GROUP} 1\n1 {SPARE} 65535"),
    "keep-id": (
        ["unshare", "-Un"],
        f"0 {MINE} 1000\n1000 {OWNER} 1\n1001 {MINE + 1000} 64535",
        f"0 {SPARE} 1000\n1000 {GROUP} 1\n1001 {SPARE + 1000} 64535",
    ),
    "only ranges": (["unshare", "-Un"], f"0 {MINE} 65536", f"0 {SPARE} 65536"),
    "only ranges, without 0": (["unshare", "-Un"], f"1 {MINE} 1000", f"1 {SPARE} 1000"),
    "nested": (["unshare", "-Ur", "unshare", "-Urn"], "", ""),
    "nested itself": (["unshare", "-cU", "--keep-caps", "unshare", "-cUn"], "", ""),
}
NOBODY, NO_GROUPS = "IdMapError", ""
AS_OWNER = f"{OWNER}\n{GROUP}\n{NO_GROUPS}"

EXPECTED = {
    "root": AS_OWNER,
    "itself": AS_OWNER,
    "nobody": NOBODY,
    "uid without gid": NOBODY,
    "gid without uid": NOBODY,
    "another gid": AS_OWNER,
    "another uid": AS_OWNER,
    "ranges": AS_OWNER,
    "keep-id": AS_OWNER,
    "only ranges": f"{MINE}\n{SPARE}\n{NO_GROUPS}",
    "only ranges, without 0": NOBODY,
    "nested": AS_OWNER,
    "nested itself": AS_OWNER,
}


@pytest.fixture(autouse=True)
def _tools() -> None:
    needs("unshare", "setpriv")


@contextmanager
def made(how: str) -> Iterator[int]:
    """A process of the owner's in a user and network namespace: its pid."""
    command, uids, gids = NAMESPACES[how]
    code = "import sys; print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [*command, "/usr/bin/env", "python3", "-ISc", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        user=OWNER,
        group=GROUP,
        extra_groups=[],
        cwd="/",
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            for kind, text in (("uid", uids), ("gid", gids)):
                if text:
                    Path(f"/proc/{process.pid}/{kind}_map").write_text(text)
            yield process.pid
        finally:
            process.kill()


def attach(pid: int, *files: Path, pids: str = "own", become: list[str] | None = None) -> list[str]:
    """What a caller is told who attaches to the namespace of that process."""
    argv = [*(become or []), sys.executable, "-c", ATTACH, str(pid), pids, *map(str, files)]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


@pytest.fixture
def secrets(tmp_path: Path) -> list[Path]:
    """Files that root reads, one as the owner, one as the group."""
    files = [tmp_path / "root's", tmp_path / "of root's group"]
    for path, mode in zip(files, (0o400, 0o040), strict=True):
        path.write_text("secret")
        path.chmod(mode)
    for directory in tmp_path.parents:
        if directory.is_relative_to("/tmp") and directory != Path("/tmp"):
            directory.chmod(directory.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    return files


@pytest.mark.parametrize("pids", ["own", "host"])
@pytest.mark.parametrize("how", NAMESPACES)
def test_root_is_the_owner_there(how: str, pids: str, secrets: list[Path]) -> None:
    for secret in secrets:
        with made(how) as pid:
            said = attach(pid, secret, pids=pids, become=["setpriv", "--groups=0,4"])
        if EXPECTED[how] == NOBODY:
            assert said[0].startswith(NOBODY), said
            assert len(said) == 1
        else:
            assert "\n".join(said[:3]) == EXPECTED[how]
            assert said[3] != "0", "the secret was read"


@pytest.mark.parametrize("pids", ["own", "host"])
def test_root_does_not_lend_its_directory(pids: str, tmp_path: Path) -> None:
    """Whoever is in a directory needs no permission for those above it.  Where `cwd` is given, that is meant."""
    (tmp_path / "shut").mkdir(0o700)
    here = tmp_path / "shut" / "open"
    here.mkdir(0o755)
    (here / "secret").write_text("secret")
    code = """if True:
        import anyio, os, sys
        from netns_kit.namespace import Namespace
        async def main():
            os.chdir(sys.argv[3])
            async with Namespace.attach(pid=int(sys.argv[1]), pids=sys.argv[2]) as ns:
                for cwd in (None, "."):
                    done = await ns.run("pwd -P; cat secret", check=False, cwd=cwd)
                    print(done.returncode, done.stdout.decode().split())
        anyio.run(main)
    """
    with made("root") as pid:
        done = subprocess.run(
            [sys.executable, "-c", code, str(pid), pids, str(here)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=60,
        )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first == "1 ['/']"
    assert second.startswith("0 ")
    assert "secret" in second


@pytest.mark.parametrize("pids", ["own", "host"])
def test_root_does_not_lend_its_keys(pids: str) -> None:
    """Those of its session keyring are for whoever has it, whatever his uid: also for the owner, who may trace the
    holder."""
    with made("root") as pid:
        assert finds_the_callers_keys(f"Namespace.attach(pid={pid}, pids={pids!r})") == "False"


def privileged(*capabilities: str, uid: int = CALLER) -> list[str]:
    """A caller who is not root; the last two of the capabilities are for it to find the program under test."""
    caps = ",".join(f"+{name}" for name in (*capabilities, "dac_override", "dac_read_search"))
    ids = [f"--reuid={uid}", f"--regid={GROUP if uid == OWNER else uid}", f"--groups={OTHER_GROUP}"]
    return ["setpriv", *ids, "--bounding-set=+all", f"--inh-caps={caps}", f"--ambient-caps={caps}"]


@pytest.mark.parametrize("how", NAMESPACES)
def test_a_caller_with_capabilities_is_the_owner_there(how: str) -> None:
    with made(how) as pid:
        said = attach(pid, become=privileged("sys_admin", "sys_ptrace", "setgid"))
    assert "\n".join(said[:3]).startswith(EXPECTED[how])


def test_a_caller_whose_groups_cannot_be_given_up_runs_nothing() -> None:
    with made("root") as pid:
        (said,) = attach(pid, become=privileged("sys_admin", "sys_ptrace"))
    assert said.startswith("IdMapError may run nothing")
    assert "groups" in said
    with made("ranges") as pid:  # whose own root may give groups up
        said_there = attach(pid, become=privileged("sys_admin", "sys_ptrace"))
    assert "\n".join(said_there[:3]) == AS_OWNER


def test_the_owner_stays_what_it_is() -> None:
    with made("root") as pid:
        said = attach(pid, become=privileged(uid=OWNER))
    assert said[:3] == [str(OWNER), str(GROUP), str(OTHER_GROUP)]


def test_a_caller_without_privilege_is_refused() -> None:
    with made("root") as pid:
        (said,) = attach(pid, become=privileged("sys_ptrace"))
    assert said.startswith("NotPrivileged")


@pytest.fixture(params=[0, 1])
def _suid_dumpable(request: pytest.FixtureRequest) -> Iterator[None]:
    """How dumpable a process is that takes other ids, see proc_sys_fs(5); 1 is for debugging."""
    knob = Path("/proc/sys/fs/suid_dumpable")
    before = knob.read_text()
    try:
        knob.write_text(str(request.param))
    except OSError:
        missing("may not set fs.suid_dumpable")
    yield
    knob.write_text(before)


@pytest.mark.usefixtures("_suid_dumpable")
@pytest.mark.parametrize("pids", ["host", "own"])
def test_the_agent_of_root_is_out_of_the_owners_reach(pids: str) -> None:
    """Though it has the owner's ids, and the owner is root in there; before it has them too."""
    code = """if True:
        import anyio, os, subprocess, sys
        from netns_kit.namespace.namespace import Namespace
        async def main():
            os.environ["SECRET"] = "do not tell"
            async with Namespace.attach(pid=int(sys.argv[1]), pids=sys.argv[3]) as ns:
                agent = ns._agent.pid
                enter = ["nsenter", "-U", "-t", sys.argv[1], "--preserve-credentials"]
                for path in ("self/environ", *(f"{agent}/{name}" for name in ("environ", "maps", "mem"))):
                    look = ["setpriv", "--reuid=" + sys.argv[2], "--clear-groups", *enter, "cat", f"/proc/{path}"]
                    print(subprocess.run(look, capture_output=True).returncode != 0)
                print("SECRET" in open(f"/proc/{agent}/environ").read(), "SECRET" in os.environ)
        anyio.run(main)
    """
    with made("root") as pid:
        done = subprocess.run(
            [sys.executable, "-c", code, str(pid), str(OWNER), pids],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=60,
        )
    assert done.stdout.split() == ["False", "True", "True", "True", "False", "True"]
