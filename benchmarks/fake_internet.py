"""What a test in memory costs: `python -m benchmarks.fake_internet [TESTS]`.

A test makes a fake internet with one host and two stacks on a pair of devices, has a request answered by name and
address, and takes it all down again.  It prints milliseconds of CPU for each, by driver and event loop, and what
10,000 hosts cost, as one JSON object.
"""

from __future__ import annotations

import json
import sys
import time

import anyio
from dnslib import DNSRecord

from netns_kit import FakeInternet, GuestStream, TapDevice, UserStack
from netns_kit.gateway.setup import DriverName

GUEST, DNS = "10.0.2.100", "10.0.2.3"
HOSTS = 10_000
WARM_UP = 5
QUESTION = DNSRecord.question("api.example.com").pack()


async def answer(stream: GuestStream) -> None:
    await stream.receive()
    await stream.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nthe answer")


async def one_test(driver: DriverName) -> None:
    """Do what such a test does."""
    fake = FakeInternet()
    fake.host("api.example.com").serve_tcp(80, answer)
    near, far = TapDevice.pair()
    outside = UserStack(far, FakeInternet(any_source=True), subnet="10.9.0.0/24", driver=driver)
    async with near, far, UserStack(near, fake, driver=driver), outside as inside:
        async with await inside.connect_tcp(DNS, 53, source=GUEST) as stream:
            await stream.send(len(QUESTION).to_bytes(2, "big") + QUESTION)
            answered = DNSRecord.parse((await stream.receive())[2:])
        async with await inside.connect_tcp(str(answered.a.rdata), 80, source=GUEST) as stream:
            await stream.send(b"GET / HTTP/1.1\r\n\r\n")
            heard = b"".join([data async for data in stream])
    if not heard.endswith(b"the answer"):
        raise RuntimeError(heard)


async def measure(driver: DriverName, tests: int) -> float:
    """Return the CPU time of a test, in milliseconds."""
    for _ in range(WARM_UP):
        await one_test(driver)
    began = time.process_time()
    for _ in range(tests):
        await one_test(driver)
    return round((time.process_time() - began) / tests * 1e3, 1)


def many_hosts() -> float:
    """Return the CPU time of adding many hosts, in milliseconds."""
    fake, began = FakeInternet(), time.process_time()
    for number in range(HOSTS):
        fake.host(f"host{number}.example.com").serve_tcp(80, answer)
    return round((time.process_time() - began) * 1e3, 1)


def main(tests: str = "100") -> None:
    drivers: tuple[DriverName, ...] = ("loop", "thread")
    found = {
        f"a test, {driver}, {backend}": anyio.run(measure, driver, int(tests), backend=backend)
        for driver in drivers
        for backend in ("asyncio", "trio")
    }
    print(json.dumps({**found, f"{HOSTS} hosts": many_hosts()}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:2])
