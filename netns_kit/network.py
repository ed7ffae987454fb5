"""Network: the five objects wired, for the common case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from subprocess import PIPE, CompletedProcess
from types import TracebackType
from typing import Any

from typing_extensions import Self

from .drivers import DriverName
from .forwarder import Forwarder
from .namespace import Namespace
from .ports import PortForward, parse
from .process import Command, Process
from .subnet import DEFAULT_CIDR, Subnet
from .tap import TapDevice
from .uplink import RESOLV_CONF, Uplink
from .userstack import UserStack

DEFAULT_MTU = 1500


class Network:
    """A namespace with real connectivity, for as long as the block is open.

        async with Network(ports=["127.0.0.1:8080:80"]) as net:
            await net.run(["curl", "http://example.com"])

    `ports` are forwarded from the start (see `netns_kit.ports`).  `namespace` is one of the caller's making, not
    entered yet; by default a new one.  The rest is as for `UserStack` and `TapDevice`.  The parts are there as
    `namespace`, `tap`, `stack` and `forwarder`.

    Entering is ready when it returns: address, route, DNS and ports work.  It raises what its parts raise, and leaves
    nothing behind then or when cancelled.  Bad ports, addresses and sizes raise before anything is made.
    """

    def __init__(
        self,
        *,
        uplink: Uplink | None = None,
        ports: Iterable[str | PortForward] = (),
        subnet: str = DEFAULT_CIDR,
        mtu: int = DEFAULT_MTU,
        namespace: Namespace | None = None,
        driver: DriverName = "thread",
    ) -> None:
        self.subnet = Subnet.parse(subnet)
        self.namespace = namespace or Namespace.create()
        self.tap = TapDevice.open(self.namespace, mtu=mtu)
        self.stack = UserStack(self.tap, uplink, subnet=subnet, driver=driver)
        self.forwarder = Forwarder(self.stack)
        self._ports = [forward for spec in ports for forward in (parse(spec) if isinstance(spec, str) else [spec])]

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for part in (self.namespace, self.tap, self.stack, self.forwarder):
                await stack.enter_async_context(part)
            for forward in self._ports:
                await self.forwarder.add(forward)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        return bool(await self._stack.__aexit__(exc_type, exc, tb))

    def files(self) -> dict[str, str]:
        """What commands see in place of the host's files: a resolv.conf that names our DNS address."""
        return {RESOLV_CONF: f"nameserver {self.subnet.dns}\n"}

    async def run(
        self,
        command: Command,
        *,
        stdout: Any = PIPE,
        stderr: Any = PIPE,
        files: Mapping[str, str] | None = None,
        **options: Any,
    ) -> CompletedProcess[bytes]:
        """`Namespace.run`, with the namespace's own resolv.conf."""
        return await self.namespace.run(
            command, stdout=stdout, stderr=stderr, files={**self.files(), **(files or {})}, **options
        )

    async def popen(
        self, command: Command, *, files: Mapping[str, str] | None = None, **options: Any
    ) -> Process:
        """`Namespace.popen`, with the namespace's own resolv.conf."""
        return await self.namespace.popen(command, files={**self.files(), **(files or {})}, **options)


