"""The migration page: every option of slirp4netns is on it, and its commands are ones that we take."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

from netns_kit.cli import attach, network_options, run
from netns_kit.cli.slirp4netns import command as slirp4netns
from tests.support import ROOT

PAGE = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
SHELL = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in SHELL for line in block.splitlines()]


@pytest.mark.parametrize("option", [word.rstrip("=") for word in slirp4netns.LONG])
def test_every_option_of_slirp4netns_is_on_the_page(option: str) -> None:
    unnamed = {
        "help",
        "version",
        "netns-type",
        *(written for written, (name, _) in slirp4netns.LONG.items() if written != name),
    }
    assert option in unnamed or f"--{option}" in PAGE


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_is_taken(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "_descriptor", int)
    monkeypatch.setattr(attach, "_pipe", int)
    program, name, *words = shlex.split(command.replace("$PID", "1"))
    assert program == "netns-kit"
    match name:
        case "run":
            parser = run.make_parser()
            network_options.network_from(parser.parse_args(run._with_values(words, parser)))
        case "attach":
            options = attach.make_parser().parse_args([network_options.with_value(word) for word in words])
            network_options.network_from(options, ifname=options.ifname)
        case _:
            assert slirp4netns.parse(words, name) is not None


def test_every_option_of_ours_that_the_page_names_is_one() -> None:
    ours = "\n".join(
        cell for row in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE) for cell in row.split("|")[2:3]
    )
    named = set(re.findall(r"(--[a-z][a-z0-9-]*)", ours))
    taken = options_of(attach.make_parser()) | options_of(run.make_parser())
    assert named - taken == set()


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
    return found
