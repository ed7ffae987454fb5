"""Namespace: a network namespace, and what may be done in it from outside.

An *agent* (agent.py describes the protocol) is executed for each namespace and lives inside.  This process never
calls setns or unshare and never forks: it asks the agent, and gets descriptors, sockets above all, that belong to the
namespace wherever they are used.  Each request has a socket of its own, so any number of tasks, threads and event
loops may ask at once, and a cancelled one leaves nothing behind.

The end of a namespace that is open (the agent was killed, the process that it was found by has ended) is noticed by
pidfd: calls under way end with NamespaceGone, as do all later ones, and closing raises it.

pyroute2 is imported only where it is used, since it takes longer than all else here together.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from socket import socket as SocketType
from subprocess import PIPE
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import anyio
import anyio.abc
import anyio.to_thread
from typing_extensions import Unpack

from netns_kit import arguments
from netns_kit.arguments import AddressLike
from netns_kit.display.displayed import Displayed
from netns_kit.errors import (
    ArgumentError,
    ArgumentTypeError,
    FeatureUnavailable,
    NamespaceGone,
    NetnsKitError,
    NotPrivileged,
    OwnNamespace,
    PortInUseError,
    SysctlError,
)
from netns_kit.frozen import frozen, replace
from netns_kit.host import bound_ports, diagnosis, sysctl
from netns_kit.host.abi import NETLINK_ROUTE, NETLINK_SOCK_DIAG, RT_TABLE_MAIN, TUN_MAJOR, TUN_MINOR
from netns_kit.host.undo import on_error

from .agent_client import AgentProcess, Conversation, Done, Start
from .background import Openable, Supervisor
from .listening import ListeningSocket, Protocol, SocketDiagnostics
from .process import Command, CommandFailed, CommandOptions, Process, communicate, open_process
from .process_info import ProcessInfo, RunningProcess
from .watch import Watch

if TYPE_CHECKING:
    from netns_kit.display.view import View

    from .added_links import AddedLink

__all__ = ["Interface", "InterfaceAddress", "Namespace", "NamespaceSnapshot", "OpenedTap", "Route"]

T = TypeVar("T")
Ids = Literal["root", "same", "subids"]
"""Who commands are in a namespace of their own, see `Namespace.create`."""
Pids = Literal["own", "host"]
"""Whose processes commands see, see `Namespace.create`."""

_PROC = re.compile(r"/proc/([0-9]+)/ns/net")
_SOCKET_FLAGS = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


@frozen
class Interface:
    """A network interface."""

    index: int
    """Number of the interface in its namespace."""
    name: str
    """Name of the interface."""
    mtu: int
    """Size in bytes of the largest packet that it sends."""
    mac: str
    """Hardware address; empty if the interface has none."""
    up: bool
    """True if the interface is up."""


@frozen
class InterfaceAddress:
    """An address of an interface."""

    index: int
    """Number of the interface that has the address."""
    interface: IPv4Interface | IPv6Interface
    """Address with its prefix."""


@frozen
class Route:
    """A route of the main routing table."""

    destination: IPv4Network | IPv6Network
    """Network that the route leads to."""
    gateway: IPv4Address | IPv6Address | None
    """Address of the next router; None if the network is on the link itself."""
    index: int | None
    """Number of the interface that packets leave by; None if the route has none, as an unreachable one."""
    metric: int
    """Cost of the route.  Of several to one network, that with the lowest is used."""


@frozen
class NamespaceSnapshot(Displayed):
    """A namespace at one moment.  A notebook shows it as tables, and `print` as text."""

    links: tuple[Interface, ...]
    """Interfaces, see `Namespace.links`."""
    addresses: tuple[InterfaceAddress, ...]
    """Addresses of the interfaces, see `Namespace.addresses`."""
    routes: tuple[Route, ...]
    """Routes of the main table, see `Namespace.routes`."""
    listening: tuple[ListeningSocket, ...]
    """Sockets that wait for clients, see `Namespace.listening`; empty if this kernel does not tell."""
    processes: tuple[RunningProcess, ...]
    """Processes, the oldest first."""
    more_processes: int
    """Number of further processes: 200 are listed at most."""

    def _view(self) -> View:
        from .display import snapshot_view

        return snapshot_view(self)


@frozen
class OpenedTap:
    """A tap device that was opened in the namespace."""

    fds: tuple[int, ...]
    """Descriptors, one for each queue.  The caller closes them."""
    name: str
    """Name of the interface."""
    flags: int
    """Flags that the kernel has set (IFF_TAP and others)."""
    existed: bool
    """True if the device existed before: a persistent one that was made by somebody else."""

    @property
    def fd(self) -> int:
        """The descriptor of the first queue."""
        return self.fds[0]


@frozen
class _Value:
    """The agent's answer: the value of a sysctl."""

    value: str


@frozen
class _Processes:
    """The agent's answer: the processes of the namespace, and the number of further ones."""

    processes: tuple[RunningProcess, ...]
    more: int


@frozen
class _Tap:
    """The agent's answer, beside descriptors: the tap that was opened."""

    name: str
    flags: int
    existed: bool


@frozen
class _Configured:
    """The agent's answer: why a link that was configured has no IPv6, if it was to have it."""

    without_ipv6: str | None


class Namespace(Displayed, Openable):
    """A network namespace, for as long as it is open.

    `create`, `attach` and `current` make one; each says what opening it raises.  Closing kills all commands that were
    started in it and ends the agent.  Then the kernel drops the namespace, if nobody else holds it.

    If the namespace ends while it is open, commands are killed and every call raises `NamespaceGone`, those under way
    at once, and so does closing.
    """

    def __init__(self, prepare: Callable[[ExitStack], Start] | None = None, what: str = "") -> None:
        """Raise ArgumentTypeError: only `create`, `attach` and `current` know the arguments."""
        if not callable(prepare):
            expected = "expected a call of Namespace.create, Namespace.attach or Namespace.current"
            raise ArgumentTypeError(expected, "prepare", arguments.shown(prepare))
        self._prepare = prepare
        self._what = what
        self._agent = AgentProcess()
        self._held = ExitStack()
        self.supervisor = Supervisor(type(self).__name__, NamespaceGone)

    @classmethod
    def create(cls, *, ids: Ids = "root", pids: Pids | None = None) -> Namespace:
        """Return a new user and network namespace, whose loopback is up.

        Args:
            ids: Who commands are in there.  "root" maps uid and gid 0 to the caller's.  "same" maps the caller's ids
                to themselves; commands have no capability then, and may use every port all the same: new namespaces
                have `net.ipv4.ip_unprivileged_port_start` 0.  "subids" maps 0 to the caller and the ids from 1 on
                to the ranges of /etc/subuid and /etc/subgid, by newuidmap(1); if the caller is root, every id that
                it has to itself.
            pids: Which processes commands see.  "own": each other and no others.  They have a PID namespace, a mount
                namespace and a /proc for themselves, and nothing that a command does keeps it, or what it has
                started, from ending when this is closed.  "host": those that the caller sees.  Then a command with
                the caller's uid can signal the caller's processes, and one that stops the agent can outlive it.
                None, the default, is "own" where that can be had, which is not so in a container whose /proc is
                masked; the property `pids` tells which it is.

        Raises:
            ArgumentError: An argument is none of these.
            UserNamespaceDenied, IdMapError, FeatureUnavailable: Opening raises them, and they name what forbids it.

        Cancellation:
            Opening leaves nothing.
        """
        arguments.one_of("ids", ids, get_args(Ids))
        _check_pids(pids)
        return cls(lambda _: Start("create", pids, ids=ids), f"create(ids={ids!r})")

    @classmethod
    def attach(
        cls,
        *,
        pid: int | None = None,
        path: str | os.PathLike[str] | None = None,
        fd: int | None = None,
        pids: Pids | None = None,
        allow_current: bool = False,
    ) -> Namespace:
        """Return an existing network namespace, for exactly one of `pid`, `path` and `fd`.

        The user namespace that owns it is joined first, and commands are its owner there: uid, gid and no other
        group, whoever the caller is (root of the namespace, if the owner has no id in it).  In another user's
        namespace they begin in the root directory unless told otherwise.  Processes of the namespace that others have
        started are neither seen nor ended.  It ends with NamespaceGone when the process of `pid`, or of a `path` in
        /proc, has ended, or when the path leads there no more, as after `ip netns delete`.

        Args:
            pid: A process that is in the namespace.
            path: A file that is the namespace, like /run/netns/NAME.
            fd: A descriptor of such a file.  It stays the caller's, and must be open until the namespace is.
            pids: As in `create`.
            allow_current: The namespace may be the caller's own.  A process that has not unshared yet is still in it,
                and what is done to it is done to the caller; so it is refused by default.

        Raises:
            ArgumentError: Not exactly one is given, or it is of another type.
            OwnNamespace: Opening found the caller's own namespace.
            NamespaceGone: Opening found no such process.
            NotPrivileged: Opening may not join it.
            IdMapError: There is no id that commands could have, or a group of the caller's cannot be given up.
            OSError: Opening met it: FileNotFoundError, or EINVAL for what is no network namespace.

        Cancellation:
            Opening leaves nothing.
        """
        _check_pids(pids)
        what = _check_named(pid, path, fd)
        arguments.boolean("allow_current", allow_current)

        def start(stack: ExitStack) -> Start:
            if pid is not None:
                start = _of_process(pid, stack)
            elif path is None:
                start = Start("attach", ns=fd, name=f"of descriptor {fd}")
            else:
                start = _at_path(os.fspath(path), stack)
            if not allow_current and start.ns is not None:
                _check_not_ours(start.ns, start.name)
            return replace(start, pids=pids)

        return cls(start, f"attach({what})")

    @classmethod
    def current(cls) -> Namespace:
        """Return the namespace that the caller is in, with the caller's own rights: what needs others raises."""
        return cls(lambda _: Start("current"), "current()")

    def __repr__(self) -> str:
        return f"<Namespace.{self._what}: {self.supervisor.condition}>"

    def _view(self) -> View:
        from .display import namespace_view

        return namespace_view(self)

    async def _open(self) -> None:
        start = self._prepare(self._held)
        await self._agent.start(start)
        self.supervisor.start(self._agent.watch)
        if start.process is not None:
            self.supervisor.start(self._watch_process, start.process)
        if start.watch is not None:
            self.supervisor.start(self._watch_path, start.watch)

    async def _close(self) -> None:
        await self._agent.stop()
        self._held.close()

    async def _watch_process(self, pidfd: int) -> None:
        await anyio.wait_readable(pidfd)
        self._agent.hang_up()
        raise self._agent.lost("the process whose namespace it was has ended")

    async def _watch_path(self, watch: Watch) -> None:
        while watch.is_there():
            await anyio.wait_readable(watch)
        self._agent.hang_up()
        raise self._agent.lost("the path of the namespace is gone")

    @property
    def origin(self) -> str:
        """The call that has made the object, as text."""
        return self._what

    @property
    def pid(self) -> int:
        """Process id of a process that holds the namespaces while this is open, as the host counts.

        `/proc/<pid>/ns/net` is the network namespace, and `nsenter --target <pid> --user --net --pid --mount` leads
        to where commands are.

        Raises:
            NamespaceGone: It is not open.
        """
        return self._agent.holder

    @property
    def pids(self) -> Pids:
        """The processes that commands see, "own" or "host", as `create` describes them.

        Raises:
            NamespaceGone: It is not open.
        """
        return self._agent.pids

    async def _converse(self, op: str, fds: Sequence[int] = (), /, **arguments: object) -> Conversation:
        return await self._agent.converse(op, fds, arguments)

    async def _ask(
        self, kind: type[T], op: str, /, *, descriptors: int = 0, fds: Sequence[int] = (), **arguments: object
    ) -> tuple[T, list[int]]:
        with self.supervisor.guarding():
            conversation = await self._converse(op, fds, **arguments)
            try:
                return await conversation.receive(kind, descriptors)
            finally:
                conversation.close()

    @arguments.spelled_out(open_process, stdin=None)
    async def run(
        self,
        command: Command,
        *,
        input: bytes | None = None,
        check: bool = True,
        **options: Unpack[CommandOptions],
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end, as `anyio.run_process` does.

        The keyword arguments are `RunOptions`.

        In a PID namespace of its own (`pids`) the command has a session of its own too, so that /dev/tty is not the
        caller's terminal.  A command that is given the caller's controlling terminal as a standard stream is in the
        caller's session and process group, so that job control works; then it can signal the group.

        What the command writes is kept until it has ended, however much that is, and until all that it has started
        has closed its streams too (docs/commands.md).

        Args:
            command: Its words, or a line for the shell.
            input: Bytes that are written to its standard input, which is then closed.
            stdin, stdout, stderr: PIPE, DEVNULL, STDOUT, a descriptor, a file, or None for the caller's own.
            check: Another status than 0 raises CommandFailed.
            cwd: Its current directory, instead of the caller's.
            env: Its environment, instead of the caller's.
            start_new_session: It has a session of its own in any case.
            foreground: It is in the caller's session and in a process group of its own, which has the terminal; the
                caller takes that back.
            pass_fds: Descriptors that it has by the same numbers.
            files: Absolute paths, and what is to be read there; only this command sees it (docs/commands.md).
            listen: Sockets that it is activated with, as systemd does: descriptors from 3 on, LISTEN_FDS and so on.
                They block from then on, for the caller as well.
            open_files: Names, and files that it is given open by these names, in the same way.
            sockets: Absolute paths, and the host's Unix sockets that are there for this command only.

        Raises:
            CommandFailed: A `subprocess.CalledProcessError`: the status is not 0.
            ArgumentError: An argument cannot be used.
            OSError: It cannot be executed, as `subprocess` tells: FileNotFoundError and others.
            UserNamespaceDenied: `files` cannot be shown.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The command is killed with all that it has started.
        """
        given: object = input
        fix = "encode it: input=text.encode()" if isinstance(given, str) else None
        arguments.instance("input", given, (bytes, bytearray, memoryview, NoneType), "bytes, or None", fix)
        arguments.boolean("check", check)
        stdin = options.get("stdin")
        if input is not None and stdin is not None:
            raise ArgumentError("expected None where input is given", "stdin", arguments.shown(stdin))
        options["stdin"] = stdin if input is None else PIPE
        async with await self.popen(command, **options) as process:
            output = await communicate(process, input or b"")
            returncode = await process.wait()
        if check and returncode != 0:
            raise CommandFailed(returncode, command, *output)
        return subprocess.CompletedProcess(command, returncode, *output)

    @arguments.spelled_out(open_process)
    async def popen(self, command: Command, **options: Unpack[CommandOptions]) -> Process:
        """Start a command, as `anyio.open_process` does.  It has been executed when this returns.

        Close the Process, or use it in an `async with`: that kills the command if it still runs.

        Args:
            command, stdin, stdout, stderr, cwd, env, start_new_session, foreground, pass_fds: As in `run`.
            files, listen, open_files, sockets: As in `run`.

        Raises:
            ArgumentError, OSError, UserNamespaceDenied, NamespaceGone: As in `run`.

        Cancellation:
            The command is killed.
        """
        with self.supervisor.guarding():
            return await open_process(self._converse, self.supervisor, command, **options)

    async def listening_socket(
        self, protocol: Literal["tcp", "udp"], host: AddressLike, port: int, *, backlog: int = 128
    ) -> socket.socket:
        """Return a non-blocking kernel socket of the namespace that waits for clients; it is the caller's to close.

        Args:
            protocol: "tcp" or "udp".
            host: An address of the namespace.
            port: A port; 0 lets the kernel choose.
            backlog: How many connections of TCP wait to be accepted, as in listen(2).

        Raises:
            AddressError: `host` is no address.
            ArgumentError: There is no such protocol, `port` is no port, or `backlog` no number.
            PortInUseError: Another socket has the port.
            PrivilegedPortError: Commands may not use a port as low as that.
            OSError: That of bind(2) or listen(2).
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no socket.
        """
        arguments.one_of("protocol", protocol, get_args(Protocol))
        address = arguments.address(host, "host")
        arguments.port("port", port)
        arguments.whole_number("backlog", backlog, 0)
        is_tcp = protocol == "tcp"
        sock = await self.socket(_family(address), socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM)
        try:
            if is_tcp:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(address), port))
            if is_tcp:
                sock.listen(backlog)
        except OSError as exc:
            sock.close()
            if exc.errno == errno.EADDRINUSE:
                owner = await anyio.to_thread.run_sync(bound_ports.holder, protocol, address, port, self.pid)
                raise PortInUseError(
                    f"{address} port {port}/{protocol} in the namespace is taken by {owner or 'another socket'}",
                    fix="choose another port, or 0",
                ) from exc
            if exc.errno == errno.EACCES:
                start = int(await self.get_sysctl(diagnosis.PORT_START))
                raise diagnosis.privileged_port(port, "in the namespace", start) from exc
            raise
        return sock

    async def socket(self, family: int, type: int, proto: int = 0) -> socket.socket:
        """Return a non-blocking kernel socket of the namespace, which is the caller's to close.

        Args:
            family, type, proto: Numbers, as socket(2) takes them.

        Raises:
            ArgumentTypeError: One is no number.
            OSError: That of socket(2).
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no socket.
        """
        for name, number in (("family", family), ("type", type), ("proto", proto)):
            arguments.instance(name, number, int, "a whole number, as socket(2) has it")
        _, (fd,) = await self._ask(
            Done, "socket", descriptors=1, family=int(family), type=int(type), proto=int(proto)
        )
        try:
            sock = socket.socket(fileno=fd)
        except OSError as exc:
            os.close(fd)
            raise self._agent.betrayed("a descriptor that is no socket") from exc
        if (sock.family, sock.type) != (family, type & ~_SOCKET_FLAGS):
            sock.close()
            raise self._agent.betrayed("another socket than was asked for")
        sock.setblocking(False)
        return sock

    async def supply_sockets(self) -> tuple[SocketType, SocketType]:
        """Return a socket on which sockets of the namespace may be ordered, and one to send it others.

        For parts of this library, see `netns_kit.namespace.agent_sockets`.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.
            OSError: There is no room for descriptors.

        Cancellation:
            It leaves nothing.
        """
        engines, agents = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with on_error(engines.close, agents.close):
            await self._ask(Done, "supply", fds=[agents.fileno()])
        for end in (engines, agents):
            end.setblocking(False)
        return engines, agents

    async def allow_unix(self, address: str, *, wanted: bool) -> None:
        """Let an engine have connections to a unix socket, or no more.

        For parts of this library, see `netns_kit.namespace.agent_sockets`.

        Args:
            address: The address, as connect(2) takes it.
            wanted: False: the engine gets none any more.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The engine may have been let.
        """
        await self._ask(Done, "allow_unix", address=address, wanted=wanted)

    async def rewrite_files(self, files: Mapping[str, str]) -> None:
        """Give files that commands see another text, at once and for commands to come.

        Only those change that a command was given as a `netns_kit.namespace.given.LiveText`.  For parts of this
        library.

        Args:
            files: Absolute paths, and the texts.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            They may have been changed.
        """
        await self._ask(Done, "rewrite_files", files=dict(files))

    async def prepare_transparent(self, *, ipv6: bool) -> None:
        """Let connections keep the address of their client, which is none of the namespace.

        For parts of this library, see `netns_kit.namespace.agent_sockets`.

        Args:
            ipv6: Whether those of IPv6 are to, beside those of IPv4.

        Raises:
            FeatureUnavailable: The caller may not have that here, or the kernel does not know it.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The routes may have been made.
        """
        try:
            await self._ask(Done, "prepare_transparent", ipv6=ipv6)
        except OSError as exc:
            raise FeatureUnavailable(
                f"no socket in this namespace may have the address of a client: {exc.strerror}",
                fix='use mode="stack", which keeps the address too; this takes CAP_NET_ADMIN in the namespace',
                errno=exc.errno,
            ) from exc

    async def route_answers(self, family: int, port: int, *, wanted: bool) -> None:
        """Have what programs send by UDP from a port go to transparent sockets, or no more.

        For parts of this library, see `netns_kit.namespace.agent_sockets`.

        Args:
            family: The address family, a number.
            port: The port that programs send from.
            wanted: False: the packets leave the namespace again.

        Raises:
            OSError: The kernel does not take the rule.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The rule may have been changed.
        """
        await self._ask(Done, "route_answers", family=int(family), port=port, wanted=wanted)

    async def connect_tcp(self, host: AddressLike, port: int) -> anyio.abc.SocketStream:
        """Connect by TCP from the namespace.

        Args:
            host: An address.  Names mean nothing here.
            port: A port from 1 on.

        Raises:
            AddressError: `host` is no address.
            ArgumentError: `port` is no port.
            OSError: That of connect(2).
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no socket.
        """
        address = arguments.address(host, "host")
        arguments.port("port", port, 1)
        sock = await self.socket(_family(address), socket.SOCK_STREAM)
        with on_error(sock.close):
            if (error := sock.connect_ex((str(address), port))) == errno.EINPROGRESS:
                with self.supervisor.guarding():
                    await anyio.wait_writable(sock)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, f"{os.strerror(error)}: {address} port {port}")
            return await anyio.abc.SocketStream.from_socket(sock)

    async def listen_tcp(
        self, host: AddressLike = "127.0.0.1", port: int = 0, *, backlog: int = 128
    ) -> anyio.abc.SocketListener:
        """Listen for TCP connections in the namespace.

        Args:
            host: An address of the namespace.
            port: A port; 0 lets the kernel choose.
            backlog: How many connections wait to be accepted, as in listen(2).

        Raises:
            AddressError: `host` is no address.
            ArgumentError: `port` is no port, or `backlog` no number.
            PortInUseError: Another socket has the port.
            PrivilegedPortError: Commands may not use a port as low as that.
            OSError: That of bind(2) or listen(2).
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no socket.
        """
        sock = await self.listening_socket("tcp", host, port, backlog=backlog)
        with on_error(sock.close):
            return await anyio.abc.SocketListener.from_socket(sock)

    async def links(self) -> tuple[Interface, ...]:
        """Return the network interfaces of the namespace.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It changes nothing.
        """
        return tuple(
            Interface(
                message["index"],
                message.get_attr("IFLA_IFNAME"),
                message.get_attr("IFLA_MTU"),
                message.get_attr("IFLA_ADDRESS") or "",
                bool(message["flags"] & 1),
            )
            for message in await self._dump(lambda route: route.get_links())
        )

    async def addresses(self) -> tuple[InterfaceAddress, ...]:
        """Return the addresses of its interfaces, of both families.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It changes nothing.
        """
        return tuple(map(_interface, await self._dump(lambda route: route.get_addr())))

    async def routes(self) -> tuple[Route, ...]:
        """Return the unicast routes of its main table, of both families.

        Raises:
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It changes nothing.
        """
        messages = await self._dump(lambda route: route.get_routes(table=RT_TABLE_MAIN))
        return tuple(map(_route, messages))

    async def _dump(self, question: Callable[[Any], Any]) -> list[Any]:
        """Ask the namespace's kernel by netlink, in a thread: pyroute2 runs an event loop of its own."""
        sock = await self.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_ROUTE)

        def ask() -> list[Any]:
            from pyroute2 import IPRoute

            with IPRoute(fileno=sock.fileno()) as route:
                sock.detach()
                return list(question(route))

        try:
            return await anyio.to_thread.run_sync(ask)
        finally:
            sock.close()

    async def listening(self) -> tuple[ListeningSocket, ...]:
        """Return the sockets of the namespace that wait for clients, of TCP and UDP.

        Raises:
            FeatureUnavailable: This kernel has no socket diagnostics.
            OSError: EMSGSIZE: there are more than about 65,000.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It changes nothing.
        """
        diagnostics = await self.diagnostics()
        try:
            return tuple(await diagnostics.parse(await diagnostics.dump(get_args(Protocol))))
        finally:
            diagnostics.close()

    async def diagnostics(self) -> SocketDiagnostics:
        """Return what tells of the namespace's sockets, for parts of this library.  It is the caller's to close.

        Raises:
            FeatureUnavailable: This kernel has no socket diagnostics.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no socket.
        """
        try:
            sock = await self.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG)
        except OSError as exc:
            raise diagnosis.feature("socket diagnostics", exc, "3.3", "socket with AF_NETLINK") from exc
        return SocketDiagnostics(sock, self._agent.betrayed)

    async def snapshot(self) -> NamespaceSnapshot:
        """Return what the namespace has now: links, addresses, routes, listening sockets, processes.

            print(await namespace.snapshot())

        Raises:
            NamespaceGone: The namespace has ended, or is not open.
            OSError: As `listening` raises it.

        Cancellation:
            It changes nothing.
        """
        listening: tuple[ListeningSocket, ...] = ()
        with suppress(FeatureUnavailable):
            listening = await self.listening()
        links, addresses, routes = await self.links(), await self.addresses(), await self.routes()
        found, _ = await self._ask(_Processes, "processes")
        return NamespaceSnapshot(links, addresses, routes, listening, found.processes, found.more)

    async def process_of(
        self,
        protocol: Literal["tcp", "udp", "icmp"],
        local: tuple[AddressLike, int],
        remote: tuple[AddressLike, int],
    ) -> ProcessInfo | None:
        """Return the process inside that has the socket of a flow; None if it is not known.

        It is not known if the socket is closed by now, as that of a short flow mostly is, or its owner is not found
        within 20 ms.  Programs inside decide what they are called, and may hide; see `ProcessInfo`.

        Args:
            protocol: "tcp", "udp" or "icmp".
            local: The end in the namespace, address and port, like `FlowInfo.guest`.  The port of a ping is its
                identifier.
            remote: The other end, as the namespace sees it, like `FlowInfo.remote`.

        Raises:
            ArgumentError, ArgumentTypeError, AddressError: The protocol is none of these, or an end is no address
                and port.
            FeatureUnavailable: This kernel has no socket diagnostics.
            NamespaceGone: The namespace is not open.

        Cancellation: Nothing is changed.
        """
        arguments.one_of("protocol", protocol, ("tcp", "udp", "icmp"))
        ends: dict[str, str | int] = {}
        for name, end in (("local", local), ("remote", remote)):
            arguments.instance(name, end, tuple, "address and port", 'write it like ("10.0.2.100", 40000)')
            address, port = end
            arguments.port(f"{name}_port", port)
            ends |= {name: str(arguments.address(address)).partition("%")[0], f"{name}_port": port}
        with self.supervisor.guarding():
            conversation = await self._converse("process_of", protocol=protocol, **ends)
            try:
                return await conversation.process()
            except OSError as error:
                if isinstance(error, NetnsKitError):
                    raise
                raise diagnosis.feature("socket diagnostics", error, "3.3") from error
            finally:
                conversation.close()

    async def get_sysctl(self, name: str) -> str:
        """Return the value of a sysctl of the namespace.

        Args:
            name: One of those below `net.`, as sysctl(8) takes it.

        Raises:
            ArgumentTypeError: The name is not text.
            SysctlError: There is no such sysctl, or it is not a network namespace's.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It changes nothing.
        """
        path = _sysctl_path(name)
        with _sysctl_errors(name):
            answer, _ = await self._ask(_Value, "sysctl_get", path=path)
        return answer.value

    async def set_sysctl(self, name: str, value: str | int) -> None:
        """Set a sysctl of the namespace.  The host's stays as it is.

        Args:
            name: One of those below `net.`, as sysctl(8) takes it.
            value: Text or a whole number.

        Raises:
            ArgumentTypeError: The name is not text, or the value neither text nor a whole number.
            SysctlError: There is no such sysctl, it is not a network namespace's, or the kernel refuses the value.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The sysctl may or may not have been set.
        """
        arguments.instance("value", value, (str, int), "text or a whole number")
        path = _sysctl_path(name)
        with _sysctl_errors(name, value):
            await self._ask(Done, "sysctl_set", path=path, value=str(value))

    async def move_link_in(self, name: str) -> None:
        """Move an interface of the caller's namespace into this one.

        Args:
            name: Its name.

        Raises:
            ArgumentTypeError: The name is not text.
            NotPrivileged: The caller has not CAP_NET_ADMIN in both.
            OSError: ENODEV: there is no such interface.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The interface may or may not have been moved.
        """
        arguments.text("name", name, "the name of an interface")
        pid = self.pid

        def move() -> None:
            from pyroute2 import IPRoute
            from pyroute2.netlink.exceptions import NetlinkError

            with IPRoute() as route:
                if not (found := route.link_lookup(ifname=name)):
                    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name)
                try:
                    route.link("set", index=found[0], net_ns_pid=pid)
                except NetlinkError as exc:
                    if exc.code == errno.EPERM:
                        raise NotPrivileged(
                            f"may not move {name} into the namespace",
                            fix="run with CAP_NET_ADMIN, or give the namespace a TapDevice instead",
                        ) from exc
                    raise OSError(exc.code, os.strerror(exc.code), name) from exc

        await anyio.to_thread.run_sync(move)

    async def add_link(self, name: str, link: AddedLink) -> None:
        """Make a link of this namespace that leads past the stack, or a VLAN on one that it has.

        It is down, and has no address: `configure_link` is next.  It ends with the namespace.  No policy, capture or
        flow knows what passes by it.

        Args:
            name: Its name.
            link: What it is: a `Macvlan` or `Ipvlan` on an interface of the caller's namespace, one end of a `Veth`
                whose other end is there, or a `Vlan` on a link of this namespace.

        Raises:
            ArgumentError, ArgumentTypeError: A name or an option that cannot be used, or one that is taken.
            FeatureUnavailable: This kernel makes no such links.
            NotPrivileged: The caller has not CAP_NET_ADMIN in this namespace; or not in its own, where the link
                is on one of its interfaces.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            The link may or may not have been made.
        """
        from netns_kit.host import netlink

        from . import added_links

        added_links.check(name, link)
        target = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if isinstance(link, added_links.Vlan):
                sock = await self.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_ROUTE)
            else:
                kind = socket.SOCK_DGRAM | _SOCKET_FLAGS
                sock = socket.socket(socket.AF_NETLINK, kind, NETLINK_ROUTE)
            with sock:
                parent = 0
                if not isinstance(link, added_links.Veth):
                    parent = netlink.index_of(sock, link.parent)
                message = added_links.request(name, link, parent, target)
                await anyio.to_thread.run_sync(netlink.transact, sock, [message])
        except OSError as error:
            if isinstance(error, NetnsKitError) or not (why := added_links.explain(error, name, link)):
                raise
            raise why from error
        finally:
            os.close(target)

    async def open_tap(self, name: str, flags: Sequence[int], queues: int = 1) -> OpenedTap:
        """Open a tap device.  A persistent device of that name is joined.

        Args:
            name: Its name.
            flags: Words for TUNSETIFF; the first that the kernel accepts is used.
            queues: How often it is opened: more than once only with IFF_MULTI_QUEUE.

        Raises:
            TunUnavailable: The kernel refuses it.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            It leaves no device but a persistent one.
        """
        try:
            tap, fds = await self._ask(
                _Tap, "open_tap", descriptors=queues, name=name, flags=list(flags), queues=queues
            )
        except OSError as exc:
            raise diagnosis.tun(exc, name) from exc
        if not all(map(_is_tap, fds)):
            for fd in fds:
                os.close(fd)
            raise self._agent.betrayed("a descriptor that is no tap")
        return OpenedTap(tuple(fds), tap.name, tap.flags, tap.existed)

    async def configure_link(
        self,
        name: str,
        *,
        mtu: int | None = None,
        mac: str | None = None,
        queue: int | None = None,
        address: IPv4Interface | None = None,
        gateway: IPv4Address | None = None,
        address6: IPv6Interface | None = None,
        gateway6: IPv6Address | None = None,
        neighbours: Mapping[IPv4Address | IPv6Address, bytes] | None = None,
    ) -> str | None:
        """Set what is given, bring the link and the loopback up, and add the default routes.

        It can be done again.  Addresses are usable when this returns.  Return why there is no IPv6, if it was asked
        for and this namespace or its kernel has none; all else is done then.

        Args:
            name: The name of the link.
            mtu: Its MTU.
            mac: Its link address.
            queue: The length of its transmit queue, in packets.
            address, gateway: An IPv4 address with its network, and the default gateway.
            address6, gateway6: The same of IPv6.  The link accepts no router advertisements then.
            neighbours: Addresses on the link with their link addresses, six bytes each.  The kernel asks nobody for
                them, so that no first burst is lost meanwhile.

        Raises:
            NotPrivileged: Commands have not CAP_NET_ADMIN in the namespace.
            OSError: The kernel refuses something; it names the link.
            NamespaceGone: The namespace has ended, or is not open.

        Cancellation:
            Any part may or may not have been done.
        """
        try:
            answer, _ = await self._ask(
                _Configured,
                "configure_link",
                name=name,
                mtu=mtu,
                mac=None if mac is None else mac.replace(":", ""),
                queue=queue,
                address=None if address is None else str(address.ip),
                netmask=None if address is None else str(address.netmask),
                gateway=None if gateway is None else str(gateway),
                ipv6=None
                if address6 is None
                else (str(address6.ip), address6.network.prefixlen, str(gateway6)),
                neighbours={str(each): link.hex() for each, link in (neighbours or {}).items()},
            )
        except PermissionError as exc:
            raise NotPrivileged(
                f"may not configure {name}",
                fix="use a namespace made by create(), or CAP_NET_ADMIN in this one",
            ) from exc
        return answer.without_ipv6


def _check_named(pid: object, path: object, fd: object) -> str:
    """Check what names a namespace, and return it as messages show it."""
    given = {name: each for name, each in (("pid", pid), ("path", path), ("fd", fd)) if each is not None}
    what = ", ".join(f"{name}={arguments.shown(each)}" for name, each in given.items())
    if len(given) != 1:
        raise ArgumentError("expected exactly one of pid, path and fd", "attach", f"({what})")
    if pid is not None:
        arguments.whole_number("pid", pid, 1)
    if fd is not None:
        arguments.whole_number("fd", fd, 0)
    if path is not None:
        arguments.instance("path", path, (str, os.PathLike), "a path, like '/run/netns/NAME'")
    return what


def _check_pids(pids: object) -> None:
    if pids is not None:
        arguments.one_of("pids", pids, get_args(Pids))


def _is_tap(fd: int) -> bool:
    """Whether the descriptor is of /dev/net/tun."""
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(TUN_MAJOR, TUN_MINOR)


def _of_process(pid: int, stack: ExitStack) -> Start:
    """Open the namespace of a process.  Its pidfd is opened first, so that a recycled pid is not mistaken for it."""
    try:
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        ns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, ns)
        with suppress(PermissionError):  # it is there, and somebody else's
            signal.pidfd_send_signal(process, 0)
    except (ProcessLookupError, FileNotFoundError) as exc:
        fix = "give the id of a process that runs"
        raise NamespaceGone("there is no such process", "pid", pid, fix) from exc
    except PermissionError as exc:
        raise NotPrivileged(
            f"may not inspect process {pid}", fix="be root, or the user it runs as", errno=exc.errno
        ) from exc
    return Start("attach", ns=ns, name=f"of process {pid}", process=process)


def _check_not_ours(ns: int, name: str) -> None:
    """Raise OwnNamespace if the descriptor is of the network namespace that the calling thread is in."""
    try:
        ours, theirs = os.stat("/proc/thread-self/ns/net"), os.fstat(ns)
    except OSError:  # no descriptor, or no /proc: joining the namespace will raise it
        return
    if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
        raise OwnNamespace(
            f"the network namespace {name} is the caller's own",
            fix="attach when the process has made its namespace (unshare(2)); where the caller's own is meant, "
            "say so by allow_current=True",
        )


def _at_path(path: str, stack: ExitStack) -> Start:
    """Open the namespace at a path, and watch that; a path in /proc is that of its process."""
    if of_process := _PROC.fullmatch(path):
        return _of_process(int(of_process[1]), stack)
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    stack.callback(os.close, opened)
    if path.startswith("/proc/"):
        return Start("attach", ns=opened, name=path)
    watch = Watch(path)
    stack.callback(watch.close)
    return Start("attach", ns=opened, name=path, watch=watch)


def _family(address: IPv4Address | IPv6Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _interface(message: Any) -> InterfaceAddress:
    address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    return InterfaceAddress(message["index"], ipaddress.ip_interface(f"{address}/{message['prefixlen']}"))


def _route(message: Any) -> Route:
    anywhere = "0.0.0.0" if message["family"] == socket.AF_INET else "::"
    gateway = message.get_attr("RTA_GATEWAY")
    return Route(
        ipaddress.ip_network(f"{message.get_attr('RTA_DST') or anywhere}/{message['dst_len']}"),
        None if gateway is None else ipaddress.ip_address(gateway),
        message.get_attr("RTA_OIF"),
        message.get_attr("RTA_PRIORITY") or 0,
    )


def _sysctl_path(name: str) -> str:
    arguments.text("name", name, "the name of a sysctl, like 'net.ipv4.ip_forward'")
    path = sysctl.path(name)
    if not path.startswith("net/"):
        fix = "only those of net. are a network namespace's; read others by netns_kit.host.sysctl.read"
        raise SysctlError(f"sysctl {name!r} is not of a network namespace", fix=fix, errno=errno.EINVAL)
    return path


@contextmanager
def _sysctl_errors(name: str, value: str | int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        fix = {
            errno.ENOENT: "this kernel has no such sysctl here: look below /proc/sys/net in the namespace",
            errno.EINVAL: "give a value that the kernel takes, see sysctl(8)",
        }.get(exc.errno or 0)
        knob = None if value is None else name
        raise SysctlError(f"sysctl {name}: {exc.strerror}", knob, value, fix, errno=exc.errno) from exc
