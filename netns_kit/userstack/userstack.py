"""UserStack: the user-mode stack as an object one enters."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import suppress
from ipaddress import IPv4Network
from itertools import count
from types import NoneType
from typing import Literal, Protocol, TypeVar, get_args

import anyio

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.dhcp import DEFAULT, DhcpSettings, Lease, StaticLease
from netns_kit.dns import Record
from netns_kit.dns.names import to_text, to_wire
from netns_kit.dns.records import as_text
from netns_kit.errors import AddressError, ArgumentError, NetnsKitError, NotFound, StackClosed, SysctlError
from netns_kit.frozen import replace
from netns_kit.gateway.gateway import FlowInfo
from netns_kit.gateway.leasing import check as check_dhcp
from netns_kit.gateway.stats import Stats, complete
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.namespace.namespace import Namespace
from netns_kit.stack import Limits
from netns_kit.subnet import DEFAULT_CIDR, SMALLEST_IPV6_MTU, Subnet, Subnet6
from netns_kit.tap.device import TapDevice
from netns_kit.tap.frame_device import Device, DeviceWrapper
from netns_kit.uplink.uplink import Uplink

from .control import PATIENCE, Control, FlowEvent
from .drivers import DriverName
from .in_process import LocalStack

Configure = bool | Literal["link"]
"""What entering does to the interface: all, nothing, or no more than to bring it up."""
SandboxLayer = Literal["core", "dumpable", "capabilities", "no_new_privs", "landlock", "seccomp"]
"""What a worker gives up before it reads a frame, see `netns_kit.userstack.worker.sandbox`."""

T = TypeVar("T")
logger = logging.getLogger(__name__)
_numbers = count()


class Runner(Protocol):
    """What runs the stack: a `LocalStack`, or `Workers`."""

    @property
    def sandbox(self) -> Mapping[str, str]: ...

    async def run(self) -> None: ...

    async def ready(self) -> None: ...

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T: ...

    async def close(self) -> None: ...


class UserStack(Openable):
    """A user-mode TCP/IP stack on a device, and the host's sockets behind it, for as long as it is open.

    Opening returns when the address is usable.  From then on `subnet` is what the namespace has: its `ipv6` is None
    where that has none.  `sandbox` says what a worker has given up, layer by layer (see
    `netns_kit.userstack.worker.sandbox`): "on", or why this host does not give it.  Closing resets what is open and
    closes every socket.

    The gateway has names at the DNS address without asking, those of `netns_kit.gateway.gateway.NAMES`:
    host.containers.internal is the host, if that is allowed.

    Args:
        tap: An open device.  If it lies in a namespace, that is configured, see `configure`.
        uplink: How flows leave.  A worker imports its policy, or a subclass of `Uplink`, by its name; they run in the
            sandbox, and are not seen to change from here.
        subnet: The addresses, as a CIDR, see `Subnet`.
        ipv6: Whether there is IPv6 too: True for the usual network, or a `Subnet6`.  A host or a namespace that has
            none is served with IPv4, and the log tells why.
        driver: Where the stack runs.  "thread": on a thread of its own.  "loop": on the caller's event loop.
            "worker": in a process of its own, which the caller's load does not slow, and which enters a sandbox
            before it reads the first frame.  A device with several queues has as many workers, which share the flows.
        configure: Whether the namespace gets the subnet's guest address, a default route and its loopback brought up.
            "link": interface and loopback are brought up and nothing more, for a DHCP client or the kernel's SLAAC.
        limits: The bounds of the stack's tables.
        dhcp: The settings of the DHCP server; None: there is none.
        require: Layers of the sandbox that are to be on, or else opening raises.
        records: What is answered at the DNS address from the start, see `UserStack.add_record`.

    Raises:
        AddressError: A bad subnet, an MTU that leaves no IPv6; on opening, an uplink with addresses that the host has
            not.
        ArgumentError: An unknown driver or layer; ArgumentTypeError: what has no such type.
        NotImportable: An uplink that a worker cannot have; already here.
        RecordError: Records that make no sense.
        SandboxUnavailable: On opening, a required layer that this host does not give.
        NetnsKitError, OSError: On opening, what configuring the namespace raises.

    If the stack fails, or its device goes away, every call raises that, those under way at once, and so does closing:
    `DeviceGone`, `NamespaceGone`, or `StackCrashed` for a bug and for a worker that has ended.
    """

    def __init__(
        self,
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
    ) -> None:
        fix = 'make one: TapDevice.open(namespace, "tap0")'
        arguments.instance("tap", tap, (TapDevice, DeviceWrapper), "a TapDevice", fix)
        arguments.instance("uplink", uplink, (Uplink, NoneType), "an Uplink, or None")
        arguments.one_of("driver", driver, get_args(DriverName))
        arguments.one_of("configure", configure, (True, False, "link"))
        arguments.instance("limits", limits, (Limits, NoneType), "a Limits, or None")
        arguments.instance("dhcp", dhcp, (DhcpSettings, NoneType), "a DhcpSettings, or None for no server")
        arguments.items("records", records, "a list of records")
        self.tap = tap
        above = [] if tap.namespace is None else [tap.namespace.supervisor]
        self.supervisor = Supervisor(type(self).__name__, StackClosed, *above, one_loop=True)
        self.uplink = uplink or Uplink()
        self.subnet = Subnet.parse(subnet, ipv6)
        if self.subnet.ipv6 is not None and tap.mtu < SMALLEST_IPV6_MTU:
            raise AddressError("IPv6 needs a larger MTU", "mtu", tap.mtu, f"use {SMALLEST_IPV6_MTU} or more")
        self.sandbox: Mapping[str, str] = {}
        self._driver = driver
        self._runner: Runner | None = None
        self._news: dict[int, anyio.Event] = {}
        self._configure = configure
        self._limits = limits
        self._dhcp = dhcp
        check_dhcp(dhcp, self.subnet)
        self._required = _required(driver, require)
        if len(tap.queues) > 1 and driver != "worker":
            raise ArgumentError(
                f"{len(tap.queues)} queues are for as many worker processes",
                "driver",
                repr(driver),
                'use driver="worker", or 1 queue',
            )
        self._records = [_record(each) for each in records]
        if driver == "worker":
            from .worker.owner import check

            check(self.uplink)

    async def _open(self) -> None:
        self.uplink.check()
        await self._configure_namespace()
        self._runner = runner = self._start()
        self.supervisor.start(runner.run)
        await runner.ready()
        self.sandbox = runner.sandbox
        for record in self._records:
            await self.add_record(record)

    def __repr__(self) -> str:
        return f"<UserStack on {self.tap.name}: {self.subnet}, driver={self._driver!r}: {self.supervisor.condition}>"

    async def _configure_namespace(self) -> None:
        subnet, ipv6 = self.subnet, self.subnet.ipv6
        missing = None
        if self.tap.namespace is not None and self._configure:
            addressed = self._configure is True
            addressed6 = ipv6 if addressed else None
            missing = await self.tap.namespace.configure_link(
                self.tap.name,
                address=subnet.guest_interface if addressed else None,
                gateway=subnet.gateway if addressed else None,
                address6=None if addressed6 is None else addressed6.guest_interface,
                gateway6=None if addressed6 is None else addressed6.gateway,
                neighbours=subnet.neighbours if addressed else None,
            )
        if ipv6 is not None and self.tap.namespace is not None and self._configure is not True:
            missing = await _ipv6_missing(self.tap.namespace, self.tap.name)
        if ipv6 is not None:
            if missing is not None:
                self.subnet = replace(subnet, ipv6=None)
                logger.warning("IPv4 only: the namespace has no IPv6: %s", missing)
            elif (missing := self.uplink.ipv6_missing()) is not None:
                logger.warning("IPv4 only: the host has no IPv6: %s", missing)

    def _start(self) -> Runner:
        parts = self.tap, self.uplink, self.subnet, self._limits, self._dhcp, self._tell
        if self._driver == "worker":
            from .worker.pool import Workers

            self.workers = Workers(*parts, required=self._required)
            return self.workers
        self.local = LocalStack(self._driver, *parts)
        self.gateway = self.local.gateway
        return self.local

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.close()

    async def flows(self) -> tuple[FlowInfo, ...]:
        """Return the flows that are under way.  Raises `StackClosed`."""
        flows = await self.ask(Control.flows)
        names = await self._names(flows)
        if not names:
            return flows
        return tuple(replace(flow, name=flow.name or names.get(flow.remote.address)) for flow in flows)

    async def _names(self, flows: Iterable[FlowInfo]) -> Mapping[Address, str | None]:
        """What the first of several workers knows of the others' flows: it is the one that is asked for names."""
        unknown = tuple({flow.remote.address for flow in flows if flow.name is None})
        if len(self.tap.queues) == 1 or not unknown:
            return {}
        return dict(zip(unknown, await self.ask(Control.names, unknown), strict=True))

    async def end_flow(self, number: int) -> bool:
        """End the flow that has this `FlowInfo.id`, at once; whether it was still there.

        A TCP connection is reset, towards the guest and towards the host's peer.  A UDP or ping flow is forgotten,
        and its socket closed if nothing else uses it; the guest's next datagram opens a new one, if the uplink lets
        it.

        Args:
            number: the id of one of `flows`, or of an event's flow.
        Raises:
            ArgumentTypeError: for what is no number.  StackClosed: outside the block.
        """
        arguments.instance("number", number, int, "the id of a FlowInfo, a whole number")
        return await self.ask(Control.end_flow, number)

    async def stats(self) -> Stats:
        """Return all gauges and counters of the stack, each of them always there.  Raises `StackClosed`."""
        return complete(await self.ask(Control.stats))

    async def leases(self) -> tuple[Lease, ...]:
        """The addresses that DHCP has given away, offered or put aside, or keeps for somebody."""
        return await self.ask(Control.leases)

    async def reserve(self, static: StaticLease) -> None:
        """Keep an address for one client, as `DhcpSettings.static` does from the start.

        A client that has the address, or another than the one now kept for it, is told when it renews its lease.
        Raises `AddressError` for an address that no client can have, `ArgumentTypeError` for what is no StaticLease.
        """
        fix = 'write it like StaticLease("10.0.2.50", mac="52:54:00:12:34:56")'
        arguments.instance("static", static, StaticLease, "a StaticLease", fix)
        await self.ask(Control.reserve_lease, static)

    async def revoke(self, address: AddressLike) -> bool:
        """Take an address from who has it, and from whom it is kept for; whether there was anybody.

        DHCP cannot tell a client before it renews its lease.  Until then, or until the lease would have ended, nobody
        else gets the address.
        """
        return await self.ask(Control.revoke_lease, arguments.address(address))

    async def add_record(self, record: str | Record) -> Record:
        """Answer for a name at the DNS address: `NAME=ADDRESS`, or a `Record` of any type.  What was added.

        From now on nobody else is asked about that name, and of an address its name is told in return.  Adding it
        again is fine.  Raises `RecordError` for what makes no sense, `StackClosed` when the stack is not open.
        """
        made = _record(record)
        await self.ask(Control.add_record, made)
        return made

    async def remove_record(self, name: str, *, type: str = "", value: AddressLike = "") -> None:
        """Answer no more for `name`, or no more with what is of that type and value.

        Raises `NotFound`, a KeyError, if nothing like that was said, `RecordError` for what is no name, and
        `StackClosed` when the stack is not open.
        """
        wire_name = to_wire(name)  # here: a worker cannot import what a name in another script takes
        arguments.text("type", type, "the type of a record, like 'A'")
        if not await self.ask(Control.remove_records, to_text(wire_name), type, as_text(value)):
            what = " ".join(str(each) for each in (name, type, value) if each != "")
            raise NotFound(f"there is no record of {what}", fix="`records` tells what there is")

    async def records(self) -> tuple[Record, ...]:
        """What is answered at the DNS address for names of our own, oldest first.  Raises `StackClosed`."""
        return await self.ask(Control.records)

    async def events(self) -> AsyncGenerator[FlowEvent, None]:
        """What happens to flows, from the first `anext` on, until the stack is closed.

        Who is slow loses the oldest of more than `EVENTS_KEPT` events, and is told how many.  To stop before the end,
        close it: `async with aclosing(stack.events()) as events`.  Raises the stack's failure, at once, and
        `StackClosed` before it is open and after it was closed.
        """
        number = next(_numbers)
        self._news[number] = anyio.Event()
        try:
            await self.ask(Control.subscribe, number)
            while True:
                try:
                    with self.supervisor.guarding():
                        await self._news[number].wait()
                    self._news[number] = anyio.Event()
                    events = await self.ask(Control.take_events, number)
                    names = await self._names(event.flow for event in events)
                except StackClosed:
                    return
                for event in events:
                    name = names.get(event.flow.remote.address)
                    yield event if name is None else replace(event, flow=replace(event.flow, name=name))
        finally:
            del self._news[number]
            with anyio.move_on_after(PATIENCE, shield=True), suppress(NetnsKitError):  # its end ends that too
                await self.ask(Control.unsubscribe, number)

    def _tell(self, number: int) -> None:
        if number in self._news:
            self._news[number].set()

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have the stack's `Control` do one of its operations.  For parts of this library.

        Raises what it raises, what has ended the stack, and `StackClosed` when that is not open.
        """
        with self.supervisor.guarding():
            if self._runner is None:
                raise StackClosed("the stack is not open yet", fix="await its open() first")
            return await self._runner.ask(operation, *arguments)


def _record(record: str | Record) -> Record:
    arguments.instance("record", record, (str, Record), "NAME=ADDRESS or a Record")
    return Record.parse(record) if isinstance(record, str) else record


async def _ipv6_missing(namespace: Namespace, name: str) -> str | None:
    """Why that interface has no IPv6, None if it may have."""
    knob = f"net/ipv6/conf/{name}/disable_ipv6"
    try:
        disabled = await namespace.get_sysctl(knob)
    except SysctlError:
        return "the kernel has none"
    return f"net.ipv6.conf.{name}.disable_ipv6 is 1" if disabled == "1" else None


def _required(driver: DriverName, layers: Iterable[SandboxLayer]) -> tuple[SandboxLayer, ...]:
    arguments.items("require", layers, "a list of layers")
    required = tuple(layers)
    for layer in required:
        arguments.one_of("require", layer, get_args(SandboxLayer))
        if driver != "worker":
            raise ArgumentError(
                "only a worker process has a sandbox", "driver", repr(driver), 'use driver="worker"'
            )
    return required
