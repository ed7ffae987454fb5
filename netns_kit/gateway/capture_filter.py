"""CaptureFilter: which frames a capture keeps, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from netns_kit import arguments
from netns_kit.errors import PolicyError
from netns_kit.frozen import frozen
from netns_kit.policy.presets import HOST
from netns_kit.policy.rules import Rule, RulePorts, RuleTarget, several

CaptureProtocol: TypeAlias = Literal["tcp", "udp", "icmp", "arp"]
"""The protocol of captured frames; "icmp" is ICMP and ICMPv6, with neighbour discovery."""


@frozen
class CaptureFilter:
    """The frames that a capture keeps, in the terms of a policy's rules.

    A frame is kept if one of its ends, source or destination, is one of the targets at one of the ports, and it is of
    the protocol.  What a name means is what our DNS has given for it, when the flow's first frame is seen.

    >>> CaptureFilter("*.example.org", ports=443).targets
    ('*.example.org',)

    Args:
        targets: A target or several of them, see `Policy.allow`; none: every end.
        ports: The ports, see `Policy.allow`; None: all, and frames that have none.
        protocol: The protocol; None: any.

    Raises:
        ArgumentError: There is no such protocol.
        PolicyError: A target or a port cannot be used.
    """

    targets: tuple[str, ...]
    ports: tuple[tuple[int, int], ...]
    protocol: CaptureProtocol | None

    def __init__(
        self,
        targets: RuleTarget | Iterable[RuleTarget] = (),
        ports: RulePorts | None = None,
        protocol: CaptureProtocol | None = None,
    ) -> None:
        if protocol is not None:
            arguments.one_of("protocol", protocol, ("tcp", "udp", "icmp", "arp"))
        rule = Rule("deny", several(targets), ports, None if protocol == "arp" else protocol)
        if HOST.name in rule.targets:
            raise PolicyError(
                "expected no HOST: which addresses are the host's is known for flows that leave only",
                "targets", "'HOST'", "write its address, which may be that of the gateway",
            )  # fmt: skip
        if protocol == "arp" and rule.ports:
            raise PolicyError("expected no ports: ARP has none", "ports", repr(ports), "leave them out")
        arguments.fill(self, targets=rule.targets, ports=rule.ports, protocol=protocol)
