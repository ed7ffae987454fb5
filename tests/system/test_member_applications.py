"""Applications of real programs in the members of a network: nginx, a service in Python, redis."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from netns_kit import Application, Composition, Member
from tests.support import ROOT, needs, needs_tun
from tests.support.members import echo, network, output, serving
from tests.support.servers import SECONDS, bounded, closed_port

pytestmark = pytest.mark.usefixtures("leaks")

SERVICE = """
import http.server, os, socket

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with socket.create_connection(("store", 6379), 20) as store:
            store.sendall(b"INCR visits\\r\\n")
            visits = store.recv(99).decode().strip(":\\r\\n")
        body = f"visit {visits} to {self.headers['Host']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        print(*words, flush=True)

http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
"""
NGINX = """
user root;
daemon off;
pid {directory}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    server {{
        listen 80;
        location / {{ proxy_pass http://app:8000; proxy_set_header Host $host; }}
    }}
}}
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


def shop(directory: Path, port: int) -> Composition:
    (directory / "nginx.conf").write_text(NGINX.format(directory=directory), encoding="utf-8")
    redis = [
        "redis-server",
        "--bind",
        "0.0.0.0",
        "--save",
        "",
        "--protected-mode",
        "no",
        "--dir",
        str(directory),
    ]
    nginx = ["nginx", "-c", str(directory / "nginx.conf"), "-p", str(directory), "-e", "stderr"]
    return Composition.from_dict(
        {
            "network": {"internal": True},
            "members": {
                "web": {"command": nginx, "ports": [f"127.0.0.1:{port}:80"], "depends_on": ["app:8000"]},
                "app": {"command": [sys.executable, "-ISc", SERVICE], "depends_on": ["db:6379"]},
                "db": {"command": redis, "aliases": ["store"]},
            },
        },
        name=f"shop{os.getpid()}",
        directory=directory,
    )


@pytest.mark.anyio
@bounded
async def test_three_programs_find_each_other_by_name(tmp_path: Path) -> None:
    needs("nginx", "redis-server", "curl")
    port = closed_port()
    async with Application(shop(tmp_path, port)) as lab:
        with anyio.fail_after(20):
            while not await lab.member("web").namespace.listening():  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.05)
        for number in range(1, 4):
            said = await anyio.run_process(["curl", "-sS", f"http://127.0.0.1:{port}/"])
            assert said.stdout == b"visit %d to 127.0.0.1" % number
        seen = [line.text async for line in lab.logs("app")]
        assert len([line for line in seen if "GET / HTTP" in line]) == 3
        assert await output(lab.member("db"), "curl", "-sS", "http://web/") == "visit 4 to web"


@pytest.mark.anyio
@bounded
async def test_a_member_is_restarted_and_no_other_loses_a_connection() -> None:
    """Two have one name: while one is away, the other answers to it, and connections to that go on."""
    async with network() as net, net.member("client") as client:
        first = await net.add_member("app1", aliases=["app"])
        second = await net.add_member("app2", aliases=["app"], ports=["127.0.0.1:0:8000"])
        (forward,) = await second.forwarder.list()
        async with serving(second, 8000, echo):
            inside = await client.namespace.connect_tcp(second.address, 8000)
            outside = await anyio.connect_tcp("127.0.0.1", forward.host_port)
            counts = {"inside": 0, "outside": 0}

            async def load(name: str) -> None:
                stream = inside if name == "inside" else outside
                while True:
                    await stream.send(b"%8d" % counts[name])
                    data = b""
                    while len(data) < 8:
                        data += await stream.receive()
                    assert int(data) == counts[name]
                    counts[name] += 1

            async with anyio.create_task_group() as tasks:
                for name in counts:
                    tasks.start_soon(load, name)
                for _ in range(3):
                    before = dict(counts)
                    await net.remove_member(first)
                    assert await addresses(client, "app") == {str(second.address)}
                    first = await net.add_member("app1", aliases=["app"])
                    assert await addresses(client, "app") == {str(first.address), str(second.address)}
                    assert all(counts[name] > before[name] for name in counts), "both have gone on"
                tasks.cancel_scope.cancel()
            await inside.aclose()
            await outside.aclose()


async def addresses(member: Member, name: str) -> set[str]:
    """What a name means in a member."""
    found = await output(member, "getent", "ahostsv4", name)
    return {line.split()[0] for line in found.splitlines()}


POSTGRESQL = "".join(f":{each}" for each in Path("/usr/lib/postgresql").glob("*/bin"))
"""Where Debian has its programs."""
UNTIL_LISTENED = """
import socket, sys, time
while True:
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), 20).close()
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
"""
LOAD = """
import socket, sys
with socket.create_connection(("db", 6379), 20) as db:
    for number in range(1, 1 << 30):
        db.sendall(b"INCR load\\r\\n")
        assert db.recv(99) == b":%d\\r\\n" % number
        if number % 50 == 0:
            print(number, flush=True)
"""


def netns_kit(*words: str) -> str:
    """What a command of ours prints; it has to succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "netns_kit", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_application_of_the_docs_is_restarted_member_by_member_under_load(tmp_path: Path) -> None:
    """From its file: requests on one connection, and a connection between two other members, go on all the time."""
    needs("nginx", "redis-server")
    name, port = f"docs{os.getpid()}", closed_port()
    directory = tmp_path / "shop"
    shutil.copytree(ROOT / "docs/shop", directory, ignore=shutil.ignore_patterns("run"))
    text = (directory / "shop.toml").read_text(encoding="utf-8").replace(":8080:", f":{port}:")
    text = text.replace('"python3"', f'"{sys.executable}"')
    (directory / "shop.toml").write_text(f'name = "{name}"\n{text}', encoding="utf-8")
    server = (directory / "nginx.conf").read_text(encoding="utf-8")
    # by itself nginx ends a connection after 1,000 requests
    server = server.replace("http {", "http { keepalive_requests 1000000;")
    (directory / "nginx.conf").write_text(server, encoding="utf-8")
    netns_kit("up", "-d", str(directory / "shop.toml"))
    try:
        words = [sys.executable, "-m", "netns_kit", "join", f"{name}/web", sys.executable, "-ISc", LOAD]
        with (
            closing(http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as client,
            subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as load,
        ):
            assert load.stdout is not None
            assert int(load.stdout.readline()) == 50
            netns_kit("join", f"{name}/app1", sys.executable, "-ISc", UNTIL_LISTENED, "web", "80")
            client.connect()
            client.auto_open = 0  # so a lost connection is an error
            visits, served = 0, set()
            for member in ("app1", "app2", "app1"):
                with subprocess.Popen(
                    [sys.executable, "-m", "netns_kit", "restart", name, member], cwd=ROOT
                ) as restart:
                    while restart.poll() is None:
                        client.request("GET", "/")
                        with client.getresponse() as answer:
                            said = re.fullmatch(rb"visit (\d+), served by (one|two)\n", answer.read())
                        assert said, answer.status
                        assert int(said[1]) > visits, "redis has gone on"
                        visits = int(said[1])
                        served.add(said[2])
                assert restart.returncode == 0
                done = int(load.stdout.readline())
            assert served == {b"one", b"two"}
            assert done > 50
            load.kill()
        states = [line.split()[-2:] for line in netns_kit("ps", name).splitlines()]
        assert not any("ended" in state for state in states)
    finally:
        netns_kit("down", name)
    assert name not in netns_kit("ps")


@pytest.mark.anyio
@bounded
async def test_a_database_that_refuses_to_be_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL, as it is installed, asked by the clients of another member before and after it is restarted."""
    monkeypatch.setenv("PATH", os.environ["PATH"] + POSTGRESQL)
    needs("psql", "initdb", "postgres")
    made = "initdb -D data -U postgres -A trust >/dev/null && echo host all all all trust >>data/pg_hba.conf"
    lab = Composition.from_dict(
        {
            "network": {"internal": True},
            "members": {
                "db": {
                    "command": f"test -d data || {{ {made}; }}; exec postgres -D data -k '' -h 0.0.0.0",
                    "ids": "same",
                },
                "app": {"command": ["sleep", "1000"], "depends_on": ["db:5432"]},
            },
        },
        directory=tmp_path,
    )
    async with Application(lab) as application:
        app = application.member("app")
        psql = 'until psql -h db -U postgres -qtAc "$1"; do sleep 0.1; done'  # it listens before it answers
        ask = ["sh", "-c", psql, "sh"]
        await output(app, *ask, "CREATE TABLE visits AS SELECT 42")
        await application.restart("db")
        assert await output(app, *ask, "TABLE visits") == "42"


@pytest.mark.anyio
@pytest.mark.parametrize("by", ["a command of the member", "a command of the host"])
@bounded
async def test_a_container_joins_a_member_by_path(tmp_path: Path, by: str) -> None:
    """By crun, in the member's user namespace, which names the path of the network's."""
    needs("crun", "busybox", "unshare", "nsenter")
    root = tmp_path / "rootfs"
    for directory in ("bin", "proc", "dev", "sys"):
        (root / directory).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
    script = "busybox ping -c1 -W5 10.0.2.101 >&2 && busybox nslookup db 10.0.2.3"
    process = {
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "args": ["busybox", "sh", "-c", script],
        "env": ["PATH=/bin"],
        "capabilities": {kind: ["CAP_NET_RAW"] for kind in ("bounding", "effective", "permitted")},
    }
    namespaces = [{"type": "mount"}, {"type": "pid"}, {"type": "network"}]
    config = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": process,
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": namespaces},
    }
    crun = [
        "crun",
        f"--root={tmp_path / 'state'}",
        "--cgroup-manager=disabled",
        "run",
        f"--bundle={tmp_path}",
        "c",
    ]
    alone = ["unshare", "-mC", "sh", "-c", 'mount -t cgroup2 none /sys/fs/cgroup; exec "$@"', "sh"]
    async with network() as net, net.member("db"), net.member("box") as box:
        is_inside = by == "a command of the member"
        place = f"/proc/{1 if is_inside else box.namespace.pid}/ns"
        namespaces[2]["path"] = f"{place}/net"
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if is_inside:
            said = await output(box, *alone, *crun)
        else:
            entered = ["nsenter", "--preserve-credentials", f"--user={place}/user"]
            said = (await anyio.run_process([*entered, *alone, *crun])).stdout.decode()
        assert "Address: 10.0.2.101" in said
