"""How a namespace is shown, and what it has at one moment."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from netns_kit.display.text import octets
from netns_kit.display.view import Cell, Facts, Table, View, condition, number
from netns_kit.errors import NamespaceGone

if TYPE_CHECKING:
    from .namespace import Namespace, NamespaceSnapshot


def namespace_view(namespace: Namespace) -> View:
    """Return the view of a namespace: what is known of it without asking it."""
    told = namespace.supervisor.condition
    facts: list[tuple[str, Cell | str]] = []
    with suppress(NamespaceGone):
        facts = [
            ("process", f"{namespace.pid}, as the host counts"),
            ("commands see", "each other" if namespace.pids == "own" else "the host's processes"),
            ("more", "snapshot() for links, addresses, routes, listening sockets, processes"),
        ]
    return View("Namespace", namespace.origin, condition(told), [Facts(facts)] if facts else ())


def snapshot_view(snapshot: NamespaceSnapshot) -> View:
    """Return the view of what a namespace has."""
    names = {link.index: link.name for link in snapshot.links}
    addresses: dict[int, list[str]] = {}
    for each in snapshot.addresses:
        addresses.setdefault(each.index, []).append(str(each.interface))
    links = [
        (link.name, Cell("up", tone="good") if link.up else Cell("down", tone="warn"), number(link.mtu), link.mac,
         ", ".join(addresses.get(link.index, ())))
        for link in snapshot.links
    ]  # fmt: skip
    routes = [
        (
            "default" if route.destination.prefixlen == 0 else str(route.destination),
            "" if route.gateway is None else str(route.gateway),
            "" if route.index is None else names.get(route.index, str(route.index)),
            number(route.metric),
        )
        for route in snapshot.routes
    ]
    listening = [
        (each.protocol, str(each.address), Cell(str(each.port), each.port)) for each in snapshot.listening
    ]
    processes = [
        (Cell(str(each.pid), each.pid), Cell(str(each.uid), each.uid), each.name, each.command or f"[{each.name}]",
         number(each.memory, octets(each.memory)))
        for each in snapshot.processes
    ]  # fmt: skip
    headings, more = ("pid", "uid", "name", "command", "memory"), snapshot.more_processes
    return View("Namespace", "at one moment", None, [
        Table(("name", "state", "MTU", "link address", "addresses"), links, "Links"),
        Table(("destination", "gateway", "link", "metric"), routes, "Routes"),
        Table(("proto", "address", "port"), listening, "Listening"),
        Table(headings, processes, "Processes", more=more, soft=("command",)),
    ])  # fmt: skip
