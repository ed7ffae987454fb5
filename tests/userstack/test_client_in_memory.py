"""A client's whole logic of retries, in memory: without a privilege, and without a socket of the host."""

from __future__ import annotations

import re
import socket
from types import ModuleType
from typing import Any

import anyio
import pytest

from tests.support import ROOT
from tests.support.servers import bounded

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the last block of docs/interception.md defines, without running it."""
    page = (ROOT / "docs" / "interception.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1]
    monkeypatch.setattr(anyio, "run", lambda *_: None)
    module = ModuleType("example")
    exec("import anyio\nfrom netns_kit import Network, Uplink\n" + block, module.__dict__)
    return module


@pytest.fixture
def no_socket_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no socket be made but those of AF_UNIX."""
    make = socket.socket.__init__

    def checked(self: socket.socket, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if self.family != socket.AF_UNIX:
            self.close()
            raise AssertionError(f"a socket of the family {self.family}")

    monkeypatch.setattr(socket.socket, "__init__", checked)


@bounded
async def test_an_httpx_client_tries_again_in_memory(example: Any, no_socket_of_the_host: None) -> None:
    with pytest.raises(AssertionError):
        socket.socket()
    import httpx

    async with (
        example.in_memory() as (stack, connect),
        await stack.serve_tcp("192.0.2.80", 80, example.flaky()),
        httpx.AsyncClient(transport=example.Transport(connect)) as client,
    ):
        text, seen = await example.fetch(client, "http://192.0.2.80/")
    assert (text, seen) == ("the answer", ["ReadError", "RemoteProtocolError", "503", "ReadTimeout"])


@bounded
async def test_a_server_that_is_not_there(example: Any, no_socket_of_the_host: None) -> None:
    import httpx

    async with (
        example.in_memory() as (stack, connect),
        httpx.AsyncClient(transport=example.Transport(connect)) as client,
    ):
        async with await stack.serve_tcp("192.0.2.80", 80, example.flaky()):
            pass  # the address is known on the link now
        with pytest.raises(TimeoutError, match="Connect"):
            await example.fetch(client, "http://10.0.2.2/", attempts=2)
