"""The uplink of a network that has no way out."""

from __future__ import annotations

from netns_kit import arguments
from netns_kit.errors import ArgumentError
from netns_kit.stack import Refusal
from netns_kit.uplink.dns_settings import DnsSettings
from netns_kit.uplink.flow import Flow
from netns_kit.uplink.uplink import Uplink


def nothing_leaves(flow: Flow) -> Refusal | None:
    """Refuse what this process does not answer itself, as the policy of an `Uplink`."""
    return None if flow.served else Refusal.PROHIBITED


def internal_uplink(given: object) -> Uplink:
    """Return the uplink of a network with `internal`.

    Raises:
        ArgumentError: The caller has given another.
    """
    if given is not None:
        expected = "expected None for an internal network, which has no way out"
        raise ArgumentError(expected, "uplink", arguments.shown(given), "leave out uplink, or internal")
    return Uplink(dns=DnsSettings([], unknown="nxdomain"), policy=nothing_leaves)
