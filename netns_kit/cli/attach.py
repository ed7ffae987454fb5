"""`netns-kit attach`: connectivity for a namespace that exists, until it, or whoever asked for that, ends.

The lifecycle is that of programs which others start: ready is told by a byte on a pipe or by a file with our pid, and
the end comes by a pipe that is closed, by a signal, or by the end of the namespace itself.  All of them are orderly.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

import anyio
import anyio.abc

from netns_kit import arguments
from netns_kit.errors import ArgumentError, NamespaceGone, NetnsKitError, OwnNamespace
from netns_kit.forwarder.specs import parse_all
from netns_kit.gateway.engine import is_waitable
from netns_kit.host.limits import calm_collector, raise_descriptor_limit
from netns_kit.host.paths import write_pid_file
from netns_kit.namespace.background import beside
from netns_kit.namespace.namespace import Namespace
from netns_kit.network.network import DEFAULT_IFNAME, Network
from netns_kit.tap.device import check_name

from .command_line import FAILED, HOST_LOOPBACK, ONE_PORT, Parser, complain, value
from .faults import disturbed
from .network_options import add_network_options, check_options, network_from, publish, with_value
from .policy import captured, events_told, open_events
from .program import end, notice
from .signals import Signals

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TARGETS = "give the id of a process, or the path of a network namespace, like /run/netns/NAME"


def main(words: Sequence[str]) -> int:
    """Run with these arguments; the exit status."""
    parser = make_parser()
    options, more = parser.parse_known_args([with_value(word) for word in words])
    if more:
        hint = f"; {ONE_PORT}" if HOST_LOOPBACK in words and any(map(str.isdigit, more)) else ""
        parser.error(f"unrecognized arguments: {' '.join(more)}{hint}")
    check_options(parser, options)
    try:
        target, own = options.target, options.allow_current
        where = {"pid": int(target)} if target.isdigit() else {"path": target}
        namespace = Namespace.attach(**where, pids="host", allow_current=own)  # no command runs there
        network = network_from(options, namespace, options.ifname)
        if any(each.settled(options.port_mode).mode == "fd" for each in parse_all(options.ports)):
            parser.error("mode fd: it gives the port to a command, and there is none; choose another")
        events = open_events(options.events)
        with Signals(ENDING) as signals:
            anyio.run(_attach, network, options, events, signals)
            end(0)
    except OwnNamespace as error:
        fix = "attach when the process has made its own (unshare(2)), or say --allow-current if that is what is meant"
        return complain(FAILED, OwnNamespace(error.cause, fix=fix))
    except (NetnsKitError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename == target:
            return complain(FAILED, NetnsKitError(f"{target}: {error.strerror}", fix=TARGETS))
        return complain(FAILED, error)


async def _attach(
    network: Network, options: argparse.Namespace, events: TextIO | None, signals: Signals
) -> None:
    signals.keep()
    with anyio.CancelScope() as scope:
        async with beside(signals.cancel, scope):
            await _serve(network, options, events)


async def _serve(network: Network, options: argparse.Namespace, events: TextIO | None) -> None:
    """Until the exit pipe is closed or the namespace has gone."""
    ready = False
    try:
        async with (
            network,
            captured(network, options.capture),
            disturbed(network, options.faults),
            events_told(network, events),
        ):
            raise_descriptor_limit()
            calm_collector()
            await publish(network, options)
            with _pid_file(options.pid_file):
                if options.ready_fd is not None:
                    with suppress(OSError):  # who has closed it has no need to know
                        os.write(options.ready_fd, b"1")
                        os.close(options.ready_fd)
                ready = True
                if options.exit_fd is None:
                    await network.wait_closed()
                else:
                    with network.supervisor.guarding():
                        await _hang_up(options.exit_fd)
    except NamespaceGone as error:
        if not ready:
            raise
        notice(f"netns-kit: {error}")


async def _hang_up(fd: int) -> None:
    """Wait until the other end is closed.  What is written there means nothing."""
    with suppress(ConnectionResetError):  # a socket's, closed with something unread in it
        while True:
            await anyio.wait_readable(fd)
            if not os.read(fd, 4096):
                return


@contextmanager
def _pid_file(path: str | None) -> Iterator[None]:
    if path is None:
        yield
        return
    try:
        made = write_pid_file(path)
    except OSError as error:
        fix = None if isinstance(error, FileExistsError) else "name a file in a directory that you may write"
        expected = f"expected a file that can be made: {error.strerror or error}"
        raise ArgumentError(expected, "pid_file", repr(path), fix) from error
    try:
        yield
    finally:
        made.remove()


def _descriptor(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected the number of a descriptor")
    fd = int(text)
    try:
        os.set_inheritable(fd, False)
    except (OSError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an open descriptor") from None
    return fd


def _check_target(text: str) -> None:
    if text.isdigit():
        arguments.whole_number("pid", int(text), 1)


def _pipe(text: str) -> int:
    """A descriptor whose other end may be closed."""
    fd = _descriptor(text)
    if not is_waitable(fd):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a pipe or a socket; a file is closed by nobody else"
        )
    return fd


def make_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "netns-kit attach",
        "[OPTION]... PID|PATH",
        description="Give an existing network namespace an interface with real connectivity.  It stays until the "
        "process, or the path, that named the namespace is gone, until the exit pipe is closed, or until a SIGTERM, "
        "SIGINT or SIGHUP; then the interface is removed.  Inside, 10.0.2.2 is the gateway and 10.0.2.3 answers DNS "
        "(with --cidr, the same numbers of that network); /etc/resolv.conf is the caller's business.",
        epilog="The exit status is 0, or 125 if netns-kit failed, or if its words have a mistake.",
    )
    parser.add_argument(
        "--ifname",
        type=value(check_name),
        default=DEFAULT_IFNAME,
        metavar="NAME",
        help="of the interface (%(default)s)",
    )
    parser.add_argument(
        "--ready-fd", type=_descriptor, metavar="FD", help='write "1" there when all is ready, and close it'
    )
    parser.add_argument(
        "--exit-fd", type=_pipe, metavar="FD", help="end when the other end of this pipe is closed"
    )
    parser.add_argument(
        "--pid-file", metavar="FILE", help="write our pid there when all is ready; removed at the end"
    )
    parser.add_argument(
        "--allow-current",
        action="store_true",
        help="attach also where we are ourselves: to a process that has not unshared, say",
    )
    add_network_options(parser)
    parser.add_argument(
        "target",
        type=value(_check_target),
        metavar="PID|PATH",
        help="a process inside, or a path like /run/netns/NAME",
    )
    return parser
