"""UserStack: the user-mode stack as an object one enters."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import suppress
from itertools import count
from typing import Protocol, TypeVar

import anyio
from typing_extensions import Unpack

from . import arguments
from .arguments import Address, AddressLike
from .background import Openable, Supervisor
from .control import PATIENCE
from .dhcp import Lease, StaticLease
from .dns import Record, Zone
from .dns.names import to_text, to_wire
from .dns.records import as_text
from .errors import NetnsKitError, StackClosed, SysctlError
from .events import Events, FlowEvent
from .frozen import replace
from .gateway import FlowInfo, Gateway
from .leasing import Leasing
from .local import LocalStack
from .namespace import Namespace
from .setup import Setup, StackOptions, as_record
from .stats import Stats, complete
from .subnet import Subnet
from .tap import TapDevice
from .uplink import Uplink

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
    where that has none.  `sandbox` says what a worker has given up, layer by layer (see `netns_kit.sandbox`): "on",
    or why this host does not give it.  Closing resets what is open and closes every socket.

    The gateway has names at the DNS address without asking, those of `netns_kit.gateway.NAMES`:
    host.containers.internal is the host, if that is allowed.

    Args:
        tap: An open device.  If it lies in a namespace, that is configured, see `configure`.
        uplink: How flows leave.  A worker imports its policy, or a subclass of `Uplink`, by its name; they run in the
            sandbox, and are not seen to change from here.
        options: Settings, see `StackOptions`.

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

    @arguments.spelled_out(Setup.of)
    def __init__(self, tap: TapDevice, uplink: Uplink | None = None, **options: Unpack[StackOptions]) -> None:
        self.setup = Setup.of(tap, uplink, **options)
        self.tap = tap
        self.uplink = self.setup.uplink
        above = [] if tap.namespace is None else [tap.namespace.supervisor]
        self.supervisor = Supervisor(type(self).__name__, StackClosed, *above, one_loop=True)
        self.sandbox: Mapping[str, str] = {}
        self._runner: Runner | None = None
        self._news: dict[int, anyio.Event] = {}

    @property
    def subnet(self) -> Subnet:
        """Addresses of the namespace; once it is open, without IPv6 where the namespace has none."""
        return self.setup.subnet

    async def _open(self) -> None:
        self.uplink.check()
        await self._configure_namespace()
        self._runner = runner = self._start()
        self.supervisor.start(runner.run)
        await runner.ready()
        self.sandbox = runner.sandbox

    def __repr__(self) -> str:
        driver, condition = self.setup.driver, self.supervisor.condition
        return f"<UserStack on {self.tap.name}: {self.subnet}, driver={driver!r}: {condition}>"

    async def _configure_namespace(self) -> None:
        subnet, ipv6, configure = self.subnet, self.subnet.ipv6, self.setup.configure
        missing = None
        if self.tap.namespace is not None and configure:
            addressed = configure is True
            addressed6 = ipv6 if addressed else None
            missing = await self.tap.namespace.configure_link(
                self.tap.name,
                address=subnet.guest_interface if addressed else None,
                gateway=subnet.gateway if addressed else None,
                address6=None if addressed6 is None else addressed6.guest_interface,
                gateway6=None if addressed6 is None else addressed6.gateway,
                neighbours=subnet.neighbours if addressed else None,
            )
        if ipv6 is not None and self.tap.namespace is not None and configure is not True:
            missing = await _ipv6_missing(self.tap.namespace, self.tap.name)
        if ipv6 is not None:
            if missing is not None:
                self.setup = replace(self.setup, subnet=replace(subnet, ipv6=None))
                logger.warning("IPv4 only: the namespace has no IPv6: %s", missing)
            elif (missing := self.uplink.ipv6_missing()) is not None:
                logger.warning("IPv4 only: the host has no IPv6: %s", missing)

    def _start(self) -> Runner:
        if self.setup.driver == "worker":
            from .workers import Workers

            self.workers = Workers(self.setup, self._tell)
            return self.workers
        self.local = LocalStack(self.setup, self._tell)
        self.gateway = self.local.gateway
        return self.local

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.close()

    async def flows(self) -> tuple[FlowInfo, ...]:
        """Return the flows that are under way.  Raises `StackClosed`."""
        flows = await self.ask(Gateway.flows)
        names = await self._names(flows)
        if not names:
            return flows
        return tuple(replace(flow, name=flow.name or names.get(flow.remote.address)) for flow in flows)

    async def _names(self, flows: Iterable[FlowInfo]) -> Mapping[Address, str | None]:
        """What the first of several workers knows of the others' flows: it is the one that is asked for names."""
        unknown = tuple({flow.remote.address for flow in flows if flow.name is None})
        if len(self.tap.queues) == 1 or not unknown:
            return {}
        return dict(zip(unknown, await self.ask(Gateway.names, unknown), strict=True))

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
        return await self.ask(Gateway.end_flow, number)

    async def stats(self) -> Stats:
        """Return all gauges and counters of the stack, each of them always there.  Raises `StackClosed`."""
        return complete(await self.ask(Gateway.stats))

    async def leases(self) -> tuple[Lease, ...]:
        """The addresses that DHCP has given away, offered or put aside, or keeps for somebody."""
        return await self.ask(Leasing.leases)

    async def reserve(self, static: StaticLease) -> None:
        """Keep an address for one client, as `DhcpSettings.static` does from the start.

        A client that has the address, or another than the one now kept for it, is told when it renews its lease.
        Raises `AddressError` for an address that no client can have, `ArgumentTypeError` for what is no StaticLease.
        """
        fix = 'write it like StaticLease("10.0.2.50", mac="52:54:00:12:34:56")'
        arguments.instance("static", static, StaticLease, "a StaticLease", fix)
        await self.ask(Leasing.reserve, static)

    async def revoke(self, address: AddressLike) -> bool:
        """Take an address from who has it, and from whom it is kept for; whether there was anybody.

        DHCP cannot tell a client before it renews its lease.  Until then, or until the lease would have ended, nobody
        else gets the address.
        """
        return await self.ask(Leasing.revoke, arguments.address(address))

    async def add_record(self, record: str | Record) -> Record:
        """Answer for a name at the DNS address: `NAME=ADDRESS`, or a `Record` of any type.  What was added.

        From now on nobody else is asked about that name, and of an address its name is told in return.  Adding it
        again is fine.  Raises `RecordError` for what makes no sense, `StackClosed` when the stack is not open.
        """
        made = as_record(record)
        await self.ask(Zone.add, made)
        return made

    async def remove_record(self, name: str, *, type: str = "", value: AddressLike = "") -> None:
        """Answer no more for `name`, or no more with what is of that type and value.

        Raises `KeyError` if nothing like that was said, `RecordError` for what is no name, and `StackClosed` when the
        stack is not open.
        """
        wire_name = to_wire(name)  # here: a worker cannot import what a name in another script takes
        arguments.text("type", type, "the type of a record, like 'A'")
        if not await self.ask(Zone.remove, to_text(wire_name), type, as_text(value)):
            raise KeyError(name)

    async def records(self) -> tuple[Record, ...]:
        """What is answered at the DNS address for names of our own, oldest first.  Raises `StackClosed`."""
        return await self.ask(Zone.records)

    async def events(self) -> AsyncGenerator[FlowEvent, None]:
        """What happens to flows, from the first `anext` on, until the stack is closed.

        Who is slow loses the oldest of more than `EVENTS_KEPT` events, and is told how many.  To stop before the end,
        close it: `async with aclosing(stack.events()) as events`.  Raises the stack's failure, at once, and
        `StackClosed` before it is open and after it was closed.
        """
        number = next(_numbers)
        self._news[number] = anyio.Event()
        try:
            await self.ask(Events.subscribe, number)
            while True:
                try:
                    with self.supervisor.guarding():
                        await self._news[number].wait()
                    self._news[number] = anyio.Event()
                    events = await self.ask(Events.take, number)
                    names = await self._names(event.flow for event in events)
                except StackClosed:
                    return
                for event in events:
                    name = names.get(event.flow.remote.address)
                    yield event if name is None else replace(event, flow=replace(event.flow, name=name))
        finally:
            del self._news[number]
            with anyio.move_on_after(PATIENCE, shield=True), suppress(NetnsKitError):  # its end ends that too
                await self.ask(Events.unsubscribe, number)

    def _tell(self, number: int) -> None:
        if number in self._news:
            self._news[number].set()

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have the stack do an operation (see `netns_kit.operations`).  For parts of this library.

        Raises what it raises, what has ended the stack, and `StackClosed` when that is not open.
        """
        with self.supervisor.guarding():
            if self._runner is None:
                raise StackClosed("the stack is not open yet", fix="await its open() first")
            return await self._runner.ask(operation, *arguments)


async def _ipv6_missing(namespace: Namespace, name: str) -> str | None:
    """Why that interface has no IPv6, None if it may have."""
    knob = f"net/ipv6/conf/{name}/disable_ipv6"
    try:
        disabled = await namespace.get_sysctl(knob)
    except SysctlError:
        return "the kernel has none"
    return f"net.ipv6.conf.{name}.disable_ipv6 is 1" if disabled == "1" else None
