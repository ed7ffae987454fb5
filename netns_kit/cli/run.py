"""The command line: `netns-kit run`, a command in a namespace of its own with real connectivity."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import NoReturn, TextIO, TypeVar, cast, get_args

import anyio

from netns_kit import __version__, arguments
from netns_kit.errors import ArgumentError, NetnsKitError
from netns_kit.forwarder.ports import Mode
from netns_kit.host.activation import activated
from netns_kit.host.limits import calm_collector, raise_descriptor_limit
from netns_kit.namespace.background import beside
from netns_kit.namespace.given import FileMode, OpenFile
from netns_kit.namespace.namespace import Namespace
from netns_kit.namespace.process import CommandOptions, Process
from netns_kit.network.network import Network

from .command_line import FAILED, HOST_LOOPBACK, ONE_PORT, Parser, assigned, complain, repeatable
from .faults import disturbed
from .network_options import add_network_options, check_options, network_from, publish, with_value
from .policy import captured, events_told, open_events
from .program import end, end_by
from .signals import Signals

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as env(1) and chroot(1) have them
READING = (signal.SIGTTIN, signal.SIGTTOU)  # from the background, or writing
COMMANDS = {
    "run": "run a command in a new namespace",
    "doctor": "what this host allows, and what would put it right",
    "attach": "give connectivity to an existing namespace",
    "up": "run the members of a network that a file describes",
    "down": "end such a network",
    "ps": "what the members of such networks are doing",
    "logs": "what their commands have written",
    "restart": "end such commands, and start them again",
    "join": "run a command in a member of such a network, or in its hub",
    "completion": "what a shell needs to complete these words",
    "slirp4netns": "be slirp4netns, for podman, rootlesskit and others",
}
"""The commands, each with what it is for."""
_OPEN_FILE = "NAME=PATH[:MODE]"
T = TypeVar("T")
Adopt = Callable[[Network], Awaitable[None]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `netns-kit run`; the exit status if it does not come to a command.  Else end this process as that ends.

    Of other words it is told what commands there are.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] != ["run"]:
        overview = make_overview()
        overview.parse_args(words)
        overview.error(f"{words[0]}: no command that this function runs; call netns_kit.cli.commands.main")
    parser = make_parser()
    options = parser.parse_args(_with_values(words[1:], parser))
    check_options(parser, options)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        command = [os.environ.get("SHELL") or "/bin/sh"]
    try:
        adopt = _activation(options.port_mode)
        events = open_events(options.events)
        with Signals() as signals:
            given = _command_options(options, inherited())
            status = anyio.run(_run, network_from(options), options, adopt, events, command, given, signals)
            end_as(status)
    except (NetnsKitError, ValueError, OSError) as error:
        return complain_of(error, command)


def _activation(mode: Mode | None) -> Adopt:
    """Return what publishes the sockets that we were activated with, if they are to go another way than "fd"."""
    sockets = () if mode in (None, "fd") else activated()

    async def adopt(network: Network) -> None:
        for name, sock in sockets:
            with sock:
                await network.forwarder.adopt(sock, int(name) if name.isdecimal() else None, mode=mode)

    return adopt


def inherited() -> list[int]:
    """The descriptors that were given to us for the command, beside the standard streams."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # of the one that has listed them
            if number > 2 and os.get_inheritable(number):
                found.append(number)
    return found


def end_as(status: int) -> NoReturn:
    """End this process as a command has ended, by its `returncode`."""
    if status < 0:
        end_by(-status)
    end(status)


def complain_of(error: Exception, command: Sequence[str]) -> int:
    """Tell why a command could not be run, and return the exit status."""
    status = _status_of(error, command)
    if status == NOT_FOUND and "/" not in command[0] and str(error).count(":") == 1:
        fix = "install it, or write where it is"
        return complain(status, NetnsKitError(f"{command[0]!r} is not found in PATH", fix=fix))
    return complain(status, error)


def _status_of(error: Exception, command: Sequence[str]) -> int:
    """As env(1) has it.  An error of executing the command names it by the very word that was given."""
    if not isinstance(error, OSError) or error.filename is not command[0]:
        return FAILED
    return NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE


def _with_values(words: list[str], parser: Parser) -> list[str]:
    """Give a bare --host-loopback its value: argparse would take the next word, the command's first, for that.

    The command's own words, from the first that is no option of ours, stay as they are.
    """
    done: list[str] = []
    rest = iter(words)
    bare = False
    for word in rest:
        if bare and word.isdigit():
            parser.error(f"{HOST_LOOPBACK} {word}: {ONE_PORT}; before a command of that name write --")
        if word == "--" or not word.startswith("-"):
            return [*done, word, *rest]
        bare = word == HOST_LOOPBACK
        done.append(with_value(word))
        if word in parser.valued and not bare:
            done += [value for value in (next(rest, None),) if value is not None]
    return done


def _command_options(options: argparse.Namespace, given: Sequence[int]) -> CommandOptions:
    """The command's own, beside its words."""
    return {
        "stdin": None,
        "stdout": None,
        "stderr": None,
        "pass_fds": given,
        "open_files": _by_name("open-file", map(_open_file, options.open_files)),
        "sockets": _by_name("unix", map(_socket, options.sockets)),
    }


def _by_name(option: str, given: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return what an option has given names to; each name once."""
    found: dict[str, T] = {}
    for name, each in given:
        if name in found:
            raise ArgumentError("expected a name that no other has", option, arguments.shown(name))
        found[name] = each
    return found


def _open_file(text: str) -> tuple[str, OpenFile]:
    name, path = assigned(text, _OPEN_FILE)
    before, _, mode = path.rpartition(":")
    if mode in get_args(FileMode) and before:
        return name, (before, cast("FileMode", mode))
    return name, path


def _socket(text: str) -> tuple[str, str]:
    expected = "an absolute PATH inside, and =HOSTPATH"
    if not text.startswith("/"):
        raise ValueError(f"{text!r}: expected {expected}")
    return assigned(text, expected)


async def _run(
    network: Network,
    options: argparse.Namespace,
    adopt: Adopt,
    events: TextIO | None,
    command: list[str],
    given: CommandOptions,
    signals: Signals,
) -> int:
    """The command's `returncode`."""
    async with (
        network,
        captured(network, options.capture),
        disturbed(network, options.faults),
        events_told(network, events),
    ):
        raise_descriptor_limit()  # not the command's: that is the agent's child
        calm_collector()
        await publish(network, options)
        await adopt(network)
        given["listen"] = network.forwarder.sockets()
        return await at_terminal(network.popen, network.namespace, command, given, signals)


async def at_terminal(
    popen: Callable[..., Awaitable[Process]],
    namespace: Namespace,
    command: list[str],
    given: CommandOptions,
    signals: Signals,
) -> int:
    """Run a command that has our streams and our terminal, and return its `returncode`.

    Args:
        popen: What starts it, a method like `Network.popen`.
        namespace: Where it runs.
        command: Its words.
        given: Its options.
        signals: What is sent to us, which is for the command from now on.
    """
    signals.keep()
    is_ours = _foreground() == os.getpgrp()
    leads = is_ours and namespace.pids == "own" and _is_alone()
    try:
        given["foreground"] = leads
        process = await popen(command, **given)
        _let_go(given["pass_fds"])
        async with process, beside(_pass_on, signals, process):
            while (number := await process.wait_stopped()) is not None:
                _stop_too(number, process, leads=leads)
    finally:
        if is_ours:  # a shell in a PID namespace has no number for us to give the terminal back to
            _foreground(give=os.getpgrp())
    return await process.wait()


def _is_alone() -> bool:
    """Whether nobody else of our job uses the terminal: we lead it, and no stream of ours is another's.

    Then the command may have a process group of its own.  Others of a job, a pager behind a pipe or a script that has
    started us, could not read from the terminal any more, and would miss its signals.
    """
    return os.getpgrp() == os.getpid() and all(map(_is_terminal, range(3)))


def _is_terminal(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False


def _let_go(given: Sequence[int]) -> None:
    """Leave what the command has to the command: whoever reads from it shall see when it closes that.

    Standard error is kept, for notices.
    """
    for fd in given:
        os.close(fd)
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1):
        os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)


def _stop_too(number: int, process: Process, *, leads: bool) -> None:
    """Stop as the command has: a shell that waits for us is told that its job has stopped, and will continue it.

    A command that is a shell has a process group of its own, to which the terminal is given again; so is one that
    `leads` a group since we had it so, also when a shell has given the terminal to ours alone and it wants to read.
    """
    command = process.pid
    if leads and number in READING and _foreground() == os.getpgrp():
        _foreground(give=_group(command))
        process.pass_on(signal.SIGCONT)
        return
    theirs = leads or _foreground() == _group(command)
    if number == signal.SIGSTOP:  # which could not be taken back, as below
        number = signal.SIGTSTP
    signal.raise_signal(
        number
    )  # it is blocked, so it is pending: until the next SIGCONT, which takes it back
    if _is_stopped(command):
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_UNBLOCK, [number]))
    else:  # it has been continued meanwhile
        signal.sigtimedwait([number], 0)
    if theirs and _foreground() == os.getpgrp():
        _foreground(give=_group(command))


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].startswith(b"T")
    except OSError:  # it has ended
        return False


def _group(pid: int) -> int:
    """The process group of a command; 0 if it has ended."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def _foreground(give: int = 0) -> int | None:
    """The process group that reads from our terminal, once it is given to `give`; None without a terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if give:
            os.tcsetpgrp(terminal, give)
        return os.tcgetpgrp(terminal)
    except OSError:  # it has hung up, or the group has ended
        return None
    finally:
        os.close(terminal)


async def _pass_on(signals: Signals, process: Process) -> None:
    """What is sent to us is for the command."""
    async for number in signals.received():
        process.pass_on(number)


def make_overview() -> Parser:
    """Return the parser for who asks what there is, and who asks for what there is not."""
    parser = Parser(
        "netns-kit",
        "[--help] [--version] COMMAND ...",
        description="Unprivileged network namespaces with real connectivity.",
        epilog="`netns-kit COMMAND --help` tells of a command.  The exit status is 125 if netns-kit failed, or if "
        "the command line has a mistake.",
    )
    parser.add_argument("--version", action="version", version=f"netns-kit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, about in COMMANDS.items():
        commands.add_parser(name, help=about)
    return parser


def make_parser() -> Parser:
    """Return the parser of the command."""
    run = Parser(
        "netns-kit run",
        "[OPTION]... [--] [COMMAND [ARGUMENT]...]",
        description="Run a command in a new user and network namespace that reaches the world through "
        "netns_kit's own TCP/IP stack.  Inside, 10.0.2.2 is the gateway and 10.0.2.3 answers DNS (with --cidr, the "
        "same numbers of that network).  Signals are passed on to the command.",
        epilog="The exit status is the command's, and a signal that ends the command ends netns-kit too (128+N to a "
        "shell); 125 if netns-kit failed, or if its words have a mistake, 126 if the command cannot be executed, 127 "
        "if it is not found.",
    )
    add_network_options(run)
    repeatable(
        run, "--open-file", dest="open_files", check=_open_file, metavar=_OPEN_FILE,
        help="give the command a file, open, in the way of systemd's OpenFile= (docs/commands.md); MODE is r, w, a "
        "or r+",
    )  # fmt: skip
    repeatable(
        run, "--unix", dest="sockets", check=_socket, metavar="PATH=HOSTPATH",
        help="show the command a Unix socket of the host at that absolute path",
    )  # fmt: skip
    run.add_argument(
        "command", nargs=argparse.REMAINDER, help="the command and its arguments; default: a shell"
    )
    return run
