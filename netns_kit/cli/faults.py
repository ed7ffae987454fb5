"""--faults: what goes wrong in the network, as a command line has it."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from netns_kit.errors import ArgumentError, NetnsKitError
from netns_kit.gateway.faults import FaultOptions, Faults
from netns_kit.network.network import Network

from .command_line import said_of

FIELDS = tuple(FaultOptions.__annotations__)
_CHANCES = ("loss", "reorder", "duplicate", "corrupt")
_SECONDS = ("delay", "jitter", "dns_delay")
_NUMBERS = ("queue", "reset_after", "seed")
_FLAGS = ("blackhole", "refuse")
_LISTS = ("to", "ports")


def add_faults_options(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--faults",
        action="append",
        default=[],
        type=_given,
        metavar="NAME=VALUE,...",
        help="make the network bad, as in loss=1%%,delay=50ms,rate=10Mbit/s,to=*.example.org or "
        "refuse,to=192.0.2.0/24 (docs/faults.md); `to` and `ports` may stand several times; repeatable",
    )


def _given(text: str) -> Faults:
    try:
        return faults_of(text)
    except NetnsKitError as error:
        raise argparse.ArgumentTypeError(said_of(error, text)) from error


def faults_of(text: str) -> Faults:
    """Return the faults that were written on the command line.

    Raises:
        ArgumentError: The text says none.
    """
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        name = name.replace("-", "_")
        if name not in FIELDS or (name in options and name not in _LISTS) or bool(equals) is (name in _FLAGS):
            raise ArgumentError(
                f"expected NAME=VALUE, each once, or {' or '.join(_FLAGS)}", "--faults", repr(part),
                f"the names are {', '.join(FIELDS)}",
            )  # fmt: skip
        if name in _LISTS:
            options.setdefault(name, []).append(value)
        else:
            options[name] = True if name in _FLAGS else _value(name, value)
    return Faults(**options)


def _value(name: str, text: str) -> object:
    """Return the value of a field; the text itself if it cannot be read, which the field then refuses."""
    try:
        if name in _CHANCES:
            chance = float(text[:-1]) / 100 if text.endswith("%") else float(text)
            if 1 < chance <= 100 and not text.endswith("%"):
                raise ArgumentError(
                    "expected a probability, 0 to 1, or percent", name, repr(text), f"write {name}={text}%"
                )
            return chance
        if name in _SECONDS:
            if text.endswith("ms"):
                return float(text[:-2]) / 1000
            return float(text.removesuffix("s"))
        return int(text) if name in _NUMBERS else text
    except ArgumentError:
        raise
    except ValueError:
        return text


@asynccontextmanager
async def disturbed(network: Network, blocks: Iterable[Faults]) -> AsyncIterator[None]:
    """Have faults while the block runs."""
    async with AsyncExitStack() as stack:
        for faults in blocks:
            await stack.enter_async_context(network.faults(faults))
        yield
