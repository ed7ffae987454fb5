"""The commands of `netns-kit` that ask networks that are up: ps, logs, restart, down and join."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import anyio

from netns_kit.arguments import shown
from netns_kit.child.codec import printable
from netns_kit.errors import NetnsKitError, NotFound
from netns_kit.namespace.namespace import Namespace
from netns_kit.namespace.process import CommandOptions
from netns_kit.network.application import LogLine, MemberState

from . import control_socket
from .command_line import FAILED, Parser, complain
from .control_socket import Place
from .run import at_terminal, complain_of, end_as, inherited
from .signals import Signals

HEADINGS = ("NETWORK", "MEMBER", "ADDRESS", "STATE", "PID", "PORTS")


def main(command: str, words: Sequence[str]) -> int:
    """Run one of the commands with these arguments; the exit status."""
    options = PARSERS[command]().parse_args(words)
    try:
        return COMMANDS[command](options)
    except (NetnsKitError, ValueError, OSError) as error:
        return complain(FAILED, error)


def _ps(options: argparse.Namespace) -> int:
    rows: list[tuple[str, ...]] = [HEADINGS]
    asked, slash, member = (options.name or "").partition("/")
    for name in [asked] if options.name else control_socket.names():
        try:
            sock = control_socket.connect(name)
        except NotFound:
            if options.name:
                raise
            continue  # it has ended meanwhile
        with sock:
            states = list(control_socket.ask(sock, MemberState, "state"))
        found = [each for each in states if not slash or member in (each.name, *each.aliases)]
        if slash and not found:
            there = ", ".join(each.name for each in states) or "none"
            raise NotFound(f"there is no member {shown(member)}", fix=f"there are {there}")
        rows += [_row(name, each) for each in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    sys.stdout.flush()
    return 0


def _row(network: str, member: MemberState) -> tuple[str, ...]:
    state = member.state if member.status is None else f"{member.state} ({member.status})"
    names = " ".join([member.name, *member.aliases])
    return (network, names, member.address, state, str(member.pid or ""), ", ".join(member.ports))


def _members(options: argparse.Namespace) -> tuple[str, list[str]]:
    """Return the network and the members that are named, none for all."""
    name, slash, member = options.name.partition("/")
    return name, [*([member] if slash else []), *options.members]


def _logs(options: argparse.Namespace) -> int:
    name, members = _members(options)
    with control_socket.connect(name) as sock:
        for line in control_socket.ask(sock, LogLine, "logs", members=members, follow=options.follow):
            _say(f"{line.member} | {printable(line.text)}")
            if options.follow:
                sys.stdout.flush()
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _restart(options: argparse.Namespace) -> int:
    name, members = _members(options)
    with control_socket.connect(name) as sock:
        for _ in control_socket.ask(sock, LogLine, "restart", members=members):
            pass
    return 0


def _down(options: argparse.Namespace) -> int:
    with control_socket.connect(options.name) as sock:
        for _ in control_socket.ask(sock, LogLine, "down"):
            pass
    return 0


def _join(options: argparse.Namespace) -> int:
    name, slash, member = options.place.partition("/")
    with control_socket.connect(name) as sock:
        (place,) = control_socket.ask(sock, Place, "join", member=member if slash else None)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    command = command or [os.environ.get("SHELL") or "/bin/sh"]
    given: CommandOptions = {
        "stdin": None, "stdout": None, "stderr": None, "pass_fds": inherited(), "files": place.files,
    }  # fmt: skip
    try:
        with Signals() as signals:
            end_as(anyio.run(_run, place.pid, command, given, signals))
    except (NetnsKitError, ValueError, OSError) as error:
        return complain_of(error, command)


async def _run(pid: int, command: list[str], given: CommandOptions, signals: Signals) -> int:
    async with Namespace.attach(pid=pid) as namespace:
        return await at_terminal(namespace.popen, namespace, command, given, signals)


def _parser_of(command: str, usage: str, description: str) -> Parser:
    return Parser(
        f"netns-kit {command}",
        usage,
        description=description,
        epilog="The exit status is 125 if netns-kit failed, or if its words have a mistake.",
    )


def _ps_parser() -> Parser:
    parser = _parser_of(
        "ps",
        "[NAME[/MEMBER]]",
        "Show what the members of networks are doing that `netns-kit up` has started.",
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME[/MEMBER]", help="of one network or member; default: all of this user"
    )
    return parser


def _logs_parser() -> Parser:
    parser = _parser_of(
        "logs", "[OPTION]... NAME[/MEMBER] [MEMBER]...", "Show what the commands of members have written."
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what they write from now on")
    return _of_members(parser)


def _of_members(parser: Parser) -> Parser:
    parser.add_argument(
        "name", metavar="NAME[/MEMBER]", help="of the network, or of one member as `join` has it"
    )
    parser.add_argument("members", nargs="*", default=[], metavar="MEMBER", help="whose; default: all")
    return parser


def _restart_parser() -> Parser:
    return _of_members(
        _parser_of(
            "restart",
            "NAME[/MEMBER] [MEMBER]...",
            "End the commands of members, one after the other, and start each again, also one that has ended; return "
            "when it listens where others depend on it. A member keeps its addresses and ports. SIGTERM ends a "
            "command, and SIGKILL after ten seconds.",
        )
    )


def _down_parser() -> Parser:
    parser = _parser_of("down", "NAME", "End a network: its commands are killed, and nothing is left.")
    parser.add_argument("name", metavar="NAME", help="of the network")
    return parser


def _join_parser() -> Parser:
    parser = _parser_of(
        "join",
        "NAME[/MEMBER] [--] [COMMAND [ARGUMENT]...]",
        "Run a command in a member of a network that is up; without MEMBER in its hub, where all of them are seen.",
    )
    parser.add_argument("place", metavar="NAME[/MEMBER]", help="where")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="the command and its arguments; default: a shell"
    ).required = False  # argparse of CPython 3.11 would name it among what is missing
    return parser


PARSERS: dict[str, Callable[[], Parser]] = {
    "ps": _ps_parser, "logs": _logs_parser, "restart": _restart_parser, "down": _down_parser, "join": _join_parser,
}  # fmt: skip
COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "ps": _ps, "logs": _logs, "restart": _restart, "down": _down, "join": _join,
}  # fmt: skip
