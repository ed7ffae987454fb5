"""`netns-kit completion`: what a word may be, and that the shells complete it; the pages of man(1)."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import man_pages
from netns_kit.cli import completion, control_socket, run
from tests.support import ROOT, needs
from tests.support.servers import SECONDS
from tests.support.waiting import until_written


def words(line: str) -> list[str]:
    return [each.partition("\t")[0] for each in completion.candidates(line.split(" "))]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", [*run.COMMANDS, "-h", "--help", "--version"]),
        ("re", ["restart"]),
        ("--v", ["--version"]),
        ("run --port", ["--port-mode"]),
        ("run --port-mode ", ["stack", "socket", "transparent", "fd"]),
        ("run --port-mode t", ["transparent"]),
        ("run -p 8080:80 --driver w", ["worker"]),
        ("run --driver=loop --ev", ["--events"]),
        ("attach 1 --dri", ["--driver"]),
        ("doctor ", []),
        ("run --policy ", []),
        ("nosuch --", []),
        ("completion ", ["bash", "zsh", "fish"]),
        ("slirp4netns --enable-s", ["--enable-sandbox", "--enable-seccomp"]),
    ],
)
def test_what_a_word_may_be(line: str, found: list[str]) -> None:
    assert words(line) == found


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("run ", 2),
        ("run ma", 2),
        ("run -- ", 3),
        ("run -- make --j", 3),
        ("run -p 1 make", 4),
        ("run --policy=x make te", 3),
        ("run --host-loopback make", 3),
        ("join shop/web ps -", 3),
    ],
)
def test_where_another_command_begins(line: str, number: int) -> None:
    assert list(completion.candidates(line.split(" "))) == [f"\t{number}"]


def test_an_option_is_told_with_its_help() -> None:
    assert list(completion.candidates(["doctor", "--j"])) == ["--json\tone JSON object, for machines"]


def test_networks_that_are_up_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket, "names", lambda: ["shop", "other"])
    assert [words(f"{command} s") for command in ("ps", "logs", "down", "join")] == [["shop"]] * 4
    assert words("logs shop o") == words("attach --ifname s") == []


def test_every_command_is_known() -> None:
    assert sorted(completion.parsers()) == sorted(run.COMMANDS)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment with `netns-kit` in PATH, and nobody's settings."""
    program = tmp_path / "bin" / "netns-kit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m netns_kit "$@"\n')
    program.chmod(0o755)
    return {
        "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TERM": "dumb",
        "HOME": str(tmp_path), "PS1": "", "LC_ALL": "C.UTF-8",
    }  # fmt: skip


CASES = {
    "netns-kit restar": "restart",
    "netns-kit run --driver w": "worker",
    "netns-kit run -p 8080:80 --policy /etc/host.con": "/etc/host.conf",
    "netns-kit run -- chroo": "chroot",
}


def output(command: list[str], environment: dict[str, str], script: str) -> list[str]:
    done = subprocess.run(
        command, env=environment, input=script, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_bash_completes(environment: dict[str, str]) -> None:
    needs("bash")
    script = """
        source <(netns-kit completion bash)
        while IFS= read -r COMP_LINE; do
            COMP_POINT=${#COMP_LINE}
            _netns_kit netns-kit
            echo "${COMPREPLY[@]}"
        done
    """
    lines = "".join(f"{line}\n" for line in CASES)
    found = output(["bash", "--norc", "-c", script], environment, lines)
    files = "netns-kit run -p 8080:80 --policy /etc/host.con"  # are readline's own
    for line, said in zip(CASES, found, strict=True):
        assert set(said.split()) == ({CASES[line]} if line != files else set()), line


def test_fish_completes(environment: dict[str, str]) -> None:
    needs("fish")
    lines = [*CASES, "netns-kit run -- mkdir --par"]
    script = "netns-kit completion fish | source\n"
    script += "".join(f"echo '= {line}'\ncomplete -C '{line}'\n" for line in lines)
    found: dict[str, list[str]] = {}
    for each in output(["fish"], environment, script):
        if each.startswith("= "):
            found[each[2:]] = []
        else:
            found[list(found)[-1]].append(each.partition("\t")[0])
    assert found == {line: [word] for line, word in CASES.items()} | {lines[-1]: ["--parents"]}


@pytest.mark.parametrize(("line", "word"), CASES.items())
def test_zsh_completes(environment: dict[str, str], line: str, word: str) -> None:
    needs("zsh")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["zsh", "-f", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    ) as zsh:
        try:
            begin = 'autoload -U compinit; compinit -u -D; eval "$(netns-kit completion zsh)"; echo rea""dy\n'
            os.write(ours, begin.encode())
            assert b"ready\r\n" in until_written(ours, b"ready\r\n")
            os.write(ours, f"{line}\t".encode())
            completed = f"{line.rpartition(' ')[0]} {word}".encode()
            assert completed in until_written(ours, completed)
        finally:
            zsh.kill()
            os.close(ours)
            os.close(theirs)


def test_the_pages_of_man_have_every_option(tmp_path: Path) -> None:
    needs("man", "groff")
    man_pages.write(tmp_path)
    for name, parser in completion.parsers().items():
        page = tmp_path / f"netns-kit-{name}.1"
        done = subprocess.run(
            ["groff", "-man", "-ww", "-z", "-Kutf8", page], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        shown = subprocess.run(
            ["man", "-l", page],
            env={**os.environ, "MANWIDTH": "100", "LC_ALL": "C"},
            capture_output=True,
            check=True,
        ).stdout.decode()
        for each in parser.declared:
            for option in each.option_strings:
                assert re.search(rf"(?m)^ +(-[\w-]+, )*{option}\b", shown), option
    assert (tmp_path / "netns-kit.1").exists()
