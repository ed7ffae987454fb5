"""HttpConnectUplink: TCP flows through an HTTP proxy, by CONNECT (RFC 9110 section 9.3.6)."""

from __future__ import annotations

import re
from base64 import b64encode
from typing import TYPE_CHECKING

from netns_kit import arguments
from netns_kit.arguments import Address, AddressLike
from netns_kit.errors import ArgumentError
from netns_kit.stack import Refusal

from .dial import Dial
from .flow import Endpoint, Flow, Target
from .indirect import (
    Carriage,
    Fault,
    IndirectUplink,
    ProxyOptions,
    ProxyUplink,
    ReadHead,
    Send,
    Talk,
    host_of,
    is_direct,
)
from .uplink import Uplink

if TYPE_CHECKING:
    from typing_extensions import Unpack

HTTP_PROXY_PORT = 8080
LONGEST_HEAD = 16384
INTERIM_MAX = 8  # answers 1xx before the final one
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r]")


class HttpConnectUplink(ProxyUplink):
    """The way out through an HTTP proxy.

    UDP and pings are refused, since HTTP/1.1 has no way for them.

    Args:
        proxy: Address and port of the proxy; the port is 8080 if it is left out.
        username, password: What the proxy is told, by the scheme Basic.  They are in no message and no repr.
        names, resolvers, time_limit: See `IndirectUplink`.
        options: The settings of any `Uplink`.

    Raises:
        AddressError: The proxy is no address with a port.
        ArgumentError: A value cannot be used.
        ArgumentTypeError: An argument has the wrong type.
    """

    kind = "HTTP proxy"
    takes_names = True

    @arguments.spelled_out(IndirectUplink.__init__)
    def __init__(
        self,
        proxy: AddressLike | Endpoint,
        username: str | None = None,
        password: str | None = None,
        **options: Unpack[ProxyOptions],
    ) -> None:
        super().__init__(proxy, HTTP_PROXY_PORT, username, password, **options)
        if self._credentials is not None and b":" in self._credentials[0]:
            raise ArgumentError("expected a user name without a colon (RFC 7617)", "username", "(not shown)")

    def dial(self, flow: Flow, target: Target, *, ttl: int = 64, tos: int = 0) -> Dial:
        if is_direct(flow, target):
            return Uplink.dial(self, flow, target, ttl=ttl, tos=tos)
        host, port = host_of(flow, target, names=self.wants_names), target.candidates[0].port
        return self._through(talk(host, port, self._credentials), tos)

    def carriage(self, flow: Flow, target: Target) -> Carriage:
        return None if is_direct(flow, target) else Refusal.PROHIBITED


def talk(host: str | Address, port: int, secret: tuple[bytes, bytes] | None) -> Talk:
    """Ask an HTTP proxy for a tunnel."""
    authority = f"{host}:{port}" if isinstance(host, str) else str(Endpoint._make((host, port)))
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if secret is not None:
        lines.append(f"Proxy-Authorization: Basic {b64encode(b':'.join(secret)).decode()}")
    yield Send("\r\n".join([*lines, "", ""]).encode())
    for _ in range(INTERIM_MAX):
        found = _STATUS.match((yield ReadHead(LONGEST_HEAD)))
        if found is None:
            break
        status = int(found[1])
        if 200 <= status < 300:
            return
        if status >= 200:
            raise _refusal(status)
    raise Fault(Refusal.HOST_UNREACHABLE, "does not speak HTTP/1.1")


def _refusal(status: int) -> Fault:
    if status == 407:
        return Fault(Refusal.PROHIBITED, "wants a user name and a password that it accepts")
    if status in (400, 401, 403, 405, 501):
        return Fault(Refusal.PROHIBITED, f"does not allow some of them: status {status}")
    return Fault(Refusal.HOST_UNREACHABLE)
