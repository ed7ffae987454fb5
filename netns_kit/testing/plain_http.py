"""The httpx transport of plain code, on the streams of an event loop in another thread."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import httpcore
import httpx

from netns_kit.sync.loop_thread import LoopThread

from .http import Backend, Connect

T = TypeVar("T")


class _Stream(httpcore.NetworkStream):
    """An async stream of httpcore, as a plain one."""

    def __init__(
        self, call: Callable[[Callable[[], Awaitable[Any]]], Any], stream: httpcore.AsyncNetworkStream
    ) -> None:
        self._call = call
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return bytes(self._call(lambda: self._stream.read(max_bytes, timeout)))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._call(lambda: self._stream.write(buffer, timeout))

    def close(self) -> None:
        self._call(self._stream.aclose)

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(
            self._call, self._call(lambda: self._stream.start_tls(ssl_context, server_hostname, timeout))
        )

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    """What opens connections for httpcore."""

    def __init__(self, loop: LoopThread, connect: Connect) -> None:
        self._loop = loop
        self._backend = Backend(connect)

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        return self._loop.call("stream", function)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        return _Stream(self._call, self._call(lambda: self._backend.connect_tcp(host, port, timeout)))


def transport(
    loop: LoopThread, connect: Connect, verify: ssl.SSLContext | bool, retries: int
) -> httpx.HTTPTransport:
    """Return httpx's own transport, with `connect` in place of the host's sockets.

    Args:
        loop: The event loop on which `connect` is called.
        connect: Opens a connection to a host, by its name or address, and a port.
        verify: As for `httpx.HTTPTransport`.
        retries: As for `httpx.HTTPTransport`.
    """
    made = httpx.HTTPTransport(verify=verify, retries=retries)
    assert isinstance(made._pool, httpcore.ConnectionPool)
    made._pool._network_backend = _Backend(loop, connect)
    return made
