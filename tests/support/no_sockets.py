"""A program that uses a fake internet with each driver of its own process, and prints the families of its sockets."""

from __future__ import annotations

import socket
import sys

import anyio
from dnslib import DNSRecord

from netns_kit import FakeInternet, Forwarder, GuestStream, Policy, TapDevice, UserStack
from netns_kit.gateway.setup import DriverName
from netns_kit.policy.presets import HOST

QUERY = DNSRecord.question("api.example.com").pack()
families: set[str] = set()


def hook(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.__new__" and arguments[1] != -1:  # it is made, and no descriptor that there was
        families.add(socket.AddressFamily(arguments[1]).name)  # type: ignore[arg-type]  # a number


async def echo(stream: GuestStream) -> None:
    async for data in stream:
        await stream.send(data)


async def use(driver: DriverName) -> None:
    fake = FakeInternet(policy=Policy.allow().deny(HOST))
    api = fake.host("api.example.com")
    api.serve_tcp(80, echo)
    near, far = TapDevice.pair()
    async with (
        near,
        far,
        UserStack(near, fake, driver=driver, ipv6=True) as stack,
        UserStack(far, FakeInternet(any_source=True), subnet="10.9.0.0/24", driver=driver) as inside,
        Forwarder(stack) as forwarder,
        await inside.serve_tcp("10.0.2.100", 80, echo),
    ):
        await forwarder.add("8080:80")
        streams = [
            await inside.connect_tcp(api.addresses[0], 80, source="10.0.2.100"),
            await api.connect_tcp(8080),
        ]
        for stream in streams:
            async with stream:
                await stream.send(b"hello")
                assert await stream.receive() == b"hello"
        async with await inside.connect_tcp("10.0.2.3", 53, source="10.0.2.100") as stream:
            await stream.send(len(QUERY).to_bytes(2, "big") + QUERY)
            await stream.receive()


if __name__ == "__main__":
    sys.addaudithook(hook)
    drivers: tuple[DriverName, ...] = ("thread", "loop")
    for driver in drivers:
        anyio.run(use, driver)
    sys.stdout.write(" ".join(sorted(families)))
