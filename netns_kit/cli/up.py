"""`netns-kit up`: the members of a network that a file describes, until they end, or somebody ends them."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing, suppress

import anyio
import anyio.abc

from netns_kit.child.codec import dump, printable
from netns_kit.errors import ArgumentError, NetnsKitError, NotPrivileged, StackClosed
from netns_kit.host.limits import calm_collector, raise_descriptor_limit
from netns_kit.namespace.background import beside
from netns_kit.network.application import Application, LogLine
from netns_kit.network.composition import Composition

from . import control_socket
from .command_line import FAILED, Parser, as_option
from .program import end, last_words, notice
from .signals import Signals

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
READY = b"1"


def main(words: Sequence[str]) -> int:
    """Run with these arguments; the exit status."""
    options = make_parser().parse_args(words)
    ready = -1
    try:
        composition = Composition.load(options.file)
        if options.detach:
            ready = _detach(composition.name)
        with control_socket.listen(composition.name) as sock, Signals(ENDING) as signals:
            end(anyio.run(_up, composition, sock, signals, ready))
    except (NetnsKitError, ValueError, OSError) as error:
        said = _said(error, options.file)
        if ready >= 0:
            os.write(ready, said.encode(errors="backslashreplace"))
        else:
            last_words(f"netns-kit: {said}")
        return FAILED


def _said(error: Exception, file: str) -> str:
    """The text of an error, with the file in which its cause is."""
    said = str(error) if isinstance(error, ArgumentError) else as_option(error)
    return said if isinstance(error, OSError) and error.filename == file else f"{printable(file)}: {said}"


def _detach(name: str) -> int:
    """Go on in a process with a session of its own and without our streams.

    Return where it tells that all is up, or why not.  This process waits for that, and ends.  If it is interrupted
    meanwhile, the other process ends too.
    """
    waits, tells = os.pipe2(os.O_CLOEXEC)
    if os.fork() == 0:
        os.close(waits)
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in range(3):
            os.dup2(nothing, fd)
        os.close(nothing)
        return tells
    os.close(tells)
    with open(waits, "rb", buffering=0) as file:
        said = file.read(len(READY))
        said += b"" if said == READY else file.read()
    last_words(f"netns-kit: {f'{name} is up' if said == READY else said.decode()}")
    return end(0 if said == READY else FAILED)


def _tell(line: LogLine) -> None:
    sys.stdout.write(f"{line.member} | {line.text}\n")
    sys.stdout.flush()


async def _up(composition: Composition, sock: socket.socket, signals: Signals, ready: int) -> int:
    scope, opening = anyio.CancelScope(), anyio.CancelScope()

    def say(text: str) -> None:
        if not scope.cancel_called:  # else all of them end, because they are killed
            notice(f"netns-kit: {text}")

    is_seen = ready < 0
    application = Application(
        composition, on_line=_tell if is_seen else None, on_notice=say if is_seen else None
    )
    signals.keep()
    raise_descriptor_limit()
    calm_collector()
    statuses: dict[str, int] = {}

    async def end_if_left() -> None:
        with opening:
            await anyio.wait_readable(ready)  # never, but for its error when nobody reads it any more
            scope.cancel()

    async with (
        await anyio.abc.SocketListener.from_socket(sock) as listener,
        beside(listener.serve, Control(application, scope).serve),
    ):
        with scope:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(beside(signals.cancel, scope))
                if not is_seen:
                    await stack.enter_async_context(beside(end_if_left))
                await stack.enter_async_context(application)
                opening.cancel()
                if is_seen:
                    say(f"{composition.name} is up")
                else:
                    os.write(ready, READY)
                statuses = await application.wait()
    return 1 if any(statuses.values()) else 0


class Control:
    """What is asked over the socket, of one application.

    Args:
        application: The application.
        scope: What is cancelled to end it.
    """

    def __init__(self, application: Application, scope: anyio.CancelScope) -> None:
        self._application = application
        self._scope = scope

    async def serve(self, stream: anyio.abc.SocketStream) -> None:
        """Answer the one request of a client."""
        async with stream:
            try:
                control_socket.check_peer(stream.extra(anyio.abc.SocketAttribute.raw_socket))
                request = json.loads(await _line(stream))
                await self._answer(stream, **request)
            except (
                NotPrivileged,
                anyio.BrokenResourceError,
                anyio.EndOfStream,
            ):  # a stranger, or it has gone
                return
            except (NetnsKitError, ValueError, TypeError) as error:
                with suppress(anyio.BrokenResourceError):  # the client has gone meanwhile
                    await _send(stream, json.dumps({"error": str(error)}).encode())

    async def _answer(
        self,
        stream: anyio.abc.SocketStream,
        op: str,
        members: Sequence[str] = (),
        follow: bool = False,
        member: str | None = None,
    ) -> None:
        application = self._application
        if op == "state":
            with suppress(StackClosed):  # it begins just now, or ends
                for each in await application.state():
                    await _send(stream, dump(each))
        elif op == "logs":
            async with aclosing(application.logs(*members, follow=follow)) as lines:
                async for line in lines:
                    await _send(stream, dump(line))
        elif op == "restart":
            for name in members or [each.name for each in application.composition.members if each.command]:
                await application.restart(name)
        elif op == "join":
            place = application.network if member is None else application.member(member)
            await _send(stream, dump(control_socket.Place(place.namespace.pid, await place.files())))
        elif op == "down":
            self._scope.cancel()
            await anyio.sleep_forever()  # until all has ended, and this stream with it
        else:
            raise ValueError(f"nobody can be asked for {op!r}")


async def _line(stream: anyio.abc.SocketStream) -> bytes:
    data = b""
    while b"\n" not in data and len(data) < control_socket.LINE_MAX:
        data += await stream.receive()
    return data


async def _send(stream: anyio.abc.SocketStream, answer: bytes) -> None:
    await stream.send(answer + b"\n")


def make_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "netns-kit up",
        "[OPTION]... FILE",
        description="Run the members of a network that a file of TOML or JSON describes (docs/networks.md), until "
        "all their commands have ended, or `netns-kit down`, a SIGTERM, SIGINT or SIGHUP ends them; then nothing is "
        "left.",
        epilog="The exit status is 0 if every command has ended with 0 or was ended by us, 1 if one has failed, 125 "
        "if netns-kit has, or if its words or the file have a mistake.",
    )
    parser.add_argument(
        "-d", "--detach", action="store_true", help="return when all is up, and leave it in the background"
    )
    parser.add_argument("file", metavar="FILE", help="whose name ends in .toml or .json")
    return parser
