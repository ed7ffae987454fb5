"""Answers of a stack that are shown: flows, and counters beside those of the last look."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, cast

from netns_kit.display.displayed import Displayed
from netns_kit.display.named import Named
from netns_kit.gateway.gateway import FlowInfo
from netns_kit.gateway.stats import Stats

if TYPE_CHECKING:
    from netns_kit.display.view import View


class Flows(Named[IPv4Address | IPv6Address, FlowInfo]):
    """A tuple of `FlowInfo`: flows at one moment.  A notebook shows it as a table to sort, and `print` as text."""

    names: Mapping[IPv4Address | IPv6Address, str]
    """Names of the members that have the flows, by address; empty without members."""

    def _view(self) -> View:
        from .display import flows_view

        return flows_view(self)


class Counted(Displayed, dict[str, int]):
    """The counters of a stack, with what they were before, which is shown beside them.

    Args:
        stats: The counters.
        before: Those of the last look; None: there was none.
        seconds: How long ago that was.
    """

    def __init__(self, stats: Stats, before: Stats | None, seconds: float) -> None:
        super().__init__(cast("Mapping[str, int]", stats))
        self.before = cast("Mapping[str, int] | None", before)
        self.seconds = seconds

    def _view(self) -> View:
        from .display import stats_view

        return stats_view(self)
