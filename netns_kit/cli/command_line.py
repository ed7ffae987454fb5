"""What the commands of `netns-kit` have in common: how their words are read, and what is said of a mistake.

A mistake in the words ends a command with the status of any other failure of ours, so that the statuses below 125 are
the command's that is run (as env(1), podman and docker have it).  It is told in one line, which names the option as
it was written, behind a line of usage.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, NoReturn

from netns_kit.child.codec import printable
from netns_kit.errors import ArgumentError, NetnsKitError

from .program import last_words

FAILED = 125
HOST_LOOPBACK = "--host-loopback"
_NO_OPTION = ("pass_fds", "LISTEN_FDS")  # what is given to us in another way
_OPTIONS = {"port": "publish", "mode": "port-mode", "open_files": "open-file", "sockets": "unix"}
ONE_PORT = "for one port write --host-loopback=PORT"


class Parser(argparse.ArgumentParser):
    """Reads the words of one command; an option is to be written in full."""

    def __init__(self, prog: str, usage: str, *, description: str, epilog: str) -> None:
        self.valued: set[str] = set()
        """The options whose value is the next word."""
        self.declared: list[argparse.Action] = []
        """Options and arguments, in their order."""
        super().__init__(
            prog=prog, usage=f"{prog} {usage}", description=description, epilog=epilog, allow_abbrev=False
        )

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Declare an option, or an argument, as `argparse.ArgumentParser.add_argument` does."""
        action = super().add_argument(*names, **options)
        self.declared.append(action)
        if action.nargs is None:
            self.valued.update(action.option_strings)
        return action

    def error(self, message: str) -> NoReturn:
        """Tell of a mistake in the words, and end with status 125."""
        said = message.removeprefix("argument ")
        self.exit(FAILED, f"{self.format_usage()}{self.prog}: {said}\n")

    def format_help(self) -> str:
        """The help, in which an option whose value may be left out has the form in which it may be given."""
        return super().format_help().replace(f"{HOST_LOOPBACK} PORT", f"{HOST_LOOPBACK}[=PORT]")


def value(check: Callable[[str], object]) -> Callable[[str], str]:
    """Return a type of argparse's: the text as it was given, if `check` has nothing against it."""

    def checked(text: str) -> str:
        try:
            check(text)
        except (NetnsKitError, ValueError) as error:
            raise argparse.ArgumentTypeError(said_of(error, text)) from error
        return text

    return checked


def whole_number(check: Callable[[int], object]) -> Callable[[str], int]:
    """The same for an option that is a number."""

    def checked(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number") from None
        value(lambda _: check(number))(text)
        return number

    return checked


def repeatable(
    parser: Parser, *names: str, check: Callable[[str], object], help: str, **options: Any
) -> None:
    """Declare an option that may be given many times; its values are a list of those that `check` lets pass."""
    options = {"default": [], **options}
    parser.add_argument(*names, action="append", type=value(check), help=f"{help}; repeatable", **options)


def assigned(text: str, expected: str) -> tuple[str, str]:
    """Return the two sides of NAME=VALUE.  Raises ValueError unless both are there."""
    name, _, given = text.partition("=")
    if not name or not given:
        raise ValueError(f"{text!r}: expected {expected}")
    return name, given


def complain(status: int, error: Exception) -> int:
    """Tell of an error, and return the exit status."""
    last_words(f"netns-kit: {as_option(error)}")
    return status


def said_of(error: Exception, text: str) -> str:
    """What is wrong with a value, without the name that the library's argument has in Python."""
    if not isinstance(error, ArgumentError) or error.knob in _NO_OPTION:
        return str(error)
    return "; ".join(part for part in (f"{text!r}: {error.cause}", error.fix) if part is not None)


def as_option(error: Exception) -> str:
    """The text of an error that came later: an argument of the library is told as the option that gave it, an error
    of the kernel's by what it was about, without its number.
    """
    if isinstance(error, OSError) and not isinstance(error, NetnsKitError) and error.filename is not None:
        name = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
        return f"{printable(str(name))}: {error.strerror}"
    if not isinstance(error, ArgumentError) or error.knob in _NO_OPTION:
        return str(error)
    option = _OPTIONS.get(error.knob.partition("[")[0]) or error.knob.replace("_", "-")
    return f"--{option} {said_of(error, str(error.value).strip(chr(39)))}"
