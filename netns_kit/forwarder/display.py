"""How a forwarder is shown: the ports that lead in, and those that lead out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netns_kit.display.view import Table, View, condition

if TYPE_CHECKING:
    from .forwarder import Forwarder


def forwarder_view(forwarder: Forwarder) -> View:
    """Return the view of a forwarder."""
    forwards, follows, reverses = forwarder.known
    ports = [(each.listens_on, each.leads_to, each.protocol, each.mode or "") for each in forwards]
    parts = [Table(("on the host", "inside", "protocol", "mode"), ports, "Published ports")]
    if follows:
        parts.append(Table(("rule",), [(str(each),) for each in follows], "Followed"))
    if reverses:
        parts.append(Table(("inside, and where it leads",), [(str(each),) for each in reverses], "Reverse"))
    return View("Forwarder", "", condition(forwarder.supervisor.condition), parts)
