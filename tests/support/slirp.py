"""A caller of slirp4netns, as podman, rootlesskit and Buildah are: pipes, their numbers, their order, their patience.

And a namespace to call it for, which knows nothing of this library.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support import ROOT, needs, needs_tun
from tests.support.servers import SECONDS

ENTER = ("nsenter", "--preserve-credentials", "--user", "--net", "--target")


SCRIPT = ROOT / "scripts" / "netns-kit-slirp4netns"


def executable(directory: Path, name: str = SCRIPT.name, first: str = "") -> str:
    """The installed command, as pip installs it, for this checkout.  `first` is a line that it runs before."""
    path = directory / name
    head, _, text = SCRIPT.read_text().partition("\n")
    assert head == "#!python"
    path.write_text(f"#!{sys.executable}\nimport os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{first}\n{text}")
    path.chmod(0o755)
    return str(path)


class Held:
    """A user and a network namespace, for as long as their process lives."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.path = f"/proc/{pid}/ns/net"

    def kill(self) -> None:
        """End the process that it is known by."""
        os.kill(self.pid, signal.SIGKILL)

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            [*ENTER, str(self.pid), *command], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def python(self, code: str) -> str:
        """What a program inside prints."""
        return self.run(sys.executable, "-S", "-E", "-I", "-c", code).strip()

    def connect(self, address: str, port: int) -> str:
        """What a server there says first, or the error's name."""
        return self.python(
            f"""
import errno, socket
try:
    with socket.create_connection(({address!r}, {port}), timeout=10) as sock:
        print(sock.recv(100).decode())
except OSError as error:
    print(errno.errorcode.get(error.errno, error))
"""
        )


@contextmanager
def held() -> Iterator[Held]:
    """A new one, its loopback down."""
    needs("unshare", "nsenter", "ip")
    needs_tun()
    command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield Held(process.pid)
        finally:
            process.kill()


class Slirp:
    """slirp4netns, started with pipes for --ready-fd and --exit-fd; `ready` is read like podman does."""

    def __init__(self, process: subprocess.Popen[str], ready: int, exit_: int) -> None:
        self.process = process
        self.pid = process.pid
        self._ready, self._exit = ready, exit_

    def ready(self) -> bytes:
        """All that it writes there until it closes it."""
        said = b""
        while True:
            assert select.select([self._ready], [], [], SECONDS)[0], "not ready in time"
            piece = os.read(self._ready, 16)
            if not piece:
                return said
            said += piece

    def say(self, data: bytes) -> None:
        """Write to the exit pipe."""
        os.write(self._exit, data)

    def leave(self) -> int:
        """Close the exit pipe; the exit status."""
        os.close(self._exit)
        self._exit = -1
        return self.process.wait(SECONDS)

    def output(self) -> tuple[str, str]:
        """What it wrote, once it has ended."""
        return self.process.communicate(timeout=SECONDS)

    def end(self) -> None:
        for fd in (self._ready, self._exit):
            if fd >= 0:
                os.close(fd)
        self.process.kill()
        self.process.communicate()


@contextmanager
def slirp(
    *words: str, program: Sequence[str] = (), exit_first: bool = False, pass_fds: Sequence[int] = ()
) -> Iterator[Slirp]:
    """Started; killed at the end of the block.  Its pipes are descriptors 3 and 4 as far as it can tell: READY and
    EXIT in `words` become their numbers."""
    needs(*program[:1])
    with ExitStack() as theirs:
        ready, writing = os.pipe()
        reading, exit_ = os.pipe()
        for fd in (writing, reading):
            theirs.callback(os.close, fd)
        numbers = {"READY": str(writing), "EXIT": str(reading)}
        given = [f"--exit-fd={reading}", f"--ready-fd={writing}"]
        if not exit_first:
            given.reverse()
        if any(word in numbers for word in words):
            given = []
        command = [
            *(program or (sys.executable, "-m", "netns_kit", "slirp4netns")),
            *given,
            *(numbers.get(word, word) for word in words),
        ]
        process = subprocess.Popen(
            command,
            pass_fds=[writing, reading, *pass_fds],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONUNBUFFERED": "1",
            },
        )
    running = Slirp(process, ready, exit_)
    try:
        yield running
    finally:
        running.end()


@contextmanager
def attached(*words: str, **options: Any) -> Iterator[tuple[Held, Slirp]]:
    """A namespace with it, configured and ready.  PID and PATH in `words` become the namespace's; with neither, PID
    and tap0 are added.
    """
    with held() as ns:
        named = {"PID": str(ns.pid), "PATH": ns.path}
        line = [named.get(word, word) for word in words]
        if not named.keys() & set(words):
            line += ["--configure", str(ns.pid), "tap0"]
        with slirp(*line, **options) as running:
            said = running.ready()
            assert said == b"1", running.output()
            yield ns, running


_SERVER = """
import socket
with socket.create_server(("0.0.0.0", 80)) as server:
    print("ready", flush=True)
    while True:
        sock, client = server.accept()
        with sock:
            sock.sendall(client[0].encode())
"""


@contextmanager
def server_inside(ns: Held) -> Iterator[None]:
    """At port 80 of the namespace: it tells each client its address."""
    command = [*ENTER, str(ns.pid), sys.executable, "-S", "-E", "-I", "-c", _SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def ask(path: str, request: dict[str, object] | bytes) -> Any:
    """What the API answers to a request."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS)
        sock.connect(path)
        sock.sendall(request if isinstance(request, bytes) else json.dumps(request).encode())
        sock.shutdown(socket.SHUT_WR)
        data = b""
        while piece := sock.recv(1 << 16):
            data += piece
    return json.loads(data)


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def children_of(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()
