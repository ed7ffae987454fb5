"""Network: the five objects wired, for the common case."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network
from subprocess import CompletedProcess
from types import NoneType
from typing import TypedDict

from typing_extensions import Unpack

from netns_kit import arguments
from netns_kit.dhcp import DEFAULT, DhcpSettings
from netns_kit.dns import Record, hosts
from netns_kit.errors import NamespaceGone, RecordError
from netns_kit.forwarder.forwarder import Forwarder
from netns_kit.forwarder.ports import PortForward, parse
from netns_kit.namespace.background import Openable, Supervisor
from netns_kit.namespace.namespace import Namespace
from netns_kit.namespace.process import Command, Process, StandardStream, Word
from netns_kit.stack import Limits
from netns_kit.subnet import DEFAULT_CIDR, Subnet, Subnet6
from netns_kit.tap.device import TapDevice
from netns_kit.uplink.uplink import RESOLV_CONF, Uplink
from netns_kit.userstack.drivers import DriverName
from netns_kit.userstack.userstack import Configure, SandboxLayer, UserStack

DEFAULT_MTU = 1500
HOSTS = "/etc/hosts"
DEFAULT_IFNAME = "tap0"


class CommandOptions(TypedDict, total=False):
    """The keyword arguments of `Namespace.popen`, which has their meaning."""

    stdin: StandardStream
    stdout: StandardStream
    stderr: StandardStream
    cwd: Word | None
    env: Mapping[str, str] | None
    start_new_session: bool
    foreground: bool
    pass_fds: Sequence[int]
    files: Mapping[str, str | bytes] | None


class Network(Openable):
    """A namespace with real connectivity, for as long as it is open.

        async with Network(ports=["127.0.0.1:8080:80"]) as net:
            await net.run(["curl", "http://example.com"])

    Opening returns when address, route, DNS and ports work.  The parts are there as `namespace`, `tap`, `stack` and
    `forwarder`.

    Args:
        uplink: How flows leave.  By default the host's loopback cannot be reached.
        ports: What is forwarded from the start, see `netns_kit.forwarder.ports`.
        ifname: The name of the interface inside.
        namespace: One of the caller's making, which is not open yet.  By default a new one.
        name: The namespace's own name at the DNS address, one more of `records`.

    The other arguments are those of `UserStack` and of `TapDevice.open`.

    Raises:
        NetnsKitError, ValueError: Arguments that make no sense, before anything is made.
        NetnsKitError, OSError: When it is opened, what its parts raise.

    If the namespace or the stack fails, every call raises that, those under way at once, and so does closing:
    `NamespaceGone`, `DeviceGone` or `StackCrashed`.
    """

    def __init__(
        self,
        *,
        uplink: Uplink | None = None,
        ports: Iterable[str | PortForward] = (),
        subnet: str | IPv4Network = DEFAULT_CIDR,
        ipv6: bool | Subnet6 = False,
        ifname: str = DEFAULT_IFNAME,
        mtu: int = DEFAULT_MTU,
        queues: int = 1,
        namespace: Namespace | None = None,
        driver: DriverName = "thread",
        configure: Configure = True,
        limits: Limits | None = None,
        dhcp: DhcpSettings | None = DEFAULT,
        require: Iterable[SandboxLayer] = (),
        records: Iterable[str | Record] = (),
        name: str | None = None,
    ) -> None:
        arguments.items("ports", ports, "a list of ports")
        arguments.items("records", records, "a list of records")
        arguments.instance(
            "namespace", namespace, (Namespace, NoneType), "a Namespace, or None for a new one"
        )
        self.namespace = namespace or Namespace.create()
        self.tap = TapDevice.open(self.namespace, ifname, mtu=mtu, queues=queues)
        if name is not None:
            records = [*_named(name, Subnet.parse(subnet, ipv6)), *records]
        self.stack = UserStack(
            self.tap,
            uplink,
            subnet=subnet,
            ipv6=ipv6,
            driver=driver,
            configure=configure,
            limits=limits,
            dhcp=dhcp,
            require=require,
            records=records,
        )
        self.forwarder = Forwarder(self.stack)
        self.supervisor = Supervisor(
            type(self).__name__,
            NamespaceGone,
            self.namespace.supervisor,
            self.stack.supervisor,
            one_loop=True,
        )
        self.ports = [
            forward
            for spec in ports
            for forward in ([spec] if isinstance(spec, PortForward) else parse(spec))
        ]

    def __repr__(self) -> str:
        ports = f", {len(self.ports)} forwarded" if self.ports else ""
        return f"<Network {self.subnet}{ports}: {self.supervisor.condition}>"

    @property
    def subnet(self) -> Subnet:
        """Its addresses."""
        return self.stack.subnet

    async def _open(self) -> None:
        await self.namespace.open()
        self.tap = await self.tap
        await self.stack.open()
        await self.forwarder.open()
        await self.forwarder.add(*self.ports)

    async def _close(self) -> None:
        await self.forwarder.supervisor.end()  # what has failed is raised by our own supervisor
        await self.stack.supervisor.end()
        await self.tap.close()
        await self.namespace.supervisor.end()

    async def files(self) -> dict[str, str]:
        """What commands see in place of the host's files, as it is now.

        A resolv.conf that names our DNS address and the search list; and a hosts file with localhost, this machine's
        name, the stack's records, and what else is in the host's, if it has one.
        """
        resolv_conf = self.stack.uplink.resolv_conf(*self.subnet.resolvers)
        records = await self.stack.records()
        ours = [
            (each.name, each.value) for each in records if each.type in ("A", "AAAA") and "*" not in each.name
        ]
        return {RESOLV_CONF: resolv_conf, HOSTS: hosts.written(os.uname().nodename, ours, _text(HOSTS))}

    async def run(
        self,
        command: Command,
        *,
        input: bytes | None = None,
        check: bool = True,
        **options: Unpack[CommandOptions],
    ) -> CompletedProcess[bytes]:
        """`Namespace.run`, with the namespace's own resolv.conf and hosts file: see `Network.files`."""
        with self.supervisor.guarding():
            return await self.namespace.run(
                command, input=input, check=check, **await self._with_files(options)
            )

    async def popen(self, command: Command, **options: Unpack[CommandOptions]) -> Process:
        """`Namespace.popen`, with the namespace's own resolv.conf and hosts file: see `Network.files`."""
        with self.supervisor.guarding():
            process = await self.namespace.popen(command, **await self._with_files(options))
        process.supervisor = self.supervisor
        return process

    async def _with_files(self, options: CommandOptions) -> CommandOptions:
        return {**options, "files": {**await self.files(), **(options.get("files") or {})}}


def _named(name: str, subnet: Subnet) -> list[Record]:
    """Its addresses, by that name.  Raises `RecordError` for none."""
    arguments.text("name", name, "a domain name, or None")
    if not name.strip("."):
        raise RecordError(f"name {name!r} is no name of a namespace")
    return [Record(name, str(each.guest)) for each in (subnet, subnet.ipv6) if each is not None]


def _text(path: str) -> str:
    """Of a file; none, if it is not there, or not for us."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
