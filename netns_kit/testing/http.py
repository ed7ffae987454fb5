"""An httpx transport on streams of anyio, such as those of a `TapPair`."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import anyio
import httpcore
import httpx
from anyio.abc import ByteStream
from anyio.streams.tls import TLSAttribute, TLSStream

AT_ONCE = 1 << 16

Connect = Callable[[str, int], Awaitable[ByteStream]]


class _Stream(httpcore.AsyncNetworkStream):
    """A stream of anyio, as httpcore wants it."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            with anyio.fail_after(timeout):
                return await self._stream.receive(max_bytes)
        except anyio.EndOfStream:
            return b""
        except TimeoutError as error:
            raise httpcore.ReadTimeout from error
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise httpcore.ReadError from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            with anyio.fail_after(timeout):
                for at in range(0, len(buffer), AT_ONCE):
                    await self._stream.send(buffer[at : at + AT_ONCE])
        except TimeoutError as error:
            raise httpcore.WriteTimeout from error
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise httpcore.WriteError from error

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        try:
            with anyio.fail_after(timeout):
                return _Stream(
                    await TLSStream.wrap(
                        self._stream, ssl_context=ssl_context, hostname=server_hostname, server_side=False,
                        standard_compatible=False,
                    )
                )  # fmt: skip
        except TimeoutError as error:
            await self.aclose()
            raise httpcore.ConnectTimeout from error
        except (ssl.SSLError, OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
            await self.aclose()
            raise httpcore.ConnectError(str(error)) from error

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object" and isinstance(self._stream, TLSStream):
            return self._stream.extra(TLSAttribute.ssl_object)
        return False if info == "is_readable" else None


class Backend(httpcore.AsyncNetworkBackend):
    """What opens connections for httpcore."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            with anyio.fail_after(timeout):
                return _Stream(await self._connect(host, port))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout from error
        except (OSError, anyio.BrokenResourceError) as error:
            raise httpcore.ConnectError(str(error)) from error

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


def transport(connect: Connect, verify: ssl.SSLContext | bool, retries: int) -> httpx.AsyncHTTPTransport:
    """Return httpx's own transport, with `connect` in place of the host's sockets.

    Args:
        connect: Opens a connection to a host, by its name or address, and a port.
        verify: As for `httpx.AsyncHTTPTransport`.
        retries: As for `httpx.AsyncHTTPTransport`.
    """
    made = httpx.AsyncHTTPTransport(verify=verify, retries=retries)
    assert isinstance(made._pool, httpcore.AsyncConnectionPool)
    made._pool._network_backend = Backend(connect)
    return made
