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

import anyio
import anyio.abc

from .background import beside
from .cli import FAILED, add_network_options, complain, network_from, tell_ports, with_value
from .errors import NamespaceGone, NetnsKitError
from .namespace import Namespace
from .network import DEFAULT_IFNAME, Network
from .own_process import calm_collector, raise_descriptor_limit
from .paths import write_pid_file
from .program import end, notice
from .signals import Signals

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(words: Sequence[str]) -> int:
    """Run with these arguments; the exit status."""
    options = _parser().parse_args([with_value(word) for word in words])
    try:
        target = options.target
        where = {"pid": int(target)} if target.isdigit() else {"path": target}
        namespace = Namespace.attach(**where, pids="host")  # no command runs there
        network = network_from(options, namespace, options.ifname)
        with Signals(ENDING) as signals:
            anyio.run(_attach, network, options, signals)
            end(0)
    except (NetnsKitError, ValueError, OSError) as error:
        return complain(FAILED, error)


async def _attach(network: Network, options: argparse.Namespace, signals: Signals) -> None:
    signals.keep()
    with anyio.CancelScope() as scope:
        async with beside(_end_at_signal, signals, scope):
            await _serve(network, options)


async def _end_at_signal(signals: Signals, scope: anyio.CancelScope) -> None:
    await anext(signals.received())
    scope.cancel()


async def _serve(network: Network, options: argparse.Namespace) -> None:
    """Until the exit pipe is closed or the namespace has gone."""
    ready = False
    try:
        async with network:
            raise_descriptor_limit()
            calm_collector()
            await tell_ports(network)
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
    """What is written there means nothing."""
    while True:
        await anyio.wait_readable(fd)
        if not os.read(fd, 4096):
            return


@contextmanager
def _pid_file(path: str | None) -> Iterator[None]:
    if path is None:
        yield
        return
    made = write_pid_file(path)
    try:
        yield
    finally:
        made.remove()


def _descriptor(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of a descriptor")
    fd = int(text)
    try:
        os.set_inheritable(fd, False)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"descriptor {fd}: {error.strerror}") from None
    return fd


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="netns-kit attach",
        allow_abbrev=False,
        description="Give an existing network namespace an interface with real connectivity.  It stays until the "
        "process, or the path, that named the namespace is gone, until the exit pipe is closed, or until a SIGTERM, "
        "SIGINT or SIGHUP; then the interface is removed.  Inside, 10.0.2.2 is the gateway and 10.0.2.3 answers DNS "
        "(with --cidr, the same numbers of that network); /etc/resolv.conf is the caller's business.",
        epilog="The exit status is 0, or 125 if netns-kit failed.",
    )
    parser.add_argument(
        "--ifname", default=DEFAULT_IFNAME, metavar="NAME", help="of the interface (%(default)s)"
    )
    parser.add_argument(
        "--ready-fd", type=_descriptor, metavar="FD", help='write "1" there when all is ready, and close it'
    )
    parser.add_argument(
        "--exit-fd", type=_descriptor, metavar="FD", help="end when the other end of this pipe is closed"
    )
    parser.add_argument(
        "--pid-file", metavar="FILE", help="write our pid there when all is ready; removed at the end"
    )
    add_network_options(parser)
    parser.add_argument("target", metavar="PID|PATH", help="a process inside, or a path like /run/netns/NAME")
    return parser
