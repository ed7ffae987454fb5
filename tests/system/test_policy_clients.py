"""Clients of many kinds under one policy, none of which knows that there is one: no proxy, no setting.

Each has its own server in the world (`world`), which listens at every address.  Without a policy it reaches a host
that the policy does not name.  With it, it reaches the one that is allowed, and of others is told at once that the
name does not exist, or that the address is prohibited.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from netns_kit import Namespace, Policy
from tests.support import needs
from tests.support.clients import ALLOWED, DENIED, HTTPS, SSH, Client, Place, curl, git_ssh, pip
from tests.support.world import EVIL, WEB, World, in_world

POSTGRES, REDIS = 15432, 16379
POLICY = Policy.deny().allow("*.example.org", protocol="tcp", ports=[HTTPS, SSH, POSTGRES, REDIS])
"""The one policy."""
RESOLVER_PATIENCE = 5.0
"""Seconds that libc waits for an answer (resolv.conf(5)); who gets no answer to a SYN waits for longer."""


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


GO = """
package main

import (
	"fmt"
	"io"
	"net"
	"os"
)

func main() {
	conn, err := net.Dial("tcp", os.Args[1])
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Fprint(conn, "GET / HTTP/1.0\\r\\n\\r\\n")
	answer, _ := io.ReadAll(conn)
	fmt.Print(string(answer))
}
"""  # without net/http, which takes a quarter of a minute to compile


@contextmanager
def go(place: Place) -> Iterator[Client]:
    needs("go")
    (place.path / "main.go").write_text(GO)
    place.run(
        "env", f"HOME={place.path}", "CGO_ENABLED=0", "GO111MODULE=off", "go", "build", "-o", "get", "main.go"
    )
    with place.http():
        yield Client(
            lambda host: [str(place.path / "get"), f"{host}:{HTTPS}"],
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
    needs("java", "javac")
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
