"""Real programs inside, through real proxies at home; the world sees what comes out of them, and nothing else."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from netns_kit import HttpConnectUplink, Network, Policy, Socks5Uplink
from netns_kit.uplink.indirect import IndirectUplink
from tests.support import needs, needs_tun
from tests.support.proxies import Proxy
from tests.support.servers import SECONDS, closed_port
from tests.support.world import DRIVERS, EVIL, RESOLVER, WEB, World, in_world

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


@contextmanager
def serving(start: Start, path: Path) -> Iterator[str]:
    """A proxy at home, which listens; its address and port."""
    port = closed_port()
    command = start(path, port)
    if shutil.which(command[0]) is None:
        pytest.skip(f"not installed: {command[0]}")
    with (path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end = time.monotonic() + SECONDS
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None, (path / "log").read_text()
            assert time.monotonic() < end, "it does not listen"
            time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(SECONDS)


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
        uplink = kind(proxy, *credentials, names="here", dns=[RESOLVER])
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


@pytest.mark.parametrize("driver", DRIVERS)
@in_world
async def test_datagrams_through_a_real_proxy(world: World, driver: str, tmp_path: Path) -> None:
    with serving(danted, tmp_path) as proxy:
        async with network(world, Socks5Uplink(proxy, dns=[RESOLVER]), driver) as net:
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
