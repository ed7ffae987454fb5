"""Network: the five objects wired, for the common case."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from subprocess import CompletedProcess
from types import NoneType

from typing_extensions import Unpack

from . import arguments
from .background import Openable, Supervisor
from .dns import hosts
from .errors import NamespaceGone
from .forwarder import Forwarder
from .namespace import Namespace
from .ports import PortForward, parse
from .process import Command, CommandOptions, Process, RunOptions
from .setup import Setup, StackOptions
from .subnet import Subnet
from .tap import TapDevice
from .uplink import RESOLV_CONF, Uplink
from .userstack import UserStack

DEFAULT_MTU = 1500
HOSTS = "/etc/hosts"
DEFAULT_IFNAME = "tap0"


class Network(Openable):
    """A namespace with real connectivity, for as long as it is open.

        async with Network(ports=["127.0.0.1:8080:80"]) as net:
            await net.run(["curl", "http://example.com"])

    Opening returns when address, route, DNS and ports work.  The parts are there as `namespace`, `tap`, `stack` and
    `forwarder`.

    Args:
        uplink: How flows leave.  By default the host's loopback cannot be reached.
        ports: What is forwarded from the start, see `netns_kit.ports`.
        ifname: The name of the interface inside.
        mtu: The MTU of the interface, see `TapDevice.open`.
        queues: The number of queues of the interface, see `TapDevice.open`.
        namespace: One of the caller's making, which is not open yet.  By default a new one.
        options: Settings of the stack, see `StackOptions`.

    Raises:
        NetnsKitError, ValueError: Arguments that make no sense, before anything is made.
        NetnsKitError, OSError: When it is opened, what its parts raise.

    If the namespace or the stack fails, every call raises that, those under way at once, and so does closing:
    `NamespaceGone`, `DeviceGone` or `StackCrashed`.
    """

    @arguments.spelled_out(Setup.of)
    def __init__(
        self,
        *,
        uplink: Uplink | None = None,
        ports: Iterable[str | PortForward] = (),
        ifname: str = DEFAULT_IFNAME,
        mtu: int = DEFAULT_MTU,
        queues: int = 1,
        namespace: Namespace | None = None,
        **options: Unpack[StackOptions],
    ) -> None:
        arguments.items("ports", ports, "a list of ports")
        arguments.instance(
            "namespace", namespace, (Namespace, NoneType), "a Namespace, or None for a new one"
        )
        self.namespace = namespace or Namespace.create()
        self.tap = TapDevice.open(self.namespace, ifname, mtu=mtu, queues=queues)
        self.stack = UserStack(self.tap, uplink, **options)
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

    @arguments.spelled_out(Namespace.run)
    async def run(self, command: Command, **options: Unpack[RunOptions]) -> CompletedProcess[bytes]:
        """`Namespace.run`, with the namespace's own resolv.conf and hosts file: see `Network.files`."""
        with self.supervisor.guarding():
            options["files"] = await self._files_for(options)
            return await self.namespace.run(command, **options)

    @arguments.spelled_out(Namespace.popen)
    async def popen(self, command: Command, **options: Unpack[CommandOptions]) -> Process:
        """`Namespace.popen`, with the namespace's own resolv.conf and hosts file: see `Network.files`."""
        with self.supervisor.guarding():
            options["files"] = await self._files_for(options)
            process = await self.namespace.popen(command, **options)
        process.supervisor = self.supervisor
        return process

    async def _files_for(self, options: CommandOptions) -> Mapping[str, str | bytes]:
        return {**await self.files(), **(options.get("files") or {})}


def _text(path: str) -> str:
    """Of a file; none, if it is not there, or not for us."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
