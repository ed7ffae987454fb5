"""What may leave, and where that is told, as a command line has it: --policy, --allow, --deny, --events."""

from __future__ import annotations

import argparse
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, TextIO

import anyio

from netns_kit.errors import ArgumentError, CaptureError, EventLogError, NetnsKitError
from netns_kit.namespace.background import beside
from netns_kit.network.network import Network
from netns_kit.policy.policy import Policy

from .command_line import Parser, said_of, value
from .program import notice

SYNTAX = "[TARGET][:PORTS][/PROTOCOL]"
_QUERIES = "dns"  # stands where a protocol does
_QUERIES_ALONE = 'only="dns"'  # as Python has it
_PLACE = re.compile(r"rules\[(\d+)\]\.(\w+)")
_EXPECTED = f"expected {SYNTAX}"

Data = dict[str, Any]


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say what may leave, and where that is told."""
    parser.add_argument(
        "--policy",
        dest="policy_file",
        type=_policy,
        metavar="FILE",
        help="what may leave, by name, address and port: a file of TOML or JSON (docs/policy.md)",
    )
    _add_rules(
        parser,
        "allow",
        "let that leave: a name, *.NAME, an address, a network or a preset such as PRIVATE; ports such as 443 or "
        "80,8000-8999; PROTOCOL is tcp, udp, icmp, or dns for queries alone; without TARGET all, as in /icmp.  "
        "Rules are asked in the order of the command line, then those of --policy, and the first that matches "
        "decides; without --policy nothing else may leave; repeatable",
    )
    _add_rules(
        parser,
        "deny",
        "refuse that, written in the same way; without --policy and --allow everything else may leave; repeatable",
    )
    parser.add_argument(
        "--events",
        metavar="FILE",
        help="append what happens to flows, and what is refused, to a file, as lines of JSON (docs/observing.md); "
        "-: to standard error",
    )
    parser.add_argument(
        "--capture",
        type=value(_check_file),
        metavar="FILE",
        help="write all frames to a pcapng file, which is emptied first (docs/observing.md)",
    )


def _check_file(text: str) -> None:
    """Raise `ValueError` for what is no file, but where other programs write to standard output."""
    if text == "-":
        raise ValueError(
            "'-': expected a file, since standard output is the command's; write /dev/stdout or ./-"
        )


def _add_rules(parser: argparse.ArgumentParser, action: Literal["allow", "deny"], help: str) -> None:
    def given(text: str) -> Data:
        try:
            rule = rule_of(action, text)
            Policy.from_dict({"default": "deny", "rules": [rule]})
        except (NetnsKitError, ValueError) as error:
            raise argparse.ArgumentTypeError(said_of(error, text)) from error
        return rule

    parser.add_argument(
        f"--{action}", dest="rules", action="append", default=[], type=given, metavar=SYNTAX, help=help
    )


def _policy(path: str) -> Policy:
    try:
        return Policy.load(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path!r}: {error.strerror}") from error
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(f"{path!r}: {error}") from error


def rule_of(action: Literal["allow", "deny"], text: str) -> Data:
    """Return a rule that was written on the command line as plain data.

    Raises `ArgumentError` for text that is none.  What its parts are is not looked at.
    """
    before, slash, last = text.rpartition("/")
    rest, protocol = (before, last) if slash and last.isalpha() else (text, "")
    if rest.startswith("[") and "]" in rest:
        target, _, rest = rest[1:].partition("]")
        prefix, colon, ports = rest.partition(":")
        target += prefix
    elif rest.count(":") > 1:  # an address of IPv6
        target, colon, ports = rest, "", ""
    else:
        target, colon, ports = rest.partition(":")
    if "://" in text:
        raise ArgumentError(
            _EXPECTED, action, repr(text), "write the host and the port, as in example.org:443"
        )
    if target == "*" or not text or (colon and not ports):
        raise ArgumentError(_EXPECTED, action, repr(text), "for everything leave TARGET out: :443, /icmp")
    rule: Data = {"action": action, "name": f"--{action} {text}"}
    if target:
        rule["targets"] = [target]
    if ports:
        rule["ports"] = [int(each) if each.isdecimal() else each for each in ports.split(",")]
    if protocol == _QUERIES:
        rule["only"] = "dns"
    elif protocol:
        rule["protocol"] = protocol
    return rule


def policy_of(options: argparse.Namespace) -> Policy | None:
    """Return the policy that the options ask for; None if there are none.

    Raises `ArgumentError` for rules that cannot stand together.
    """
    loaded: Policy | None = options.policy_file
    rules: list[Data] = options.rules
    if loaded is None and not rules:
        return None
    if loaded is None:
        allows = any(each["action"] == "allow" for each in rules)
        data: dict[str, Any] = {"default": "deny" if allows else "allow"}
    else:
        data = loaded.as_dict()
    return Policy.from_dict({**data, "rules": [*rules, *data.get("rules", ())]})


def check_policy(parser: Parser, options: argparse.Namespace) -> None:
    """Complain of rules that cannot stand together, by the options that they are of."""
    try:
        policy_of(options)
    except ArgumentError as error:
        place = _PLACE.fullmatch(str(error.knob))
        if place is None:
            parser.error(f"--policy: {error}")
        number = int(place[1]) - len(options.rules)
        if number >= 0:
            parser.error(f"--policy: rules[{number}].{place[2]}={error.value}: {error.cause}; {error.fix}")
        option, _, text = options.rules[number]["name"].partition(" ")
        cause, fix = error.cause, error.fix
        if _QUERIES_ALONE in f"{cause}{fix}":
            cause = cause.replace(_QUERIES_ALONE, "/dns")
            fix = f"write {text}/dns to refuse the queries alone, or --allow what may leave"
        parser.error(f"{option}: {text!r}: {cause}; {fix}")


def open_events(path: str | None) -> TextIO | None:
    """Open the file that events are told in.  Raises OSError.

    It stays open until this process ends: closing would wait for whoever does not read it.
    """
    if path is None:
        return None
    if path == "-":
        return open(2, "w", encoding="ascii", closefd=False)
    return open(path, "a", encoding="ascii")


@asynccontextmanager
async def events_told(network: Network, file: TextIO | None) -> AsyncIterator[None]:
    """Write all events to a file while the block runs, if there is one."""
    if file is None:
        yield
        return
    begun = _Begun()
    async with beside(_tell, network, file, begun):
        await begun.event.wait()
        yield


@asynccontextmanager
async def captured(network: Network, path: str | None) -> AsyncIterator[None]:
    """Write all frames to a file while the block runs, if there is one.

    Raises:
        CaptureError: The file cannot be opened.  What happens to it later is noticed, and nothing else.
    """
    if path is None:
        yield
        return
    capture = await network.stack.capture(path).__aenter__()
    try:
        yield
    finally:
        try:
            await capture.__aexit__(None, None, None)
        except CaptureError as error:
            notice(f"netns-kit: {error}")
        if capture.lost:
            notice(
                f"netns-kit: {capture.lost} of {capture.frames} captured frames were lost: the file was too slow"
            )


class _Begun:
    """A status of a task, for somebody who waits until it has begun."""

    def __init__(self) -> None:
        self.event = anyio.Event()

    def started(self, value: None = None) -> None:
        """Note that it has."""
        self.event.set()


async def _tell(network: Network, file: TextIO, begun: _Begun) -> None:
    try:
        await network.stack.log_events(file, processes=True, task_status=begun)
    except EventLogError as error:
        notice(f"netns-kit: {error}")
    except NetnsKitError:  # the network has failed, and raises it too
        begun.started()
