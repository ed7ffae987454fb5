"""Interception: flows that may pass, and that a handler of the caller's has before they leave.

    the guest opens a flow --uplink, policy--> a rule is about it: it waits --Opened--> the caller's handler
         a relay with its other end <---- accept ----- it peeks, reads, answers
         a socket of the uplink's ------- dial ------> it wants the way out, and has the socket itself
         a plain relay <-- release; hold, go_on ------ it wants to see no more

So what the handler copies crosses this engine once, and what it has handed back is a flow as any other.  The SYN is
on hold until the handler reads or sends, so a refusal of the way out may be told to the guest as ever.

Rules by name rest on what our DNS has answered: `NameGuard` notes that, beside the policy's pins and not in them.  If
the policy looks at first bytes, it does so before the handler gets them.
"""

from __future__ import annotations

from netns_kit.child.codec import load
from netns_kit.domain_names import to_text
from netns_kit.policy.addresses import canonical
from netns_kit.policy.index import Index
from netns_kit.policy.policy import Policy
from netns_kit.policy.rules import Rule, is_name
from netns_kit.stack import Refusal, TcpConnection, UdpFlow
from netns_kit.uplink.flow import Flow, Target
from netns_kit.uplink.uplink import is_host_address

from .intercepted import InterceptedConnection, InterceptedUdp
from .serving import Serving


class Interception:
    """What is intercepted of the flows of one gateway.  It is `FlowRouter.interceptor`.

    Args:
        serving: Tells the caller's side of flows.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._gateway = serving.gateway
        self._rules: dict[int, Rule] = {}
        self._indexes: list[tuple[int, Index]] = []  # each alone: a rule may cover another, and be gone first

    def add(self, service: int, text: str) -> None:
        """Intercept what a rule is about.

        Args:
            service: The number under which flows are told of.
            text: The rule, as the only one of a policy, as `netns_kit.child.codec.dump` has it.
        """
        self._rules[service] = load(Policy, text.encode()).rules[0]
        self._arrange()

    def discard(self, service: int) -> None:
        """Undo `add`."""
        del self._rules[service]
        self._arrange()

    def _arrange(self) -> None:
        self._indexes = [(service, Policy("deny", (rule,)).index) for service, rule in self._rules.items()]
        names = {each for rule in self._rules.values() for each in rule.targets if is_name(each)}
        self._gateway.want_names(self, names)
        self._gateway.router.interceptor = self if self._rules else None

    # -- flows ----------------------------------------------------------------------------------------

    def takes(self, opened: TcpConnection | UdpFlow, flow: Flow, target: Target) -> bool | Refusal:
        address, port = flow.destination
        plain = canonical(address.packed)
        names = self._names(flow, plain)

        def is_host() -> bool:
            local = flow.subnet.of(address)
            return (local is not None and address in local.gateways) or is_host_address(address)

        found = next(
            (
                each
                for each in self._indexes
                if each[1].flow(flow.protocol, plain, port, names, is_host).rule is not None
            ),
            None,
        )
        if found is None:
            return False
        service, index = found
        name = next(
            (
                to_text(each)
                for each in reversed(names)
                if index.flow(flow.protocol, None, port, (each,), lambda: False).rule is not None
            ),
            None,
        )
        relay: InterceptedConnection | InterceptedUdp
        serving = self._serving
        if isinstance(opened, TcpConnection):
            relay = InterceptedConnection(serving, service, opened, (flow, target))
        elif serving.has_room_for_datagrams():
            relay = InterceptedUdp(serving, service, opened, (flow, target))
        else:
            return Refusal.NET_UNREACHABLE
        opened.user = relay
        serving.flows[opened.id] = relay
        serving.opened(service, opened, name=name)
        return True

    def _names(self, flow: Flow, plain: bytes) -> tuple[bytes, ...]:
        """Return the names that the guest may know an address by, the one that was answered last at the end."""
        gateway, address = self._gateway, flow.destination.address
        enforcer, now = gateway.enforcer.of(flow.source.address.packed), gateway.engine.now
        answered = gateway.answered(address.packed)
        return tuple(dict.fromkeys((*enforcer.pins.names(plain, now), *answered)))
