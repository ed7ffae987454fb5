"""TapPair: names, addresses, and an httpx client, in memory."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from netns_kit import FakeInternet, Record, StackClosed
from netns_kit.testing import ManualClock, TapPair
from tests.support.servers import bounded

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]


async def answer(stream: Any) -> None:
    async with stream:
        await stream.receive()
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")


@bounded
async def test_names_are_resolved_as_programs_do(tap_pair: TapPair, fake_internet: FakeInternet) -> None:
    host = fake_internet.host("both.example.org")
    host.alias("alias.example.org")
    fake_internet.add_record(Record("only.example.org", "nothing", "TXT"))
    assert await tap_pair.resolve("alias.example.org") == host.addresses
    with pytest.raises(socket.gaierror, match="NXDOMAIN"):
        await tap_pair.resolve("nowhere.example.org")
    with pytest.raises(socket.gaierror, match="has no address"):
        await tap_pair.resolve("only.example.org")
    async with tap_pair.faults(dns="servfail"):
        with pytest.raises(socket.gaierror, match="SERVFAIL"):
            await tap_pair.resolve("both.example.org")


@bounded
async def test_the_next_address_is_tried(tap_pair: TapPair, fake_internet: FakeInternet) -> None:
    first, second = fake_internet.host(addresses=["192.0.2.1"]), fake_internet.host(addresses=["192.0.2.2"])
    for address in "192.0.2.1", "192.0.2.2":
        fake_internet.add_record(f"many.example.org={address}")
    first.down()
    second.serve_tcp(80, answer)
    async with await tap_pair.connect_tcp("many.example.org", 80) as stream:
        await stream.send(b"?")
        assert (await stream.receive()).endswith(b"hi")


@bounded
async def test_a_connection_is_kept_alive(tap_pair: TapPair, fake_internet: FakeInternet) -> None:
    async def twice(stream: Any) -> None:
        async with stream:
            for _ in range(2):
                await stream.receive()
                await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    fake_internet.host("api.example.org").serve_tcp(80, twice)
    async with httpx.AsyncClient(transport=tap_pair.httpx_transport()) as client:
        for _ in range(2):
            assert (await client.get("http://api.example.org/")).text == "hi"
    assert len([flow for flow in fake_internet.flows if flow.refused is None]) == 1


@bounded
async def test_what_fails_is_what_httpx_raises(
    tap_pair: TapPair, fake_internet: FakeInternet, manual_clock: ManualClock
) -> None:
    host = fake_internet.host("api.example.org")

    @host.tcp(1)
    async def reset(stream: Any) -> None:
        await stream.receive()
        raise ConnectionResetError

    @host.tcp(2)
    async def silent(stream: Any) -> None:
        async for _ in stream:
            pass

    async with httpx.AsyncClient(transport=tap_pair.httpx_transport(), timeout=5) as client:
        for port, expected in ((1, httpx.ReadError), (2, httpx.ReadTimeout), (3, httpx.ConnectError)):
            with pytest.raises(expected):
                await client.get(f"http://api.example.org:{port}/")
    assert manual_clock.elapsed == pytest.approx(5)


@bounded
async def test_a_pair_that_is_not_open() -> None:
    pair = TapPair(FakeInternet())
    for call in (pair.resolve("a.example.org"), pair.connect_tcp("192.0.2.1", 80)):
        with pytest.raises(StackClosed):
            await call
    with pytest.raises(StackClosed):
        pair.faults(loss=1)
