"""The pages of man(1), made from the parsers of the commands: `python -m docs.man_pages DIRECTORY`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import netns_kit
from netns_kit.cli import run
from netns_kit.cli.command_line import HOST_LOOPBACK, Parser
from netns_kit.cli.completion import help_of, parsers

LEADING = re.compile(r"^(?=[.'])", re.MULTILINE)


def pages() -> dict[str, str]:
    """Return the pages by the names of their files."""
    made = parsers()
    shown = {
        "netns-kit": "\n".join(
            _page(run.make_overview(), "unprivileged network namespaces with connectivity")
        )
    }
    for name, about in run.COMMANDS.items():
        shown[f"netns-kit-{name}"] = "\n".join(_page(made[name], about))
    return {f"{name}.1": f"{text}\n" for name, text in shown.items()}


def _page(parser: Parser, about: str) -> Iterator[str]:
    name = parser.prog.replace(" ", "-")
    yield f'.TH "{name.upper()}" "1" "" "netns_kit {netns_kit.__version__}"\n.ad l'
    yield f".SH NAME\n{_text(name)} \\- {_text(about)}"
    yield f".SH SYNOPSIS\n.B {_text(parser.prog)}\n{_text((parser.usage or '').removeprefix(parser.prog).strip())}"
    yield f".SH DESCRIPTION\n{_text(parser.description or '')}"
    options = [each for each in parser.declared if each.option_strings]
    arguments = [each for each in parser.declared if not each.option_strings]
    for title, actions in ("ARGUMENTS", arguments), ("OPTIONS", options):
        if actions:
            yield f".SH {title}"
        for action in actions:
            yield f".TP\n{_heading(action)}\n{_text(help_of(action, parser))}"
    if name == "netns-kit":
        yield ".SH COMMANDS"
        for each, said in run.COMMANDS.items():
            yield f".TP\n.BR netns\\-kit\\-{each} (1)\n{_text(said)}"
    yield f".SH EXIT STATUS\n{_text(parser.epilog or '')}"
    others = [each for each in ("netns-kit", "netns-kit-run", "netns-kit-doctor") if each != name]
    yield ".SH SEE ALSO\n" + ",\n".join(f".BR {_text(each)} (1)" for each in others)


def _heading(action: argparse.Action) -> str:
    """Return an option as it is written, with its value."""
    value = str(
        action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    )
    if not action.option_strings:
        return f"\\fI{_text(value)}\\fR"
    names = ", ".join(f"\\fB{_text(each)}\\fR" for each in action.option_strings)
    if HOST_LOOPBACK in action.option_strings:
        return f"{names}[=\\fI{value}\\fR]"
    return names if action.nargs == 0 else f"{names} \\fI{_text(value)}\\fR"


def _text(text: str) -> str:
    """Return text of which nothing is a command to roff."""
    return LEADING.sub(r"\\&", text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq"))


def write(directory: Path) -> None:
    """Write the pages into a directory, which is made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    write(parser.parse_args().directory)
