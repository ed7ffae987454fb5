"""How a forwarder is shown: the ports that lead in, and those that lead out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from netns_kit.display.view import Table, View, condition

if TYPE_CHECKING:
    from .forwarder import Forwarder
    from .ports import PortForward


def forwarder_view(forwarder: Forwarder) -> View:
    """Return the view of a forwarder."""
    forwards, follows, reverses = forwarder.known
    parts = [published(forwards)]
    if follows:
        parts.append(Table(("rule",), [(str(each),) for each in follows], "Followed"))
    if reverses:
        parts.append(Table(("inside, and where it leads",), [(str(each),) for each in reverses], "Reverse"))
    return View("Forwarder", "", condition(forwarder.supervisor.condition), parts)


def published(forwards: Iterable[PortForward]) -> Table:
    """Return the table of host ports that lead in."""
    ports = [(each.listens_on, each.leads_to, each.protocol, each.mode or "") for each in forwards]
    return Table(("on the host", "inside", "protocol", "mode"), ports, "Published ports")
