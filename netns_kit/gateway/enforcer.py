"""Enforcer: what one gateway has of a policy.

The policy says what may pass.  The enforcer knows what only a running gateway does: which addresses our DNS has given
for which names (`Pins`), which addresses are the host's, and how often the policy has refused.  `FlowRouter` asks it
about every flow that a guest opens, after `Uplink.route` has let the flow pass, and before there is a socket.  The
DNS server asks its `guard` about every query and answer.

Whatever fails here refuses the flow, and nothing else.  A new policy takes the place of the old one between two
handlers of the engine, so that each flow is decided by one of them as a whole.  Pins outlive a change of the policy,
if the new policy would let the names have these addresses.

A guest of several may have a policy of its own, which decides in place of the other: it has an enforcer of its own
below this one, with pins of its own, which is found by the guest's address.  It has the number of a member of the
network, by which other workers know whose pins they are told.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from netns_kit.domain_names import is_among, to_text
from netns_kit.frozen import replace
from netns_kit.policy.addresses import canonical
from netns_kit.policy.pins import Pins
from netns_kit.stack import Refusal
from netns_kit.subnet import Subnet
from netns_kit.uplink.flow import Flow
from netns_kit.uplink.uplink import is_host_address

if TYPE_CHECKING:
    from netns_kit.arguments import Address
    from netns_kit.dns.guard import Guard, Refused
    from netns_kit.policy.index import Index
    from netns_kit.policy.name_guard import NameGuard
    from netns_kit.policy.pins import Pin
    from netns_kit.policy.policy import Policy
    from netns_kit.policy.rules import RefusalName, RuleAction

EARLY_PINS = 1024  # that wait for their policy
REFUSALS: dict[RefusalName, Refusal] = {
    "prohibited": Refusal.PROHIBITED,
    "reset": Refusal.RESET,
    "silence": Refusal.DROP,
    "forbidden": Refusal.PROHIBITED,  # of what is no TCP
}


class Look(NamedTuple):
    """What was seen of the first bytes of a connection."""

    kind: Literal["tls", "http"] | None = None
    """The protocol; None for another one, and for nothing in time."""
    names: tuple[bytes, ...] = ()
    """The name that the client has asked for, in wire form; none if there is none to be relied on."""


class Ruling(NamedTuple):
    """What the policy says of one flow.  It is kept with the flow, see `ruling_of`."""

    action: RuleAction
    """What is to be done with it."""
    refusal: RefusalName = "prohibited"
    """How it is refused, if it is."""
    rule: str | None = None
    """The rule that decides, as people read it; None if there is no policy."""
    looks: bool = False
    """Whether it is decided once more when its first bytes are known."""
    audit: bool = False
    """Whether it is only noted that the flow would be refused."""
    seen: Look | None = None
    """What was seen, if it was looked at."""
    names: tuple[bytes, ...] = ()
    """The names that our DNS has given the destination for, in wire form.  Of a flow that was looked at, it is the
    one that its client has asked for."""
    targets: tuple[str, ...] = ()
    """What the rule is about."""

    @property
    def name(self) -> str | None:
        """The name of the destination, see `name_or`."""
        return self.name_or(None)

    def name_or(self, known: str | None) -> str | None:
        """Return the name of the destination.

        It is the one that the client has asked for in its first bytes, whether or not our DNS has told it; else one
        that the rule is about; else the one that is known otherwise; else the one that our DNS has told last.
        """
        if self.seen is not None and self.seen.names:
            return to_text(self.seen.names[0])
        for name in filter(self.is_about, map(to_text, reversed(self.names))):
            return name
        return known or (to_text(self.names[-1]) if self.names else None)

    def is_about(self, name: str | None) -> bool:
        """Return whether the rule is about a name."""
        return is_among(name, self.targets)

    @property
    def refuses(self) -> bool:
        """Whether the flow may not pass.  What is to be asked about may not, as long as nobody is asked."""
        return self.action != "allow" and not self.audit


_Ground: TypeAlias = "tuple[RefusalName, str, tuple[str, ...]]"
"""What all rulings by a rule have: its refusal, its text, its targets."""
_made = tuple.__new__  # without the call of `Ruling.__new__`, which is not needed
UNGOVERNED = Ruling("allow")
"""The ruling without a policy."""


class Enforcer:
    """The policy of one gateway, while it runs.

    Args:
        subnet: The subnet of the guest.
        failed: Called with a warning for people and the exception behind it, if the policy fails to decide.
        member: The number of the member that it is about; 0: all that have none of their own.

    Attributes:
        policy: The policy; None: there is none, and everything passes that the uplink lets pass.
        governs: Whether there is a policy, be it of one guest alone.
        pins: What our DNS has answered for names.
        catch_up: Called before a flow is refused, to learn the pins that others have made (`learn`); returns whether
            there were any.  None: all pins are made here.
        own_names: Returns the names that our own records give to a packed address.  They count as answered: programs
            read them in their hosts file too.
        has_host: Whether addresses may be the host's own.  None is for an uplink that never leads there.
        told: Called with what `NameGuard` tells; the next policy gets it.
        pinned: Called with what `NameGuard` has pinned, and the number of the member.
        hits: Number of flows that each rule has decided about, by the rule's text; and of queries and answers that it
            has refused, by "dns " and that.
        refused: Number of flows that the policy has refused.
        audited: Number of flows that it would have refused, but for `audit`.
    """

    def __init__(
        self, subnet: Subnet, failed: Callable[[str, BaseException], object], member: int = 0
    ) -> None:
        self.member = member
        self._subnet = subnet
        self._failed = failed
        self.policy: Policy | None = None
        self.pins = Pins()
        self.governs = False
        self._guard: NameGuard | None = None
        # of guests with a policy of their own, by their packed addresses
        self._own: dict[bytes, Enforcer] = {}
        # of members whose policy has not come yet
        self._early: deque[tuple[int, Pin]] = deque(maxlen=EARLY_PINS)
        self.catch_up: Callable[[], bool] | None = None
        self.own_names: Callable[[bytes], tuple[bytes, ...]] = lambda _: ()
        self.has_host = True
        self.told: Callable[[bytes, int, bytes, Refused, str], object] = _nobody
        self.pinned: Callable[[list[Pin], int], object] = _nobody
        self.hits = defaultdict[str, int](int)
        self.refused = self.audited = 0
        self._culprit = ""
        self._index: Index | None = None
        self._grounds: dict[int | None, _Ground] = {}  # by the number of the rule
        self._asked: Address = subnet.gateway  # the destination that is being decided about

    def set(self, policy: Policy | None) -> None:
        """Let this policy decide from now on.  If this raises, the old one stays."""
        if policy is None:
            self.policy = self._index = self._guard = None
            self.pins = Pins()
        else:
            from netns_kit.policy.name_guard import NameGuard  # with no policy nobody has it

            networks = [each.network for each in self._subnet.families]
            guard = NameGuard(policy.index, self.pins, own=networks, told=self.told, pinned=self._tell_pins)
            self.pins.keep(guard.lets)
            self.policy, self._index, self._guard = policy, policy.index, guard
        self._culprit = ""
        self._grounds = {}
        self.hits = defaultdict(int)
        self.governs = self.policy is not None or bool(self._own)

    def _tell_pins(self, pins: list[Pin]) -> None:
        self.pinned(pins, self.member)

    def set_own(self, member: int, guests: Iterable[bytes], policy: Policy | None) -> None:
        """Let this policy decide about a member from now on; None: the common one does.

        If this raises, nothing has changed.

        Args:
            member: The number of the member, which is not 0.  A policy of another member with these addresses is gone
                with all that it knows.
            guests: The packed addresses of the member.
            policy: The policy.
        """
        addresses = tuple(guests)
        if policy is None:
            for address in addresses:
                self._own.pop(address, None)
        else:
            own = self._own.get(addresses[0])
            if own is None or own.member != member:
                own = type(self)(self._subnet, self._failed, member)
            own.own_names, own.has_host, own.told = self.own_names, self.has_host, self.told
            own.catch_up, own.pinned = self.catch_up, self.pinned
            own.set(policy)
            self._own.update(dict.fromkeys(addresses, own))
            own.learn([pin for number, pin in self._early if number == member], member)
        self._early = deque([each for each in self._early if each[0] != member], EARLY_PINS)
        self.governs = self.policy is not None or bool(self._own)

    def of(self, guest: bytes) -> Enforcer:
        """Return what decides about a guest with this packed address."""
        return self._own.get(guest, self)

    def address_of(self, guest: Address, version: int) -> Address | None:
        """Return the address of the other version of a guest with a policy of its own; None: it has none."""
        own = self._own.get(guest.packed)
        found = (ip_address(each) for each, other in self._own.items() if own is not None and other is own)
        return next((each for each in found if each.version == version), None)

    def policy_of(self, flow: Flow) -> Policy | None:
        """Return the policy that decides about a flow."""
        return self.of(flow.source.address.packed).policy

    @property
    def guard(self) -> Guard | None:
        """What the DNS server asks; None without a policy."""
        return _GuardByClient(self) if self._own else self._guard

    @property
    def own_guard(self) -> NameGuard | None:
        """What the DNS server asks about guests that have no policy of their own."""
        return self._guard

    def learn(self, pins: Iterable[Pin], member: int = 0) -> None:
        """Take the pins that another worker has made for a member.

        They are kept even before this worker has the policy: the other may have its new one a moment earlier.  It may
        also have the old one a moment longer, so what the policy here would have cut is not kept.
        """
        if member != self.member:
            own = next((each for each in self._own.values() if each.member == member), None)
            if own is None:
                self._early.extend((member, pin) for pin in pins)
            else:
                own.learn(pins, member)
            return
        for name, address, until, ours in pins:
            if ours or self._guard is None or self._guard.lets(name, address):
                self.pins.add(name, address, until)

    def flow(self, flow: Flow, now: float) -> Ruling:
        """Decide about a flow that the guest opens.  A policy that fails refuses it."""
        enforcer = self.of(flow.source.address.packed) if self._own else self
        ruling = enforcer._ruled(flow, None, now)
        if ruling.rule is not None and not ruling.looks:
            enforcer.hits[ruling.rule] += 1
        return ruling

    def existing(self, flow: Flow, before: Ruling | None, now: float) -> Ruling:
        """Decide once more about a flow that there is already, and about what was seen of it.

        Flows may last longer than the answer that has let them in.  So the names that the destination was given for
        then count, if the policy still lets these names have the address.

        Args:
            flow: The flow.
            before: Its ruling; None: no policy has been asked about it.
            now: The time.
        """
        if (own := self.of(flow.source.address.packed)) is not self:
            return own.existing(flow, before, now)
        plain, guard = canonical(flow.destination.address.packed), self._guard
        names: tuple[bytes, ...] = ()
        if before is not None and guard is not None:
            names = tuple(name for name in before.names if guard.lets(name, plain))
        ruling = self._ruled(flow, None, now, names)
        if ruling.looks and before is not None and before.seen is not None:
            return self._ruled(flow, before.seen, now, names)
        return ruling

    def first_bytes(self, flow: Flow, seen: Look, now: float) -> Ruling:
        """Decide once more about a flow with `Ruling.looks`, by what its client has said first.

        The name that it has asked for is now the only one, and none if our DNS has not given the address for it.
        """
        enforcer = self.of(flow.source.address.packed)
        ruling = enforcer._ruled(flow, seen, now)
        if ruling.rule is not None:
            enforcer.hits[ruling.rule] += 1
        return ruling

    def _ruled(self, flow: Flow, seen: Look | None, now: float, given: tuple[bytes, ...] = ()) -> Ruling:
        index = self._index
        if index is None:
            return UNGOVERNED
        try:
            ruling = self._decide(index, flow, seen, now, given)
            if ruling.action == "allow":
                return ruling
            if self.catch_up is not None and self.catch_up():
                ruling = self._decide(index, flow, seen, now, given)
        except KeyboardInterrupt:  # it is meant for the program
            raise
        except BaseException as error:
            if not self._culprit:
                self._culprit = self._find_culprit(index.policy, flow, now)
            self._failed(f"flows are refused: {self._culprit} failed to decide about {flow}", error)
            self.refused += 1
            return Ruling("deny", rule=self._culprit)
        if ruling.action == "deny":
            if index.policy.audit:
                self.audited += 1
                return ruling._replace(audit=True)
            self.refused += 1
        return ruling

    def _decide(
        self, index: Index, flow: Flow, seen: Look | None, now: float, given: tuple[bytes, ...]
    ) -> Ruling:
        address, port = flow.destination
        packed = address.packed
        plain = canonical(packed)
        names = self.pins.names(plain, now)
        own = self.own_names(packed)
        if own:
            names = own + names
        if given:
            names = (*(name for name in given if name not in names), *names)
        self._asked = address
        action, number, looks = index.flow(flow.protocol, plain, port, names, self._is_host)
        if looks and seen is not None:
            had = (*own, *given)
            names = tuple(name for name in seen.names if name in had or self.pins.has(name, plain, now))
            action, number, looks = index.flow(flow.protocol, plain, port, names, self._is_host)
            if looks and not _is_met(index.policy, number, seen):
                action = "deny"
            looks = False
        refusal, rule, targets = self._grounds.get(number) or self._ground(index.policy, number)
        return _made(Ruling, (action, refusal, rule, looks, False, seen, names, targets))

    def _ground(self, policy: Policy, number: int | None) -> _Ground:
        """Return what rulings by a rule have in common, and keep it."""
        rule = policy.rule(number)
        found = self._grounds[number] = rule.refusal, policy.label(number), rule.targets
        return found

    def _find_culprit(self, policy: Policy, flow: Flow, now: float) -> str:
        """Return the rule that fails to decide about a flow: the first with which the rules up to it fail."""
        packed = canonical(flow.destination.address.packed)
        names = self.pins.names(packed, now)

        def fails(number: int) -> bool:
            part = replace(policy, rules=policy.rules[: number + 1])
            try:
                part.index.flow(flow.protocol, packed, flow.destination.port, names, self._is_host)
            except Exception:
                return True
            return False

        number = bisect_left(range(len(policy.rules)), True, key=fails)
        return policy.label(number) if number < len(policy.rules) else "the policy"

    def stats(self) -> dict[str, int]:
        """Return the counters and gauges by name."""
        every = {self, *self._own.values()}
        return {
            "policy_refused": sum(each.refused for each in every),
            "policy_audited": sum(each.audited for each in every),
            "policy_pins": sum(len(each.pins) for each in every),
            "policy_pins_evicted": sum(each.pins.evicted for each in every),
        }

    def _is_host(self) -> bool:
        return is_host(self._subnet, self._asked, has_host=self.has_host)


class _GuardByClient:
    """A `Guard` that asks the guard of the client, if its policy is not the common one."""

    def __init__(self, enforcer: Enforcer) -> None:
        self._enforcer = enforcer

    def question(self, name: bytes, kind: int, client: bytes) -> Refused | None:
        guard = self._enforcer.of(client).own_guard
        return None if guard is None else guard.question(name, kind, client)

    def alias(self, name: bytes, kind: int, client: bytes) -> Refused | None:
        guard = self._enforcer.of(client).own_guard
        return None if guard is None else guard.alias(name, kind, client)

    def answer(
        self, question: bytes, message: bytes, now: float, client: bytes, *, ours: bool
    ) -> bytes | Refused:
        guard = self._enforcer.of(client).own_guard
        return message if guard is None else guard.answer(question, message, now, client, ours=ours)

    def names(self, name: bytes, address: bytes) -> bool:
        guard = self._enforcer.own_guard
        return guard is None or guard.names(name, address)


def is_host(subnet: Subnet, address: Address, *, has_host: bool = True) -> bool:
    """Return whether an address is the gateway's, or the host's own, which not every uplink leads to."""
    local = subnet.of(address)
    if local is not None and (address in local.gateways or address == local.dns):
        return True
    if not has_host:
        return False
    plain = ip_address(canonical(address.packed))
    return is_host_address(address) or (plain != address and is_host_address(plain))


def _nobody(_: object, *more: object) -> None:
    """Tell nobody."""


def ruling_of(flow: object) -> Ruling | None:
    """Return the ruling of a flow of the guest, or None if no policy has been asked about it.

    Args:
        flow: A `TcpConnection`, `UdpFlow` or `EchoFlow`, or a flow beside the stack, which has none.
    """
    found: Ruling | None = getattr(flow, "ruling", None)
    return found


def _is_met(policy: Policy, number: int | None, seen: Look) -> bool:
    """Return whether the first bytes are of a kind by which the rule lets a flow pass."""
    rule = policy.rule(number)
    return (seen.kind == "tls" and rule.sni) or (seen.kind == "http" and rule.host)
