"""Asking: flows that wait until the caller's function on_flow has answered.

    FlowRouter --hold--> Held flow --question--> the caller's event loop: on_flow(FlowRequest)
                             |                        |
       let on, or refused  <-+------- answer ---------+     or the time is over, or the guest has given up

Nothing of a flow leaves while it waits, and it has no socket.  The SYN of a connection stays on hold, so that a
kernel inside repeats it and a program there just waits.  Of UDP and pings the first `KEPT_MOST` datagrams are kept,
`KEPT_BYTES` at most, and go out in order after the answer; what comes beyond that is dropped.

It never fails open.  At most `HELD_MAX` flows wait; others are refused at once.  A flow that is not answered in time
is refused by a timer of the engine, whatever the caller's event loop does.  An answer counts only if the policy has
stayed the same, or the new one does not refuse the flow.

That function is never here: it runs on the caller's side (`netns_kit.userstack.answering`).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from netns_kit.arguments import Address
from netns_kit.frozen import frozen
from netns_kit.namespace.process_info import ProcessInfo
from netns_kit.operations import chained, operation, same
from netns_kit.stack import AnyFlow, Closed, EchoFlow, Refusal, Stack, TcpConnection, Transport, UdpFlow
from netns_kit.stack.user import NOBODY, PassiveUser
from netns_kit.stack.wire.ip import Packet
from netns_kit.uplink.flow import Endpoint, Flow, Target

from .enforcer import REFUSALS, Enforcer, Ruling
from .engine import Engine

if TYPE_CHECKING:
    from netns_kit.policy.policy import Policy

HELD_MAX = 256
KEPT_MOST = 8
KEPT_BYTES = 65536


@frozen
class FlowRequest:
    """A flow that the namespace wants to open, and that waits for an answer."""

    id: int
    """Number of this flow, see `FlowInfo.id`."""
    protocol: Transport
    """Transport of the flow."""
    guest: Endpoint
    """Address and port in the namespace.  The port of a ping is its identifier."""
    remote: Endpoint
    """Address and port that the program inside wants to reach."""
    name: str | None
    """Name of `remote`, if our DNS has told the namespace one that has this address."""
    rule: str | None
    """The policy's rule that asks, as text."""
    process: ProcessInfo | None = None
    """The process inside that opens the flow, if it could be found, see `Namespace.process_of`."""


FlowAnswer: TypeAlias = bool | Refusal | Endpoint
"""An answer of `on_flow`.  True: the flow may pass.  False: it is refused as its rule says.  A `Refusal`: it is
refused so.  An `Endpoint`: it goes there instead, as the host sees it."""
OnFlow: TypeAlias = Callable[[FlowRequest], Awaitable[FlowAnswer]]
"""A function that is asked about flows, see `StackOptions`."""


class Router(Protocol):
    """What lets the flows go on: a `FlowRouter`."""

    stack: Stack
    refused: int

    def proceed(self, opened: AnyFlow, flow: Flow, target: Target) -> Refusal | None:
        """Carry a flow to its target, or return how it is refused."""

    def refuse(self, connection: TcpConnection, why: Refusal) -> None:
        """Refuse a connection whose SYN is on hold, as its ruling says."""

    def flush(self) -> None:
        """Send the datagrams that wait for more of their kind."""

    def notice(self, text: str, error: BaseException | None = None) -> None:
        """Report a warning to people, each text up to its " about " once."""


class Keeper(Protocol):
    """What a `Held` flow belongs to."""

    @property
    def engine(self) -> Engine:
        """The engine of the gateway."""
        ...

    @property
    def router(self) -> Router:
        """What lets the flow go on."""
        ...

    def time_over(self, held: Held) -> None:
        """Refuse a flow, since its time is over."""
        ...

    def withdraw(self, held: Held) -> None:
        """Forget a flow that waits no more."""
        ...


class Asking:
    """The flows of one gateway that wait for an answer.

    Args:
        engine: The engine of the gateway.
        enforcer: What has decided that they wait.
        router: What lets them go on.

    Attributes:
        timeout: Seconds that a flow may wait; None: nobody answers, and what is to be asked about is refused.
        tell: Called with the number of a subscriber that has something to `take`.
        name_of: Returns the name of an address, if it is known.
    """

    def __init__(self, engine: Engine, enforcer: Enforcer, router: Router) -> None:
        self.engine = engine
        self.router = router
        self._enforcer = enforcer
        self.timeout: float | None = None
        self.tell: Callable[[int], None] = _nobody
        self.name_of: Callable[[Address], str | None] = _unnamed
        self._held: dict[int, Held] = {}
        self._untold: dict[int, FlowRequest] = {}  # questions that the caller has not taken
        self._withdrawn: list[int] = []  # flows that do not wait any more, of questions that it has
        self._subscriber: int | None = None

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, opened: AnyFlow, flow: Flow, target: Target, ruling: Ruling) -> Refusal | None:
        """Have a flow wait, or return how it is refused.

        Args:
            opened: The flow.
            flow: The same, as the uplink was asked about it.
            target: Where it goes if the answer is True.
            ruling: What the policy says of it: to ask.
        """
        if self.timeout is None or len(self._held) >= HELD_MAX:
            self._enforcer.refused += 1  # the router counts it too
            if self.timeout is not None:
                self.router.notice(f"flows are refused: {HELD_MAX} wait for on_flow already")
            return REFUSALS[ruling.refusal]
        kind = HeldConnection if isinstance(opened, TcpConnection) else HeldDatagrams
        held = kind(self, opened, flow, target, ruling, self._enforcer.policy_of(flow))
        opened.user = self._held[opened.id] = held
        self.engine.timers.arm(held, self.engine.now + self.timeout)
        name = ruling.name_or(self.name_of(flow.destination.address))
        self._untold[opened.id] = FlowRequest(
            opened.id, flow.protocol, flow.source, flow.destination, name, ruling.rule
        )
        self._news()
        return None

    # -- what the caller's side asks ------------------------------------------------------------------

    @operation(same)
    def listen(self, number: int) -> None:
        """Tell the subscriber `number` whenever there is something to `take`."""
        self._subscriber = number
        if self._untold:
            self.tell(number)

    @operation(chained)
    def take(self) -> tuple[FlowRequest | int, ...]:
        """Return the flows that wait since the last call, and the ids of earlier ones that do not wait any more."""
        taken: tuple[FlowRequest | int, ...] = (*self._withdrawn, *self._untold.values())
        self._withdrawn.clear()
        self._untold.clear()
        return taken

    @operation(any)
    def answer(self, number: int, answer: bool | Refusal | Endpoint) -> bool:
        """Answer for the flow with that id.  Return whether it was waiting."""
        held = self._held.get(number)
        if held is None:
            return False
        if held.timer_at <= self.engine.now:  # the event loop was blocked, and the engine with it
            self.time_over(held)
            return False
        self._release(held)
        ruling, opened = held.ruling, held.opened
        if held.policy is not self._enforcer.policy_of(held.flow):  # it has changed meanwhile
            ruling = self._enforcer.flow(held.flow, self.engine.now)
        if answer is False or (ruling.refuses and ruling.action == "deny"):
            self._refuse(held, ruling, REFUSALS[ruling.refusal])
        elif isinstance(answer, Refusal):
            self._refuse(held, ruling._replace(refusal="prohibited"), answer)
        else:
            opened.ruling = ruling._replace(action="allow")
            why = self.router.proceed(
                opened, held.flow, Target((answer,)) if answer is not True else held.target
            )
            if why is None:
                held.pass_on()
            else:
                held.refuse(why)
        return True

    def close(self) -> None:
        """Tell nobody any more, since the engine is being closed."""
        self._subscriber = None

    # -- the end of waiting ---------------------------------------------------------------------------

    def time_over(self, held: Held) -> None:
        """Refuse a flow that nobody has answered for."""
        self.withdraw(held)
        what = f"{held.flow.protocol} to {held.flow.destination}"
        self.router.notice(
            f"flows are refused: {held.ruling.rule}: on_flow has not answered within {self.timeout:g} s about {what}"
        )
        self._refuse(held, held.ruling, REFUSALS[held.ruling.refusal])

    def withdraw(self, held: Held) -> None:
        """Forget a flow that waits no more, and tell the caller's side so if it knows of the flow."""
        self._release(held)
        if self._untold.pop(held.opened.id, None) is None:
            self._withdrawn.append(held.opened.id)
            self._news()

    def _refuse(self, held: Held, ruling: Ruling, why: Refusal) -> None:
        held.opened.ruling = ruling
        self.router.refused += 1
        if ruling.action != "deny" or ruling.audit:  # else the enforcer has counted it
            self._enforcer.refused += 1
        held.refuse(why)

    def _release(self, held: Held) -> None:
        held.timer_at = math.inf
        del self._held[held.opened.id]

    def _news(self) -> None:
        if self._subscriber is not None and len(self._untold) + len(self._withdrawn) == 1:
            self.tell(self._subscriber)


class Held:
    """A flow that waits: its user meanwhile.

    Args:
        asking: What it is to be told of.
        opened: The flow.
        flow: The same, as the uplink was asked about it.
        target: Where it goes if it may.
        ruling: What the policy has said of it.
        policy: The policy that has said so.
    """

    __slots__ = ("_asking", "flow", "opened", "policy", "ruling", "target", "timer_at", "timer_entry")

    def __init__(
        self, asking: Keeper, opened: Any, flow: Flow, target: Target, ruling: Ruling, policy: Policy | None
    ) -> None:
        self._asking = asking
        self.opened = opened
        self.flow = flow
        self.target = target
        self.ruling = ruling
        self.policy = policy
        self.timer_at = self.timer_entry = math.inf

    def handle_timer(self, _: float) -> None:
        """Refuse the flow: its time is over."""
        self._asking.time_over(self)

    def refuse(self, why: Refusal) -> None:
        """End the flow, and tell the guest how it is refused."""
        raise NotImplementedError

    def pass_on(self) -> None:
        """Hand on what was kept to the flow's new user."""


class HeldConnection(Held, PassiveUser):
    """A connection whose SYN is on hold.  Of a `TcpUser`'s methods only `closed` is called."""

    __slots__ = ()

    opened: TcpConnection

    def closed(self, why: Closed) -> None:
        """Forget the connection: the guest has given it up, or the stack is being closed."""
        self._asking.withdraw(self)

    def refuse(self, why: Refusal) -> None:
        """End the flow, and tell the guest how it is refused."""
        self._asking.router.refuse(self.opened, why)

    def deliver(self, data: memoryview) -> int:
        return 0

    def urgent(self, data: memoryview) -> int:
        return 0


class HeldDatagrams(Held):
    """A UDP or ping flow, with its first datagrams."""

    __slots__ = ("_kept", "_room")

    opened: UdpFlow | EchoFlow

    def __init__(
        self, asking: Keeper, opened: Any, flow: Flow, target: Target, ruling: Ruling, policy: Policy | None
    ) -> None:
        super().__init__(asking, opened, flow, target, ruling, policy)
        self._kept: list[tuple[Any, ...]] = []  # the arguments of the calls of the user, but for the flow
        self._room = KEPT_BYTES

    def datagram(self, flow: UdpFlow, payload: memoryview, marks: int, segment_size: int) -> None:
        """Keep a datagram."""
        if self._has_room(payload):
            self._kept.append((memoryview(bytes(payload)), marks, segment_size))

    def echo(self, flow: EchoFlow, sequence: int, payload: memoryview, packet: Packet) -> None:
        """Keep an echo request."""
        if self._has_room(payload):
            data = memoryview(bytes(payload))
            kept = Packet(
                packet.family, packet.addresses, packet.protocol, data, data, packet.ttl, packet.tos
            )
            kept.dont_fragment = packet.dont_fragment
            self._kept.append((sequence, data, kept))

    def _forget(self) -> None:
        """Forget the datagrams, since the waiting is over: the timers have this object for longer."""
        self._kept.clear()

    def _has_room(self, payload: memoryview) -> bool:
        self.opened.last = self.timer_at  # it is not idle while it waits
        if len(self._kept) < KEPT_MOST and len(payload) <= self._room:
            self._room -= len(payload)
            return True
        self._asking.router.stack.dropped["limit-held"] += 1
        return False

    def expired(self, flow: UdpFlow | EchoFlow) -> None:
        """Forget the flow, which was ended or has made room."""
        self._forget()
        self._asking.withdraw(self)

    def refuse(self, why: Refusal) -> None:
        """End the flow, and tell the guest how it is refused."""
        opened = self.opened
        opened.user = NOBODY
        opened.turn_away(why)
        if isinstance(opened, UdpFlow):
            for payload, _, size in self._kept[:1]:
                opened.refuse(why, payload[:size] if size else payload)
        else:
            for sequence, payload, _ in self._kept[:1]:
                opened.refuse(why, sequence, payload)
        self._forget()

    def pass_on(self) -> None:
        """Hand on what was kept to the flow's new user."""
        opened = self.opened
        opened.last = self._asking.engine.now
        while self._kept:
            user: Any = opened.user
            (user.datagram if isinstance(opened, UdpFlow) else user.echo)(opened, *self._kept.pop(0))
        self._asking.router.flush()


def _nobody(_: int) -> None:
    """Tell nobody."""


def _unnamed(_: Address) -> None:
    """Return no name."""
