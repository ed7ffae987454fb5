"""Clients of many kinds under one policy, none of which knows that there is one: no proxy, no setting.

Each has its own server in the world (`world`), which listens at every address.  Without a policy it reaches a host
that the policy does not name.  With it, it reaches the one that is allowed, and of others is told at once that the
name does not exist, or that the address is prohibited.
"""

from __future__ import annotations

import base64
import hashlib
import os
import pwd
import shutil
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

import anyio
import pytest

from netns_kit import Namespace, Policy
from tests.support import needs
from tests.support.servers import SECONDS
from tests.support.world import EVIL, WEB, World, in_world

ALLOWED, DENIED = "service.example.org", "another.example"
HTTPS, SSH, POSTGRES, REDIS = 8444, 8022, 15432, 16379
POLICY = Policy.deny().allow("*.example.org", protocol="tcp", ports=[HTTPS, SSH, POSTGRES, REDIS])
"""The one policy."""
RESOLVER_PATIENCE = 5.0
"""Seconds that libc waits for an answer (resolv.conf(5)); who gets no answer to a SYN waits for longer."""


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
        (self.path / "index.html").write_text("welcome\n")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path / "cert.pem", self.path / "key.pem")
        with self.world.on("other"):
            server = ThreadingHTTPServer(("0.0.0.0", HTTPS), partial(Quiet, directory=str(self.path)))
        server.socket = context.wrap_socket(server.socket, server_side=True)
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
def git_https(place: Place) -> Iterator[Client]:
    needs("git", "openssl")
    place.repository()
    with place.https():
        yield Client(
            lambda host: ["git", "ls-remote", f"https://{host}:{HTTPS}/project.git"],
            "refs/heads/main",
            "Could not resolve host",
            "Failed to connect",
        )


@contextmanager
def git_ssh(place: Place) -> Iterator[Client]:
    needs("git")
    needs("ssh", "ssh-keygen", "sshd")
    repository = place.repository()
    for key in ("host", "user"):
        place.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    shutil.copy(place.path / "user.pub", place.path / "authorized")
    settings = [f"HostKey={place.path}/host", f"AuthorizedKeysFile={place.path}/authorized", "StrictModes=no"]
    settings += ["UsePAM=no", "PidFile=none", f"Port={SSH}"]
    sshd = shutil.which("sshd")
    ssh = f"ssh -F /dev/null -i {place.path}/user -o BatchMode=yes -o StrictHostKeyChecking=no"
    ssh += " -o UserKnownHostsFile=/dev/null"
    user = pwd.getpwuid(os.geteuid()).pw_name
    with place.serving(SSH, sshd, "-D", "-f", "/dev/null", *(f"-o{each}" for each in settings)):
        yield Client(
            lambda host: [
                "git",
                "-c",
                f"core.sshCommand={ssh}",
                "ls-remote",
                f"ssh://{user}@{host}:{SSH}{repository}",
            ],
            "refs/heads/main",
            "Could not resolve hostname",
        )


@contextmanager
def psql(place: Place) -> Iterator[Client]:
    os.environ["PATH"] += "".join(f":{each}" for each in Path("/usr/lib/postgresql").glob("*/bin"))
    needs("psql", "initdb", "postgres")
    place.run("initdb", "-D", "data", "-U", "user", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C")
    (place.path / "data" / "pg_hba.conf").write_text("host all all 0.0.0.0/0 trust\n")
    options = (
        f"port={POSTGRES}",
        "listen_addresses=0.0.0.0",
        f"unix_socket_directories={place.path}",
        "fsync=off",
    )
    with place.serving(
        POSTGRES, "postgres", "-D", "data", *(word for each in options for word in ("-c", each))
    ):
        url = f"postgresql://user@{{}}:{POSTGRES}/postgres"
        yield Client(
            lambda host: ["psql", "-X", "-A", "-t", "-c", "select 'wel' || 'come'", url.format(host)],
            "welcome",
            "could not translate host name",
        )


@contextmanager
def redis_cli(place: Place) -> Iterator[Client]:
    needs("redis-cli", "redis-server")
    options = ("--port", REDIS, "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "")
    with place.serving(REDIS, "redis-server", *options):
        yield Client(
            lambda host: ["redis-cli", "-h", host, "-p", str(REDIS), "ping"],
            "PONG",
            "Name or service not known",
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


GO = """
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
)

func main() {
	answer, err := http.Get(os.Args[1])
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	body, _ := io.ReadAll(answer.Body)
	fmt.Print(string(body))
}
"""


@contextmanager
def go(place: Place) -> Iterator[Client]:
    if_there("go")
    needs("openssl")
    (place.path / "main.go").write_text(GO)
    place.run(
        "env", f"HOME={place.path}", "CGO_ENABLED=0", "GO111MODULE=off", "go", "build", "-o", "get", "main.go"
    )
    with place.https():
        yield Client(
            lambda host: [str(place.path / "get"), f"https://{host}:{HTTPS}/"],
            "welcome",
            "no such host",
            "no route to host",
        )


NODE = """
fetch(process.argv[1]).then(answer => answer.text()).then(console.log, error => {
    console.log(error.cause);
    process.exit(1);
});
"""


@contextmanager
def node(place: Place) -> Iterator[Client]:
    needs("node")
    needs("openssl")
    with place.https():
        yield Client(
            lambda host: ["node", "-e", NODE, f"https://{host}:{HTTPS}/"],
            "welcome",
            "ENOTFOUND",
            "EHOSTUNREACH",
        )


JAVA = """
import java.io.FileInputStream;
import java.net.URL;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import javax.net.ssl.HttpsURLConnection;
import javax.net.ssl.SSLContext;
import javax.net.ssl.TrustManagerFactory;

class Get {
    public static void main(String[] arguments) throws Exception {
        KeyStore trusted = KeyStore.getInstance(KeyStore.getDefaultType());
        trusted.load(null, null);
        FileInputStream pem = new FileInputStream(arguments[0]);
        trusted.setCertificateEntry("ca", CertificateFactory.getInstance("X.509").generateCertificate(pem));
        TrustManagerFactory managers = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        managers.init(trusted);
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(null, managers.getTrustManagers(), null);
        HttpsURLConnection.setDefaultSSLSocketFactory(context.getSocketFactory());
        System.out.print(new String(new URL(arguments[1]).openStream().readAllBytes()));
    }
}
"""


@contextmanager
def java(place: Place) -> Iterator[Client]:
    if_there("java", "javac")
    needs("openssl")
    (place.path / "Get.java").write_text(JAVA)
    place.run("javac", "Get.java")
    command = [
        "java",
        "-Xshare:auto",
        "-XX:TieredStopAtLevel=1",
        "-cp",
        str(place.path),
        "Get",
        str(place.path / "ca.pem"),
    ]
    with place.https():
        yield Client(
            lambda host: [*command, f"https://{host}:{HTTPS}/"],
            "welcome",
            "UnknownHostException",
            "NoRouteToHostException",
        )


def if_there(*commands: str) -> None:
    """Require programs that are a lot to install for one test: without them it is skipped in CI, too."""
    absent = [command for command in commands if shutil.which(command) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")


@pytest.mark.parametrize("client", [curl, git_https, git_ssh, psql, redis_cli, pip, go, node, java])
@in_world
async def test_a_client_reaches_what_is_allowed_and_is_told_at_once_what_is_not(
    world: World, client: Callable[[Place], Iterator[Client]], tmp_path: Path
) -> None:
    for name, address in (ALLOWED, WEB), (DENIED, EVIL):
        world.says(name, f"{name} 60 IN A {address}")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C"}
    for name in ("SSL_CERT_FILE", "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS", "CURL_CA_BUNDLE"):
        environment[name] = str(tmp_path / "ca.pem")

    async def says(host: str) -> tuple[int, str, float]:
        start = anyio.current_time()
        done = await net.run(this.command(host), env=environment, stderr=subprocess.STDOUT, check=False)
        return done.returncode, done.stdout.decode(), anyio.current_time() - start

    with client(Place(world, tmp_path)) as this:  # type: ignore[attr-defined]  # they are context managers
        async with world.network("worker", namespace=Namespace.create(ids="same")) as net:
            status, said, _ = await says(DENIED)
            assert (status, this.says in said) == (0, True), said
        world.forget()
        async with world.network("worker", namespace=Namespace.create(ids="same"), policy=POLICY) as net:
            status, said, took = await says(ALLOWED)
            assert (status, this.says in said) == (0, True), said
            for host, words in (DENIED, this.no_name), (EVIL, this.no_route):
                status, said, seconds = await says(host)
                assert status != 0
                assert words in said, said
                assert seconds < took + RESOLVER_PATIENCE, "it has waited for nothing"
    assert not [each for each in world.arrivals() if each.target == EVIL]
    assert DENIED not in world.names_asked()
