"""`netns-kit run`, as people and scripts use it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import pytest

from netns_kit.cli.command_line import FAILED
from netns_kit.cli.run import NOT_EXECUTABLE, NOT_FOUND, main
from netns_kit.gateway.setup import DriverName
from tests.support import ROOT, missing, needs, needs_ipv6, needs_tun, pcapng
from tests.support.servers import (
    SECONDS,
    closed_port,
    digest,
    dns_server,
    hello,
    host_address,
    http,
    tcp_server,
)
from tests.support.waiting import until_written

pytestmark = pytest.mark.usefixtures("leaks")

NETNS_KIT = [sys.executable, "-m", "netns_kit"]
RESOLV_CONF = Path("/etc/resolv.conf")

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.client_address[0].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("0.0.0.0", 80), Handler)
print("ready", flush=True)
server.serve_forever()
"""
NGINX = """
user root; daemon off; master_process off; pid {0}/pid; error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {0}/1; proxy_temp_path {0}/2; fastcgi_temp_path {0}/3;
    uwsgi_temp_path {0}/4; scgi_temp_path {0}/5;
    server {{ listen 80; return 200 $remote_addr; }}
}}
"""
UNTIL_LISTENING = "until ss -Hltn 'sport = :80' | grep -q .; do kill -0 $! || exit 1; done; echo ready;"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def run(*words: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """`netns-kit run WORDS`."""
    needs_tun()
    return subprocess.run(
        [*NETNS_KIT, "run", *words],
        capture_output=True, text=True, timeout=SECONDS, check=False, env=environment(), input=input,
    )  # fmt: skip


@contextlib.contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """`netns-kit run WORDS` until its command has said that it is ready; ended at the end of the block."""
    needs_tun()
    command = [*NETNS_KIT, "run", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], SECONDS)[0], "not ready in time"
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.terminate()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


# -- the command's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "exit 255"], 255),
        (["sh", "-c", "kill -TERM $$"], -signal.SIGTERM),
        (["sh", "-c", "kill -KILL $$"], -signal.SIGKILL),
        (["no-such-command-anywhere"], NOT_FOUND),
        (["/etc/passwd"], NOT_EXECUTABLE),
        (["/"], NOT_EXECUTABLE),
    ],
)
def test_the_exit_status(command: Sequence[str], status: int) -> None:
    done = run("--", *command)
    assert done.returncode == status, done.stderr
    if status in (NOT_FOUND, NOT_EXECUTABLE):
        assert done.stderr.startswith("netns-kit: ")
        assert command[0] in done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert done.stderr == ""


def test_its_streams_are_the_callers() -> None:
    done = run("--", "sh", "-c", "cat; echo problems >&2", input="one\ntwo\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "problems\n")


@pytest.mark.parametrize(
    "words",
    [["--mtu", "1400", "echo"], ["echo"], ["--", "echo"], ["--host-loopback", "echo"], ["--ipv6", "echo"]],
)
def test_its_words_are_its_own(words: list[str]) -> None:
    own = ["--host-loopback", "-p", "80:80", "--mtu=9", "--", "x y", ""]
    done = run(*words, *own)
    assert (done.returncode, done.stdout) == (0, " ".join(own) + "\n"), done.stderr


def test_without_a_command_it_is_a_shell() -> None:
    done = run(input="echo $((6 * 7))\n")
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(number: signal.Signals) -> None:
    script = f"trap 'echo caught; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    with running("--", "bash", "-c", script) as process:
        process.send_signal(number)
        assert process.wait(SECONDS) == 9
        assert process.stdout is not None
        assert process.stdout.read() == "caught\n"


def test_a_signal_that_ends_the_command_ends_it() -> None:
    with running("--", "sh", "-c", "echo ready; exec sleep 600") as process:
        process.terminate()
        assert process.wait(SECONDS) == -signal.SIGTERM


@pytest.mark.parametrize("driver", get_args(DriverName))
def test_it_ends_at_once_when_its_device_does(driver: DriverName) -> None:
    needs("ip")
    done = run("--driver", driver, "--", "sh", "-c", "ip link delete tap0; exec sleep 600")
    assert done.returncode == FAILED
    assert done.stderr.startswith("netns-kit: tap0: "), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("driver", get_args(DriverName))
def test_it_ends_at_once_when_its_agent_does(driver: DriverName) -> None:
    with running("--driver", driver, "--", "sh", "-c", "echo ready; exec sleep 600") as process:
        pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        [agent] = [
            pid for pid in pids if b"netns_kit.namespace.agent" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(int(agent), signal.SIGKILL)
        assert process.wait(SECONDS) == FAILED


@pytest.mark.parametrize("driver", get_args(DriverName))
def test_killed_it_takes_the_command_along(driver: DriverName) -> None:
    """Not even SIGKILL leaves something: the pipe that the command holds is closed."""
    with running("--driver", driver, "--", "sh", "-c", "echo ready; sleep 600 & exec sleep 600") as process:
        process.kill()
        assert process.wait(SECONDS) == -signal.SIGKILL
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], SECONDS)[0]
        assert process.stdout.read() == ""


# -- IPv6 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "gateway"), [(["--ipv6"], "fd00::2"), (["--cidr6", "fd07::/64"], "fd07::2")]
)
def test_ipv6(words: list[str], gateway: str) -> None:
    needs("curl")
    needs_ipv6()
    with tcp_server(http, ("::1", 0)) as port:
        url = f"http://[{gateway}]:{port}/peer"
        done = run(*words, f"--host-loopback={port}", "--", "curl", "-6sSf", url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "::1", "")


def test_without_ipv6_there_is_a_notice_and_ipv4() -> None:
    """A host without IPv6, made by hand."""
    needs("unshare", "curl")
    needs_tun()
    command = [*NETNS_KIT, "run", "--ipv6", "--host-loopback", "--", "curl", "-sS", "http://10.0.2.2:9/"]
    host = 'ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; exec "$@"'
    done = subprocess.run(
        ["unshare", "-Urn", "sh", "-c", host, "sh", *command],
        capture_output=True, text=True, timeout=SECONDS, check=False, env=environment(),
    )  # fmt: skip
    first, second = done.stderr.splitlines()
    assert first == "IPv4 only: the host has no IPv6: net.ipv6.conf.all.disable_ipv6 is 1"
    assert "Failed to connect to 10.0.2.2 port 9" in second
    assert done.returncode == 7


# -- what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["-p", "80:80:80"],
            "-p/--publish: '80:80:80': expected ',', '/' or the end at character 6, not ':'",
        ),
        (["-p", "80", "--port-mode", "tunnel"], "--port-mode: invalid choice: 'tunnel'"),
        (["--cidr", "10.0.2.0/30"], "--cidr: '10.0.2.0/30': expected a prefix of 1 to 25"),
        (["--mtu", "67"], "--mtu: '67': expected a whole number from 68 to 65521"),
        (["--mtu", "big"], "--mtu: 'big': expected a whole number"),
        (["--dns", "resolver"], "--dns: 'resolver': expected ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT"),
        (["--bind4", "::1"], "--bind4: '::1': expected an IPv4 address of the host"),
        (["--bind6", "127.0.0.1"], "--bind6: '127.0.0.1': expected an IPv6 address of the host"),
        (["--device", "a" * 16], "--device: "),
        (["--cidr6", "fd00::/48"], "--cidr6: 'fd00::/48': expected a /64"),
        (["--cidr6", "fd00:7::/64", "--mtu", "1279"], "--mtu 1279: --ipv6 needs 1280 or more"),
        (["--ipv6", "--mtu", "1279"], "--mtu 1279: --ipv6 needs 1280 or more"),
        (["--dns-record", "a"], "--dns-record: 'a': expected NAME=ADDRESS"),
        (["--dns-record", "a..b=::1"], "--dns-record: 'a..b=::1': expected a domain name"),
        (["--dns-search", "a..b"], "--dns-search: 'a..b': expected a domain name"),
        (["--dns-domain", "a.example"], "--dns-domain: 'a.example': expected DOMAIN=ADDRESS[:PORT]"),
        (["--dns-domain", "a..b=::1"], "--dns-domain: 'a..b=::1': expected a domain name"),
        (["--queues", "0"], "--queues: '0': expected a whole number from 1 to 64"),
        (["--queues", "2"], "--queues 2: it needs --driver worker"),
        (["--driver", "horse"], "--driver: invalid choice: 'horse'"),
        (["--host-loopback=http"], "--host-loopback: 'http': expected a port, 1 to 65535"),
        (["--host-loopback=0"], "--host-loopback: '0': expected a port"),
        (["--host-loopback=65536"], "--host-loopback: '65536': expected a port"),
        (["--host-loopback", "5432"], "--host-loopback 5432: for one port write --host-loopback=PORT"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--allow", "example.org:https"], "--allow: 'example.org:https': expected ports from 1 to 65535"),
        (["--deny", "ads.example"], "--deny: 'ads.example': expected /dns: "),
        (["--policy", "none.toml"], "--policy: 'none.toml': No such file or directory"),
        (["-p"], "-p/--publish: 'echo': expected tcp: or udp: or an address"),
    ],
)
def test_a_mistake_in_its_words_is_told_by_the_options_name(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line, behind the usage of that very command; and no word of Python's."""
    command = ["--", "echo", "started"] if words != ["-p"] else ["echo"]
    with pytest.raises(SystemExit) as caught:
        main(["run", *words, *command])
    assert caught.value.code == FAILED
    out, err = capfd.readouterr()
    usage, mistake = err.splitlines()
    assert (out, usage) == ("", "usage: netns-kit run [OPTION]... [--] [COMMAND [ARGUMENT]...]")
    assert mistake.startswith(f"netns-kit run: {said}")
    assert not re.search(r"\w=\d|driver=|bind[46]=|mtu=", mistake)


@pytest.mark.parametrize(("option", "value"), [("--device", "nosuch0"), ("--bind4", "192.0.2.9")])
def test_so_is_what_only_the_host_can_tell(
    option: str, value: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", option, value, "--", "echo", "started"]) == FAILED
    out, err = capfd.readouterr()
    assert out == ""
    assert err == (
        f"netns-kit: {option} '{value}': expected an address or interface of the host; "
        "choose one that `ip address` shows on the host\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        [], ["walk"], ["--no-such-option"], ["run", "-p"], ["doctor", "--no-such-option"], ["attach"],
        ["attach", "0"], ["attach", "--mtu", "1", "1"],
    ],
)  # fmt: skip
def test_usage(words: list[str]) -> None:
    done = subprocess.run(
        [*NETNS_KIT, *words], capture_output=True, text=True, timeout=SECONDS, check=False, env=environment()
    )
    assert (done.returncode, done.stdout) == (FAILED, "")
    program = f"netns-kit {words[0]}" if words and words[0] in ("run", "doctor", "attach") else "netns-kit"
    usage, mistake = done.stderr.splitlines()
    assert usage.startswith(f"usage: {program} [")
    assert mistake.startswith(f"{program}: ")


@pytest.mark.parametrize(
    ("command", "missing"),
    [("logs", "NAME[/MEMBER]"), ("restart", "NAME[/MEMBER]"), ("join", "NAME[/MEMBER]"), ("down", "NAME")],
)
def test_only_words_that_are_needed_are_missing(command: str, missing: str) -> None:
    done = subprocess.run(
        [*NETNS_KIT, command], capture_output=True, text=True, timeout=SECONDS, check=False, env=environment()
    )
    assert done.returncode == FAILED
    assert done.stderr.endswith(f": the following arguments are required: {missing}\n")


@pytest.mark.parametrize("words", [["restart"], ["ps"], ["doctor"]])
def test_words_of_another_command_run_no_shell(words: list[str]) -> None:
    """In a process of its own, which a shell would end with status 0."""
    program = f"from netns_kit.cli.run import main; main({words})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == FAILED
    assert "netns_kit.cli.commands.main" in done.stderr


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--publish",
        "--port-mode",
        "--host-loopback[=PORT]",
        "--mtu",
        "--cidr",
        "--ipv6",
        "--cidr6",
        "--bind6",
        "--host-loopback",
        "--dns-record",
        "--bind4",
        "--device",
        "--policy",
        "--allow [TARGET][:PORTS][/PROTOCOL]",
        "--deny",
        "--events",
        "--capture",
        "--faults",
    ):
        assert option in text


def test_a_mode_that_a_port_cannot_have() -> None:
    done = run("--port-mode", "stack", "-p", "unix:/tmp/a:80", "--", "echo", "started")
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr == "netns-kit: --port-mode 'stack': expected the mode socket (for a unix socket)\n"


def test_a_port_inside_that_leads_out() -> None:
    """Also to the host's loopback, which is closed otherwise."""
    needs("curl")
    with tcp_server(http) as port:
        done = run("-R", f"80:127.0.0.1:{port}", "--", "curl", "-sSf", "http://127.0.0.1/peer")
    assert (done.returncode, done.stdout) == (0, "127.0.0.1")


def test_a_port_that_appears_with_its_server() -> None:
    needs("curl")
    serve = """if True:
        from http.server import HTTPServer, SimpleHTTPRequestHandler
        server = HTTPServer(("", 21099), SimpleHTTPRequestHandler)
        print("ready", flush=True)
        server.handle_request()
    """
    with running("-p", "127.0.0.1:auto", "--", sys.executable, "-c", serve) as process:
        command = [
            "curl",
            "-sS",
            "--retry",
            "20",
            "--retry-all-errors",
            "--retry-delay",
            "1",
            "-o",
            os.devnull,
        ]
        subprocess.run([*command, "http://127.0.0.1:21099/"], check=True, timeout=SECONDS)
        assert process.wait(SECONDS) == 0


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("-p", f"{address}:80", "--", "echo", "started")
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert address in done.stderr
    assert "taken" in done.stderr


def test_a_privileged_port_names_the_sysctl() -> None:
    """As an unprivileged uid; before anything is bound, so the free port beside it stays free."""
    knob = "net.ipv4.ip_unprivileged_port_start"
    if (start := int(Path("/proc/sys", knob.replace(".", "/")).read_text())) <= 80:
        missing(f"{knob} is {start}")
    if os.geteuid() == 0:
        pytest.skip("root may; tests/system/test_forwarder.py drops the privilege")
    done = run("-p", "127.0.0.1:80:80", "--", "echo", "started")
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert f"{knob} is {start}" in done.stderr
    assert f"sysctl {knob}=80" in done.stderr


# -- the network -------------------------------------------------------------------------------------------


def test_resolv_conf_inside_and_out() -> None:
    needs("ip")
    before = RESOLV_CONF.read_bytes(), RESOLV_CONF.stat().st_mtime_ns
    done = run("--", "sh", "-c", f"cat {RESOLV_CONF}; echo changed >{RESOLV_CONF}; ip -br address show tap0")
    assert done.stdout.startswith("nameserver 10.0.2.3\n"), done.stderr
    assert "10.0.2.100/24" in done.stdout
    assert (RESOLV_CONF.read_bytes(), RESOLV_CONF.stat().st_mtime_ns) == before


@pytest.mark.parametrize("driver", get_args(DriverName))
def test_options_reach_their_parts(driver: DriverName) -> None:
    needs("ping", "dig", "curl")
    with dns_server({"name.tld": "192.0.2.7"}) as resolver, tcp_server(http) as port:
        script = (
            "ip -o link show tap0 | grep -o 'mtu [0-9]*'; ping -qc1 -W5 172.20.0.2 >&2;"
            "dig +short name.tld; dig +short +tcp name.tld; dig +short @203.0.113.53 name.tld;"
            f"curl -sSf http://172.20.0.2:{port}/peer"
        )
        words = [
            "--mtu",
            "9000",
            "--cidr",
            "172.20.0.0/16",
            "--dns",
            f"127.0.0.1:{resolver}",
            "--intercept-dns",
            "--driver",
            driver,
        ]
        done = run(*words, f"--host-loopback={port}", "--", "sh", "-ec", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mtu", "9000", *["192.0.2.7"] * 3, "127.0.0.1"]


def test_names() -> None:
    needs("dig")
    asked: list[str] = []
    with dns_server({"name.tld": "192.0.2.7", "db.corp.tld": "192.0.2.8"}, asked) as resolver:
        words = ["--dns", f"127.0.0.1:{closed_port()}", "--dns-domain", f"tld=127.0.0.1:{resolver}"]
        words += ["--dns-record", "db.internal=192.0.2.5", "--dns-record", "db.internal=2001:db8::5"]
        words += ["--dns-search", "nowhere.tld", "--dns-search", "corp.tld", "--no-dns-cache"]
        script = (
            "dig +short name.tld; dig +short name.tld; dig +short db.internal aaaa; getent ahostsv4 db.internal;"
            "dig +short +search db; grep search /etc/resolv.conf; grep -w db.internal /etc/hosts"
        )
        done = run(*words, "--", "sh", "-ec", script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["192.0.2.7", "192.0.2.7", "2001:db8::5"]
    assert lines[3].split() == ["192.0.2.5", "STREAM", "db.internal"]
    assert lines[6:] == [
        "192.0.2.8", "search nowhere.tld corp.tld", "192.0.2.5 db.internal", "2001:db8::5 db.internal"
    ]  # fmt: skip
    assert asked.count("udp name.tld") == 2, "nothing was kept"


@pytest.mark.parametrize(
    ("grant", "works"), [([], False), (["--host-loopback"], True), (["--host-loopback=1"], False)]
)
def test_the_hosts_loopback(grant: list[str], works: bool) -> None:
    needs("curl")
    with tcp_server(http) as port:
        command = ["curl", "-sS", "-m", "20", "-w", "%{stderr}%{time_total}\n", f"http://10.0.2.2:{port}/1"]
        with subprocess.Popen(
            [*NETNS_KIT, "run", *grant, "--", *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
        ) as process:  # fmt: skip
            out, err = process.communicate(timeout=SECONDS)
    if works:
        assert process.returncode == 0
        assert hashlib.sha256(out).hexdigest() == digest(1)
    else:
        assert process.returncode == 7, "CURLE_COULDNT_CONNECT"
        assert b"No route to host" in err or b"ouldn't connect" in err or b"Failed to connect" in err
        assert max(float(number) for number in re.findall(rb"^\d+\.\d+$", err, re.MULTILINE)) < 1.0


@pytest.fixture(params=["nginx", "python"])
def web_server(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A command that serves on port 80 the client's address, and says when it is ready."""
    if request.param == "python":
        return [sys.executable, "-ISuc", SERVER]
    needs("nginx", "ss")
    (tmp_path / "nginx.conf").write_text(NGINX.format(tmp_path))
    serve = f"nginx -c {tmp_path}/nginx.conf -p {tmp_path} -e stderr & {UNTIL_LISTENING} wait"
    return ["sh", "-c", serve]  # ended, it leaves nginx for netns-kit to end


def get(address: str, port: int) -> str:
    with urllib.request.urlopen(f"http://{address}:{port}/", timeout=SECONDS) as answer:
        body: bytes = answer.read()
    return body.decode()


def test_a_web_server_inside(web_server: list[str]) -> None:
    port = closed_port()
    with running("-p", f"127.0.0.1:{port}:80", "--", *web_server):
        assert get("127.0.0.1", port) == "10.0.2.2"
        with socket.socket() as again, pytest.raises(OSError, match="in use"):
            again.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_more_ports_than_the_soft_limit_on_descriptors() -> None:
    """The command has the limit as it was."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1000:
        missing(f"the hard limit on descriptors is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        done = run("-p", "127.0.0.1:20000-20299,optional", "--", "sh", "-c", "ulimit -Sn")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (done.returncode, done.stdout, done.stderr) == (0, "256\n", "")


def test_a_mode_for_all_ports(web_server: list[str], tmp_path: Path) -> None:
    """In the mode socket it is a socket inside that connects, so the server sees an address of the namespace."""
    port, path = closed_port(), str(tmp_path / "web.sock")
    ports = ["-p", f"127.0.0.1:{port}:80", "-p", "127.0.0.1:0:80,mode=stack", "-p", f"unix:{path}:80"]
    with running("--port-mode=socket", *ports, "--", *web_server):
        assert get("127.0.0.1", port) in ("10.0.2.100", "127.0.0.1")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(SECONDS)
            sock.connect(path)
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert sock.makefile("rb").readline().split()[1] == b"200"
    assert not os.path.exists(path)


def test_a_web_server_inside_sees_who_asks(web_server: list[str]) -> None:
    address = host_address()
    if address is None:
        missing("no address but the loopback's")
        return
    port = closed_port()
    with running("-p", f"{port}:80", "--", *web_server):
        assert get(address, port) == address
        assert get("127.0.0.1", port) == "10.0.2.2"


# -- what may leave ----------------------------------------------------------------------------------------

TRY = """
import socket, sys
for name, port in [("web.example", {0}), ("web.example", {0} - 1), ("other.example", {0}), ("192.0.2.1", {0})]:
    try:
        with socket.create_connection((name, port), timeout=9) as connection:
            print(name, connection.recv(9).decode())
    except OSError as error:
        print(name, error.strerror)
"""


@pytest.mark.parametrize("driver", get_args(DriverName))
def test_what_may_leave_and_where_that_is_told(driver: DriverName, tmp_path: Path) -> None:
    policy, events = tmp_path / "policy.json", tmp_path / "events.jsonl"
    policy.write_text('{"default": "deny", "dns": "refused"}', encoding="utf-8")
    with tcp_server(hello) as port:
        words = ["--policy", str(policy), "--allow", f"web.example:{port}/tcp", "--events", str(events)]
        words += ["--dns-record", "web.example=10.0.2.2", "--dns-record", "other.example=10.0.2.2"]
        words += ["--host-loopback", "--driver", driver]
        done = run(*words, "--", sys.executable, "-c", TRY.format(port))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "web.example hello",
        "web.example No route to host",
        "other.example Temporary failure in name resolution",
        "192.0.2.1 No route to host",
    ]
    told = [json.loads(line) for line in events.read_text(encoding="ascii").splitlines()]
    assert {
        (each["kind"], each["remote"], each["remote_port"] - port, each["rule"])
        for each in told
        if each["kind"] != "opened" and each["protocol"] == "tcp"
    } == {
        (
            "closed",
            "10.0.2.2",
            0,
            f"rule 1 (--allow web.example:{port}/tcp): allow web.example port {port} tcp",
        ),
        ("refused", "10.0.2.2", -1, "default: deny"),
        ("refused", "192.0.2.1", 0, "default: deny"),
    }
    assert {(each["name"], each["rcode"]) for each in told if each["protocol"] == "dns"} == {
        ("other.example", "REFUSED")
    }


def test_events_on_standard_error() -> None:
    needs("ping")
    done = run(
        "--deny", "192.0.2.1", "--events", "-", "--", "sh", "-c", "ping -c1 -W9 192.0.2.1; echo said >&2"
    )
    said, *told = sorted(done.stderr.splitlines(), key=lambda line: line.startswith("{"))
    assert said == "said"
    assert [json.loads(line)["kind"] for line in told] == ["opened", "refused"]


def test_a_file_for_events_that_cannot_be_had(tmp_path: Path) -> None:
    done = run("--events", str(tmp_path), "--", "echo", "started")
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr == f"netns-kit: {tmp_path}: Is a directory\n"


def test_the_command_goes_on_when_events_cannot_be_written() -> None:
    done = run("--events", "/dev/full", "--", "sh", "-c", "getent hosts a.example; echo done")
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr == (
        "netns-kit: the event log cannot be written: No space left on device; the file is /dev/full; "
        "make room, or write to another file\n"
    )


def test_a_capture(tmp_path: Path) -> None:
    needs("ping")
    path = tmp_path / "frames.pcapng"
    done = run("--capture", str(path), "--", "sh", "-c", "ping -c1 -W9 10.0.2.2; exit 3")
    assert (done.returncode, done.stderr) == (3, "")
    pings = [each for each in pcapng.read(path.read_bytes()).packets if each.data[23] == 1]
    assert [each.direction for each in pings] == [pcapng.OUTBOUND, pcapng.INBOUND]


def test_faults() -> None:
    needs("ping")
    options = ("--host-loopback", "--faults", "blackhole,to=10.0.2.2", "--faults", "dns=nxdomain")
    done = run(
        *options, "--", "sh", "-c", "ping -c1 -W1 10.0.2.2 >&2 || ping -c1 -W5 10.0.2.3 >&2 && echo other"
    )
    assert (done.returncode, done.stdout) == (0, "other\n")
    done = run("--faults", "loss=2", "--", "echo", "started")
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert "a probability, 0 to 1" in done.stderr


def test_a_file_for_a_capture_that_cannot_be_had(tmp_path: Path) -> None:
    done = run("--capture", str(tmp_path), "--", "echo", "started")
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert "the capture cannot be written: Is a directory" in done.stderr
    assert "make room" not in done.stderr
    done = run("--capture", str(tmp_path / "missing" / "file"), "--", "echo", "started")
    assert "make its directory" in done.stderr
    done = run("--capture", "-", "--", "echo", "started")
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert "'-': expected a file" in done.stderr


def test_importing_the_command_line_leaves_out_what_is_slow() -> None:
    """pyroute2 alone takes longer than all else together; it is not imported."""
    code = "import sys, netns_kit.cli.run; sys.exit('pyroute2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=SECONDS, check=False)
    assert done.returncode == 0


def test_a_shell_that_ends_leaves_the_terminal_to_us() -> None:
    """It had taken the terminal for its own process group, and ours has no number in its PID namespace."""
    needs("bash")
    script = f'{sys.executable} -m netns_kit run -- bash --norc -i; read word; echo "read $word"'
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv("/bin/sh", ["sh", "-c", script])
    seen = b""
    try:
        for expected, typed in (
            (b"# ", b"echo in$((3))side\n"),
            (b"in3side", b"exit\n"),
            (b"exit\r\n", b"back\n"),
        ):
            seen = until_written(terminal, expected)
            os.write(terminal, typed)
        seen = until_written(terminal, b"read back")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    assert b"read back" in seen
