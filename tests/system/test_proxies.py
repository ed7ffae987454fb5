"""Real programs inside, through real proxies at home; the world sees what comes out of them, and nothing else."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import anyio
import pytest

from netns_kit import (
    DnsSettings,
    FlowRequest,
    HttpConnectUplink,
    Namespace,
    Network,
    Policy,
    Socks5Uplink,
)
from netns_kit.uplink.indirect import IndirectUplink, ProxyNames
from tests.support import needs, needs_tun
from tests.support.clients import ALLOWED, Client, Place, git_ssh, pip, ssh
from tests.support.events import followed
from tests.support.pcapng import read
from tests.support.proxies import Proxy
from tests.support.servers import SECONDS, closed_port
from tests.support.world import (
    DRIVERS,
    ELSEWHERE,
    EVIL,
    NEIGHBOUR,
    QUEUES,
    RESOLVER,
    WEB,
    World,
    in_world,
)

Start = Callable[[Path, int], list[str]]


def microsocks(_: Path, port: int) -> list[str]:
    return ["microsocks", "-i", "127.0.0.1", "-p", str(port)]


def microsocks_with_password(_: Path, port: int) -> list[str]:
    return ["microsocks", "-i", "127.0.0.1", "-p", str(port), "-u", "me", "-P", "s3cr3t"]


def tinyproxy(path: Path, port: int) -> list[str]:
    (path / "conf").write_text(f"Port {port}\nListen 127.0.0.1\nTimeout 60\nMaxClients 100\n")
    return ["tinyproxy", "-d", "-c", str(path / "conf")]


def tinyproxy_with_password(path: Path, port: int) -> list[str]:
    command = tinyproxy(path, port)
    with (path / "conf").open("a") as conf:
        conf.write("BasicAuth me s3cr3t\n")
    return command


def squid(path: Path, port: int, *rules: str) -> list[str]:
    """One that caches nothing, logs nothing, and runs as whoever starts it."""
    settings = [
        f"http_port 127.0.0.1:{port}",
        *rules,
        "http_access allow all",
        "cache deny all",
        "cache_mem 8 MB",
    ]
    settings += [f"cache_log {path}/log", "access_log none", "cache_store_log none", "pid_filename none"]
    settings += [
        f"coredump_dir {path}",
        "pinger_enable off",
        "visible_hostname proxy",
        "max_filedescriptors 1024",
    ]
    settings += ["shutdown_lifetime 0 seconds", "dns_nameservers 127.0.0.9", f"netdb_filename {path}/netdb"]
    (path / "conf").write_text("".join(f"{each}\n" for each in settings))
    return ["squid", "-N", "-n", f"squid{os.getpid()}p{port}", "-f", str(path / "conf")]


def squid_with_password(path: Path, port: int) -> list[str]:
    helper = path / "helper"
    helper.write_text(
        '#!/bin/sh\nwhile read line; do [ "$line" = "me s3cr3t" ] && echo OK || echo ERR; done\n'
    )
    helper.chmod(0o755)
    rules = (f"auth_param basic program {helper}", "acl known proxy_auth REQUIRED", "http_access deny !known")
    return squid(path, port, *rules)


def danted(path: Path, port: int) -> list[str]:
    (path / "conf").write_text(
        f"""logoutput: stderr
internal: 127.0.0.1 port = {port}
external: eth0
clientmethod: none
socksmethod: none
client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
socks block {{ from: 0.0.0.0/0 to: {EVIL}/32 }}
socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
"""
    )
    return ["danted", "-f", str(path / "conf")]


WITH_HOSTS = """
import ctypes, os, sys
MS_BIND = 4096
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.mount(sys.argv[1].encode(), b"/etc/hosts", None, MS_BIND, None), ctypes.get_errno()
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Runs a program that has another hosts file."""


class Running(NamedTuple):
    """A proxy that runs: its address and port, and its process."""

    at: str
    process: subprocess.Popen[bytes]


@contextmanager
def serving(
    start: Start, path: Path, port: int = 0, hosts: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A proxy at home, which listens.  It knows the addresses of `hosts`, if any are given, and asks nobody."""
    port = port or closed_port()
    command = start(path, port)
    needs(command[0])
    if hosts is not None:
        (path / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        apart = ["unshare", "--user", "--map-current-user", "--keep-caps", "--mount"]
        command = [*apart, sys.executable, "-c", WITH_HOSTS, str(path / "hosts"), *command]
    with (path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end = time.monotonic() + SECONDS
        while not _listens(port):
            assert process.poll() is None, (path / "log").read_text()
            assert time.monotonic() < end, "it does not listen"
            time.sleep(0.02)
        yield Running(f"127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.wait(SECONDS)
        for left in Path("/dev/shm").glob(f"squid{os.getpid()}p{port}-*"):  # squid's, when it is killed
            left.unlink()


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def network(world: World, uplink: IndirectUplink, driver: str) -> Network:
    return world.network(driver, uplink=uplink, ipv6=False)


async def curl(net: Network, url: str) -> tuple[int, str]:
    command = ["curl", "-sS", "--max-time", str(SECONDS), url]
    done = await net.run(command, env={"PATH": os.environ["PATH"]}, stderr=subprocess.STDOUT, check=False)
    return done.returncode, done.stdout.decode()


HOW: dict[str, tuple[Start, type[Socks5Uplink | HttpConnectUplink], tuple[str, ...]]] = {
    "microsocks": (microsocks, Socks5Uplink, ()),
    "microsocks, password": (microsocks_with_password, Socks5Uplink, ("me", "s3cr3t")),
    "danted": (danted, Socks5Uplink, ()),
    "squid": (squid, HttpConnectUplink, ()),
    "squid, password": (squid_with_password, HttpConnectUplink, ("me", "s3cr3t")),
    "tinyproxy": (tinyproxy, HttpConnectUplink, ()),
    "tinyproxy, password": (tinyproxy_with_password, HttpConnectUplink, ("me", "s3cr3t")),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("how", HOW)
@in_world
async def test_curl_through_a_real_proxy(world: World, how: str, driver: str, tmp_path: Path) -> None:
    needs("curl")
    start, kind, credentials = HOW[how]
    with serving(start, tmp_path) as proxy:
        uplink = kind(proxy.at, *credentials, names="here", dns=[RESOLVER])
        async with network(world, uplink, driver) as net:
            world.forget()
            assert await curl(net, "http://www.example.org/") == (0, "welcome\n")
            assert {each[0] for each in world.asked} == {"tcp"}, "no question by another way"
            assert not [each for each in world.arrivals() if each.protocol != "tcp"]
            status, text = await curl(net, f"http://{WEB}:81/")
            assert (status, "Failed to connect" in text) == (7, True), "nobody listens there"
            if how == "danted":
                assert (await curl(net, f"http://{EVIL}/"))[0] == 7
                assert not [each for each in world.arrivals() if each.target == EVIL]


@pytest.mark.parametrize("client", [ssh, git_ssh, pip])
@pytest.mark.parametrize(
    ("how", "driver"),
    [("microsocks", "thread"), ("danted", "worker"), ("tinyproxy", "loop"), ("squid, password", "worker")],
)
@in_world
async def test_other_clients_through_a_real_proxy(
    world: World, how: str, driver: str, client: Callable[[Place], Iterator[Client]], tmp_path: Path
) -> None:
    world.says(ALLOWED, f"{ALLOWED} 60 IN A {WEB}")
    start, kind, credentials = HOW[how]
    (tmp_path / "proxy").mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C"}
    with (
        serving(start, tmp_path / "proxy") as proxy,
        client(Place(world, tmp_path)) as this,  # type: ignore[attr-defined]  # they are context managers
    ):
        uplink = kind(proxy.at, *credentials, names="here", dns=[RESOLVER])
        namespace = Namespace.create(ids="same")
        async with world.network(driver, uplink=uplink, ipv6=False, namespace=namespace) as net:
            command = this.command(ALLOWED)
            done = await net.run(command, env=environment, stderr=subprocess.STDOUT, check=False)
            assert (done.returncode, this.says in done.stdout.decode()) == (0, True), done.stdout.decode()


WITH_PASSWORD = [each for each in HOW if "password" in each]


@pytest.mark.parametrize("credentials", [(), ("me", "wr0ng")])
@pytest.mark.parametrize("how", WITH_PASSWORD)
@in_world
async def test_a_real_proxy_wants_a_password(
    world: World, how: str, credentials: tuple[str, ...], tmp_path: Path
) -> None:
    start, kind, _ = HOW[how]
    with serving(start, tmp_path) as proxy:
        async with network(
            world, kind(proxy.at, *credentials, names="here", dns=[RESOLVER]), "thread"
        ) as net:
            world.forget()
            assert await world.tries(net, ("tcp", WEB, 80), ("tcp", WEB, 23)) == ["EHOSTUNREACH"] * 2
            assert b"hello" not in _payloads(world), "there is no other way"


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("how", ["microsocks", "danted", "tinyproxy", "squid"])
@in_world
async def test_a_real_proxy_that_hangs_or_dies(world: World, how: str, driver: str, tmp_path: Path) -> None:
    start, kind, _ = HOW[how]
    with serving(start, tmp_path) as proxy:
        uplink = kind(proxy.at, names="here", dns=[RESOLVER], time_limit=1.0)
        async with network(world, uplink, driver) as net:
            async with await net.popen(
                [sys.executable, "-c", MIDST, WEB], stdin=PIPE, stdout=PIPE
            ) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                assert await process.stdout.receive() == b"hello\n"
                _signal_all(proxy.process, signal.SIGSTOP)
                assert await world.tries(net, ("tcp", WEB, 80)) == ["EHOSTUNREACH"], "it hangs"
                _signal_all(proxy.process, signal.SIGKILL)
                proxy.process.wait(SECONDS)
                await process.stdin.send(b"\n")
                assert await process.stdout.receive() in (b"the end\n", b"ConnectionResetError\n")
            world.forget()
            assert await world.tries(net, ("tcp", WEB, 80)) == ["EHOSTUNREACH"], "it is not there"
            assert b"hello" not in _payloads(world), "there is no other way"
            with serving(start, tmp_path, int(proxy.at.partition(":")[2])):
                assert await world.tries(net, ("tcp", WEB, 80)) == ["hello"], "it is back"


HOSTS = {"www.example.org": WEB}
BY_NAME = ["microsocks", "danted", "tinyproxy", "squid"]


def by_name(proxy: Running, how: str, path: Path) -> IndirectUplink:
    """An uplink whose host has a resolver that does not answer."""
    (path / "resolv.conf").write_text("nameserver 127.0.0.53\nsearch corp.example\noptions ndots:5\n")
    return HOW[how][1](proxy.at, dns=DnsSettings(resolv_conf=str(path / "resolv.conf")))


@pytest.mark.parametrize("driver", QUEUES)
@pytest.mark.parametrize("how", BY_NAME)
@in_world
async def test_a_real_proxy_resolves_names_where_no_resolver_answers(
    world: World, how: str, driver: str, tmp_path: Path
) -> None:
    """Also of a policy by name, and nobody but the proxy is told a name."""
    needs("curl")
    with serving(HOW[how][0], tmp_path, hosts=HOSTS) as proxy:
        uplink = by_name(proxy, how, tmp_path)
        policy = Policy.deny().allow("*.example.org", ports=80)
        for options in {}, {"policy": policy}:
            async with world.network(driver, uplink=uplink, ipv6=False, **options) as net:
                world.forget()
                for _ in range(4):
                    assert await curl(net, "http://www.example.org/") == (0, "welcome\n")
                assert (await curl(net, "http://www.example.org:81/"))[0] == 7
                if options:
                    assert (await curl(net, "http://another.example/"))[0] == 6, "the policy refuses the name"
                assert not world.asked
                assert not [each for each in world.arrivals() if each.protocol != "tcp"]


@pytest.mark.parametrize("driver", QUEUES)
@in_world
async def test_datagrams_by_name_through_a_real_proxy(world: World, driver: str, tmp_path: Path) -> None:
    with serving(danted, tmp_path, hosts=HOSTS) as proxy:
        async with network(world, by_name(proxy, "danted", tmp_path), driver) as net:
            assert await world.tries(net, ("udp", "www.example.org", 7777)) == ["hello"]


@pytest.mark.parametrize("driver", DRIVERS)
@in_world
async def test_what_is_seen_of_flows_through_a_real_proxy(world: World, driver: str, tmp_path: Path) -> None:
    """Events, captures, counters and `on_flow` have the name and the destination, whoever resolves it."""
    asked: list[FlowRequest] = []

    async def on_flow(request: FlowRequest) -> bool:
        asked.append(request)
        return True

    policy = Policy.deny().ask("www.example.org").allow(WEB, ports=80)
    with serving(microsocks, tmp_path, hosts=HOSTS) as proxy:
        uplink = by_name(proxy, "microsocks", tmp_path)
        options = {"uplink": uplink, "ipv6": False, "policy": policy, "on_flow": on_flow}
        async with (
            world.network(driver, **options) as net,
            net.stack.capture(file := io.BytesIO(), where="www.example.org"),
            followed(net.stack) as events,
        ):
            before = await net.stack.stats()
            assert await world.tries(net, ("tcp", "www.example.org", 80), ("tcp", WEB, 80)) == ["hello"] * 2
            closed: list[tuple[str | None, int]] = []
            while len(closed) < 2:
                event = await events.receive()
                if (event.kind, event.flow.protocol) == ("closed", "tcp"):
                    closed.append((event.flow.name, event.flow.bytes_to_guest))
            assert closed[0][0] == "www.example.org"
            assert min(carried for _, carried in closed) > 0
            after = await net.stack.stats()
            assert after["dns_owned"] == before["dns_owned"]
            assert after["flows_refused"] == before["flows_refused"]
        assert [(each.name, each.remote.port) for each in asked] == [("www.example.org", 80)]
        found = read(file.getvalue())
        assert any(b"hello" in each.data for each in found.packets)
        assert not any(ip_address(WEB).packed in each.data[26:34] for each in found.packets), "by name alone"


MIDST = """
import socket, sys
sock = socket.create_connection((sys.argv[1], 80), timeout=20)
sock.sendall(b"hello")
print(sock.recv(100).decode(), flush=True)
sys.stdin.readline()
try:
    print("more" if sock.recv(100) else "the end", flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


def _payloads(world: World) -> set[bytes]:
    """Return what has come to a server in the world."""
    return {each.payload for each in world.arrivals() if each.target == WEB}


def _signal_all(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a proxy and to all its children, the youngest first."""
    for pid in sorted(_descendants(process.pid), reverse=True):
        os.kill(pid, number)


def _descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _descendants(int(child))


@pytest.mark.parametrize("driver", DRIVERS)
@in_world
async def test_a_proxy_without_udp_resolves_names_all_the_same(
    world: World, driver: str, tmp_path: Path
) -> None:
    """What asks resolvers of its own by UDP is told at once, and asks ours with `intercept_dns`."""
    with serving(microsocks, tmp_path) as proxy:
        uplink = Socks5Uplink(proxy.at, names="here", dns=[RESOLVER])
        async with network(world, uplink, driver) as net:
            steps = (("tcp", "www.example.org", 80), ("ask", ELSEWHERE, "www.example.org"))
            assert await world.tries(net, *steps) == ["hello", "EHOSTUNREACH"]
            assert await world.tries(net, ("ask", ELSEWHERE, "www.example.org", "A", "tcp")) == [
                f"NOERROR {WEB}"
            ]
        async with world.network(driver, uplink=uplink, ipv6=False, intercept_dns=True) as net:
            world.forget()
            assert await world.tries(net, steps[1]) == [f"NOERROR {WEB}"]
            assert {each[0] for each in world.asked} == {"tcp"}
            assert not [each for each in world.arrivals() if each.target == ELSEWHERE]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("names", "leaks"), [("here", False), ("here", True), ("proxy", False)])
@in_world
async def test_no_name_is_seen_but_by_the_proxy(
    world: World, driver: str, names: ProxyNames, leaks: bool, tmp_path: Path
) -> None:
    """The proxy is in the world: all that leaves home is for it, unless the host is to ask.

    The proxy knows no resolver: who has it resolve a name is told that there is no way.
    """
    needs("microsocks")
    with Place(world, tmp_path).serving(1080, "microsocks", "-i", "0.0.0.0", "-p", 1080):
        uplink = Socks5Uplink(
            f"{NEIGHBOUR}:1080", dns=[RESOLVER], names=names, resolvers="host" if leaks else "proxy"
        )
        async with network(world, uplink, driver) as net:
            world.forget()
            steps = (
                ("tcp", "www.example.org", 80),
                ("tcp", "nowhere.example", 80),
                ("ask", ELSEWHERE, "a.example"),
            )
            hello, *others = await world.tries(net, *steps)
            assert (hello == "hello", "hello" in others) == (names == "here", False)
            leaving = {(each.protocol, each.target, each.port) for each in world.arrivals()}
            assert leaving - {("tcp", NEIGHBOUR, 1080)} == ({("udp", RESOLVER, 53)} if leaks else set())


@pytest.mark.parametrize("driver", DRIVERS)
@in_world
async def test_a_client_that_leaves_rudely_leaves_nothing_at_the_proxy(world: World, driver: str) -> None:
    """As a health check does: it connects and resets, again and again; each time it gets through."""
    with Proxy("socks") as proxy:
        async with network(world, Socks5Uplink(proxy.at, dns=[RESOLVER]), driver) as net:
            done = await net.run([sys.executable, "-c", RUDE, WEB])
            assert done.stdout == b"40\n"
            await anyio.to_thread.run_sync(proxy.join)


@pytest.mark.parametrize("driver", DRIVERS)
@in_world
async def test_one_association_for_all_destinations_of_a_port(
    world: World, driver: str, tmp_path: Path
) -> None:
    """And a new one, if the proxy has been away, for datagrams from the same port."""
    with serving(danted, tmp_path) as proxy:
        uplink = Socks5Uplink(proxy.at, dns=[RESOLVER])
        async with network(world, uplink, driver) as net:
            command = [sys.executable, "-c", SAME_PORT, WEB]
            async with await net.popen(command, stdin=PIPE, stdout=PIPE) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                assert await process.stdout.receive() == b"hello\n"
                _signal_all(proxy.process, signal.SIGKILL)
                proxy.process.wait(SECONDS)
                with serving(danted, tmp_path, int(proxy.at.partition(":")[2])):
                    await process.stdin.send(b"\n")
                    assert await process.stdout.receive() == b"hello\n"


RUDE = """
import socket, struct, sys
for number in range(40):
    sock = socket.create_connection((sys.argv[1], 80), timeout=20)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
print(number + 1)
"""
SAME_PORT = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(0.5)
def exchange():
    for _ in range(40):
        sock.sendto(b"hello", (sys.argv[1], 7777))
        try:
            return sock.recv(100).decode()
        except OSError:
            pass
print(exchange(), flush=True)
sys.stdin.readline()
print(exchange(), flush=True)
"""


@pytest.mark.parametrize("driver", DRIVERS)
@in_world
async def test_datagrams_through_a_real_proxy(world: World, driver: str, tmp_path: Path) -> None:
    with serving(danted, tmp_path) as proxy:
        async with network(world, Socks5Uplink(proxy.at, dns=[RESOLVER]), driver) as net:
            assert await world.tries(net, ("udp", WEB, 7777), ("udp", WEB, 443)) == ["hello", "hello"]
            (answer,) = await world.tries(net, ("ping", WEB))
            assert answer != "hello"


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("kind", [Socks5Uplink, HttpConnectUplink])
@in_world
async def test_the_proxy_is_told_the_name_that_dns_was_asked_for(
    world: World, kind: type[Socks5Uplink | HttpConnectUplink], driver: str
) -> None:
    with Proxy("http" if kind is HttpConnectUplink else "socks") as proxy:
        uplink = kind(proxy.at, dns=[RESOLVER], resolvers="host")
        policy = Policy.deny().allow("*.example.org")
        for options in {}, {"policy": policy}:
            async with world.network(driver, uplink=uplink, ipv6=False, **options) as net:
                assert await world.tries(net, ("tcp", "www.example.org", 23)) == ["hello"]
                assert proxy.asked == [("tcp", "www.example.org", 23)]
                proxy.asked.clear()
                await world.tries(net, ("tcp", "another.example", 23))
                assert [each[1] for each in proxy.asked] == ([] if options else ["another.example"])
                proxy.asked.clear()


TALK = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 80), timeout=20) as sock:
        sock.sendall(b"hello")
        print(sock.recv(100))
except OSError as error:
    print(error)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "netns_kit", "run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("kind", "scheme"), [("socks", "socks5"), ("socks", "socks5h"), ("http", "http")])
def test_the_option(kind: str, scheme: str, driver: str) -> None:
    needs_tun()
    inside = ["--driver", driver, "--", sys.executable, "-c", TALK, "192.0.2.1"]
    with Proxy(kind, password=("me@here", "s3:cr3t")) as proxy:
        done = run("--proxy", f"{scheme}://me%40here:s3%3Acr3t@{proxy.at}", *inside)
        assert (done.returncode, done.stdout, done.stderr) == (0, "b'hello'\n", "")
        assert proxy.said == [("me@here", "s3:cr3t")]
        assert proxy.asked == [("tcp", "192.0.2.1", 80)]
        done = run("--proxy", f"{scheme}://me:wr0ng@{proxy.at}/", *inside)
        assert (done.returncode, done.stdout) == (0, "[Errno 113] No route to host\n")
        assert done.stderr.count("password") == 1, "a notice"
        assert "wr0ng" not in done.stderr


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_proxy_that_is_not_there_is_told_of_once(driver: str) -> None:
    needs_tun()
    port = closed_port()
    program = [sys.executable, "-c", TALK + "\n" + TALK, "192.0.2.1"]
    done = run("--proxy", f"socks5://127.0.0.1:{port}", "--driver", driver, "--", *program)
    assert (done.returncode, done.stdout) == (0, "[Errno 113] No route to host\n" * 2)
    assert done.stderr.count(f"flows are refused: the SOCKS proxy 127.0.0.1:{port} cannot be reached") == 1
