"""Setup: the settings of a stack as one record, which is checked once and passed down whole.

`StackOptions` are the settings as callers give them.  `Setup.of` checks them.  Every part that runs a stack takes the
`Setup`: `UserStack`, the driver in this process, the pool of workers, each worker, and the `Gateway`.  A new setting
is added here, and used where it has its effect.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network
from socket import socket
from types import NoneType
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

from netns_kit import arguments
from netns_kit.dhcp import DEFAULT, DhcpSettings
from netns_kit.dns import Record
from netns_kit.errors import ArgumentError, ArgumentTypeError, DomainNameError, PolicyError
from netns_kit.frozen import field, frozen, replace
from netns_kit.stack import Limits
from netns_kit.subnet import DEFAULT_CIDR, SMALLEST_IPV6_MTU, Subnet, Subnet6
from netns_kit.tap.device import TapDevice
from netns_kit.tap.frame_device import Device, DeviceWrapper
from netns_kit.uplink.uplink import Uplink

from .leasing import check as check_dhcp

if TYPE_CHECKING:
    from netns_kit.policy.policy import Policy

    from .asking import OnFlow

LARGEST_TIMEOUT = 3600.0  # seconds that a flow may wait for an answer

DriverName = Literal["thread", "loop", "worker"]
"""Where a stack runs: on a thread of its own, on the caller's event loop, in a process of its own."""
Configure = bool | Literal["link"]
"""What opening a stack does to the interface: everything, nothing, or no more than to bring it up."""
SandboxLayer = Literal["core", "dumpable", "capabilities", "no_new_privs", "landlock", "seccomp"]
"""What a worker gives up before it reads a frame, see `netns_kit.userstack.worker.sandbox`."""


class StackOptions(TypedDict, total=False):
    """The settings of a stack, as keyword arguments of `UserStack` and `Network`."""

    subnet: str | IPv4Network
    """The IPv4 network, as a CIDR, see `Subnet`.  Default: 10.0.2.0/24."""
    ipv6: bool | Subnet6
    """IPv6 beside IPv4: True for the usual network, or a `Subnet6`.  Without IPv6 on the host or in the namespace,
    IPv4 alone is served, and the log says why.  Default: False."""
    driver: DriverName
    """The place where the stack runs.  "thread", the default: a thread of its own.  "loop": the caller's event loop.
    "worker": a process of its own, which the caller's load does not slow, and which enters a sandbox before it reads
    the first frame.  A device with several queues has as many workers, which share the flows."""
    configure: Configure
    """Changes to the interface on opening.  True, the default: it gets the subnet's guest address and a default
    route, and is brought up, as is the loopback.  "link": both are brought up and nothing more, for a DHCP client or
    the kernel's SLAAC.  False: nothing."""
    limits: Limits | None
    """Bounds of the stack's tables.  Default: those of `Limits`."""
    dhcp: DhcpSettings | None
    """Settings of the DHCP server; None: there is no server.  Default: those of `DhcpSettings`."""
    require: Iterable[SandboxLayer]
    """Layers of the worker's sandbox without which opening raises.  Default: none."""
    records: Iterable[str | Record]
    """Names that are answered at the DNS address from the start, see `UserStack.add_record`.  Default: none."""
    intercept_dns: bool
    """True: DNS (port 53) to any other address is answered as it is at the DNS address, by the same records, hook,
    cache and resolvers.  Programs with a resolver of their own get those answers too, and nothing is sent to the
    address that they ask.  The uplink's policy is asked about the DNS address then.  Default: False."""
    name: str | None
    """The namespace's own name at the DNS address, one more of `records`.  Default: none."""
    policy: Policy | None
    """The policy about flows and names.  If the uplink has a function as its policy, both must let a flow pass.
    Default: that of the uplink, see `Uplink`; if it has none, everything may pass."""
    on_flow: OnFlow | None
    """An async function that is asked about each flow for which the policy says "ask"; without a policy, about all.
    It is given a `FlowRequest`.  It returns True: the flow may pass; False: it is refused as its rule says; a
    `Refusal`: it is refused so; an `Endpoint`: it goes there instead, as the host sees it, and neither policy nor
    uplink is asked about that.  It runs on the caller's event loop with every driver, once for each flow and many at
    a time.  If it fails or returns anything else, the flow is refused, and the failure is logged.  Default: none."""
    on_flow_timeout: float
    """Seconds that a flow may wait for an answer; then it is refused.  Default: 30."""


@frozen
class Setup:
    """The settings of one stack, checked by `Setup.of`."""

    tap: Device
    uplink: Uplink
    subnet: Subnet
    driver: DriverName = "thread"
    configure: Configure = True
    limits: Limits = field(default_factory=Limits)
    dhcp: DhcpSettings | None = DEFAULT
    require: tuple[SandboxLayer, ...] = ()
    records: tuple[Record, ...] = ()
    intercept_dns: bool = False
    policy: Policy | None = None
    on_flow: OnFlow | None = None
    """The function that is asked about flows.  It stays in the process of the caller: a worker has None."""
    on_flow_timeout: float = 30.0
    asks: bool = False
    """Whether there is such a function."""
    supplies: tuple[tuple[socket, ...], ...] = ()
    """For each worker, or the one stack in this process: where the engine orders sockets of `Uplink.namespaces`."""
    supply: socket | None = None
    """Where the engine orders sockets of the namespace, see `netns_kit.gateway.inside`.  None: it has none."""

    @classmethod
    def of(
        cls,
        tap: Device,
        uplink: Uplink | None = None,
        *,
        subnet: str | IPv4Network = DEFAULT_CIDR,
        ipv6: bool | Subnet6 = False,
        driver: DriverName = "thread",
        configure: Configure = True,
        limits: Limits | None = None,
        dhcp: DhcpSettings | None = DEFAULT,
        require: Iterable[SandboxLayer] = (),
        records: Iterable[str | Record] = (),
        intercept_dns: bool = False,
        name: str | None = None,
        policy: Policy | None = None,
        on_flow: OnFlow | None = None,
        on_flow_timeout: float = 30.0,
    ) -> Setup:
        """Check the settings that a caller gives, and return them as a record.

        Raises:
            AddressError, ArgumentError, ArgumentTypeError, NotImportable, RecordError: As `UserStack` says.
        """
        fix = 'make one: TapDevice.open(namespace, "tap0")'
        arguments.instance("tap", tap, (TapDevice, DeviceWrapper), "a TapDevice", fix)
        arguments.instance("uplink", uplink, (Uplink, NoneType), "an Uplink, or None")
        network = Subnet.parse(subnet, ipv6)
        arguments.one_of("driver", driver, get_args(DriverName))
        arguments.one_of("configure", configure, (True, False, "link"))
        arguments.instance("limits", limits, (Limits, NoneType), "a Limits, or None")
        arguments.instance("dhcp", dhcp, (DhcpSettings, NoneType), "a DhcpSettings, or None for no server")
        arguments.items("require", require, "a list of layers")
        layers = tuple(require)
        for layer in layers:
            arguments.one_of("require", layer, get_args(SandboxLayer))
        arguments.items("records", records, "a list of records")
        arguments.boolean("intercept_dns", intercept_dns)
        uplink = uplink or Uplink()
        _check_on_flow(on_flow, on_flow_timeout)
        setup = cls(
            tap,
            uplink,
            network,
            driver,
            configure,
            limits or Limits(),
            dhcp,
            layers,
            (*_named(name, network), *map(as_record, records)),
            intercept_dns,
            _policy(policy, uplink, asks=on_flow is not None),
            on_flow,
            on_flow_timeout,
            on_flow is not None,
        )
        setup._check_together()
        return setup

    def without_ipv6(self) -> Setup:
        """Return these settings for a namespace without IPv6: without its subnet and records of its address."""
        ipv6 = self.subnet.ipv6
        kept = tuple(each for each in self.records if ipv6 is None or each.value != str(ipv6.guest))
        return replace(self, subnet=replace(self.subnet, ipv6=None), records=kept)

    def _check_together(self) -> None:
        """Check the settings that are valid alone, but perhaps not together."""
        tap, driver = self.tap, self.driver
        if tap.namespace is not None and tap.namespace in self.uplink.namespaces:
            raise ArgumentError(
                "expected another namespace than the device's: flows would leave to where they come from",
                "uplink",
                repr(self.uplink),
            )
        if self.subnet.ipv6 is not None and tap.mtu < SMALLEST_IPV6_MTU:
            raise ArgumentError(f"expected {SMALLEST_IPV6_MTU} or more for IPv6", "mtu", tap.mtu)
        check_dhcp(self.dhcp, self.subnet)
        if driver != "worker" and self.require:
            raise ArgumentError("expected 'worker', which alone has a sandbox", "driver", repr(driver))
        if driver != "worker" and len(tap.queues) > 1:
            raise ArgumentError(
                f"expected worker processes for {len(tap.queues)} queues",
                "driver",
                repr(driver),
                'use driver="worker", or 1 queue',
            )


def as_record(record: str | Record) -> Record:
    """Return a `Record` as it is, or the one that NAME=ADDRESS describes.

    Raises:
        RecordError: The text does not describe a record.
        ArgumentTypeError: It is neither text nor a `Record`.
    """
    arguments.instance("record", record, (str, Record), "NAME=ADDRESS or a Record")
    return Record.parse(record) if isinstance(record, str) else record


def _policy(policy: Policy | None, uplink: Uplink, *, asks: bool) -> Policy | None:
    """Return the policy of a stack: its own, or that of its uplink, or the one by which all flows are asked about."""
    for each in (policy, uplink.rules):
        if each is not None:
            check_policy(each, asks=asks)
    if policy is not None and uplink.rules is not None:
        raise ArgumentError(
            "expected one policy: the uplink has one too", "policy", arguments.shown(policy),
            "leave out that of Uplink(policy=...)",
        )  # fmt: skip
    rules = uplink.rules if policy is None else policy
    if rules is None and asks:
        from netns_kit.policy.policy import Policy  # without one, nobody has it

        rules = Policy.ask()
    return rules


def check_policy(policy: object, *, asks: bool) -> None:
    """Check that a policy is a `Policy` that this stack can enforce.

    Args:
        policy: What was given.
        asks: Whether the stack has a function to ask.

    Raises:
        ArgumentTypeError: It is something else, or of a class that is derived from it.
        PolicyError: It has a rule that asks, and there is nobody to ask.
    """
    from netns_kit.policy.policy import Policy  # without one, nobody has it

    fix = "give a function to Uplink(policy=...)"
    if not callable(policy):
        fix = "begin with Policy.deny() or Policy.allow()"
    arguments.instance("policy", policy, Policy, "a Policy, or None", fix)
    assert isinstance(policy, Policy)
    if type(policy) is not Policy:
        raise ArgumentTypeError(
            f"expected a Policy, not a {type(policy).__name__}: of a policy its rules and settings are enforced,"
            " and nothing that a class adds",
            "policy", arguments.shown(policy), "write it as rules of a Policy",
        )  # fmt: skip
    if not asks:
        numbers = [number for number, rule in enumerate(policy.rules) if rule.action == "ask"]
        if numbers or policy.default == "ask":
            rule = policy.label(numbers[0] if numbers else None)
            fix = "give the stack one: on_flow=..."
            raise PolicyError("expected a function to ask", "on_flow", repr(None), fix, rule)


def _check_on_flow(on_flow: object, timeout: object) -> None:
    """Check the settings of asking.

    Raises:
        ArgumentError: The time is out of range.
        ArgumentTypeError: The function is no async function, or the time no number.
    """
    expected = f"seconds, more than 0 and {LARGEST_TIMEOUT:g} at most"
    arguments.number("on_flow_timeout", timeout, expected, lambda value: 0 < value <= LARGEST_TIMEOUT)
    if on_flow is not None:
        from inspect import iscoroutinefunction  # it reads source, for which it knows all of Python's grammar

        if not iscoroutinefunction(on_flow) and not iscoroutinefunction(getattr(on_flow, "__call__", None)):  # noqa: B004
            fix = "write `async def on_flow(asked: FlowRequest) -> bool`"
            raise ArgumentTypeError(
                "expected an async function, or None", "on_flow", arguments.shown(on_flow), fix
            )


def _named(name: str | None, subnet: Subnet) -> list[Record]:
    """Return the records that give the guest's addresses a name.

    Raises:
        DomainNameError: The name is not a domain name.
    """
    if name is None:
        return []
    arguments.text("name", name, "a domain name, or None")
    if not name.strip("."):
        raise DomainNameError("expected a domain name, or None", "name", repr(name))
    return [Record(name, str(each.guest)) for each in subnet.families]
