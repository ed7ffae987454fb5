"""docs/comparison.md: each row that says "measured" is what happens here.

A row's test publishes ports in its way and serves them inside: by nginx, whose access log tells where its client is,
and by a UDP server that tells its clients where they are.  The clients are on another host, 192.0.2.10, and on the
host's loopback (`two_hosts`).  With NETNS_KIT_WRITE=1 the tests write what they find into the page.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest

from benchmarks.processes import Child, Failed, child, family, line, tell, wait_for, wait_readable
from netns_kit import Network, PortForward, PortSpecError
from netns_kit.forwarder.ports import MODES, Mode, UnixSocket
from tests.support import ROOT, needs, needs_tun
from tests.support.servers import SECONDS
from tests.support.two_hosts import HOST, NOBODY, TwoHosts, on_host

PAGE = ROOT / "docs" / "comparison.md"
WEB, NAMES, DEVICE, LOCAL = 8080, 8053, 8081, 8082
"""Ports of the host: of nginx, of the UDP server, of nginx by the device eth0 alone, of a server on 127.0.0.1."""
INSIDE = {WEB: 80, NAMES: 5300, DEVICE: 80, LOCAL: 8082}
"""The ports that they lead to."""
LOOPBACK = "127.0.0.1"
AT_ONCE = 2.0  # seconds in which an answer comes, or never
LOWEST = "`ip_unprivileged_port_start`"

UDP_SERVER = """
import os, socket, sys
if os.environ.get("LISTEN_PID") == str(os.getpid()):
    sock = socket.socket(fileno=3)
else:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", int(sys.argv[1])))
print("ready", flush=True)
while True:
    data, client = sock.recvfrom(100)
    sock.sendto(client[0].encode(), client)
"""
TCP_SERVER = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
while True:
    with server.accept()[0] as sock:
        sock.sendall(b"here")
"""
NGINX = """
user root root; daemon off; pid {top}/pid; error_log {top}/error.log;
events {{ }}
http {{
    log_format addresses "$remote_addr"; access_log {top}/access.log addresses;
    client_body_temp_path {top}; proxy_temp_path {top}; fastcgi_temp_path {top}; uwsgi_temp_path {top};
    scgi_temp_path {top};
    server {{ listen {address}; return 200 "served"; }}
}}
"""
PUBLISHER = """
import json, sys
import anyio
from netns_kit import Network

async def main():
    async with Network() as net:
        refused = []
        for spec in json.loads(sys.argv[2]):
            try:
                await net.forwarder.add(spec, mode=sys.argv[1])
            except Exception as error:
                refused.append(type(error).__name__)
        print(json.dumps([net.namespace.pid, refused]), flush=True)
        await anyio.wait_readable(sys.stdin)

anyio.run(main)
"""
ACTIVATOR = """
import json, socket, sys
import anyio
from netns_kit import Namespace

async def main():
    fd = int(sys.argv[1])
    async with Namespace.create(ids="same") as ns:
        env = json.loads(sys.argv[2])
        process = await ns.popen(sys.argv[3:], stdin=None, stdout=None, listen=[socket.socket(fileno=fd)], env=env)
        async with process:
            await process.wait()

anyio.run(main)
"""


@dataclass(frozen=True)
class Published:
    """Ports that lead inside: `serve` starts a server there, and gives it an activated socket if need be."""

    serve: Callable[..., AbstractContextManager[Child]]
    programs: Sequence[int] = ()
    """The processes that may stand between client and server."""
    without: Sequence[int] = ()
    """The host's ports that cannot be had in this way."""


Way = Callable[[TwoHosts, Sequence[int]], AbstractContextManager[Published]]


# -- the ways ------------------------------------------------------------------------------------------


@contextmanager
def ours(mode: str, _: TwoHosts, ports: Sequence[int]) -> Iterator[Published]:
    specs = {port: f"0.0.0.0:{port}:{INSIDE.get(port, 80)}" for port in ports}
    if NAMES in specs:
        specs[NAMES] += "/udp"
    if DEVICE in specs:
        specs[DEVICE] = f"0.0.0.0%eth0:{DEVICE}:{INSIDE[DEVICE]}"
    if LOCAL in specs:
        specs[LOCAL] = f"0.0.0.0:{LOCAL}:{LOOPBACK}:{INSIDE[LOCAL]}"
    words = [sys.executable, "-c", PUBLISHER, mode, json.dumps(list(specs.values()))]
    with child(*words, cwd=ROOT) as process:
        pid, refused = json.loads(line(process, SECONDS))
        if "PrivilegedPortError" in refused:
            raise Failed("a low port")
        without = [LOCAL] if "AddressError" in refused else []
        yield Published(partial(_inside, _enter(pid)), [process.pid], without)


@contextmanager
def activated(hosts: TwoHosts, ports: Sequence[int], *starter: str) -> Iterator[Published]:
    """Servers that are given the host's listening sockets, by us or by systemd-socket-activate."""
    with ExitStack() as stack:
        programs: list[int] = []

        @contextmanager
        def serve(*command: str, port: int = WEB, **_: object) -> Iterator[Child]:
            if not ports or port not in ports:
                raise Failed("no such port")
            env = {"PATH": os.environ["PATH"], "NGINX": "3;"}
            if starter:
                kind = ["--datagram"] if port == NAMES else []
                assert port != DEVICE, "it does not know BindToDevice="
                names = [word for name, value in env.items() for word in ("-E", f"{name}={value}")]
                words = [*starter, *kind, *names, "-l", f"0.0.0.0:{port}", "unshare", "-Urn", *command]
                with child(*words) as process:
                    yield process
                return
            with stack.enter_context(_listening(port)) as sock:
                os.set_inheritable(sock.fileno(), True)
                words = [sys.executable, "-c", ACTIVATOR, str(sock.fileno()), json.dumps(env), *command]
                with child(*words, cwd=ROOT, pass_fds=[sock.fileno()]) as process:
                    programs.append(process.pid)
                    yield process

        yield Published(serve, programs)


def _listening(port: int) -> socket.socket:
    kind = socket.SOCK_DGRAM if port == NAMES else socket.SOCK_STREAM
    sock = socket.socket(socket.AF_INET, kind)
    if port == DEVICE:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    sock.bind(("0.0.0.0", port))
    if port != NAMES:
        sock.listen()
    return sock


@contextmanager
def _holder() -> Iterator[Child]:
    """A namespace, held by a process that ends with its standard input."""
    with child(
        "unshare", "--user", "--map-root-user", "--net", "sh", "-c", "ip link set lo up; cat"
    ) as process:
        tell(process, "")
        line(process, SECONDS)
        yield process


def _enter(pid: int) -> tuple[str, ...]:
    return ("nsenter", "--preserve-credentials", "--user", "--net", "--target", str(pid))


@contextmanager
def _inside(enter: Sequence[str], *command: str, port: int = WEB) -> Iterator[Child]:
    with child(*enter, *command) as process:
        yield process


@contextmanager
def pasta(_: TwoHosts, ports: Sequence[int]) -> Iterator[Published]:
    """As podman starts it."""
    specs = {port: f"0.0.0.0/{port}:{INSIDE.get(port, 80)}" for port in ports}
    if DEVICE in specs:
        specs[DEVICE] = f"0.0.0.0%eth0/{DEVICE}:{INSIDE[DEVICE]}"
    words = [word for port, spec in specs.items() for word in ("-u" if port == NAMES else "-t", spec)]
    with tempfile.TemporaryDirectory() as directory, _holder() as holder:
        pid_file = Path(directory, "pid")
        options = ["--foreground", "--quiet", "--config-net", "--no-map-gw", "--pid", str(pid_file)]
        with child("pasta", *options, *words, "-T", "none", "-U", "none", str(holder.pid)) as process:
            wait_for(pid_file, process, SECONDS)
            yield Published(partial(_inside, _enter(holder.pid)), [process.pid])


@contextmanager
def slirp4netns(_: TwoHosts, ports: Sequence[int]) -> Iterator[Published]:
    """As podman starts it, and with its port handler."""
    with tempfile.TemporaryDirectory() as directory, _holder() as holder:
        api, (ready, theirs) = f"{directory}/api", os.pipe()
        words = ["-c", "--disable-host-loopback", "--mtu=65520", f"--api-socket={api}"]
        try:
            started = child(
                "slirp4netns", *words, f"--ready-fd={theirs}", "--exit-fd=0", str(holder.pid), "tap0",
                pass_fds=[theirs],
            )  # fmt: skip
            with started as process:
                wait_readable(ready, SECONDS)
                for port in ports:
                    _add_hostfwd(api, port)
                yield Published(partial(_inside, _enter(holder.pid)), [process.pid], [DEVICE])
        finally:
            os.close(ready)
            os.close(theirs)


def _add_hostfwd(api: str, port: int) -> None:
    if port == DEVICE:  # there is no word for it
        return
    protocol = "udp" if port == NAMES else "tcp"
    arguments = {
        "proto": protocol,
        "host_addr": "0.0.0.0",
        "host_port": port,
        "guest_port": INSIDE.get(port, 80),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(SECONDS)
        sock.connect(api)
        sock.sendall(json.dumps({"execute": "add_hostfwd", "arguments": arguments}).encode())
        if b"error" in sock.recv(4096):
            raise Failed("add_hostfwd")


NEWIDMAP = """#!/bin/sh
# The user namespace around us has one uid, so there are no others to map.
[ {kind} = gid ] && echo deny >/proc/$1/setgroups
echo "$2 $3 1" >/proc/$1/{kind}_map
"""


@contextmanager
def rootlesskit(_: TwoHosts, ports: Sequence[int]) -> Iterator[Published]:
    """With slirp4netns as its network and its own port driver, as podman's rootlessport is."""
    specs = {port: f"0.0.0.0:{port}:{INSIDE.get(port, 80)}/tcp" for port in ports if port != DEVICE}
    if NAMES in specs:
        specs[NAMES] = f"0.0.0.0:{NAMES}:{INSIDE[NAMES]}/udp"
    published = [word for spec in specs.values() for word in ("--publish", spec)]
    with tempfile.TemporaryDirectory() as directory:
        for kind in ("uid", "gid"):
            file = Path(directory, f"new{kind}map")
            file.write_text(NEWIDMAP.format(kind=kind))
            file.chmod(0o755)
        words = ["--net=slirp4netns", "--disable-host-loopback", "--port-driver=builtin", *published]
        words = [f"--state-dir={directory}/state", *words, "sh", "-c", "echo $$; exec cat"]
        with child("env", f"PATH={directory}:{os.environ['PATH']}", "rootlesskit", *words) as process:
            pid = int(line(process, SECONDS))
            stoppable = [each for each in family(process.pid) if each != pid]
            yield Published(partial(_inside, _enter(pid)), stoppable, [DEVICE])


@contextmanager
def host(_: TwoHosts, ports: Sequence[int]) -> Iterator[Published]:
    """No namespace: the servers are the host's, so each listens on the host's port."""
    yield Published(partial(_inside, ()))


def _may_bind(port: int) -> bool:
    """Whether a program of the user's may, which has no capability."""
    code = f"import socket; socket.socket().bind(('', {port}))"
    return not subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode


WAYS: dict[str, Way] = {
    "netns_kit, mode stack": partial(ours, "stack"),
    "netns_kit, mode socket": partial(ours, "socket"),
    "netns_kit, mode transparent": partial(ours, "transparent"),
    "netns_kit, mode fd": activated,
    "socket activation (user service)": lambda hosts, ports: activated(
        hosts, ports, "systemd-socket-activate"
    ),
    "pasta": pasta,
    "slirp4netns, port_handler=slirp4netns": slirp4netns,
    "slirp4netns, port_handler=rootlesskit": rootlesskit,
    "host": host,
}
PEERS = {
    "pasta": ("pasta",),
    "slirp4netns": ("slirp4netns",),
    "slirp4netns, port_handler=slirp4netns": ("slirp4netns",),
    "slirp4netns, port_handler=rootlesskit": ("slirp4netns", "rootlesskit"),
}
OWN_PORT = ("netns_kit, mode fd", "socket activation (user service)", "host")
"""Where the server has the host's own port."""


# -- the cells -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
@on_host
def test_who_publishes_shows_what_and_lets_in_what(hosts: TwoHosts, name: str) -> None:
    _prepare(name)
    way, own = WAYS[name], name in OWN_PORT
    with way(hosts, [WEB, NAMES, DEVICE, LOCAL]) as published, ExitStack() as stack:
        log = stack.enter_context(nginx(published, WEB, own=own))
        port = NAMES if own else INSIDE[NAMES]
        udp = stack.enter_context(published.serve(sys.executable, "-c", UDP_SERVER, str(port), port=NAMES))
        if name != "socket activation (user service)":  # it starts the server with the first client
            assert line(udp, SECONDS) == "ready"
        found = [
            seen_by_nginx(hosts, log, "other", HOST),
            seen_by_nginx(hosts, log, "host", LOOPBACK),
            seen_by_udp(hosts, "other", HOST),
            seen_by_udp(hosts, "host", LOOPBACK),
            yes(goes_on_while_stopped(hosts, published)),
            yes(DEVICE not in published.without and is_of_a_device(hosts, published, own=own)),
            reaches_loopback(hosts, published, own=own),
            lowest(way, hosts, name),
        ]
    check_row("### Published ports", name, found)


def _prepare(name: str) -> None:
    needs("nginx", "curl", "unshare", "nsenter", *PEERS.get(name, ()))
    if name == "socket activation (user service)":
        needs("systemd-socket-activate")
    if os.geteuid() == 0:
        pytest.skip("for an ordinary user: as root pasta becomes nobody, who may not enter this namespace")


@contextmanager
def nginx(published: Published, port: int, *, own: bool) -> Iterator[Path]:
    """Serve the port inside; yield the access log."""
    with tempfile.TemporaryDirectory() as top:
        address = f"0.0.0.0:{port if own else INSIDE.get(port, 80)}"
        config = Path(top, "nginx.conf")
        config.write_text(NGINX.format(top=top, address=address))
        with published.serve("nginx", "-c", str(config), port=port) as process:
            yield Path(top, "access.log")
            process.terminate()  # so that it ends its worker
            process.wait(SECONDS)


def seen_by_nginx(hosts: TwoHosts, log: Path, where: str, address: str) -> str:
    before = log.read_text() if log.exists() else ""
    with hosts.on(where):
        deadline = time.monotonic() + SECONDS
        while _fetch(address, WEB) != "served":
            assert time.monotonic() < deadline, f"nginx cannot be reached from {where}"
    while (text := log.read_text()) == before:
        assert time.monotonic() < deadline
    return text.splitlines()[-1]


def _fetch(address: str, port: int) -> str:
    command = ["curl", "-s", "-m", str(AT_ONCE), f"http://{address}:{port}/"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def seen_by_udp(hosts: TwoHosts, where: str, address: str) -> str:
    """What the server says of its client, who asks again until it is there."""
    with hosts.on(where), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(AT_ONCE / 4)
        sock.connect((address, NAMES))
        for _ in range(20):
            with suppress(OSError):
                sock.send(b"?")
                return sock.recv(100).decode()
    return "no answer"


def goes_on_while_stopped(hosts: TwoHosts, published: Published) -> bool:
    """Whether a connection needs none of the programs beside the server."""
    request = f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    with hosts.on("other"), socket.create_connection((HOST, WEB), SECONDS) as sock:
        sock.sendall(request)
        assert b"served" in sock.recv(1000)
        for pid in published.programs:
            _stop(pid)
        try:
            sock.settimeout(AT_ONCE)
            sock.sendall(request)
            return b"served" in sock.recv(1000)
        except TimeoutError:
            return False
        finally:
            for pid in published.programs:
                os.kill(pid, signal.SIGCONT)


def _stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + SECONDS
    while {
        (task / "stat").read_text().rpartition(") ")[2][0] for task in Path(f"/proc/{pid}/task").iterdir()
    } != {"T"}:
        assert time.monotonic() < deadline, f"{pid} does not stop"


def is_of_a_device(hosts: TwoHosts, published: Published, *, own: bool) -> bool:
    """Whether a port can be reached by one device alone."""
    if own and not published.programs:  # the server's own business, or BindToDevice= of a socket unit
        return True
    with ExitStack() as stack:
        if own:
            stack.enter_context(nginx(published, DEVICE, own=True))
        with hosts.on("other"):
            deadline = time.monotonic() + SECONDS
            while _fetch(HOST, DEVICE) != "served":
                assert time.monotonic() < deadline
        return _fetch(LOOPBACK, DEVICE) == ""


def reaches_loopback(hosts: TwoHosts, published: Published, *, own: bool) -> str:
    """Whose clients reach a server that is bound to 127.0.0.1 inside."""
    if own or LOCAL in published.without:
        return ""
    with published.serve(sys.executable, "-c", TCP_SERVER, str(INSIDE[LOCAL])) as process:
        assert line(process, SECONDS) == "ready"
        here, there = [_is_here(hosts, *client) for client in (("host", LOOPBACK), ("other", HOST))]
    return "yes" if here and there else f"from {LOOPBACK}" if here else ""


def _is_here(hosts: TwoHosts, where: str, address: str) -> bool:
    with hosts.on(where), suppress(OSError), socket.create_connection((address, LOCAL), AT_ONCE) as sock:
        sock.settimeout(AT_ONCE)
        return sock.recv(10) == b"here"
    return False


def lowest(way: Way, hosts: TwoHosts, name: str) -> str:
    """The lowest port that can be published, where `ip_unprivileged_port_start` is 1024."""
    if name == "socket activation (user service)":
        return LOWEST if not _may_bind(1023) else "0"
    if (
        name == "netns_kit, mode fd"
    ):  # this process has CAP_NET_BIND_SERVICE, as a system service's socket unit has
        with way(hosts, [1023]) as published, nginx(published, 1023, own=True):
            deadline = time.monotonic() + SECONDS
            while _fetch(LOOPBACK, 1023) != "served":
                assert time.monotonic() < deadline
        assert not _may_bind(1023)
        return f"{LOWEST}; 0 by a socket of a system service"
    for port, possible in ((1024, True), (1023, False)):
        with suppress(Failed), way(hosts, [port]) as published, nginx(published, port, own=name in OWN_PORT):
            deadline = time.monotonic() + (SECONDS if possible else AT_ONCE)
            while (answer := _fetch(LOOPBACK, port)) != "served" and time.monotonic() < deadline:
                pass
            assert (answer == "served") == possible
    return LOWEST


# -- the other way, unix sockets, and several at once ------------------------------------------------------

REACHER = """
import sys
import anyio
from netns_kit import Network, Uplink

async def main():
    uplink = Uplink(allow_host_loopback=True) if sys.argv[1] == "allowed" else None
    async with Network(uplink=uplink) as net:
        print(net.namespace.pid, flush=True)
        await anyio.wait_readable(sys.stdin)

anyio.run(main)
"""
LOOPBACK_SERVER = 9000


@contextmanager
def _ours_reaching(allowed: bool) -> Iterator[tuple[Sequence[str], str]]:
    with child(sys.executable, "-c", REACHER, "allowed" if allowed else "", cwd=ROOT) as process:
        yield _enter(int(line(process, SECONDS))), "10.0.2.2"


@contextmanager
def _pasta_reaching(allowed: bool) -> Iterator[tuple[Sequence[str], str]]:
    with tempfile.TemporaryDirectory() as directory, _holder() as holder:
        pid_file = Path(directory, "pid")
        options = [
            "--foreground",
            "--quiet",
            "--config-net",
            "--pid",
            str(pid_file),
            "-T",
            "none",
            "-U",
            "none",
        ]
        with child("pasta", *options, *([] if allowed else ["--no-map-gw"]), str(holder.pid)) as process:
            wait_for(pid_file, process, SECONDS)
            yield _enter(holder.pid), NOBODY


@contextmanager
def _slirp4netns_reaching(allowed: bool) -> Iterator[tuple[Sequence[str], str]]:
    ready, theirs = os.pipe()
    words = ["-c", *([] if allowed else ["--disable-host-loopback"]), f"--ready-fd={theirs}", "--exit-fd=0"]
    try:
        with _holder() as holder, child("slirp4netns", *words, str(holder.pid), "tap0", pass_fds=[theirs]):
            wait_readable(ready, SECONDS)
            yield _enter(holder.pid), "10.0.2.2"
    finally:
        os.close(ready)
        os.close(theirs)


REACHING = {
    "netns_kit": (
        _ours_reaching,
        "`Uplink(allow_host_loopback=True)`, or a list of ports; `--host-loopback`",
    ),
    "pasta": (_pasta_reaching, "`--map-gw`, `--map-host-loopback`, `-T`"),
    "slirp4netns": (_slirp4netns_reaching, "`allow_host_loopback=true`"),
}


@pytest.mark.parametrize("name", REACHING)
@on_host
def test_the_hosts_loopback_is_reached_if_that_is_allowed(hosts: TwoHosts, name: str) -> None:
    _prepare(name)
    reaching, how = REACHING[name]
    found = []
    with socket.create_server((LOOPBACK, LOOPBACK_SERVER)):
        for allowed in (False, True):
            with reaching(allowed) as (enter, gateway):
                code = f"import socket; socket.create_connection(('{gateway}', {LOOPBACK_SERVER}), {AT_ONCE})"
                command = [*enter, sys.executable, "-c", code]
                found.append(yes(not subprocess.run(command, capture_output=True, check=False).returncode))
    check_row("### The host's localhost", name, [*found, how])


GREETER = """
import os, socket, sys, threading

def serve(server):
    while True:
        with server.accept()[0] as client:
            client.sendall(b"hello")

if os.environ.get("LISTEN_PID") == str(os.getpid()):
    servers = [socket.socket(fileno=3)]
else:
    servers = [socket.create_server(("0.0.0.0", 80)), socket.socket(socket.AF_UNIX)]
    servers[1].bind(sys.argv[1])
    servers[1].listen()
print("ready", flush=True)
for server in servers:
    server.setblocking(True)
    threading.Thread(target=serve, args=(server,)).start()
"""


@asynccontextmanager
async def _greeter(net: Network, path: str = "", **options: Any) -> AsyncIterator[None]:
    """Serve inside, on port 80 and a unix socket; or on the host's socket that is given."""
    command = [sys.executable, "-c", GREETER, path]
    async with await net.popen(command, stdout=subprocess.PIPE, **options) as process:
        assert process.stdout
        assert await process.stdout.receive() == b"ready\n"
        yield


async def _is_greeted(connecting: Awaitable[anyio.abc.ByteStream]) -> bool:
    async with await connecting as stream:
        return await stream.receive() == b"hello"


@pytest.mark.anyio
@pytest.mark.parametrize("mode", MODES)
async def test_unix_sockets_on_either_side(mode: Mode, short_path: Path) -> None:
    needs_tun()
    outside, inside = f"{short_path}/outside", f"{short_path}/inside"
    found = []
    async with Network() as net:
        if mode == "fd":  # the command has the socket itself: no forwarder is asked
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(outside)
                sock.listen()
                async with _greeter(net, listen=[sock]):
                    found = [yes(await _is_greeted(anyio.connect_unix(outside))), ""]
        else:
            async with _greeter(net, inside):
                try:
                    await net.forwarder.add(PortForward("tcp", UnixSocket(outside), 0, None, 80, mode=mode))
                    found.append(yes(await _is_greeted(anyio.connect_unix(outside))))
                except PortSpecError:
                    found.append("")
                try:
                    target = PortForward("tcp", LOOPBACK, 0, UnixSocket(inside), 0, mode=mode)
                    (added,) = await net.forwarder.add(target)
                    found.append(yes(await _is_greeted(anyio.connect_tcp(LOOPBACK, added.host_port))))
                except PortSpecError:
                    found.append("")
    check_row("### Unix sockets", f"netns_kit, mode {mode}", found)


@pytest.mark.anyio
async def test_the_modes_go_together(short_path: Path) -> None:
    """One server inside, by three of them at once; and beside it a command that has a socket of the host."""
    needs_tun()
    async with Network() as net, _greeter(net, f"{short_path}/inside"):
        ports = []
        for mode in ("stack", "socket", "transparent"):
            (added,) = await net.forwarder.add(f"{LOOPBACK}:0:80", mode=mode)
            ports.append(added.host_port)
        with socket.create_server((LOOPBACK, 0)) as sock:
            async with _greeter(net, listen=[sock]):
                for port in (*ports, sock.getsockname()[1]):
                    assert await _is_greeted(anyio.connect_tcp(LOOPBACK, port))


# -- the page --------------------------------------------------------------------------------------------


def yes(answer: bool) -> str:
    return "yes" if answer else ""


def check_row(heading: str, name: str, found: Sequence[str]) -> None:
    """Hold what was found against the row of the table below the heading, or write it there.

    A row that another version of a peer has made is not compared.
    """
    text = PAGE.read_text(encoding="utf-8")
    before, section = text.split(f"{heading}\n", 1)
    row = next(row for row in section.splitlines() if row.startswith(f"| {name} |"))
    source = ", ".join(["measured", *map(_version, PEERS.get(name, ()))])
    measured = f"| {name} | {' | '.join(found)} | {source} |"
    if os.environ.get("NETNS_KIT_WRITE"):
        PAGE.write_text(f"{before}{heading}\n{section.replace(row, measured, 1)}", encoding="utf-8")
    elif row.endswith(f"| {source} |"):
        assert row == measured


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).partition("\n")[0].replace(" version", "").strip()
