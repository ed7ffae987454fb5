"""The command line: `netns-kit doctor`, what this host allows."""

from __future__ import annotations

from collections.abc import Sequence

from netns_kit.checkup.checkup import doctor
from netns_kit.errors import NetnsKitError

from .command_line import FAILED, Parser
from .program import last_words

MISSING = 1


def main(words: Sequence[str]) -> int:
    """Print what `doctor` finds; 0 if all that is needed is there, 1 if not."""
    options = make_parser().parse_args(words)
    try:
        report = doctor()
    except (NetnsKitError, OSError) as error:
        last_words(f"netns-kit: {error}")
        return FAILED
    print(report.json() if options.json else report)
    return 0 if report.ok else MISSING


def make_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "netns-kit doctor",
        "[--json]",
        description="Try everything that netns_kit needs of this host, in processes of their own, and say what is "
        "wrong, which setting has done it, and the least that would put it right.  Nothing is changed.",
        epilog="The exit status is 0 if all that is needed is there, even if something is limited; 1 if not; "
        "125 if netns-kit failed, or if its words have a mistake.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    return parser
