"""StandInNames: names that a proxy resolves have addresses that stand for them.

a query --> a name that the proxy may be told, and the policy has no rule about its address
                A: the address that stands for it; AAAA, HTTPS, SVCB: none; others: not implemented
        --> another name, as without this: resolvers are asked
a flow to such an address --> `IndirectRouter` has the proxy told the name
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, cast

from netns_kit.dns.message import ANY, IN, NXDOMAIN, PTR, SERVFAIL, TYPES, Rr
from netns_kit.dns.stand_ins import NETWORK, TTL, StandIns
from netns_kit.dns.zone import Lookup
from netns_kit.domain_names import address_of, is_among, to_text
from netns_kit.stack.wire import flow_key
from netns_kit.subnet import Subnet
from netns_kit.uplink.indirect import IndirectUplink, can_be_told

from .engine import Engine
from .flow_router import FlowRouter
from .indirect_router import IndirectRouter
from .worker_links import STANDING, WorkerLinks

if TYPE_CHECKING:
    from netns_kit.policy.pins import Pin
    from netns_kit.uplink.uplink import Uplink

NOT_IMPLEMENTED = 4
_A = TYPES["A"]
_NONE = frozenset({TYPES["AAAA"], TYPES["HTTPS"], TYPES["SVCB"]})


class StandInNames:
    """The stand-ins of one gateway.

    Args:
        engine: Has the time, and tells when to look which addresses are in use.
        router: Has flows to these addresses carried by name.
        uplink: Says which names have stand-ins.
        subnet: The subnet of the guest.
        links: The links to other workers; None: there are none.
    """

    def __init__(
        self, engine: Engine, router: FlowRouter, uplink: Uplink, subnet: Subnet, links: WorkerLinks | None
    ) -> None:
        self._engine = engine
        self._router = cast("IndirectRouter", router)
        self._uplink = cast("IndirectUplink", uplink)
        self._links = links
        parts = (0, 1) if links is None else (links.index, links.count)
        halves = tuple(NETWORK.subnets())
        free = next(
            (each for each in (NETWORK, *halves) if not each.overlaps(subnet.network)),
            IPv4Network("0.0.0.0/32"),
        )  # in that one there is no room
        tell = None if links is None else self._tell
        self._stand_ins = StandIns(free, self._used, tell, part=parts[0], parts=parts[1])
        self._told = -math.inf
        self.timer_at = self.timer_entry = math.inf
        self._router.stand_ins = self._stand_ins

    def _used(self) -> frozenset[bytes]:
        stack = self._router.stack
        return frozenset(flow_key.parse(key).remote for key in (*stack.tcp, *stack.udp))

    def _tell(self, name: bytes, address: bytes, until: float) -> None:
        if self._links is not None:
            self._links.send_pins([(name, address, until, False)], STANDING)
            self._keep_looking(self._engine.now)

    def _keep_looking(self, now: float) -> None:
        """Look in a while which flows there are: other workers have to know."""
        self._told = now
        if self.timer_at == math.inf:
            self._engine.timers.arm(self, now + TTL / 4)

    def handle_timer(self, now: float) -> None:
        """Have the addresses that flows lead to stay as they are, at the workers that have given them, too."""
        used = [address for address in self._used() if address in self._stand_ins]
        for address in used:
            self._stand_ins.use(address, now)
        if self.timer_at == math.inf and (used or now < self._told + TTL):
            self._engine.timers.arm(self, now + TTL / 4)

    def name_of(self, address: bytes) -> bytes | None:
        """Return the name that a packed address stands for, None for none."""
        return self._stand_ins.name_of(address)

    def learn(self, pins: Iterable[Pin]) -> None:
        """Take what another worker has given."""
        now = self._engine.now
        for name, address, until, _ in pins:
            self._stand_ins.learn(name, address, until, now)
        self._keep_looking(now)

    def find(self, question: bytes, client: bytes) -> Lookup | None:
        """Return the answer to a question, or None: resolvers are asked."""
        asked, kind = question[:-4], int.from_bytes(question[-4:-2], "big")
        name = asked.lower()
        if int.from_bytes(question[-2:], "big") != IN:
            return Lookup(NOT_IMPLEMENTED, ())
        address = address_of(name)
        if address is not None:
            found = self._stand_ins.name_of(address.packed)
            if found is None:
                return Lookup(NXDOMAIN, ())
            return Lookup(0, (Rr(asked, PTR, TTL, found),) if kind in (PTR, ANY) else ())
        text = to_text(name)
        if not can_be_told(text):
            return Lookup(NXDOMAIN, ())
        if not self._uplink.stands_for(text) or not self._is_free(name, text, client):
            return None
        if kind in _NONE:
            return Lookup(0, ())
        if kind not in (_A, ANY):
            return Lookup(NOT_IMPLEMENTED, ())
        packed = self._stand_ins.address_of(name, client, self._engine.now)
        if packed is None:
            return Lookup(SERVFAIL, ())
        return Lookup(0, (Rr(asked, _A, TTL, packed),))

    def _is_free(self, name: bytes, text: str, client: bytes) -> bool:
        """Return whether no policy has a say in the address: there is none, or a rule is about the name."""
        policy = self._router.enforcer.of(client).policy
        if policy is None:
            return True
        number = policy.index.name(name).rule
        return number is not None and is_among(text, policy.rules[number].targets)
