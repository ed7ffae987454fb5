"""A fake internet: two stacks on a pair of fake devices, one of which has it as its uplink, on each driver."""

from __future__ import annotations

import errno
import os
import pickle
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from anyio.lowlevel import checkpoint
from dnslib import DNSRecord

from netns_kit import (
    AddressError,
    ArgumentError,
    ArgumentTypeError,
    DomainNameError,
    Endpoint,
    FakeFlow,
    FakeInternet,
    FakeQuery,
    FeatureUnavailable,
    FlowAttribute,
    Forwarder,
    GuestStream,
    NotFound,
    Policy,
    PortInUseError,
    Rcode,
    Record,
    Refusal,
    StackClosed,
    TapDevice,
    UserStack,
)
from netns_kit.gateway.setup import DriverName
from netns_kit.policy.presets import HOST, PRIVATE
from netns_kit.stack.wire import ip, tcp
from netns_kit.tap.frame_device import FRAME_MAX
from netns_kit.uplink.in_memory import InMemoryUplink
from netns_kit.userstack.serving import Servers
from tests.support import ROOT, packets
from tests.support.bench import SUBNET
from tests.support.servers import SECONDS, bounded
from tests.support.taps import send, stack_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

GUEST, DNS = "10.0.2.100", "10.0.2.3"
REQUEST = b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n"


class Pair:
    """A stack on a fake internet, and another one in place of its namespace."""

    def __init__(self, stack: UserStack, inside: UserStack) -> None:
        self.stack, self.inside = stack, inside

    async def query(self, name: str, kind: str = "A") -> DNSRecord:
        question = DNSRecord.question(name, kind).pack()
        async with await self.inside.connect_tcp(DNS, 53, source=GUEST) as stream:
            await stream.send(len(question).to_bytes(2, "big") + question)
            heard = b""
            while len(heard) < 2 or len(heard) < 2 + int.from_bytes(heard[:2], "big"):
                heard += await stream.receive()
        return DNSRecord.parse(heard[2:])

    async def resolve(self, name: str, kind: str = "A") -> list[str]:
        return [str(each.rdata) for each in (await self.query(name, kind)).rr]

    async def dial(self, name: str, port: int = 80) -> GuestStream:
        address = name if name[0].isdigit() else (await self.resolve(name))[-1]
        return await self.inside.connect_tcp(address, port, source=GUEST)

    async def refusal(self, name: str, port: int = 80, patience: float = SECONDS) -> int:
        """The errno with which a connection is refused; 0: silence."""
        with anyio.move_on_after(patience):
            try:
                await (await self.dial(name, port)).aclose()
            except OSError as error:
                return error.errno or 0
            raise AssertionError("it is connected")
        return 0


@asynccontextmanager
async def joined(driver: DriverName, fake: FakeInternet, **options: Any) -> AsyncIterator[Pair]:
    near, far = TapDevice.pair()
    async with (
        near,
        far,
        UserStack(near, fake, driver=driver, **options) as stack,
        UserStack(far, FakeInternet(any_source=True), subnet="10.9.0.0/24", driver="loop") as inside,
    ):
        yield Pair(stack, inside)


async def name_of(stream: GuestStream) -> None:
    await stream.send(str(stream.extra(FlowAttribute.name)).encode())


async def echo(stream: GuestStream) -> None:
    async for data in stream:
        await stream.send(data)


async def everything(stream: GuestStream) -> bytes:
    async with stream:
        return b"".join([data async for data in stream])


@bounded
async def test_a_host_answers_by_its_name(driver: DriverName) -> None:
    fake = FakeInternet()
    api = fake.host("api.example.com")
    api.serve_tcp(80, name_of)
    async with joined(driver, fake) as pair:
        stream = await pair.dial("API.example.com")
        assert await everything(stream) == b"api.example.com"
        [flow] = fake.flows
        remote = Endpoint(api.addresses[0], 80)
        assert flow == FakeFlow("tcp", flow.guest, remote, api, None)
        assert flow.guest.address == Endpoint(GUEST, 0).address
        assert list(fake.queries) == [FakeQuery("api.example.com", "A", Rcode.NOERROR)]


@bounded
async def test_a_handler_has_both_directions_and_their_ends(driver: DriverName) -> None:
    fake = FakeInternet()

    async def reverse(stream: GuestStream) -> None:
        await stream.send(b"".join([data async for data in stream])[::-1])

    fake.host("api.example.com").serve_tcp(80, reverse)
    block = bytes(range(256)) * 2048
    async with joined(driver, fake) as pair, await pair.dial("api.example.com") as stream:
        await stream.send(block)
        await stream.send_eof()
        assert await everything(stream) == block[::-1]


@bounded
async def test_names_of_all_kinds(driver: DriverName) -> None:
    fake = FakeInternet()
    api = fake.host(
        "api.example.com", "www.example.com", addresses=["203.0.113.7", "2001:db8::7", "203.0.113.8"]
    )
    wild = fake.host("*.pages.example.com", "*.example.com")
    api.alias("alias.example.com", "again.example.com")
    fake.add_record(Record("api.example.com", "10 mail.example.com", "MX"))
    fake.add_record(Record("api.example.com", '"v=spf1 -all"', "TXT"))
    fake.add_record(Record("_sip._udp.example.com", "1 2 5060 api.example.com", "SRV"))
    fake.add_record("extra.example.com=192.0.2.99")
    async with joined(driver, fake, ipv6=True) as pair:
        assert await pair.resolve("api.example.com") == ["203.0.113.7", "203.0.113.8"]
        assert await pair.resolve("www.example.com", "AAAA") == ["2001:db8::7"]
        assert await pair.resolve("a.pages.example.com") == [str(wild.addresses[0])]
        assert await pair.resolve("b.a.pages.example.com") == [str(wild.addresses[0])]
        assert await pair.resolve("alias.example.com") == ["api.example.com.", "203.0.113.7", "203.0.113.8"]
        assert await pair.resolve("api.example.com", "MX") == ["10 mail.example.com."]
        assert await pair.resolve("api.example.com", "TXT") == ['"v=spf1 -all"']
        assert await pair.resolve("_sip._udp.example.com", "SRV") == ["1 2 5060 api.example.com."]
        assert await pair.resolve("extra.example.com") == ["192.0.2.99"]
        assert await pair.resolve("8.113.0.203.in-addr.arpa", "PTR") == ["api.example.com."]
        assert await pair.resolve("99.2.0.192.in-addr.arpa", "PTR") == ["extra.example.com."]
        assert len(await pair.resolve("api.example.com", "ANY")) == 5
        fake.queries.clear()
        for name, kind, code in (
            ("nowhere.org", "A", 3), ("9.113.0.203.in-addr.arpa", "PTR", 3), ("api.example.com", "NS", 0),
            ("alias.example.com", "AAAA", 0), ("8.113.0.203.in-addr.arpa", "TXT", 0),
        ):  # fmt: skip
            assert (await pair.query(name, kind)).header.rcode == code
        assert [(each.name, each.type, each.rcode.value) for each in fake.queries] == [
            ("nowhere.org", "A", 3), ("9.113.0.203.in-addr.arpa", "PTR", 3), ("api.example.com", "NS", 0),
            ("alias.example.com", "AAAA", 0), ("8.113.0.203.in-addr.arpa", "TXT", 0),
        ]  # fmt: skip


@bounded
async def test_who_has_no_ipv6_is_told_none_where_there_is_another(driver: DriverName) -> None:
    fake = FakeInternet()
    fake.host("both.example.com")
    fake.host("six.example.com", addresses=["2001:db8::6"])
    async with joined(driver, fake) as pair:
        assert await pair.resolve("both.example.com", "AAAA") == []
        assert await pair.resolve("six.example.com", "AAAA") == ["2001:db8::6"]


@bounded
async def test_what_is_refused_and_how(driver: DriverName) -> None:
    fake = FakeInternet()
    api = fake.host("api.example.com")
    api.serve_tcp(80, echo)
    api.refuse_tcp(81, Refusal.DROP)
    api.refuse_tcp(82, Refusal.PROHIBITED)
    async with joined(driver, fake) as pair:
        assert await pair.refusal("api.example.com", 79) == errno.ECONNREFUSED
        assert await pair.refusal("api.example.com", 81, patience=0.3) == 0
        assert await pair.refusal("api.example.com", 82) == errno.EHOSTUNREACH
        assert await pair.refusal("192.0.2.200") == errno.EHOSTUNREACH
        api.down()
        assert not api.is_up
        assert await pair.refusal("api.example.com") == errno.EHOSTUNREACH
        api.down(Refusal.DROP)
        assert await pair.refusal("api.example.com", patience=0.3) == 0
        api.up()
        assert api.is_up
        await (await pair.dial("api.example.com")).aclose()
    asked = [(each.host, each.refused) for each in fake.flows]  # a SYN that is lost comes again
    assert [each for each, after in zip(asked, [*asked[1:], None], strict=True) if each != after] == [
        (api, Refusal.RESET), (api, Refusal.DROP), (api, Refusal.PROHIBITED), (None, Refusal.NET_UNREACHABLE),
        (api, Refusal.HOST_UNREACHABLE), (api, Refusal.DROP), (api, None),
    ]  # fmt: skip


@bounded
async def test_unknown_addresses_may_be_a_black_hole(driver: DriverName) -> None:
    async with joined(driver, FakeInternet(unknown=Refusal.DROP)) as pair:
        assert await pair.refusal("192.0.2.200", patience=0.3) == 0


@bounded
async def test_hosts_change_while_they_are_used(driver: DriverName) -> None:
    fake = FakeInternet()

    def saying(what: bytes) -> Any:
        async def handler(stream: GuestStream) -> None:
            await stream.send(what)
            await echo(stream)

        return handler

    async with joined(driver, fake) as pair:
        assert await pair.resolve("api.example.com") == []
        api = fake.host("api.example.com")
        api.tcp(None)(saying(b"any"))
        async with await pair.dial("api.example.com") as first:
            assert await first.receive() == b"any"
            assert api.tcp(80)(handler := saying(b"second")) is handler
            async with await pair.dial("api.example.com") as second:
                assert await second.receive() == b"second"
                await first.send(b"still")
                assert await first.receive() == b"still"
                api.down()
                for each in first, second:
                    with pytest.raises(anyio.BrokenResourceError):
                        await each.receive()
        api.up()
        api.alias("alias.example.com")
        fake.remove_record("alias.example.com")
        assert await pair.resolve("alias.example.com") == []
        async with await pair.dial("api.example.com", 81) as third:
            fake.remove(api)
            with pytest.raises(anyio.BrokenResourceError):
                await everything(third)
        assert await pair.resolve("api.example.com") == []
        assert await pair.refusal(str(api.addresses[0])) == errno.EHOSTUNREACH
        again = fake.host("api.example.com", addresses=api.addresses)
        assert await pair.resolve("api.example.com") == [str(again.addresses[0])]


@bounded
async def test_a_handler_that_fails_resets(driver: DriverName, caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeInternet()

    async def fails(stream: GuestStream) -> None:
        await stream.receive()
        raise LookupError("a bug")

    fake.host("api.example.com").serve_tcp(80, fails)
    async with joined(driver, fake) as pair, await pair.dial("api.example.com") as stream:
        await stream.send(b".")
        with pytest.raises(anyio.BrokenResourceError):
            await stream.receive()
    assert "a bug" in caplog.text


@bounded
async def test_a_policy_decides_first(driver: DriverName) -> None:
    fake = FakeInternet(policy=Policy.deny().allow("*.example.com", ports=80).allow(HOST))
    api = fake.host("api.example.com", "other.org")
    api.serve_tcp(None, echo)
    async with joined(driver, fake) as pair:
        assert await pair.refusal(str(api.addresses[0])) == errno.EHOSTUNREACH
        assert (await pair.query("other.org")).rr == []
        async with await pair.dial("api.example.com") as stream:
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            [flow] = [each for each in await pair.stack.flows() if each.remote.port == 80]
            assert flow.name == "api.example.com"
            assert "*.example.com" in str(flow.rule)
            await pair.stack.set_policy(Policy.deny(), existing="cut")
            with pytest.raises(anyio.BrokenResourceError):
                await stream.receive()
    assert [each.remote.port for each in fake.flows] == [80]
    assert {each.name for each in fake.queries} == {"api.example.com"}


@pytest.mark.parametrize("host", [b"api.example.com", b"other.example.com"])
@bounded
async def test_a_policy_looks_at_first_bytes(driver: DriverName, host: bytes) -> None:
    fake = FakeInternet(policy=Policy.deny().allow("api.example.com", host=True))
    heard: list[bytes] = []
    ended = anyio.Event()

    async def handler(stream: GuestStream) -> None:
        try:
            while True:
                heard.append(await stream.receive())
                await stream.send(b"welcome")
        except anyio.BrokenResourceError:
            ended.set()

    api = fake.host("api.example.com")
    api.serve_tcp(80, handler)
    api.refuse_tcp(81)
    async with joined(driver, fake) as pair:
        assert await pair.refusal("api.example.com", 81) == errno.ECONNREFUSED
        async with await pair.dial("api.example.com") as stream:
            await stream.send(REQUEST % host)
            if host.startswith(b"api"):
                assert await stream.receive() == b"welcome"
                await stream.send(b"more")
                assert await stream.receive() == b"welcome"
                assert heard == [REQUEST % host, b"more"]
                await pair.inside.end_flow(stream.extra(FlowAttribute.flow_id))
            else:
                with pytest.raises(anyio.BrokenResourceError):
                    await stream.receive()
        await ended.wait()
        assert len(heard) == (2 if host.startswith(b"api") else 0)


@bounded
async def test_faults_are_between_the_namespace_and_the_internet(driver: DriverName) -> None:
    fake = FakeInternet()
    fake.host("api.example.com", "other.example.com").serve_tcp(80, echo)
    async with joined(driver, fake) as pair:
        async with pair.stack.faults(dns="servfail", to="api.example.com"):
            assert (await pair.query("api.example.com")).header.rcode == 2
            assert (await pair.query("other.example.com")).header.rcode == 0
        async with pair.stack.faults(refuse=True, to="api.example.com"):
            assert await pair.refusal("api.example.com") == errno.ECONNREFUSED
        assert list(fake.flows) == []
        async with pair.stack.faults(reset_after=3, ports=80), await pair.dial("api.example.com") as stream:
            await stream.send(b"hello")
            with pytest.raises(anyio.BrokenResourceError):
                await everything(stream)


@bounded
async def test_a_capture_has_it_all(driver: DriverName, tmp_path: Path) -> None:
    fake = FakeInternet()
    fake.host("api.example.com").serve_tcp(80, echo)
    async with joined(driver, fake) as pair:
        async with pair.stack.capture(tmp_path / "all.pcapng"), await pair.dial("api.example.com") as stream:
            await stream.send(b"something that is said")
            await stream.receive()
        written = (tmp_path / "all.pcapng").read_bytes()
        assert written.count(b"something that is said") == 2
        assert b"api.example.com" in written


@bounded
async def test_who_is_asked_may_send_a_flow_elsewhere(driver: DriverName) -> None:
    fake = FakeInternet()
    staging = fake.host("staging.example.com")
    staging.serve_tcp(8080, echo)

    async def on_flow(asked: object) -> Endpoint:
        return Endpoint(staging.addresses[0], 8080)

    async with (
        joined(driver, fake, on_flow=on_flow) as pair,
        await pair.inside.connect_tcp("192.0.2.7", 80, source=GUEST) as stream,
    ):
        await stream.send(b"x")
        assert await stream.receive() == b"x"
    assert [str(each.remote) for each in fake.flows] == [f"{staging.addresses[0]}:8080"]


@bounded
async def test_one_internet_of_two_stacks(driver: DriverName) -> None:
    fake = FakeInternet()
    api = fake.host("api.example.com")
    api.serve_tcp(80, echo)
    async with joined(driver, fake) as one, await one.dial("api.example.com") as first:
        async with joined(driver, fake) as other, await other.dial("api.example.com") as second:
            for each in first, second:
                await each.send(b"x")
                assert await each.receive() == b"x"
            with pytest.raises(ArgumentError, match="uplink of 2"):
                await api.connect_tcp(8080)
        await first.send(b"x")
        assert await first.receive() == b"x"
    with pytest.raises(ArgumentError, match="uplink of 0"):
        await api.connect_tcp(8080)


@bounded
async def test_a_client_outside_of_a_published_port(driver: DriverName) -> None:
    fake = FakeInternet()
    client = fake.host("client.example.net", addresses=["198.51.100.9"])
    seen: list[str] = []

    async def server(stream: GuestStream) -> None:
        seen.append(str(stream.extra(FlowAttribute.remote).address))
        await echo(stream)

    async with (
        joined(driver, fake) as pair,
        Forwarder(pair.stack) as forwarder,
        await pair.inside.serve_tcp(GUEST, 80, server),
    ):
        [published, chosen] = await forwarder.add("8080:80", "0:81")
        assert (published.host_port, published.mode) == (8080, "stack")
        assert chosen.host_port > 1024
        for port in 8080, 0:
            with pytest.raises(PortInUseError if port else FeatureUnavailable):
                await forwarder.add(f"{port}:80" if port else "5353:53/udp")
        async with Forwarder(pair.stack) as other:
            with pytest.raises(PortInUseError):
                await other.add("8080:81")
        async with await client.connect_tcp(8080) as stream:
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
            [flow] = await pair.stack.flows()
            assert flow.direction == "inbound"
        assert seen == ["198.51.100.9"]
        with pytest.raises(ConnectionRefusedError):  # not published
            await client.connect_tcp(8081)
        with pytest.raises(OSError, match=os.strerror(errno.EHOSTUNREACH)):  # nobody is there inside
            await client.connect_tcp(chosen.host_port)
        await forwarder.remove(published)
        with pytest.raises(ConnectionRefusedError):
            await client.connect_tcp(8080)


@bounded
async def test_a_handler_outlives_nothing(driver: DriverName) -> None:
    fake = FakeInternet()
    began, ended = anyio.Event(), anyio.Event()

    async def waits(stream: GuestStream) -> None:
        began.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    fake.host("api.example.com").serve_tcp(80, waits)
    async with joined(driver, fake) as pair:
        async with await pair.dial("api.example.com") as stream:
            await began.wait()
            await pair.stack.close()
            await ended.wait()
            with pytest.raises((anyio.BrokenResourceError, anyio.EndOfStream)):
                await stream.receive()
        with pytest.raises(StackClosed):
            await pair.stack.flows()


async def test_no_socket_of_the_hosts_network_is_made() -> None:
    """In a process of its own, for an audit hook stays."""
    command = [sys.executable, "-m", "tests.support.no_sockets"]
    done = await anyio.run_process(command, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b"AF_UNIX"]


@bounded
async def test_ten_thousand_names_are_hosts_of_their_own(driver: DriverName) -> None:
    fake = FakeInternet()
    for number in range(10_000):
        fake.host(f"host{number}.example.com").serve_tcp(80, name_of)
    assert len(fake["host9999.example.com"].addresses) == 2
    async with joined(driver, fake) as pair:
        for number in (0, 761, 762, 9999):
            stream = await pair.dial(f"host{number}.example.com")
            assert await everything(stream) == f"host{number}.example.com".encode()
    assert fake["host761.example.com"].addresses[0] not in PRIVATE
    assert fake["host762.example.com"].addresses[0] in PRIVATE
    assert (
        len({each for number in range(10_000) for each in fake[f"host{number}.example.com"].addresses})
        == 20_000
    )


THERE = packets.GUEST + bytes((192, 0, 2, 1))
PINGS = [packets.echo_request(THERE[4:])] * 3000
QUERIES = [
    packets.datagram(
        packets.RESOLVER, 53, DNSRecord.question(f"n{number}.example.com").pack(), source_port=1024 + number
    )
    for number in range(3000)
]
GIVEN_UP = [
    packets.packet(
        ip.TCP,
        THERE,
        tcp.pack(src_port=1024 + number, dst_port=80, seq=seq, ack=0, flags=flags, window=1),
        16,
    )
    for number in range(1500)
    for flags, seq in ((tcp.SYN, 1), (tcp.RST, 2))
]


@pytest.mark.parametrize("flood", [PINGS, QUERIES, GIVEN_UP], ids=["pings", "queries", "given up"])
@pytest.mark.parametrize("driver", ["thread", "worker"])
@bounded
async def test_a_flood_leaves_the_event_loop_little_to_do(driver: DriverName, flood: list[bytes]) -> None:
    """The loop is busy meanwhile, so that all could pile up."""
    fake = FakeInternet()
    fake.host("*.example.com", addresses=["192.0.2.1"]).serve_tcp(80, echo)
    most = 0
    async with stack_of(driver, fake) as (stack, guest):
        buffer = bytearray(FRAME_MAX)
        for packet in flood:
            send(guest, packet)
            guest.flush()
            time.sleep(0.0001)  # noqa: ASYNC251 - the loop is busy
            while guest.read_into(buffer):
                pass
        while (await stack.stats())["tap_received"] < len(flood):
            guest.flush()
            most = max(most, len(anyio.get_running_tasks()))
            await anyio.sleep(0.001)
        for _ in range(100):
            most = max(most, len(anyio.get_running_tasks()))
            await checkpoint()
    assert most < 600
    assert len(fake.flows) < 1000


def test_a_worker_may_ask_nonsense() -> None:
    fake = FakeInternet()
    for asked in b"", bytes(11), bytes(12), bytes(11) + b"\1", b"\0\0\1\0\0\1" + bytes(6) + b"\x3f" * 30:
        with suppress(ValueError):  # which is expected of it
            fake.world.resolve(cast("Servers", SimpleNamespace(stack=SimpleNamespace(subnet=SUBNET))), asked)
    assert not fake.queries


def test_a_worker_gets_no_more_than_settings() -> None:
    policy = Policy.deny()
    fake = FakeInternet(policy=policy, any_source=True, search=["example.com"])
    fake.host("api.example.com").serve_tcp(80, lambda stream: None)  # type: ignore[arg-type,return-value]
    copy = pickle.loads(pickle.dumps(fake))
    assert type(copy) is InMemoryUplink
    assert copy.search() == ("example.com",)
    assert copy.policy == policy
    assert copy.any_source


def test_mistakes_are_told_at_once() -> None:
    fake = FakeInternet()
    api = fake.host("api.example.com", "*.example.org", addresses=["203.0.113.7"])
    assert fake["API.example.com."] is api
    assert fake["203.0.113.7"] is api
    assert fake["*.example.org"] is api
    for wrong, error in (
        (lambda: fake.host("api.example.com"), ArgumentError),
        (lambda: fake.host("a..b"), DomainNameError),
        (lambda: fake.host("192.0.2.1"), DomainNameError),
        (lambda: fake.host("2001:db8::1"), DomainNameError),
        (lambda: fake.host("http://b.example.com"), DomainNameError),
        (lambda: fake.host("b.example.com:80"), DomainNameError),
        (lambda: fake.host("b.example.com", addresses=["203.0.113.7"]), AddressError),
        (lambda: fake.host("b.example.com", addresses=["192.0.2.1", "192.0.2.1"]), AddressError),
        (lambda: fake.host("b.example.com", addresses=["127.0.0.1"]), AddressError),
        (lambda: fake.host("b.example.com", addresses=["nonsense"]), AddressError),
        (lambda: fake.host("b.example.com", addresses=[]), ArgumentError),
        (lambda: fake.host("b.example.com", addresses="192.0.2.1"), ArgumentTypeError),
        (lambda: fake.host("*.b.example.com").alias("c.example.com"), ArgumentError),
        (lambda: fake["b.example.com"], NotFound),
        (lambda: fake["192.0.2.1"], NotFound),
        (lambda: fake.remove_record("api.example.com"), NotFound),
        (lambda: fake.remove(FakeInternet().host("a.example.com")), NotFound),
        (lambda: api.serve_tcp(0, echo), ArgumentError),
        (lambda: api.tcp(70000), ArgumentError),
        (lambda: api.serve_udp(80, 7), ArgumentTypeError),  # type: ignore[arg-type]
        (lambda: api.refuse_udp(80, "reset"), ArgumentTypeError),  # type: ignore[arg-type]
        (lambda: api.down("reset"), ArgumentTypeError),  # type: ignore[arg-type]
        (lambda: FakeInternet(unknown="drop"), ArgumentTypeError),  # type: ignore[arg-type]
        (lambda: FakeInternet(search="example.com"), ArgumentTypeError),
    ):  # fmt: skip
        with pytest.raises(error):
            wrong()
    assert repr(fake) == "<FakeInternet of 3 names>"
    assert repr(api) == "<FakeHost api.example.com, *.example.org, 203.0.113.7>"
