"""The programs in examples/: each runs as its README says."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from netns_kit import FakeInternet, GuestStream
from netns_kit.sync import Network
from tests.support import ROOT, missing, needs, needs_tun, needs_userns
from tests.support.servers import SECONDS

EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


def example(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with an example; whatever warns has failed."""
    return subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=cwd,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_agent_reaches_what_is_allowed_and_is_told_why_not(tmp_path: Path) -> None:
    needs("curl")
    needs_tun()
    (tmp_path / "page").write_text("the page")

    class Pages(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: object) -> None:
            super().__init__(*given, directory=str(tmp_path))  # type: ignore[arg-type]  # as socketserver gives them

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever).start()
        port = server.server_port
        policy = (EXAMPLES / "agent_sandbox" / "policy.toml").read_text()
        rule = f'\n[[rules]]\naction = "allow"\ntargets = ["host.containers.internal"]\nports = [{port}]\n'
        (tmp_path / "policy.toml").write_text(policy + rule)
        script = f"""
            curl -sS http://host.containers.internal:{port}/page; echo
            curl -sS -o /dev/null -w '%{{http_code}}\\n' http://www.example.com/
            curl -sS http://www.example.com/secret http://192.0.2.1/
            curl -sS https://www.example.com/ 2>&1
            curl -sS http://169.254.169.254/latest
            exit 7
        """
        words = ["policy.toml", "audit.jsonl", "--host-port", str(port), "--", "sh", "-c", script]
        done = example(EXAMPLES / "agent_sandbox" / "sandbox.py", *words, cwd=tmp_path)
        server.shutdown()
    assert done.returncode == 7, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["the page", "403"], done.stdout
    assert "This sandbox does not let you reach www.example.com." in lines
    assert "The network policy of this sandbox does not allow 192.0.2.1:80." in lines
    assert "curl: (35)" in done.stdout
    audit = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [each["request"] for each in audit if "request" in each] == [
        "GET / HTTP/1.1",
        "GET /secret HTTP/1.1",
    ]
    reached, _, refused = done.stderr.partition("refused: ")
    assert "reached: 1\n  1 × tcp host.containers.internal" in reached
    for what in (
        "dns www.example.com (name): default: deny",
        "http www.example.com (GET /secret HTTP/1.1): default: deny",
        "tcp www.example.com (443): default: deny",
        "tcp 192.0.2.1 (80): default: deny",
        "tcp 169.254.169.254 (80): rule 1 (no credentials of the cloud)",
    ):
        assert f"1 × {what}" in refused


def test_the_flaky_network_passes() -> None:
    needs_tun()
    done = example("-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/flaky_network", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 passed" in done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root file system of busybox alone."""
    needs("busybox", "chroot", "unshare")
    needs_userns()
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "etc").mkdir()
    (tree / "etc" / "resolv.conf").symlink_to("../run/no/such/file")
    shutil.copy(str(shutil.which("busybox")), tree / "bin")
    for name in "cat hostname httpd id ls nslookup sh touch true".split():
        (tree / "bin" / name).symlink_to("busybox")
    done = subprocess.run(
        ["unshare", "-r", "chroot", tree, "true"], capture_output=True, check=False, text=True
    )
    if done.returncode:
        missing(f"no busybox without libraries: {done.stderr}")
    return tree


def page(url: str) -> bytes:
    """Return a page of a server that is about to listen."""
    until = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as answer:
                return bytes(answer.read())
        except OSError:
            assert time.monotonic() < until, url
            time.sleep(0.05)


RUNTIME = EXAMPLES / "runtime" / "runtime.py"


def test_the_runtime_has_a_root_volumes_and_a_policy(tree: Path, tmp_path: Path) -> None:
    needs_tun()
    (tmp_path / "policy.toml").write_text(
        'default = "deny"\n[[rules]]\naction = "allow"\ntargets = ["example.org"]\n'
    )
    (tmp_path / "data").mkdir()
    script = """
        id -u; hostname; ls /; ls -d /proc/[0-9]*; cat /etc/resolv.conf; echo > /dev/null
        echo written > /data/file; touch /ro/file; nslookup www.example.net; exit 42
    """
    volumes = ["-v", f"{tmp_path}/data:/data", "-v", f"{tmp_path}/data:/ro:ro"]
    words = ["--policy", "policy.toml", *volumes, "--hostname", "box", str(tree), "sh", "-c", script]
    done = example(RUNTIME, *words, cwd=tmp_path)
    assert done.returncode == 42, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["0", "box"]
    assert {"bin", "data", "dev", "etc", "proc", "ro", "run", "sys", "tmp"} == set(lines[2:11])
    assert sum(line.startswith("/proc/") for line in lines) == 2, lines  # init and the shell
    assert "nameserver 10.0.2.3" in lines
    assert (tmp_path / "data" / "file").read_text() == "written\n"
    assert "touch: /ro/file: Read-only file system" in done.stderr
    assert "** server can't find www.example.net: NXDOMAIN" in lines


def test_the_runtime_publishes_a_port_and_passes_on_signals(tree: Path, tmp_path: Path) -> None:
    needs_tun()
    (tmp_path / "index.html").write_text("from inside")
    script = "trap 'exit 5' TERM; httpd -f -p 80 -h /srv & echo started; wait"
    words = ["-p", "127.0.0.1:0:80", "-v", f"{tmp_path}:/srv:ro", str(tree), "sh", "-c", script]
    pipe = subprocess.PIPE
    command: list[str | Path] = [sys.executable, RUNTIME, *words]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        try:
            where = running.stderr.readline().split()[0]
            assert running.stdout.readline() == "started\n"
            assert page(f"http://{where}/") == b"from inside"
            running.send_signal(signal.SIGTERM)
            assert running.wait(SECONDS) == 5
        finally:
            running.kill()  # and the container ends


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["tree", "nosuch"], 127, "nosuch: No such file or directory"),
        (["-v", "nosuch:/srv", "tree"], 125, "[Errno 2] No such file or directory: 'nosuch'"),
        (["nosuch"], 125, "No such file or directory: '"),
        (["-p", "nosuch", "tree"], 125, "port='nosuch': expected "),
    ],
)
def test_the_runtime_says_in_one_line_what_is_wrong(
    tree: Path, tmp_path: Path, words: list[str], status: int, said: str
) -> None:
    needs_tun()
    done = example(RUNTIME, *words, cwd=tmp_path)
    assert done.returncode == status
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


HTTP = """
import socket, sys
try:
    address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), socket.AF_INET, socket.SOCK_STREAM)[0][4]
    with socket.create_connection(address) as stream:
        stream.sendall(b"GET /<blink> HTTP/1.1\\r\\n\\r\\n")
        while stream.recv(1000):
            pass
except OSError as error:
    print(error)
"""


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """Return a capture of a connection, one that is refused, and a name that does not exist."""
    needs_tun()
    fake = FakeInternet()
    api = fake.host("api.example.org")

    @api.tcp(80)
    async def answer(stream: GuestStream) -> None:
        await stream.receive()
        await stream.send(b"HTTP/1.1 204 No Content\r\n\r\n")

    path = tmp_path / "run.pcapng"
    with Network(uplink=fake) as net, net.stack.capture(path):
        for name, port in ("api.example.org", 80), ("api.example.org", 81), ("nowhere.example.org", 80):
            net.run([sys.executable, "-c", HTTP, name, str(port)])
        until = time.monotonic() + SECONDS
        while any(flow.protocol == "tcp" for flow in net.stack.flows()):
            assert time.monotonic() < until
            time.sleep(0.05)
    return path


def test_the_explorer_says_what_there_is_in_a_capture(capture: Path, tmp_path: Path) -> None:
    def explored(*words: str) -> str:
        done = example(EXAMPLES / "capture_explorer" / "explore.py", capture, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = explored()
    assert re.search(r"(?m)^protocols: .*\bHTTP 2\b", told)
    assert re.search(
        r"(?m)^    1  10\.0\.2\.100:\d+ → [\d.]+:80 \(api\.example\.org\), \d+ bytes, finished$", told
    )
    assert re.search(
        r"(?m)^    2  10\.0\.2\.100:\d+ → [\d.]+:81 \(api\.example\.org\), \d+ bytes, reset$", told
    )
    assert "10.0.2.3 → 10.0.2.100 DNS: A nowhere.example.org → NXDOMAIN" in told
    assert "TCP: RST ACK" in told
    assert "SYN seq 0" in (diagram := explored("--connection", "1"))
    assert "HTTP: GET /<blink> HTTP/1.1" in diagram
    assert explored("--connection", "3") == "there is no such connection\n"
    listed = explored("http", "from guest", "--list")
    assert "Packets: 1 packet" in listed
    [number] = re.findall(r"(?m)^ +(\d+) .*GET", listed)
    assert "HTTP: GET /<blink> HTTP/1.1" in explored("--packet", number)
    assert "10.0.2.3" not in explored("api.example.org", "tcp")
    assert explored("--html", "run.html") == ""
    page = (tmp_path / "run.html").read_text()
    total = int(told.split()[0])
    assert page.count("<summary>Packet ") == total
    assert page.count("<svg") == page.count("<summary>Connection ") == 2
    assert "<blink>" not in page
    assert "<script" not in page


def test_the_explorer_says_what_is_no_capture(tmp_path: Path) -> None:
    done = example(EXAMPLES / "capture_explorer" / "explore.py", __file__, cwd=tmp_path)
    assert done.returncode == 2
    assert "explore.py: error: the capture cannot be read: " in done.stderr
