"""Composition: a network with its members and their commands, as a file says it.

    name = "shop"

    [network]
    internal = true

    [members.db]
    command = ["redis-server", "--bind", "0.0.0.0"]

    [members.web]
    command = "exec nginx -g 'daemon off;'"
    ports = ["127.0.0.1:8080:80"]
    depends_on = ["db:6379"]

An error names its place in the file, like members.web.ports.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from netns_kit import arguments
from netns_kit.child.codec import printable
from netns_kit.domain_names import check_host_name
from netns_kit.errors import ArgumentError, DomainNameError, NetnsKitError
from netns_kit.frozen import frozen
from netns_kit.policy import plain
from netns_kit.policy.policy import Policy

from .member_options import MemberSetup

NETWORK_KEYS = (
    *("subnet", "ipv6", "mtu", "driver", "internal", "isolate", "guard"),
    *("allow_host_loopback", "dns", "search", "records", "policy"),
)
MEMBER_KEYS = (
    "command",
    "ports",
    "aliases",
    "address",
    "mac",
    "ids",
    "policy",
    "env",
    "directory",
    "depends_on",
)
KEYS = {"cidr": "subnet", "port": "ports", "record": "records"}
"""What arguments are called in the file, where they have another name."""
FILES = "write a table for each, like [members.web]"
NAME_MAX = 63  # characters


@frozen
class Dependency:
    """A condition for a member's command to be started: another one's runs, and listens on a port if one is named."""

    member: str
    """Name of the other member."""
    port: int | None
    """Port that it listens on; None: its command runs, and that is enough."""
    protocol: str
    """Protocol of the port, "tcp" or "udp"."""


@frozen
class MemberPlan:
    """A member of a `Composition`."""

    setup: MemberSetup
    """Settings in the network."""
    command: str | tuple[str, ...] | None
    """Words of the command, or a line for the shell; None: there is no command."""
    env: Mapping[str, str]
    """Environment of the command, beside the caller's."""
    directory: str
    """Directory in which the command starts."""
    depends_on: tuple[Dependency, ...]
    """Conditions for the command to be started."""

    @property
    def name(self) -> str:
        """The name in the network."""
        return self.setup.name


@frozen
class Composition:
    """A network with its members and their commands.

    `load` reads one from a file, `from_dict` from plain data.  `Application` runs it.
    """

    name: str
    """Name on this machine."""
    network: Mapping[str, Any]
    """Arguments of the `Network`, but for those of the uplink."""
    uplink: Mapping[str, Any]
    """Arguments of the `Uplink`."""
    members: tuple[MemberPlan, ...]
    """Members, each behind what it depends on."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Composition:
        """Read a file of TOML or JSON, whose name ends in .toml or .json.

        Args:
            path: The file.  Its name is that of the composition, if it says no other; paths in it are relative to its
                directory.

        Raises:
            ArgumentError, AddressError, DomainNameError, PolicyError, PortSpecError: Something in it cannot be used;
                the error names its place.
            FeatureUnavailable: Python before 3.11 reads TOML by the package tomli.
            OSError: It cannot be read.
        """
        file = Path(path)
        return cls.from_dict(plain.load(file), name=file.stem, directory=file.parent)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, name: str = "network", directory: str | os.PathLike[str] = "."
    ) -> Composition:
        """Make one of plain data.

        Args:
            data: What a file has.
            name: The name, if the data has none.
            directory: What paths in the data are relative to.

        Raises:
            ArgumentError, AddressError, DomainNameError, PolicyError, PortSpecError: Something cannot be used; the
                error names its place.
        """
        table = _table(data, "", ("name", "network", "members"))
        where = Path(directory).absolute()
        called = _named(table, name)
        if len(called) > NAME_MAX:
            raise ArgumentError(f"expected {NAME_MAX} characters at most", "name", repr(called))
        network = _table(table.get("network", {}), "network", NETWORK_KEYS)
        uplink = {key: network.pop(key) for key in ("allow_host_loopback",) if key in network}
        if {"dns", "search"} & network.keys():
            from netns_kit.uplink.dns_settings import DnsSettings

            with placed("network", address="dns"):
                uplink["dns"] = DnsSettings(network.pop("dns", None), search=network.pop("search", None))
        if "policy" in network:
            network["policy"] = _policy(network["policy"], where, "network.policy")
        if network.get("internal") and uplink:
            fix = "leave out what is for the way out"
            _refuse("an internal network to have no way out", "network.internal", True, fix)
        members = _table(table.get("members", {}), "members", None)
        plans = [_plan(key, value, where) for key, value in members.items()]
        return cls(called, network, uplink, tuple(_in_order(plans)))


def _named(table: Mapping[str, Any], usual: str) -> str:
    """Return the name of a composition, which is that of its file if it has none."""
    try:
        return check_host_name(table.get("name", usual), "name")
    except DomainNameError as error:
        if "name" not in table:
            error.fix = 'write one in the file, like name = "shop", or give the file another name'
            error.args = (*error.args[:3], error.fix)
        raise


def _plan(name: str, data: object, where: Path) -> MemberPlan:
    place = f"members.{name}"
    table = _table(data, place, MEMBER_KEYS)
    command = table.get("command")
    if isinstance(command, list | tuple):
        if not command or not all(isinstance(word, str) for word in command):
            _refuse("words, or a line for the shell", f"{place}.command", command)
        command = tuple(command)
    elif command is not None and (not isinstance(command, str) or not command.strip()):
        _refuse("words, or a line for the shell", f"{place}.command", command)
    env = _table(table.get("env", {}), f"{place}.env", None)
    for variable, value in env.items():
        if not isinstance(value, str):
            _refuse("text", f"{place}.env.{variable}", value, "write it in quotes")
    directory = table.get("directory", ".")
    if not isinstance(directory, str):
        _refuse("the path of a directory", f"{place}.directory", directory)
    options: dict[str, Any] = {
        key: table[key] for key in ("ports", "aliases", "address", "mac", "ids") if key in table
    }
    if "policy" in table:
        options["policy"] = _policy(table["policy"], where, f"{place}.policy")
    with placed(place):
        setup = MemberSetup.of(name, **options)
    return MemberPlan(setup, command, env, str(where / directory), tuple(_dependencies(table, place)))


def _dependencies(table: Mapping[str, Any], place: str) -> Iterable[Dependency]:
    place += ".depends_on"
    given = table.get("depends_on", [])
    if not isinstance(given, list | tuple):
        fix = f"write [{given!r}]" if isinstance(given, str) else None
        _refuse("a list of members", place, given, fix)
    for each in given:
        expected = "MEMBER or MEMBER:PORT, like db:5432 or dns:53/udp"
        if not isinstance(each, str):
            _refuse(expected, place, each)
        member, colon, port = each.partition(":")
        number, slash, protocol = port.partition("/")
        if colon and not (number.isascii() and number.isdigit() and 0 < int(number) < 65536):
            _refuse(expected, place, each)
        if slash and protocol not in ("tcp", "udp"):
            _refuse(expected, place, each)
        yield Dependency(member.lower(), int(number) if colon else None, protocol or "tcp")


def _in_order(plans: list[MemberPlan]) -> Iterable[MemberPlan]:
    """Yield the members, each behind those that it depends on, else in the order that they are given in."""
    waiting = {plan.name: plan for plan in plans}
    if len(waiting) < len(plans):
        _refuse("each member once", "members", sorted(plan.name for plan in plans))
    known = {plan.name: plan for plan in plans}
    for plan in plans:
        for each in plan.depends_on:
            if each.member not in known:
                fix = f"there are {', '.join(known)}"
                _refuse("the name of a member", f"members.{plan.name}.depends_on", each.member, fix)
            if known[each.member].command is None:
                _refuse("a member with a command", f"members.{plan.name}.depends_on", each.member)
    while waiting:
        ready = next(
            (
                plan
                for plan in waiting.values()
                if not any(each.member in waiting for each in plan.depends_on)
            ),
            None,
        )
        if ready is None:
            _refuse("no circle of members that wait for each other", "depends_on", sorted(waiting))
        yield waiting.pop(ready.name)


@contextmanager
def placed(place: str, **keys: str) -> Iterator[None]:
    """Have an error tell where in the file its cause is.

    Args:
        place: The place, like members.web.
        keys: What arguments are called in the file, where that is another word.
    """
    try:
        yield
    except ArgumentError as error:
        knob = str(error.knob)
        error.knob = place if knob == "name" else f"{place}.{keys.get(knob) or KEYS.get(knob, knob)}"
        error.args = (error.cause, error.knob, *error.args[2:])
        raise
    except NetnsKitError as error:
        error.cause = f"{place}: {error.cause}"
        error.args = (error.cause, *error.args[1:])
        raise
    except OSError as error:
        if error.filename is not None:
            error.filename = f"{place}: {printable(os.fsdecode(error.filename))}"
        raise


def _policy(given: object, where: Path, place: str) -> Policy:
    """Return a policy that is a table of the file, or another file."""
    table = None if isinstance(given, str) else _table(given, place, None)
    with placed(place):
        return Policy.load(where / str(given)) if table is None else Policy.from_dict(table)


def _table(data: object, place: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    """Return a copy of a table with no other keys than those that are known, None for any."""
    if not isinstance(data, Mapping):
        _refuse("a table", place or "the file", data, FILES if place == "members" else None)
    for key, value in data.items():
        if known is not None and key not in known:
            from difflib import get_close_matches

            like = get_close_matches(str(key), known, 1)
            fix = f"write {like[0]}" if like else f"such a key is {', '.join(known)}"
            _refuse("a key that is known here", f"{place}.{key}".lstrip("."), value, fix)
    return dict(data)


def _refuse(expected: str, place: str, given: object, fix: str | None = None) -> NoReturn:
    raise ArgumentError(f"expected {expected}", place, arguments.shown(given), fix)
