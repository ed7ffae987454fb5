"""UserStack: the user-mode stack as an object to open and close."""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol, TextIO, TypeVar, cast

import anyio
from typing_extensions import Self, Unpack

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.child.channel import send_record
from netns_kit.child.codec import dump
from netns_kit.child.supply import PASSED
from netns_kit.dhcp import Lease, StaticLease
from netns_kit.display.displayed import Displayed
from netns_kit.dns import Record, Zone
from netns_kit.dns.records import as_text
from netns_kit.domain_names import to_text, to_wire
from netns_kit.errors import (
    ArgumentError,
    ArgumentTypeError,
    FeatureUnavailable,
    NetnsKitError,
    NotFound,
    StackClosed,
    SysctlError,
)
from netns_kit.forwarder.forwarder import CLOSING_SECONDS
from netns_kit.frozen import replace
from netns_kit.gateway.asking import FlowRequest, OnFlow
from netns_kit.gateway.gateway import FlowInfo, Gateway
from netns_kit.gateway.leasing import Leasing
from netns_kit.gateway.setup import Setup, StackOptions, as_record, check_policy
from netns_kit.gateway.stats import Stats, complete
from netns_kit.namespace.background import Openable, Supervisor, finish
from netns_kit.namespace.namespace import Namespace
from netns_kit.namespace.process_info import ProcessInfo
from netns_kit.operations import Asked
from netns_kit.subnet import Subnet
from netns_kit.tap.frame_device import Device
from netns_kit.uplink.in_memory import InMemoryUplink
from netns_kit.uplink.uplink import Uplink

from .answers import Counted, Flows
from .capture import Capture, CaptureOptions
from .event_log import EventLog
from .events import Event, Events, FlowEvent, under_way
from .in_process import LocalStack

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from netns_kit.display.view import View
    from netns_kit.gateway.faults import FaultOptions, Faults
    from netns_kit.policy.hits import PolicyHits
    from netns_kit.policy.policy import Policy
    from netns_kit.policy.rules import Rule, RulePorts, RuleTarget

    from .faults import FaultsBlock
    from .guest_streams import GuestStream, TcpGuestHandler, UdpGuestHandler
    from .interception import Interceptor, TcpInterceptHandler, UdpInterceptHandler
    from .serving import GuestServer, Servers, World

T = TypeVar("T")
logger = logging.getLogger(__name__)
_numbers = count()
_PAUSE = 1e-3  # seconds before a socket is passed again


class Runner(Asked, Protocol):
    """A place where the stack runs: a `LocalStack`, or `Workers`."""

    @property
    def sandbox(self) -> Mapping[str, str]: ...

    async def run(self) -> None: ...

    async def ready(self) -> None: ...

    async def close(self) -> None: ...


class Settable(Protocol):
    """What a subscriber is told by that there is something to take."""

    def set(self) -> object: ...


class UserStack(Displayed, Openable):
    """A user-mode TCP/IP stack on a device, and the host's sockets behind it, while the object is open.

    Opening returns when the address is usable.  Closing resets the open connections, and closes every socket.

    The gateway's names are answered at the DNS address, see `netns_kit.gateway.gateway.NAMES`:
    host.containers.internal is the host, if its loopback is allowed.

    If the stack fails, or its device vanishes, every call raises that, those under way at once, and so does closing:
    `DeviceGone`, `NamespaceGone`, or `StackCrashed` for a bug and for a worker that has ended.

    Args:
        tap: An open device.  If it is in a namespace, that is configured, see `StackOptions`.
        uplink: The way out for flows; None: an `Uplink` without options.  A worker imports its policy, or a subclass
            of `Uplink`, by name, runs it in the sandbox, and sees no later change of it.
        options: The settings, see `StackOptions`.

    Raises:
        ArgumentError: An argument that cannot be used, or not together with another.
        ArgumentTypeError: An argument of another type.
        AddressError: A subnet or an address that cannot be used; on opening, an uplink's address that the host lacks.
        DomainNameError, RecordError: A name or a record that makes no sense.
        NotImportable: An uplink that a worker cannot have.
        SandboxUnavailable: On opening, a required layer that this host does not give.
        NetnsKitError, OSError: On opening, what configuring the namespace raises.
    """

    sandbox: Mapping[str, str] = {}
    """The layers of the worker's sandbox (see `netns_kit.userstack.worker.sandbox`): "on", or why this host does not
    give one."""

    tap: Device
    """The device."""
    uplink: Uplink
    """The way out for flows."""
    policy: Policy | None
    """The policy that was set last; None: there is none."""

    @arguments.spelled_out(Setup.of)
    def __init__(self, tap: Device, uplink: Uplink | None = None, **options: Unpack[StackOptions]) -> None:
        self.setup = Setup.of(tap, uplink, **options)
        if self.setup.driver == "worker":
            from .worker.policy_check import check

            check(self.setup.uplink)
        self.tap = tap
        self.uplink = self.setup.uplink
        self.policy = self.setup.policy
        above = [] if tap.namespace is None else [tap.namespace.supervisor]
        self.supervisor = Supervisor(type(self).__name__, StackClosed, *above, one_loop=True)
        self.guests: dict[Address, Namespace] = {}
        """Namespaces by their addresses, but for the one of the device; for parts of this library."""
        self.guest_names: dict[Address, str] = {}
        """Names of guests by their addresses, for those who look at flows; for parts of this library."""
        self._looked: tuple[Stats, float] | None = None  # at the stats, and when
        self._setting_policy = anyio.Lock()
        self._runner: Runner | None = None
        self._passing: socket.socket | None = None
        self._news: dict[int, Settable] = {}
        self._servers: Servers | None = None  # once there are such

    @property
    def subnet(self) -> Subnet:
        """The addresses of the namespace.  On opening, `ipv6` becomes None if the namespace has no IPv6."""
        return self.setup.subnet

    async def _open(self) -> None:
        self.uplink.check()
        await self._configure_namespace()
        with ExitStack() as ours:
            if self.tap.namespace is not None:
                supply, self._passing = await self.tap.namespace.supply_sockets()
                self.setup = replace(self.setup, supply=ours.enter_context(supply))
            if self.uplink.namespaces:
                self.setup = replace(self.setup, supplies=await self._supplies(ours))
            self._runner = runner = self._start()
            if self.setup.driver != "worker":  # which has a copy
                ours.pop_all()
        self.supervisor.start(runner.run)
        if self.setup.on_flow is not None:
            self._start_answering(self.setup.on_flow)
        await runner.ready()
        self.sandbox = runner.sandbox
        if isinstance(self.uplink, InMemoryUplink):
            await self._start_serving().attach(cast("World", self.uplink.world))

    def __repr__(self) -> str:
        driver, condition = self.setup.driver, self.supervisor.condition
        return f"<UserStack on {self.tap.name}: {self.subnet}, driver={driver!r}: {condition}>"

    def _view(self) -> View:
        from .display import stack_view

        return stack_view(self)

    async def _supplies(self, ours: ExitStack) -> tuple[tuple[socket.socket, ...], ...]:
        """Return what `Setup.supplies` is to be.

        Raises:
            NamespaceGone: A namespace of the uplink has ended, or is not open.
        """
        supplies: list[tuple[socket.socket, ...]] = []
        for _ in self.tap.queues if self.setup.driver == "worker" else (None,):
            made: list[socket.socket] = []
            for namespace in self.uplink.namespaces:
                supply, agents = await namespace.supply_sockets()
                made.append(ours.enter_context(supply))
                agents.close()  # so that its end is seen
            supplies.append(tuple(made))
        return tuple(supplies)

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
                self.setup = self.setup.without_ipv6()
                logger.warning("IPv4 only: the namespace has no IPv6: %s", missing)
            elif (missing := self.uplink.ipv6_missing()) is not None:
                logger.warning("IPv4 only: the host has no IPv6: %s", missing)

    def _start(self) -> Runner:
        if self.setup.driver == "worker":
            from .worker.pool import Workers

            self.workers = Workers(self.setup, self._tell)
            return self.workers
        self.local = LocalStack(self.setup, self._tell)
        self.gateway = self.local.gateway
        return self.local

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.close()
        if self._servers is not None:
            self._servers.close()
        if self._passing is not None:
            self._passing.close()

    async def flows(self) -> Flows:
        """Return the flows that are under way, a tuple of `FlowInfo`.

        Raises:
            StackClosed: The stack is not open.

        Cancellation: Nothing is changed.
        """
        flows = await self.ask(Gateway.flows)
        names = await self._names(flows)
        if names:
            flows = tuple(replace(flow, name=flow.name or names.get(flow.remote.address)) for flow in flows)
        return Flows.of(flows, dict(self.guest_names))

    async def _names(self, flows: Iterable[FlowInfo | FlowRequest]) -> Mapping[Address, str | None]:
        """Return the names of remote addresses.  The first of several workers knows them for all flows."""
        unknown = tuple({flow.remote.address for flow in flows if flow.name is None})
        if len(self.tap.queues) == 1 or not unknown:
            return {}
        return dict(zip(unknown, await self.ask(Gateway.names, unknown), strict=True))

    async def end_flow(self, number: int) -> bool:
        """End a flow at once, and return whether it was there.

        A TCP connection is reset, towards the guest and towards the host's peer.  A UDP or ping flow is forgotten,
        and its socket closed if no other flow uses it; the guest's next datagram opens a new flow, if the uplink
        allows it.

        Args:
            number: The `FlowInfo.id` of the flow.

        Raises:
            ArgumentTypeError: The argument is no whole number.
            StackClosed: The stack is not open.

        Cancellation: The flow may have been ended.
        """
        arguments.instance("number", number, int, "the id of a FlowInfo, a whole number")
        return await self.ask(Gateway.end_flow, number)

    async def set_policy(self, policy: Policy | None, existing: Literal["keep", "cut"] = "keep") -> None:
        """Let another policy decide from now on.

        There is no gap: each flow is decided by the old policy or by the new one.  When this returns, all are decided
        by the new one.  If it fails, the old one stays.  Names that were resolved under the old policy still have
        their addresses, for as long as their answers last.

        Args:
            policy: The policy; None: everything may pass that the uplink lets pass.
            existing: What becomes of flows that the namespace has opened before.  "keep": they go on.  "cut": each is
                decided again, and ended if it may not pass; a connection is reset on both sides.  Flows that the new
                policy would ask about, or look into, end too, since that cannot be made up for.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
            PolicyError: A rule asks, and the stack has no `on_flow`.
            StackClosed: The stack is not open.

        Cancellation: It takes effect when the policy is set.
        """
        arguments.one_of("existing", existing, ("keep", "cut"))
        text = None
        if policy is not None:
            check_policy(policy, asks=self.setup.asks)
            text = dump(policy).decode()

        async def change() -> None:
            async with self._setting_policy:  # answers to several calls at once may be seen in any order
                await self.ask(Gateway.set_policy, text, existing)
                self.policy = policy

        await finish(change)

    async def stats(self) -> Stats:
        """Return all gauges and counters of the stack; none is ever left out.

        A notebook, and `print`, show those that are not 0, beside what has changed since the last call.

        Raises:
            StackClosed: The stack is not open.

        Cancellation: Nothing is changed.
        """
        stats, now = complete(await self.ask(Gateway.stats)), anyio.current_time()
        before, then = self._looked or (None, now)
        self._looked = stats, now
        return cast("Stats", Counted(stats, before, now - then))

    async def policy_hits(self) -> PolicyHits | None:
        """Return how often each rule of the policy has decided since it was set; None: there is no policy.

        Raises:
            StackClosed: The stack is not open.

        Cancellation: Nothing is changed.
        """
        return await self.hits_of(self.policy, self.subnet.guest)

    async def hits_of(self, policy: Policy | None, guest: AddressLike) -> PolicyHits | None:
        """Return what `policy_hits` does, of the policy that decides about a guest; for parts of this library.

        Args:
            policy: The policy.
            guest: The address of the guest.

        Raises:
            AddressError, ArgumentTypeError: The argument is no address.
            StackClosed: The stack is not open.

        Cancellation: Nothing is changed.
        """
        counted = await self.ask(Gateway.policy_hits, arguments.address(guest))
        if policy is None:
            return None
        from netns_kit.policy.hits import PolicyHits  # with no policy nobody has it

        return PolicyHits.of(policy, counted)

    async def leases(self) -> tuple[Lease, ...]:
        """Return the addresses that DHCP has given away, offered, put aside, or keeps for a client.

        Raises:
            StackClosed: The stack is not open.

        Cancellation: Nothing is changed.
        """
        return await self.ask(Leasing.leases)

    async def reserve(self, static: StaticLease) -> None:
        """Set an address aside for one client, as `DhcpSettings.static` does from the start.

        A client that has this address, or another address than the one reserved for it, learns that when it renews
        its lease.

        Args:
            static: The address, and its client.

        Raises:
            AddressError: No client can have the address.
            ArgumentTypeError: The argument is no StaticLease.
            StackClosed: The stack is not open.

        Cancellation: The address may have been reserved.
        """
        fix = 'write it like StaticLease("10.0.2.50", mac="52:54:00:12:34:56")'
        arguments.instance("static", static, StaticLease, "a StaticLease", fix)
        await self.ask(Leasing.reserve, static)

    async def revoke(self, address: AddressLike) -> bool:
        """Take an address from the client that has it or that it is reserved for, and return whether there was one.

        DHCP cannot tell a client before it renews its lease.  Until then, or until the lease would have ended, no
        other client gets the address.

        Args:
            address: The address.

        Raises:
            AddressError, ArgumentTypeError: The argument is no address.
            StackClosed: The stack is not open.

        Cancellation: The address may have been revoked.
        """
        return await self.ask(Leasing.revoke, arguments.address(address))

    async def add_record(self, record: str | Record) -> Record:
        """Answer for a name at the DNS address, and return the record that does so.

        From now on no resolver is asked about the name.  The reverse name of an address is answered too.  A record
        that is there already may be added again.

        Args:
            record: Text like NAME=ADDRESS, or a `Record` of any type.

        Raises:
            DomainNameError, RecordError: The record makes no sense.
            ArgumentTypeError: The argument is neither text nor a Record.
            StackClosed: The stack is not open.

        Cancellation: The record may have been added.
        """
        made = as_record(record)
        await self.ask(Zone.add, made)
        return made

    async def remove_record(self, name: str, *, type: str = "", value: AddressLike = "") -> None:
        """Remove the records of a name, all or only those of one type or value.

        Args:
            name: The name.
            type: The type of the records, like "A"; empty: any.
            value: The value of the records, as `Record.value`; empty: any.

        Raises:
            NotFound: There is no such record; it is a KeyError.
            DomainNameError: The name is none.
            ArgumentTypeError: An argument of another type.
            StackClosed: The stack is not open.

        Cancellation: The records may have been removed.
        """
        wire_name = to_wire(name)  # not in a worker, which cannot import the module for other scripts
        arguments.text("type", type, "the type of a record, like 'A'")
        if not await self.ask(Zone.remove, to_text(wire_name), type, as_text(value)):
            what = " ".join(str(each) for each in (name, type, value) if each != "")
            raise NotFound(f"there is no record of {what}", fix="`records` tells what there is")

    async def records(self) -> tuple[Record, ...]:
        """Return the records that are answered at the DNS address, oldest first.

        Raises:
            StackClosed: The stack is not open.

        Cancellation: Nothing is changed.
        """
        return await self.ask(Zone.records)

    async def serve_tcp(
        self, address: AddressLike | None, port: int, handler: TcpGuestHandler
    ) -> GuestServer:
        """Answer the connections that the namespace opens to an address and port, by a function of the caller's.

        No socket of the host is used, and nothing leaves.  The uplink's function, if its policy is one, is told of
        each connection by `Flow.served`, and may refuse it.

        Args:
            address: Any address that the namespace can send to, also the gateway's; None: every one that has no
                handler of its own for the port.
            port: The port.
            handler: An async function, called with a `GuestStream` for each connection, many at a time.  When it
                returns, the connection is closed.  If it raises, the connection is reset, and the error logged.

        Returns:
            The server, which answers until its `aclose`: `async with await stack.serve_tcp(...)`.

        Raises:
            AddressError: The namespace sends nothing to that address.
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
            PortInUseError: The address and port have a handler.
            StackClosed: The stack is not open.

        Cancellation: Nothing is served, or the call completes.
        """
        return await self._serve("tcp", address, port, handler)

    async def serve_udp(
        self, address: AddressLike | None, port: int, handler: UdpGuestHandler
    ) -> GuestServer:
        """Answer the datagrams that the namespace sends to an address and port, by a function of the caller's.

        Args:
            address: As for `serve_tcp`.
            port: The port.
            handler: An async function, called with a `GuestDatagrams` for each flow, many at a time.  When it returns
                or raises, the flow is forgotten, and the next datagram opens a new one.

        Raises:
            AddressError, ArgumentError, ArgumentTypeError, PortInUseError, StackClosed: As for `serve_tcp`.

        Cancellation: Nothing is served, or the call completes.
        """
        return await self._serve("udp", address, port, handler)

    async def intercept(
        self,
        targets: RuleTarget | Iterable[RuleTarget] | Rule,
        handler: TcpInterceptHandler | UdpInterceptHandler,
        *,
        ports: RulePorts | None = None,
        protocol: Literal["tcp", "udp"] | None = None,
    ) -> Interceptor:
        """Give the flows that the namespace opens to some targets to a function of the caller's, before they leave.

        The uplink and the policy are asked first, and what they refuse never gets here.  An address that
        `serve_tcp` or `serve_udp` answers is not intercepted, and neither is our DNS.  Of several rules the first
        that was given counts.

        A name is what our DNS has answered with the address.  A program that comes by an address in another way gets
        past: let a policy allow the names alone, or intercept a port of every address and look at the first bytes.

        Args:
            targets: What is intercepted, as `Policy.allow` has it: domain names, networks, presets; an empty list for
                everything.  Or a `Rule`, whose action does not matter.
            handler: An async function.  It is called with an `InterceptedStream` for each connection, or with
                `InterceptedDatagrams` for each UDP flow, many at a time.  When it returns, the connection is closed,
                unless it was joined.  If it raises what `InterceptedStream.connect_upstream` has raised, the guest is
                refused in the same way; if it raises something else, the connection is reset, and the error logged.
            ports: The ports; None: all.
            protocol: "udp" for UDP flows; "tcp", the default, for connections.

        Returns:
            The interceptor, which works until its `aclose`: `async with await stack.intercept(...)`.

        Raises:
            PolicyError: A target or a port that cannot be used.
            ArgumentError, ArgumentTypeError: Another argument that cannot be used.
            StackClosed: The stack is not open.

        Cancellation: Nothing is intercepted, or the call completes.
        """
        from netns_kit.policy.rules import Rule, several  # few need this and the next

        from .interception import intercept

        arguments.one_of("protocol", protocol, ("tcp", "udp", None))
        if isinstance(targets, Rule):
            given, ports, protocol = targets.targets, ports or targets.ports, protocol or _carried(targets)
            rule = Rule("allow", given, ports or None, protocol or "tcp")
        else:
            rule = Rule("allow", several(targets), ports, protocol or "tcp")
        check_handler(handler)
        return await intercept(self._serving(), rule, handler)

    async def _serve(
        self, transport: Literal["tcp", "udp"], address: AddressLike | None, port: int, handler: object
    ) -> GuestServer:
        where = None if address is None else arguments.address(address)
        arguments.port("port", port, 1)
        check_handler(handler)
        return await self._serving().serve(transport, where, port, handler)

    async def connect_tcp(
        self, address: AddressLike | None, port: int, *, source: AddressLike | None = None
    ) -> GuestStream:
        """Open a connection to a server in the namespace, through the stack and without a socket of the host.

        Args:
            address: An address of the namespace; None: `Subnet.guest`.
            port: The port.
            source: The address that the server sees as its client's, of the same family; None: the gateway's.

        Raises:
            ConnectionRefusedError: Nothing listens there.
            TimeoutError: Nothing in the namespace answers, after a minute.  On `TapDevice.pair()` that is what
                the other stack does if `source` is none of its guest's addresses.
            AddressError: The namespace cannot have the address, or no client the source.
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
            OSError: EHOSTUNREACH: an ICMP error says that it cannot be reached.  Or there is no room for it.
            StackClosed: The stack is not open, or is closed meanwhile.

        Cancellation: There is no connection.
        """
        where = self.subnet.guest if address is None else arguments.address(address)
        arguments.port("port", port, 1)
        client = None if source is None else arguments.address(source, "source", version=where.version)
        servers = self._serving()
        with self.supervisor.guarding():
            return await servers.connect(where, port, client)

    def _serving(self) -> Servers:
        """Return what serves flows on this side; it is started if it is not there yet."""
        self.supervisor.check()
        return self._start_serving()

    def _start_serving(self) -> Servers:
        if self._servers is None:
            from .serving import Servers  # few need it

            self._servers = Servers(self)
            number = next(_numbers)
            self._news[number] = self._servers
            self.supervisor.start(self._servers.run, number)
        return self._servers

    async def events(self, *, processes: bool = False) -> AsyncGenerator[Event, None]:
        """Yield what happens to flows, and what the policy refuses, from the first `anext` on, until the stack is
        closed.

        A slow reader loses the oldest of more than `EVENTS_KEPT` events, and the next event says how many.  To stop
        before the end, close the generator: `async with aclosing(stack.events()) as events`.  A failure of the stack
        is raised at once.

        Args:
            processes: Whether to find out which process inside has opened each flow, see `Namespace.process_of`.
                That costs about a millisecond for each flow.

        Raises:
            StackClosed: The stack is not open yet, or was closed.

        Cancellation: The generator has ended, and keeps no more events.
        """
        async with Follower(self, processes) as follower:
            while True:
                try:
                    await follower.wait()
                    events = await follower.take()
                except StackClosed:
                    return
                for event in events:
                    yield event

    async def log_events(
        self,
        target: str | os.PathLike[str] | TextIO,
        *,
        processes: bool = False,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Write all events to a file, each as one line of JSON, until the stack is closed or this is cancelled.

        The file is flushed after each write.  If it cannot be written, this raises, and the stack goes on.  If events
        were lost because the file was too slow, a line of the kind "lost" has their number.

        Args:
            target: The path of a file that is made or appended to; or a file that is open for text, which stays open.
            processes: Whether to find out which process inside has opened each flow, as for `events`.
            task_status: What a task group is told by when no event is missed any more: `await tasks.start(...)`.

        Raises:
            EventLogError: The file cannot be opened or written.
            ArgumentTypeError: The target is neither a path nor a file for text.
            StackClosed: The stack is not open yet, or was closed.

        Cancellation: What has happened until then is written, and a line of the kind "open" for each flow that is
            still under way.
        """
        await Follower(self, processes).log(target, task_status)

    @arguments.spelled_out(Capture.__init__)
    def capture(
        self, target: str | os.PathLike[str] | BinaryIO | None, **options: Unpack[CaptureOptions]
    ) -> Capture:
        """Return a capture of the frames of the device, to be used in `async with`, in which it writes a pcapng file.

        The file has the frames of flows that the stack carries, of DNS, DHCP and everything else on the link.  Flows
        beside the stack have none, see `netns_kit.forwarder.ports.Mode`.  TCP super-segments are whole, UDP
        super-datagrams are cut.  What the file is too slow for is lost, and counted.

        Args:
            target: The path of a file that is made or emptied; or a file that is open for bytes, which stays open.
                None: the last frames are kept in memory, for `Capture.dump`.
            options: The settings, see `CaptureOptions`.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
            CaptureError: On entering, the file cannot be opened or written; on leaving, it could not be written
                meanwhile.
            PolicyError: A target of the filter cannot be used.
            StackClosed: On entering, the stack is not open.
            OSError: On entering, there are no descriptors or no memory left.

        Cancellation: The file is complete.
        """
        return Capture(self, target, **options)

    def faults(
        self,
        faults: Faults | None = None,
        *,
        script: Iterable[tuple[float, Faults]] | None = None,
        **options: Unpack[FaultOptions],
    ) -> FaultsBlock:
        """Return faults of the network, to be used in `async with`, in which they are in force.

            async with stack.faults(loss=0.01, delay=0.05, to="*.example.org"):
                ...

        Any number of blocks may run at once.  A packet passes all that are about it, in the order in which they have
        begun.  Packets that a block holds when it ends go on at once.  Flows beside the stack are not disturbed, see
        `netns_kit.forwarder.ports.Mode`.

        Args:
            faults: The faults.
            script: Faults over time, instead: each with the seconds from the beginning at which it takes the place of
                the one before.
            options: The fields of `Faults`, instead.

        Raises:
            ArgumentError, ArgumentTypeError: An argument that cannot be used.
            StackClosed: On entering, the stack is not open.

        Cancellation: The faults are over.
        """
        from .faults import FaultsBlock  # few need it

        return FaultsBlock(self, faults, script, options)

    def _start_answering(self, on_flow: OnFlow) -> None:
        from .answering import Answering  # few need it

        answering = Answering(self, on_flow, self._completed)
        number = next(_numbers)
        self._news[number] = answering
        self.supervisor.start(answering.run, number)

    async def _completed(self, asked: FlowRequest) -> FlowRequest:
        """Return a request with what is known on this side: the name, and the process."""
        name = asked.name
        if name is None:
            name = (await self._names([asked])).get(asked.remote.address)
        process = None
        namespace = self.namespace_of(asked.guest.address)
        if namespace is not None:
            with suppress(NetnsKitError, OSError):
                process = await namespace.process_of(asked.protocol, asked.guest, asked.remote)
        return replace(asked, name=name, process=process)

    def _tell(self, number: int) -> None:
        if number in self._news:
            self._news[number].set()

    @property
    def namespace(self) -> Namespace | None:
        """The namespace that the device is in, if it is known."""
        return self.tap.namespace

    def namespace_of(self, guest: AddressLike) -> Namespace | None:
        """Return the namespace that has an address, if it is known.

        Args:
            guest: The address.

        Raises:
            AddressError, ArgumentTypeError: The argument is no address.
        """
        return self.guests.get(arguments.address(guest, "guest"), self.namespace)

    async def pass_socket(self, sock: socket.socket) -> int:
        """Have the engine receive a copy of a socket, and return the number under which it has it.

        For parts of this library, see `netns_kit.gateway.inside`.

        Args:
            sock: The socket, which stays the caller's.

        Raises:
            FeatureUnavailable: The device is in no namespace that has an agent.
            OSError: There is no room for another descriptor on its way.
            StackClosed: The stack has ended meanwhile.

        Cancellation: The engine has no copy.
        """
        if self._passing is None:
            raise FeatureUnavailable(
                "expected a device in a Namespace: the engine of another takes no sockets",
                fix='open the device in the namespace: TapDevice.open(namespace, "tap0")',
            )
        number = next(_numbers)
        while True:  # some ten are on their way at most (net.unix.max_dgram_qlen)
            try:
                send_record(self._passing, PASSED.pack(number), [sock.fileno()])
                return number
            except BlockingIOError:
                await anyio.sleep(_PAUSE)
                self.supervisor.check()

    async def ask(self, operation: Callable[..., T], *arguments: object) -> T:
        """Have the stack do an operation, see `netns_kit.operations`.  For parts of this library.

        Args:
            operation: A method that is marked as one.
            arguments: What it is called with.

        Raises:
            StackClosed: The stack is not open.

        Other errors are those of the operation, and what has ended the stack.

        Cancellation: The operation may have been done.
        """
        with self.supervisor.guarding():
            if self._runner is None:
                raise StackClosed("the stack is not open yet", fix="await its open() first")
            return await self._runner.ask(operation, *arguments)

    async def hand(
        self,
        fds: Sequence[Sequence[int]],
        operation: Callable[..., T],
        *arguments: object,
        flow: int | None = None,
    ) -> T:
        """Have the stack do an operation with descriptors, which are the stack's from now on.

        For parts of this library.

        Args:
            fds: The descriptors for each worker that is asked: all are, or the one that the operation is for.
            operation: A method that is marked as one, and takes `fds`.
            arguments: What it is called with.
            flow: The number of the flow that it is about, if it is about one.

        Raises:
            StackClosed: The stack is not open.

        Other errors are those of `ask`.

        Cancellation: The operation may have been done.
        """
        try:
            self.supervisor.check()
        except NetnsKitError:
            for fd in itertools.chain(*fds):
                os.close(fd)
            raise
        with self.supervisor.guarding():
            assert self._runner is not None, "it is open"
            return await self._runner.hand(fds, operation, *arguments, flow=flow)


class Follower:
    """A subscriber of events, which completes them by names and, if they are wanted, by processes.

    Args:
        stack: The stack.
        processes: Whether processes are wanted.
        guests: The addresses of the guests whose events it gets; none: those of all.
        supervisor: That of the object whose end interrupts it; None: that of the stack.
    """

    def __init__(
        self,
        stack: UserStack,
        processes: bool,
        guests: tuple[Address, ...] = (),
        supervisor: Supervisor | None = None,
    ) -> None:
        self._stack = stack
        self._supervisor = supervisor or stack.supervisor
        self._guests = guests
        self._wants_processes = processes
        self._processes: dict[int, ProcessInfo | None] = {}  # of flows that are under way, by their ids
        self._number = next(_numbers)

    async def __aenter__(self) -> Self:
        self._news = self._stack._news[self._number] = anyio.Event()
        try:
            await self._stack.ask(Events.subscribe, self._number, self._guests)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        del self._stack._news[self._number]
        # or its end does
        with anyio.move_on_after(CLOSING_SECONDS, shield=True), suppress(NetnsKitError):
            await self._stack.ask(Events.unsubscribe, self._number)

    async def wait(self) -> None:
        """Wait until there is something to take.

        Raises:
            StackClosed: The stack was closed.
        """
        with self._supervisor.guarding():
            await self._news.wait()
        self._news = self._stack._news[self._number] = anyio.Event()

    def wake(self) -> None:
        """End the wait."""
        self._news.set()

    async def take(self) -> tuple[Event, ...]:
        """Return the events since the last call.  Raises as `wait` does."""
        events = await self._stack.ask(Events.take, self._number)
        return await self._completed(events)

    async def under_way(self) -> tuple[Event, ...]:
        """Return an event of the kind "open" for each flow that is under way.  Raises as `wait` does."""
        return tuple(
            under_way(flow, self._processes.get(flow.id))
            for flow in await self._stack.flows()
            if not self._guests or flow.guest.address in self._guests
        )

    async def log(self, target: str | os.PathLike[str] | TextIO, task_status: TaskStatus[None]) -> None:
        """Write the events to a file: see `UserStack.log_events`."""
        log = EventLog(target)
        try:
            async with self:
                task_status.started()
                await log.run(self, CLOSING_SECONDS)
        finally:
            log.close()

    async def _completed(self, events: tuple[Event, ...]) -> tuple[Event, ...]:
        names = await self._stack._names(event.flow for event in events if isinstance(event, FlowEvent))
        if not names and not self._wants_processes:
            return events
        completed: list[Event] = []
        for event in events:
            if isinstance(event, FlowEvent):
                flow = event.flow
                name = flow.name or names.get(flow.remote.address)
                flow = flow if name is flow.name else replace(flow, name=name)
                completed.append(replace(event, flow=flow, process=await self._process(event)))
            else:
                completed.append(event)
        return tuple(completed)

    async def _process(self, event: FlowEvent) -> ProcessInfo | None:
        """Return the process that has opened a flow, which is looked for when that has happened."""
        flow, known = event.flow, self._processes
        namespace = self._stack.namespace_of(flow.guest.address) if self._wants_processes else None
        if namespace is None or flow.direction == "inbound":
            return None
        if event.missed:  # perhaps the ends of known ones
            known.clear()
        if event.kind == "opened":
            known[flow.id] = None
            with suppress(NetnsKitError, OSError):
                known[flow.id] = await namespace.process_of(flow.protocol, flow.guest, flow.remote)
            return known[flow.id]
        return known.get(flow.id) if event.audit else known.pop(flow.id, None)


def check_handler(handler: object) -> None:
    """Raise `ArgumentTypeError` unless a handler can be called."""
    if not callable(handler):
        fix = "write `async def handler(stream)`"
        raise ArgumentTypeError("expected an async function", "handler", arguments.shown(handler), fix)


def _carried(rule: Rule) -> Literal["tcp", "udp"] | None:
    """Return the transport of a rule.  Raises ArgumentError for one that no handler can have."""
    if rule.protocol == "icmp":
        raise ArgumentError("expected tcp or udp", "targets", str(rule), "pings cannot be intercepted")
    return rule.protocol


async def _ipv6_missing(namespace: Namespace, name: str) -> str | None:
    """Return why the interface cannot have IPv6, or None if it can."""
    knob = f"net/ipv6/conf/{name}/disable_ipv6"
    try:
        disabled = await namespace.get_sysctl(knob)
    except SysctlError:
        return "the kernel has none"
    return f"net.ipv6.conf.{name}.disable_ipv6 is 1" if disabled == "1" else None
