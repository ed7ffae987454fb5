"""Clients that know of no proxy and no policy, each with its own server in the world, at every address."""

from __future__ import annotations

import base64
import hashlib
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support import needs
from tests.support.servers import SECONDS
from tests.support.world import EVIL, World

ALLOWED, DENIED = "service.example.org", "another.example"
"""Names of `WEB` and of `EVIL`, as a certificate of `Place.https` has them."""
HTTPS, SSH = 8444, 8022


@dataclass
class Client:
    """How a client is executed, and what it says."""

    command: Callable[[str], list[str]]
    """What to execute for a host."""
    says: str
    """What a server that it reaches has it print."""
    no_name: str
    """What it says of a name that does not exist."""
    no_route: str = "No route to host"
    """What it says of an address that is prohibited."""


@dataclass
class Place:
    """A directory for the files of servers and clients, and the world."""

    world: World
    path: Path

    def run(self, *command: object) -> None:
        """Prepare something."""
        subprocess.run(
            [str(each) for each in command], check=True, capture_output=True, cwd=self.path, timeout=SECONDS
        )

    @contextmanager
    def serving(self, port: int, *command: object) -> Iterator[None]:
        """In the world a server runs, which has begun to listen."""
        with self.world.on("other"), (self.path / "log").open("wb") as log:
            server = subprocess.Popen([str(each) for each in command], stdout=log, stderr=log, cwd=self.path)
        try:
            self.world.wait_listening(port)
            yield
        finally:
            server.terminate()
            server.wait(SECONDS)

    @contextmanager
    def https(self) -> Iterator[None]:
        """In the world a web server has our files, and a certificate of our authority."""
        names = ",".join(f"DNS:{each}" for each in (ALLOWED, DENIED)) + f",IP:{EVIL}"
        new = (
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            2,
        )
        self.run(*new, "-subj", "/CN=Nobody's", "-keyout", "ca.key", "-out", "ca.pem")
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", f"subjectAltName={names}"]
        signed += ["-addext", "basicConstraints=critical,CA:FALSE"]
        self.run(*new, "-subj", f"/CN={ALLOWED}", *signed, "-keyout", "key.pem", "-out", "cert.pem")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path / "cert.pem", self.path / "key.pem")
        with self.http(lambda sock: context.wrap_socket(sock, server_side=True)):
            yield

    @contextmanager
    def http(self, wrap: Callable[[socket.socket], socket.socket] = lambda sock: sock) -> Iterator[None]:
        """In the world a web server has our files."""
        (self.path / "index.html").write_text("welcome\n")
        with self.world.on("other"):
            server = ThreadingHTTPServer(("0.0.0.0", HTTPS), partial(Quiet, directory=str(self.path)))
        server.socket = wrap(server.socket)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()

    def repository(self) -> Path:
        """Make a repository, with one commit."""
        git = ("git", "-c", "user.name=x", "-c", "user.email=x", "-c", "init.defaultBranch=main")
        self.run(*git, "init", "-q", "work")
        self.run(*git, "-C", "work", "commit", "-q", "--allow-empty", "-m", "welcome")
        self.run(*git, "clone", "-q", "--bare", "work", "project.git")
        self.run(*git, "-C", "project.git", "update-server-info")
        return self.path / "project.git"


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and logs nothing."""

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def curl(place: Place) -> Iterator[Client]:
    needs("curl", "openssl")
    with place.https():
        yield Client(
            lambda host: ["curl", "-sSv", f"https://{host}:{HTTPS}/"], "welcome", "Could not resolve host"
        )


@contextmanager
def sshd(place: Place) -> Iterator[list[str]]:
    """In the world sshd runs.  It yields the client that it lets in, to which a host and a command are added."""
    needs("ssh", "ssh-keygen", "sshd")
    for key in ("host", "user"):
        place.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    shutil.copy(place.path / "user.pub", place.path / "authorized")
    settings = [f"HostKey={place.path}/host", f"AuthorizedKeysFile={place.path}/authorized", "StrictModes=no"]
    settings += ["UsePAM=no", "PidFile=none", f"Port={SSH}"]
    ssh = f"ssh -F /dev/null -i {place.path}/user -o BatchMode=yes -o StrictHostKeyChecking=no"
    ssh += f" -o UserKnownHostsFile=/dev/null -p {SSH} -l {pwd.getpwuid(os.geteuid()).pw_name}"
    program = shutil.which("sshd")
    with place.serving(SSH, program, "-D", "-f", "/dev/null", *(f"-o{each}" for each in settings)):
        yield ssh.split()


@contextmanager
def ssh(place: Place) -> Iterator[Client]:
    with sshd(place) as command:
        yield Client(lambda host: [*command, host, "echo welcome"], "welcome", "Could not resolve hostname")


@contextmanager
def git_ssh(place: Place) -> Iterator[Client]:
    needs("git")
    repository = place.repository()
    with sshd(place) as command:
        yield Client(
            lambda host: [
                "git",
                "-c",
                f"core.sshCommand={' '.join(command)}",
                "ls-remote",
                f"ssh://{host}:{SSH}{repository}",
            ],
            "refs/heads/main",
            "Could not resolve hostname",
        )


@contextmanager
def pip(place: Place) -> Iterator[Client]:
    needs("openssl")
    wheel = "welcome-1.0-py3-none-any.whl"
    (place.path / "simple" / "welcome").mkdir(parents=True)
    (place.path / "simple" / "welcome" / "index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
    metadata = "Metadata-Version: 2.1\nName: welcome\nVersion: 1.0\n"
    tags = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(place.path / "simple" / "welcome" / wheel, "w") as archive:
        record = ""
        for name, text in ("METADATA", metadata), ("WHEEL", tags):
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"welcome-1.0.dist-info/{name},sha256={digest},{len(text)}\n"
            archive.writestr(f"welcome-1.0.dist-info/{name}", text)
        archive.writestr("welcome-1.0.dist-info/RECORD", record + "welcome-1.0.dist-info/RECORD,,\n")
    options = ["--isolated", "--no-cache-dir", "--disable-pip-version-check", "--retries", "1"]
    command = [
        sys.executable,
        "-m",
        "pip",
        *options,
        "download",
        "--no-deps",
        "-d",
        str(place.path),
        "welcome",
    ]
    certificates = ["--cert", str(place.path / "ca.pem")]
    with place.https():
        yield Client(
            lambda host: [*command, *certificates, "-i", f"https://{host}:{HTTPS}/simple/"],
            "Successfully downloaded welcome",
            "Name or service not known",
        )
