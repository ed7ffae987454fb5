"""The client on bad networks: in memory with a clock that jumps, and in a namespace with a kernel's sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import httpx
import pytest

from examples.flaky_network.fetching import GaveUp, NoSuchHost, fetch
from netns_kit import FakeInternet, GuestStream, Refusal
from netns_kit.testing import Confined, ManualClock, TapPair

pytestmark = pytest.mark.anyio

URL = "http://api.example.org/"
BODY = bytes(range(256)) * 40
OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


class Server:
    """Answers requests; the first `len(faults)` of them by a fault."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.asked = 0

    async def __call__(self, stream: GuestStream) -> None:
        async with stream:
            await stream.receive()
            self.asked += 1
            fault = self.faults.pop(0) if self.faults else ""
            if fault == "busy":
                await stream.send(b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            elif fault == "reset in mid-body":
                await stream.send(OK[: len(OK) // 2])
                raise ConnectionResetError
            elif fault == "slow":
                await anyio.sleep(3600)
            else:
                await stream.send(OK)


@pytest.fixture
def server(fake_internet: FakeInternet) -> Server:
    server = Server()
    fake_internet.host("api.example.org").serve_tcp(80, server)
    return server


@pytest.fixture
async def client(tap_pair: TapPair) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=tap_pair.httpx_transport()) as client:
        yield client


async def in_the_namespace(url: str) -> bytes:
    """Fetch with sockets of the kernel, which the namespace has."""
    async with httpx.AsyncClient() as client:
        return await fetch(client, url)


async def test_loss(
    server: Server, client: httpx.AsyncClient, tap_pair: TapPair, manual_clock: ManualClock
) -> None:
    async with tap_pair.faults(loss=0.3, seed=1) as faults:
        assert await fetch(client, URL, timeout=60) == BODY
        counts = await faults.counts()
    assert counts["out_lost"] + counts["in_lost"] > 0
    assert server.asked == 1  # TCP has sent again what was lost: the client need not


async def test_dns_that_fails_for_a_while(
    server: Server, client: httpx.AsyncClient, tap_pair: TapPair, manual_clock: ManualClock
) -> None:
    async with tap_pair.faults(dns="servfail", to="*.example.org"):
        with pytest.raises(GaveUp) as gave_up:
            await fetch(client, URL)
    assert gave_up.value.args == ("ConnectError",) * 5
    assert manual_clock.elapsed == pytest.approx(0.5 + 1 + 2 + 4)
    assert await fetch(client, URL) == BODY


async def test_a_name_that_does_not_exist(
    client: httpx.AsyncClient, fake_internet: FakeInternet, manual_clock: ManualClock
) -> None:
    with pytest.raises(NoSuchHost, match=r"nowhere\.example\.org"):
        await fetch(client, "http://nowhere.example.org/")
    assert manual_clock.elapsed == 0
    assert len(fake_internet.queries) <= 2  # A and AAAA, once


async def test_a_slow_server(server: Server, client: httpx.AsyncClient, manual_clock: ManualClock) -> None:
    server.faults = ["slow"]
    assert await fetch(client, URL, timeout=20) == BODY
    assert server.asked == 2
    assert manual_clock.elapsed == pytest.approx(20 + 0.5)


async def test_a_server_that_is_down(
    server: Server, client: httpx.AsyncClient, fake_internet: FakeInternet, manual_clock: ManualClock
) -> None:
    fake_internet["api.example.org"].down(Refusal.DROP)
    with pytest.raises(GaveUp) as gave_up:
        await fetch(client, URL, timeout=10)
    assert gave_up.value.args == ("ConnectTimeout",) * 5
    assert manual_clock.elapsed == pytest.approx(5 * 10 + 7.5)


async def test_a_reset_in_mid_body(
    server: Server, client: httpx.AsyncClient, manual_clock: ManualClock
) -> None:
    server.faults = ["reset in mid-body", "busy"]
    assert await fetch(client, URL) == BODY
    assert server.asked == 3
    assert manual_clock.elapsed == pytest.approx(0.5 + 1)


async def test_the_same_with_sockets_of_the_kernel(server: Server, confined: Confined) -> None:
    with pytest.raises(NoSuchHost):
        await confined.call(in_the_namespace, "http://nowhere.example.org/")
    server.faults = ["reset in mid-body"]
    assert await confined.call(in_the_namespace, URL) == BODY
    assert server.asked == 2
