"""A policy at flows, with the clients that people have: what passes, what is refused and how, on each driver."""

from __future__ import annotations

import errno
import socket
import ssl
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import get_args

import anyio
import anyio.lowlevel
import pytest

from netns_kit import HOST, Network, Policy, Refusal, Uplink
from netns_kit.gateway.setup import DriverName
from tests.support import needs, needs_ping, needs_tun
from tests.support.connections import (
    GATEWAY,
    dial,
    driver,
    echoes,
    every_driver,
    failure,
    outcome,
    pair,
    stuck,
    tcp_socket,
)
from tests.support.servers import bounded, echo, http, tcp_server, udp_server

__all__ = ["driver"]  # a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

NOWHERE = "192.0.2.1"  # TEST-NET-1; what would go there is refused before
NAMES = ["good.example=10.0.2.2", "bad.example=10.0.2.2"]


def network(
    driver: DriverName, policy: Policy | None, *, queues: int = 1, records: Iterable[str] = ()
) -> Network:
    needs_tun()
    uplink = Uplink(allow_host_loopback=True, dns=[])
    return Network(uplink=uplink, driver=driver, policy=policy, queues=queues, records=records)


async def curl(net: Network, *words: str) -> subprocess.CompletedProcess[bytes]:
    return await net.run(["curl", "-sS", "-m", "20", *words], stdout=-1, stderr=-1, check=False)


async def datagram_fails(net: Network, port: int = 9) -> int:
    """The errno that a datagram to NOWHERE ends with."""
    with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((NOWHERE, port))
        sock.send(b"x")
        await anyio.wait_readable(sock)
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


# -- what passes, and how the rest is refused ----------------------------------------------------------


@every_driver
@bounded
async def test_an_allowed_address_and_port_and_nothing_else(driver: DriverName) -> None:
    needs("curl")
    with tcp_server(http) as port, tcp_server(http) as other:
        async with network(
            driver, Policy.deny().allow(GATEWAY, ports=port, protocol="tcp", name="web")
        ) as net:
            assert (await curl(net, f"http://{GATEWAY}:{port}/peer")).stdout == b"127.0.0.1"
            for url in (f"http://{GATEWAY}:{other}/peer", f"http://{NOWHERE}:{port}/"):
                refused = await curl(net, url)
                assert refused.returncode == 7, "it could not connect"
                assert b"No route to host" in refused.stderr or b"Couldn't connect" in refused.stderr
            told = await curl(
                net, "--resolve", f"good.example:{other}:{GATEWAY}", f"http://good.example:{other}/"
            )
            assert told.returncode == 7, "a name of its own helps nobody"
            stats = await net.stack.stats()
    assert (stats["policy_refused"], stats["policy_audited"]) == (3, 0)


@every_driver
@pytest.mark.parametrize(
    ("refusal", "expected"), [("prohibited", errno.EHOSTUNREACH), ("reset", errno.ECONNREFUSED)]
)
@bounded
async def test_each_refusal_has_its_error(driver: DriverName, refusal: str, expected: int) -> None:
    policy = Policy.allow().deny("192.0.2.0/24", refusal=refusal)  # type: ignore[arg-type]  # one of them
    async with network(driver, policy) as net:
        with await dial(net.namespace, 80, NOWHERE) as sock:
            assert await outcome(sock) == expected
        assert await datagram_fails(net) == expected


@every_driver
@bounded
async def test_ping_is_told_that_it_is_prohibited(driver: DriverName) -> None:
    needs("ping")
    needs_ping()
    policy = Policy.deny().allow(GATEWAY, icmp_type="echo-request")
    async with network(driver, policy) as net:
        passed = await net.run(["ping", "-c1", "-W10", GATEWAY], stdout=-1, check=False)
        assert passed.returncode == 0, passed.stdout
        refused = await net.run(["ping", "-c1", "-W10", NOWHERE], stdout=-1, check=False)
    assert b"Packet filtered" in refused.stdout, refused.stdout


@every_driver
@bounded
async def test_silence_is_no_answer(driver: DriverName) -> None:
    """Nothing comes of it; the one that is refused with a word tells that something would have by now."""
    policy = Policy.allow().deny(NOWHERE, ports=80, refusal="silence").deny(NOWHERE)
    async with network(driver, policy) as net:
        with await dial(net.namespace, 80, NOWHERE) as silent, await dial(net.namespace, 81, NOWHERE) as told:
            assert await outcome(told) == errno.EHOSTUNREACH
            assert silent.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            assert silent.connect_ex((NOWHERE, 80)) == errno.EALREADY


@every_driver
@bounded
async def test_a_refused_request_is_told_why(driver: DriverName) -> None:
    needs("curl")
    async with network(driver, Policy.allow().deny("192.0.2.0/24", refusal="forbidden", name="lab")) as net:
        told = await curl(net, "-i", f"http://{NOWHERE}:8080/path", "-d", "x" * 100_000)
        assert told.returncode == 0, told.stderr
        head, _, body = told.stdout.decode().partition("\r\n\r\n")
        assert head.splitlines()[0] == "HTTP/1.1 403 Forbidden"
        assert "X-Netns-Kit-Rule: rule 1 (lab): deny 192.0.2.0/24" in head.splitlines()
        assert f"does not allow {NOWHERE}:8080." in body
        assert "Rule: rule 1 (lab): deny 192.0.2.0/24" in body
        head_only = await curl(net, "-I", f"http://{NOWHERE}/")
        assert head_only.stdout.startswith(b"HTTP/1.1 403 Forbidden")
        told = await curl(net, "-k", f"https://{NOWHERE}/")
        assert told.returncode == 35, "the TLS handshake fails"
        assert b"access denied" in told.stderr
        with await dial(net.namespace, 22, NOWHERE) as sock:
            assert await outcome(sock) == 0
            sock.send(b"SSH-2.0-OpenSSH_9.2\r\n")
            assert await failure(sock) == errno.ECONNRESET


@every_driver
@bounded
async def test_the_host_is_one_target(driver: DriverName) -> None:
    with tcp_server(http) as port, udp_server() as udp_port:
        async with network(driver, Policy.allow().deny(HOST)) as net:
            with await dial(net.namespace, port, GATEWAY) as sock:
                assert await outcome(sock) == errno.EHOSTUNREACH
            with await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect((GATEWAY, udp_port))
                sock.send(b"x")
                await anyio.wait_readable(sock)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EHOSTUNREACH


@every_driver
@bounded
async def test_audit_lets_pass_and_counts(driver: DriverName) -> None:
    with tcp_server(echo):
        async with network(driver, Policy.deny(audit=True)) as net, pair(net.namespace) as (guest, host):
            await echoes(guest, host)
            stats = await net.stack.stats()
    assert (stats["policy_refused"], stats["policy_audited"], stats["flows_refused"]) == (0, 1, 0)


@every_driver
@bounded
async def test_published_ports_are_no_egress(driver: DriverName) -> None:
    async with network(driver, Policy.deny()) as net:
        [forward] = await net.forwarder.add("127.0.0.1:0:80")
        with await tcp_socket(net.namespace) as listener:
            listener.bind(("10.0.2.100", 80))
            listener.listen()
            async with await anyio.connect_tcp("127.0.0.1", forward.host_port) as client:
                await anyio.wait_readable(listener)
                inside, _ = listener.accept()
                with inside:
                    inside.sendall(b"hello")
                    assert await client.receive() == b"hello"
                    await net.stack.set_policy(Policy.deny(refusal="reset"), existing="cut")
                    inside.sendall(b"still here")
                    assert await client.receive() == b"still here"


# -- a policy that changes -----------------------------------------------------------------------------


@every_driver
@bounded
async def test_a_new_policy_keeps_or_cuts_what_there_is(driver: DriverName) -> None:
    async with network(driver, Policy.allow()) as net:
        with udp_server() as port, await net.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            async with pair(net.namespace) as (guest, host):
                udp.connect((GATEWAY, port))
                udp.send(b"1")
                await anyio.wait_readable(udp)
                assert udp.recv(9) == b"1"
                await net.stack.set_policy(Policy.deny())
                assert net.stack.policy == Policy.deny()
                await echoes(guest, host)
                udp.send(b"2")
                await anyio.wait_readable(udp)
                assert udp.recv(9) == b"2"
                with await dial(net.namespace, port) as late:
                    assert await outcome(late) == errno.EHOSTUNREACH
                await net.stack.set_policy(Policy.deny().allow(GATEWAY), existing="cut")
                await echoes(guest, host)
                await net.stack.set_policy(Policy.deny(refusal="reset"), existing="cut")
                assert await failure(guest) == errno.ECONNRESET
                assert await failure(host) == errno.ECONNRESET
                udp.send(b"3")
                await anyio.wait_readable(udp)
                assert udp.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
                assert not [flow for flow in await net.stack.flows() if flow.direction == "outbound"]
        await net.stack.set_policy(None)
        assert net.stack.policy is None
        async with pair(net.namespace) as (guest, host):
            await echoes(guest, host)


@pytest.mark.parametrize("driver", get_args(DriverName))
@bounded
async def test_the_policy_that_was_set_last_decides_also_if_that_is_cancelled(driver: DriverName) -> None:
    policies = [Policy.deny(refusal="reset"), Policy.deny(), Policy.allow()]
    errors = dict(zip(policies, (errno.ECONNREFUSED, errno.EHOSTUNREACH, 0), strict=True))
    with tcp_server(http) as port:
        async with network(driver, None) as net:

            async def decides() -> None:
                await net.stack.stats()  # what was asked of the engine before this is done
                assert net.stack.policy is not None
                with await dial(net.namespace, port) as sock:
                    assert await outcome(sock) == errors[net.stack.policy]

            for policy in policies:
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await net.stack.set_policy(policy)
                assert net.stack.policy == policy
                await decides()
            for number in range(12):
                async with anyio.create_task_group() as tasks:
                    for policy in policies:
                        tasks.start_soon(net.stack.set_policy, policy)
                    for _ in range(number):
                        await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
                await decides()


@every_driver
@bounded
async def test_what_hangs_is_cut_as_the_rule_says(driver: DriverName) -> None:
    async with network(driver, None) as net:
        with stuck() as (_, port), await dial(net.namespace, port) as hanging:
            while not await net.stack.flows():  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.01)
            await net.stack.set_policy(Policy.deny(refusal="reset"), existing="cut")
            assert await outcome(hanging) == errno.ECONNREFUSED


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@bounded
async def test_all_workers_get_a_new_policy_without_a_gap(leaks: None) -> None:
    """While policies that allow one port each take turns, whoever tries a third never gets through."""
    with tcp_server(http) as first, tcp_server(http) as second, tcp_server(http) as never:
        policies = [Policy.deny().allow(GATEWAY, ports=port) for port in (first, second)]
        async with network("worker", policies[0], queues=3) as net, AsyncExitStack() as stack:
            done = False

            async def turn() -> None:
                for number in range(60):
                    await net.stack.set_policy(policies[number % 2], existing="keep" if number % 3 else "cut")
                nonlocal done
                done = True

            tasks = await stack.enter_async_context(anyio.create_task_group())
            tasks.start_soon(turn)
            tried = 0
            while not done:
                with await dial(net.namespace, never) as sock:
                    assert await outcome(sock) == errno.EHOSTUNREACH
                tried += 1
            assert tried > 20
            for port, policy in zip((first, second), policies, strict=True):
                await net.stack.set_policy(policy)
                for _ in range(12):  # by whichever queue
                    with await dial(net.namespace, port) as sock:
                        assert await outcome(sock) == 0
                    with await dial(net.namespace, first + second - port) as sock:
                        assert await outcome(sock) == errno.EHOSTUNREACH


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@bounded
async def test_what_is_no_policy_is_refused_and_the_old_one_stays(leaks: None) -> None:
    async with network("thread", Policy.deny()) as net:
        for policy, existing in (("deny", "keep"), (Policy.allow(), "drop"), (print, "keep")):
            with pytest.raises(ValueError, match="expected"):
                await net.stack.set_policy(policy, existing)  # type: ignore[arg-type]  # as callers who check no types
        assert net.stack.policy == Policy.deny()
        with await dial(net.namespace, 80, NOWHERE) as sock:
            assert await outcome(sock) == errno.EHOSTUNREACH


def test_one_policy_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"expected one policy.*leave out that of Uplink"):
        Network(uplink=Uplink(policy=Policy.deny()), policy=Policy.allow())
    network = Network(uplink=Uplink(policy=Policy.deny()))
    assert network.stack.policy == network.stack.setup.policy == Policy.deny()
    assert Network(uplink=Uplink(policy=_nothing), policy=Policy.deny()).stack.policy == Policy.deny()


def _nothing(_: object) -> Refusal:
    return Refusal.RESET


# -- first bytes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate that nobody trusts, in one file."""
    needs("openssl")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=good.example"
    made = [
        subprocess.run(["openssl", *words.split(), "-keyout", "-"], check=True, capture_output=True).stdout
    ]
    path.write_bytes(b"".join(made))
    return path


@contextmanager
def tls_server(certificate: Path) -> Iterator[tuple[int, list[str | None]]]:
    """A server of HTTP over TLS, and the names that its clients have asked for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    asked: list[str | None] = []
    context.sni_callback = lambda _, name, __: asked.append(name)

    def serve(sock: socket.socket) -> None:
        try:
            sock.recv(1, socket.MSG_PEEK)  # what was reset cannot be wrapped without a leak
            with context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) as secured:
                secured.do_handshake()
                http(secured)
        except (ssl.SSLError, OSError):
            asked.append("nothing")

    with tcp_server(serve) as port:
        yield port, asked


@every_driver
@bounded
async def test_names_at_one_address_are_told_apart(driver: DriverName, certificate: Path) -> None:
    """By what a real TLS client asks for; the server hears nothing of the one that is refused."""
    needs("curl")
    policy = (
        Policy.deny()
        .allow("good.example", sni=True, private=True, name="good")
        .allow("bad.example", only="dns")
    )
    with tls_server(certificate) as (port, asked):
        async with network(driver, policy, records=NAMES) as net:
            passed = await curl(
                net, "-k", f"https://good.example:{port}/1", "-o", "/dev/null", "-w", "%{size_download}"
            )
            assert passed.stdout == str(1 << 20).encode(), passed.stderr
            refused = await curl(net, "-k", f"https://bad.example:{port}/peer")
            assert refused.returncode == 35, refused.stderr
            other = f"bad.example:{port}:{GATEWAY}"
            refused = await curl(net, "-k", "--resolve", other, f"https://bad.example:{port}/peer")
            assert refused.returncode == 35, refused.stderr
            refused = await curl(net, "-k", f"https://{GATEWAY}:{port}/peer")
            assert refused.returncode == 35, "no name at all"
            refused = await curl(net, f"http://good.example:{port}/peer")
            assert refused.returncode == 56, "no TLS at all"
    assert set(asked) <= {"good.example", "nothing"}
    assert "good.example" in asked


@every_driver
@bounded
async def test_hosts_at_one_address_are_told_apart(driver: DriverName) -> None:
    needs("curl")
    policy = Policy.deny(refusal="forbidden").allow("good.example", host=True, private=True)
    with tcp_server(http) as port:
        async with network(driver, policy, records=NAMES) as net:
            passed = await curl(
                net, f"http://good.example:{port}/1", "-o", "/dev/null", "-w", "%{size_download}"
            )
            assert passed.stdout == str(1 << 20).encode(), passed.stderr
            put = await curl(net, f"http://good.example:{port}/", "-T", "/proc/self/exe")
            assert len(put.stdout) == 64, put.stderr
            told = await curl(net, "-i", "-H", "Host: bad.example", f"http://good.example:{port}/")
            assert told.stdout.startswith(b"HTTP/1.1 403 Forbidden"), told.stderr
            assert b"default: deny" in told.stdout
