"""What is measured: us with each driver, the peers found on this machine, and the host's loopback as the limit.

A `Subject` starts as a context manager of a `Running`: a namespace with connectivity, into which nsenter(1) takes any
command.  One start serves all tasks of a round, so that what it costs is in none of them.  Each has one port of the
host forwarded into the namespace, in its own way, from the start.

Their command lines are those of their users (podman, rootlesskit), but that the gateway's address leads to the host's
loopback.  Should this process be killed, all but pasta end with their standard input.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from netns_kit.forwarder.ports import MODES
from netns_kit.gateway.setup import DriverName

from .processes import Child, Failed, answer, child, line, output, tell, wait_for, wait_readable

ROOT = Path(__file__).resolve().parent.parent
GATEWAY, GUEST = "10.0.2.2", "10.0.2.100"
LOOPBACK = "127.0.0.1"
MTUS = (1500, 65520)
NO_MTU = 0
NOT_FORWARDED = 0, 0
QUEUES = 2
HOST = "host"
OURS = "netns_kit"
GUEST_PORT = 5201
PATIENCE = 15.0  # seconds to be ready in
PUBLISHED, FIRST_PUBLISHED = "127.0.77.1", 20_000  # an address that nobody else listens on
TRAFFIC = frozenset("bulk rr crr udp_rr udp_64 udp_1400 udp_gso".split())
OWN = TRAFFIC | frozenset("memory idle start heartbeat".split())
FORWARD = frozenset({"forward"})
PEER = TRAFFIC | FORWARD | frozenset("memory idle start".split())
DROP_IN = frozenset("bulk rr udp_rr memory start".split())  # in all else it is as a worker is
PEERS = ("slirp4netns", "pasta", "rootlesskit")


@dataclass(frozen=True)
class Running:
    """A namespace with connectivity.

    `enter` stands before a command that shall run inside, `pid` is the process whose time and memory count, with its
    descendants, `gateway` is the host's loopback as seen from inside, and `forwarded` a port of the host and the
    guest's that it leads to.  `publish` tells the seconds until so many ports more are published.  `lateness` tells,
    of us, how many seconds late a heartbeat on the event loop is, at the 99.9th percentile, in the seconds to come.
    """

    enter: tuple[str, ...]
    pid: int
    gateway: str
    forwarded: tuple[int, int]
    lateness: Callable[[float], float] | None = None
    publish: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Subject:
    """`mtus` are those worth measuring, `NO_MTU` for what has none.

    `cold` gives seconds from nothing to ready, `warm` a number of such times with the library imported, `tap` seconds
    until there is an interface.
    """

    name: str
    start: Callable[[int], AbstractContextManager[Running]]
    tasks: frozenset[str]
    mtus: tuple[int, ...] = MTUS
    cold: Callable[[], float] | None = None
    warm: Callable[[int], list[float]] | None = None
    tap: Callable[[], float] | None = None


def find(binaries: Mapping[str, str]) -> list[Subject]:
    """All that this machine has; `binaries` are paths of peers by name, for those not to be found in PATH."""
    found = [_netns_kit(driver, "asyncio") for driver in get_args(DriverName)]
    found.append(_netns_kit("worker", "asyncio", QUEUES))
    for mode in MODES:
        starts = _activated if mode == "fd" else partial(_publishing, mode)
        found.append(Subject(f"{OURS} {mode}", starts, FORWARD, MTUS if mode == "stack" else (NO_MTU,)))
    if importlib.util.find_spec("trio") is not None:
        found.append(_netns_kit("loop", "trio"))
    paths = {name: binaries.get(name) or shutil.which(name) for name in PEERS}
    slirp, pasta, rootlesskit = (paths[name] for name in PEERS)
    installed = Path(sys.executable).with_name("netns-kit-slirp4netns")
    drop_in = (str(installed),) if installed.exists() else (sys.executable, "-m", "netns_kit", "slirp4netns")
    programs = {f"{OURS} slirp4netns": (drop_in, DROP_IN), "slirp4netns": ((slirp or "",), PEER)}
    for name, (program, tasks) in programs.items():
        if name != "slirp4netns" or slirp:
            start, cold = partial(_slirp4netns, program), partial(_cold_slirp, program)
            tap = partial(_tap_of_slirp, program)
            found.append(Subject(name, start, tasks, cold=cold, tap=tap))
    if pasta:
        found.append(Subject("pasta", partial(_pasta, pasta), PEER, cold=partial(_cold_pasta, pasta)))
    if rootlesskit and slirp:
        start = partial(_rootlesskit, rootlesskit, slirp)
        found.append(Subject("rootlesskit", start, FORWARD, (NO_MTU,)))
    found.append(Subject(HOST, _host, TRAFFIC | FORWARD | {"calibrate"}, (NO_MTU,)))
    return found


def versions(binaries: Mapping[str, str]) -> dict[str, str]:
    """What the peers say of themselves."""
    found = {}
    for name in (*PEERS, "iperf3", "sockperf"):
        path = binaries.get(name) or shutil.which(name)
        if path:
            output = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=10, check=False
            )
            found[name] = (output.stdout or output.stderr).strip().partition("\n")[0].rstrip(".")
    return found


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])


# Us


def _netns_kit(driver: str, backend: str, queues: int = 1) -> Subject:
    name = f"{OURS} {driver}" + (f" {backend}" if driver == "loop" else "")
    if queues > 1:
        return Subject(f"{name} x{queues}", partial(_ours, driver, backend, queues), TRAFFIC)
    return Subject(
        name,
        partial(_ours, driver, backend, queues),
        OWN | {"policy"} if driver == "thread" else OWN,  # which costs the same on each
        cold=_cold_ours if driver == "thread" else None,
        warm=partial(_warm_ours, driver, backend),
    )


@contextmanager
def _ours(driver: str, backend: str, queues: int, mtu: int, *forwards: str) -> Iterator[Running]:
    with child(*_our_command(driver, backend, mtu, queues), *forwards, cwd=ROOT) as process:
        inside = answer(process, PATIENCE)["pid"]

        def ask(what: str, argument: object, seconds: float) -> float:
            tell(process, f"{what} {argument}")
            return float(answer(process, seconds + PATIENCE)[what])

        yield Running(
            _enter(inside),
            process.pid,
            GATEWAY,
            NOT_FORWARDED,
            lambda seconds: ask("late", seconds, seconds),
            lambda count: ask("publish", f"{PUBLISHED}:{_published(count)}", 0),
        )


@contextmanager
def _publishing(mode: str, mtu: int) -> Iterator[Running]:
    """One of us whose port is forwarded in that mode."""
    port = free_port()
    with _ours("thread", "asyncio", 1, mtu or MTUS[0], mode, f"{LOOPBACK}:{port}:{GUEST_PORT}") as running:
        yield replace(running, forwarded=(port, GUEST_PORT))


@contextmanager
def _activated(_: int) -> Iterator[Running]:
    """Each server has the host's own listening socket, and there is nothing between."""
    port = free_port()
    enter = (sys.executable, str(Path(__file__).with_name("ours.py")), "--activated", str(port))
    yield Running(enter, 0, LOOPBACK, (port, port))


def _published(count: int) -> str:
    return f"{FIRST_PUBLISHED}-{FIRST_PUBLISHED + count - 1}"


def _our_command(driver: str, backend: str, mtu: int, queues: int = 1) -> list[str]:
    return [sys.executable, "-m", "benchmarks.ours", backend, driver, str(mtu), str(queues)]


def _cold_ours() -> float:
    return _timed([sys.executable, "-m", "netns_kit", "run", "--", "true"])


def _warm_ours(driver: str, backend: str, count: int) -> list[float]:
    with child(*_our_command(driver, backend, MTUS[0]), "--times", str(count), cwd=ROOT) as process:
        return [float(each) for each in answer(process, PATIENCE + count)["times"]]


# Peers


@contextmanager
def _holder() -> Iterator[Child]:
    """A namespace, held by a process that ends with its standard input."""
    with child("unshare", "--user", "--map-root-user", "--net", "cat") as process:
        tell(process, "")
        line(process, PATIENCE)  # the namespace is there
        yield process


def _enter(pid: int) -> tuple[str, ...]:
    return ("nsenter", "--preserve-credentials", "--user", "--net", "--target", str(pid))


@contextmanager
def _slirp(program: Sequence[str], holder: Child, *options: str) -> Iterator[Child]:
    """slirp4netns, ready."""
    ready, theirs = os.pipe()
    command = [*program, "-c", f"--ready-fd={theirs}", "--exit-fd=0", *options, str(holder.pid), "tap0"]
    try:
        with child(*command, pass_fds=[theirs], cwd=ROOT) as process:
            os.close(theirs)
            theirs = -1
            wait_readable(ready, PATIENCE)
            if os.read(ready, 1) != b"1":
                raise Failed("slirp4netns did not become ready")
            yield process
    finally:
        os.close(ready)
        if theirs >= 0:
            os.close(theirs)


@contextmanager
def _slirp4netns(program: Sequence[str], mtu: int) -> Iterator[Running]:
    port = free_port()
    with tempfile.TemporaryDirectory() as directory, _holder() as holder:
        api = f"{directory}/api"
        with _slirp(program, holder, f"--mtu={mtu}", f"--api-socket={api}") as process:
            _ask_slirp(api, "add_hostfwd", _forward(LOOPBACK, port, GUEST_PORT))
            publish = partial(_publish_by_slirp, api)
            yield Running(_enter(holder.pid), process.pid, GATEWAY, (port, GUEST_PORT), publish=publish)


def _forward(address: str, port: int, guest_port: int) -> dict[str, object]:
    return {"proto": "tcp", "host_addr": address, "host_port": port, "guest_port": guest_port}


def _publish_by_slirp(api: str, count: int) -> float:
    began = time.perf_counter()
    ports = range(FIRST_PUBLISHED, FIRST_PUBLISHED + count)
    ids = [_ask_slirp(api, "add_hostfwd", _forward(PUBLISHED, port, port))["return"]["id"] for port in ports]
    took = time.perf_counter() - began
    for number in ids:
        _ask_slirp(api, "remove_hostfwd", {"id": number})
    return took


def _ask_slirp(api: str, execute: str, arguments: dict[str, object]) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(api)
        sock.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode())
        reply = sock.recv(4096)
    if b"error" in reply:
        raise Failed(reply.decode(errors="replace"))
    return json.loads(reply)


def _cold_slirp(program: Sequence[str]) -> float:
    """Until it says that it is ready, for a namespace that is there."""
    with _holder() as holder:
        began = time.perf_counter()
        with _slirp(program, holder):
            return time.perf_counter() - began


def _tap_of_slirp(program: Sequence[str]) -> float:
    """Until a program inside would find the tap, asked again and again."""
    with _holder() as holder:
        devices = Path(f"/proc/{holder.pid}/net/dev")
        theirs, ready = os.pipe()
        began = time.perf_counter()
        try:
            words = [f"--ready-fd={ready}", "--exit-fd=0", str(holder.pid), "tap0"]
            with child(*program, *words, pass_fds=[ready], cwd=ROOT) as process:
                while "tap0" not in devices.read_text():
                    if process.poll() is not None or time.perf_counter() > began + PATIENCE:
                        raise Failed("slirp4netns made no tap")
                    os.sched_yield()
                return time.perf_counter() - began
        finally:
            os.close(theirs)
            os.close(ready)


_ADDRESSES = ("-a", GUEST, "-n", "24", "-g", GATEWAY)


@contextmanager
def _pasta(path: str, mtu: int) -> Iterator[Running]:
    port = free_port()
    with _started_pasta(path, mtu, f"{LOOPBACK}/{port}:{GUEST_PORT}") as (holder, process):
        publish = partial(_publish_by_pasta, path)
        yield Running(_enter(holder.pid), process.pid, GATEWAY, (port, GUEST_PORT), publish=publish)


@contextmanager
def _started_pasta(path: str, mtu: int, ports: str) -> Iterator[tuple[Child, Child]]:
    others = ("-u", "none", "-T", "none", "-U", "none")
    with tempfile.TemporaryDirectory() as directory, _holder() as holder:
        pid_file = Path(directory, "pid")  # written when it is ready
        words = ["--foreground", "--quiet", "--config-net", "--pid", str(pid_file), "-m", str(mtu)]
        with child(path, *words, *_ADDRESSES, "-t", ports, *others, str(holder.pid)) as process:
            wait_for(pid_file, process, PATIENCE)
            yield holder, process


def _publish_by_pasta(path: str, count: int) -> float:
    """What its start takes longer: this is the only time at which it publishes."""
    took = []
    for ports in ("none", f"{PUBLISHED}/{_published(count)}"):
        began = time.perf_counter()
        with _started_pasta(path, MTUS[0], ports):
            took.append(time.perf_counter() - began)
    return took[1] - took[0]


def _cold_pasta(path: str) -> float:
    return _timed([path, "--config-net", "--quiet", *_ADDRESSES, "--", "true"])


@contextmanager
def _rootlesskit(path: str, slirp: str, _: int) -> Iterator[Running]:
    port = free_port()
    words = ["--net=slirp4netns", f"--slirp4netns-binary={slirp}", "--port-driver=builtin", "--publish"]
    words += [f"{LOOPBACK}:{port}:{GUEST_PORT}/tcp", "sh", "-c", "echo $$; exec cat"]
    with tempfile.TemporaryDirectory() as state, child(path, f"--state-dir={state}", *words) as process:
        pid = int(line(process, PATIENCE))
        publish = partial(_publish_by_rootlesskit, f"{state}/api.sock")
        yield Running(_enter(pid), process.pid, GATEWAY, (port, GUEST_PORT), publish=publish)


class _Api(http.client.HTTPConnection):
    """HTTP by a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self._path)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        self.request(method, path, None if body is None else json.dumps(body))
        response = self.getresponse()
        text = response.read()
        if response.status >= 300:
            raise Failed(text.decode(errors="replace"))
        return json.loads(text or b"null")


def _publish_by_rootlesskit(path: str, count: int) -> float:
    api = _Api(path)
    began = time.perf_counter()
    ids = []
    for port in range(FIRST_PUBLISHED, FIRST_PUBLISHED + count):
        spec = {"proto": "tcp", "parentIP": PUBLISHED, "parentPort": port, "childPort": port}
        ids.append(api.ask("POST", "/v1/ports", spec)["id"])
    took = time.perf_counter() - began
    for number in ids:
        api.ask("DELETE", f"/v1/ports/{number}")
    api.close()
    return took


@contextmanager
def _host(_: int) -> Iterator[Running]:
    port = free_port()
    yield Running((), 0, LOOPBACK, (port, port))


def _timed(command: list[str]) -> float:
    began = time.perf_counter()
    output(command, PATIENCE, cwd=ROOT)
    return time.perf_counter() - began
