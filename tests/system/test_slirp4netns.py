"""The command that slirp4netns is, started by a caller like its own: descriptors, lifecycle, traffic, sandbox."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from netns_kit.cli.program import takes
from tests.support import ROOT, needs, needs_ping, needs_tun, needs_userns
from tests.support.servers import SECONDS, closed_port, hello, tcp_server
from tests.support.slirp import (
    ENTER,
    Held,
    Slirp,
    ask,
    attached,
    children_of,
    executable,
    held,
    server_inside,
    slirp,
    status,
)

pytestmark = pytest.mark.usefixtures("leaks")

BANNER = """\
Starting slirp
* MTU:             65520
* Network:         10.0.135.128
* Netmask:         255.255.255.128
* Gateway:         10.0.135.130
* DNS:             10.0.135.131
* DHCP begin:      10.0.135.143
* DHCP end:        10.0.135.158
* Recommended IP:  10.0.135.228
* MAC address:     52:54:00:12:34:56
WARNING: 127.0.0.1:* on the host is accessible as 10.0.135.130 (set --disable-host-loopback to prohibit connecting \
to 127.0.0.1:*)
"""


THEIRS = ["slirp4netns"]
BOTH = pytest.mark.parametrize("program", [pytest.param([], id="ours"), pytest.param(THEIRS, id="theirs")])
"""The same is asked of slirp4netns, where it is installed."""
SANDBOXES: list[list[str]] = [
    [],
    ["--enable-sandbox"],
    ["--enable-seccomp"],
    ["--enable-sandbox", "--enable-seccomp"],
]


@contextmanager
def works(*words: str, **options: object) -> Iterator[tuple[Held, Slirp]]:
    """As `attached`; and a server of the host's loopback is reached from inside."""
    with attached(*words, **options) as (ns, running), tcp_server(hello) as port:
        assert ns.connect("10.0.2.2", port) == "hello"
        yield ns, running


# -- how it is told where ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "PID", "tap0"],
        ["--netns-type=pid", "-c", "PID", "tap0"],
        ["-c", "--netns-type=path", "PATH", "tap0"],
        ["-c", "--mtu", "65520", "PID", "tap0"],  # Buildah
    ],
)
def test_it_attaches(words: list[str]) -> None:
    with works(*words):
        pass


@pytest.mark.parametrize("line", ["-c -e EXIT -r READY PID tap0", "-c -r READY -e EXIT PID tap0"])
def test_both_orders_of_descriptors_that_podman_has_had(line: str) -> None:
    with works(*line.split()) as (_, running):
        assert running.leave() == 0


def test_a_namespace_of_another_user_namespace_by_its_path(tmp_path: Path) -> None:
    """rootlesskit --detach-netns: the network namespace is nobody's, the user namespace is that of a process."""
    with held() as ns:
        userns = f"--userns-path=/proc/{ns.pid}/ns/user"
        with slirp("-c", "--mtu=65520", userns, "--netns-type=path", ns.path, "tap0") as running:
            assert running.ready() == b"1"
            assert "10.0.2.100/24" in ns.run("ip", "-br", "address")


def test_a_user_namespace_that_cannot_be_joined_is_no_reason_to_fail() -> None:
    with works("-c", "--userns-path=/proc/self/ns/user", "--netns-type=path", "PATH", "tap0"):
        pass


def test_a_persistent_tap_is_joined_and_not_configured() -> None:
    """rootlesskit makes it, without our flags, and configures it when it has heard that we are ready."""
    with held() as ns:
        ns.run("ip", "tuntap", "add", "name", "tap0", "mode", "tap")
        ns.run("ip", "link", "set", "tap0", "up")
        with slirp("--mtu", "65520", str(ns.pid), "tap0") as running, tcp_server(hello) as port:
            assert running.ready() == b"1"
            assert "10.0.2.100" not in ns.run("ip", "-br", "address")
            ns.run("ip", "link", "set", "tap0", "mtu", "65520")
            ns.run("ip", "address", "add", "10.0.2.100/24", "dev", "tap0")
            ns.run("ip", "route", "add", "default", "via", "10.0.2.2")
            assert ns.connect("10.0.2.2", port) == "hello"
            assert json.loads(ns.run("ip", "-j", "link", "show", "tap0"))[0]["mtu"] == 65520


OPEN_TAP = """
import array, fcntl, os, socket, struct, sys
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"tap0", 0x1002))  # TUNSETIFF: IFF_TAP | IFF_NO_PI
out = socket.socket(fileno=int(sys.argv[1]))
out.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [tap]))])
"""


def test_a_tap_that_is_open_already_without_offloads() -> None:
    with held() as ns, ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        command = [
            *ENTER,
            str(ns.pid),
            sys.executable,
            "-S",
            "-E",
            "-I",
            "-c",
            OPEN_TAP,
            str(theirs.fileno()),
        ]
        subprocess.run(command, pass_fds=[theirs.fileno()], timeout=SECONDS, check=True)
        _, [tap], _, _ = socket.recv_fds(ours, 1, 1)
        try:
            with slirp("--netns-type=tapfd", str(tap), pass_fds=[tap]) as running, tcp_server(hello) as port:
                assert running.ready() == b"1"
                ns.run("ip", "link", "set", "tap0", "up")
                ns.run("ip", "address", "add", "10.0.2.100/24", "dev", "tap0")
                assert ns.connect("10.0.2.2", port) == "hello"
        finally:
            os.close(tap)


def test_a_peer_of_the_bess_kind_speaks_a_frame_per_record(short_path: Path) -> None:
    path = str(short_path / "bess.sock")
    with slirp("--target-type=bess", path) as running, ExitStack() as stack:
        deadline = time.monotonic() + SECONDS
        peer = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        while peer.connect_ex(path):  # it is not ready before somebody is there: nothing else tells
            assert time.monotonic() < deadline
            os.sched_yield()
        assert running.ready() == b"1"
        peer.settimeout(SECONDS)
        mac = bytes.fromhex("020000000001")
        ask_for = (
            bytes.fromhex("0001080006040001") + mac + bytes([10, 0, 2, 100]) + bytes(6) + bytes([10, 0, 2, 2])
        )
        peer.send(b"\xff" * 6 + mac + b"\x08\x06" + ask_for)
        reply = peer.recv(2000)
        assert reply[:14] == mac + b"\x52\x55\x0a\x00\x02\x02" + b"\x08\x06"
        peer.close()
        assert running.process.wait(SECONDS) == 1
        assert "closed by its other end" in running.output()[1]


# -- what it configures -------------------------------------------------------------------------------------


def test_the_link_is_configured_and_the_banner_says_how() -> None:
    words = "-c --mtu=65520 --cidr=10.0.135.128/25 --macaddress=52:54:00:12:34:56 PID tap7".split()
    with attached(*words) as (ns, running):
        [link] = json.loads(ns.run("ip", "-j", "address", "show", "tap7"))
        [address] = [each for each in link["addr_info"] if each["family"] == "inet"]
        assert (link["mtu"], link["address"], "UP" in link["flags"]) == (65520, "52:54:00:12:34:56", True)
        assert (address["local"], address["prefixlen"]) == ("10.0.135.228", 25)
        assert "default via 10.0.135.130 dev tap7" in ns.run("ip", "route")
        assert "UP" in ns.run("ip", "link", "show", "lo")
        assert running.leave() == 0
        shown, errors = running.output()
        assert shown == BANNER
        assert "for tap7\nreceived tapfd=" in errors
        assert errors.endswith("exitfd event\ndo_slirp is exiting\n")


def test_standard_output_stays_the_callers_while_it_runs() -> None:
    """As long as it is no terminal: rootlesskit's command has it too."""
    with attached() as (_, running):
        assert running.process.stdout is not None
        assert not select.select([running.process.stdout], [], [], 0)[0]


# -- how it ends ----------------------------------------------------------------------------------------------


def test_what_is_written_to_the_exit_pipe_means_nothing() -> None:
    with attached() as (ns, running):
        running.say(b"x")
        assert "10.0.2.100" in ns.run("ip", "-br", "address")
        assert running.process.poll() is None
        assert running.leave() == 0


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_have_their_default_action(number: signal.Signals, tmp_path: Path) -> None:
    with attached(program=[executable(tmp_path)]) as (_, running):
        running.process.send_signal(number)
        assert running.process.wait(SECONDS) == -number
        assert "Traceback" not in running.output()[1]


def test_it_is_one_process_with_one_thread() -> None:
    with attached("-c", "--enable-sandbox", "--enable-seccomp", "PID", "tap0") as (_, running):
        assert children_of(running.pid) == ""
        assert status(running.pid)["Threads"] == "1"


WITH_PDEATHSIG = """
import ctypes, os, signal, subprocess, sys
def dies_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
ready, writing = os.pipe()
child = subprocess.Popen(
    [*sys.argv[1:5], f"--ready-fd={writing}", *sys.argv[5:]], pass_fds=[writing], preexec_fn=dies_with_parent,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)
os.close(writing)
assert os.read(ready, 1) == b"1"
print(child.pid, flush=True)
sys.stdin.read()
os._exit(0)
"""


def test_it_dies_with_its_caller_in_the_sandbox_too() -> None:
    with held() as ns:
        words = ["-c", "--enable-sandbox", "--enable-seccomp", str(ns.pid), "tap0"]
        command = [
            sys.executable,
            "-c",
            WITH_PDEATHSIG,
            sys.executable,
            "-m",
            "netns_kit",
            "slirp4netns",
            *words,
        ]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as caller:
            assert caller.stdout is not None
            pidfd = os.pidfd_open(int(caller.stdout.readline()))
            try:
                caller.communicate(timeout=SECONDS)
                assert select.select([pidfd], [], [], SECONDS)[0], "it outlives its caller"
            finally:
                os.close(pidfd)


def test_it_ends_when_its_tap_is_removed() -> None:
    with attached() as (ns, running):
        ns.run("ip", "link", "delete", "tap0")
        assert running.process.wait(SECONDS) == 1
        assert running.output()[1].endswith("do_slirp failed\nparent failed\n")


@pytest.mark.parametrize("words", SANDBOXES)
def test_it_ends_with_the_last_process_of_the_namespace(words: list[str]) -> None:
    """Not with the one that it was told, while others are there; nor because of one that is elsewhere."""
    with attached("-c", *words, "-r", "READY", "PID", "tap0") as (ns, running), conversation(ns) as inside:
        with held():
            ns.kill()
            exchange(inside, "still there")
        assert running.process.poll() is None
        inside.kill()
        assert running.process.wait(SECONDS) == 0
        assert running.output()[1].endswith("the namespace has no process left\ndo_slirp is exiting\n")


def test_an_exit_pipe_that_is_open_keeps_it() -> None:
    """Whoever holds one says when: there may be a process again."""
    with (
        attached("-c", "-r", "READY", "PID", "tap0") as (ns, other),
        slirp("-c", "-e", "EXIT", "-r", "READY", str(ns.pid), "tap1") as running,
    ):
        assert running.ready() == b"1"
        ns.kill()
        assert other.process.wait(SECONDS) == 0  # it would have noticed too
        assert running.process.poll() is None
        assert running.leave() == 0
        assert running.output()[1].endswith("for tap1\nreceived tapfd=6\nexitfd event\ndo_slirp is exiting\n")


def test_a_namespace_that_is_a_file_ends_with_the_file(tmp_path: Path) -> None:
    """In a mount namespace of its own, for it takes privilege to mount one."""
    needs("unshare", "ip")
    needs_tun()
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "--mount", sys.executable, "-c", FILE, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == ["1", "None", "0"], done.stderr


FILE = """
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
path = os.path.join(sys.argv[1], "net")
open(path, "w").close()
holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
    os.sched_yield()
assert libc.mount(f"/proc/{holder.pid}/ns/net".encode(), path.encode(), None, 0x1000, None) == 0  # MS_BIND
ready, writing = os.pipe()
program = [sys.executable, "-m", "netns_kit", "slirp4netns"]
slirp = subprocess.Popen(
    [*program, f"--ready-fd={writing}", "--netns-type=path", "-c", path, "tap0"],
    pass_fds=[writing], stdout=subprocess.DEVNULL,
)
os.close(writing)
print(os.read(ready, 1).decode())
holder.kill(), holder.wait()
open(path + "2", "w").close()  # something happens beside it
print(slirp.poll())
assert libc.umount2(path.encode(), 2) == 0  # MNT_DETACH
os.unlink(path)
print(slirp.wait(20))
"""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-c", "999999999", "tap0"], "/proc/999999999/ns/net: No such file or directory"),
        (["-c", "--netns-type=path", "/etc/passwd", "tap0"], "setns(CLONE_NEWNET): Invalid argument"),
        (["-c", "PID", "lo"], "ioctl(TUNSETIFF): Invalid argument"),
    ],
)
def test_what_cannot_be_opened_is_told_as_perror_would(words: list[str], text: str) -> None:
    with held() as ns, slirp(*(word.replace("PID", str(ns.pid)) for word in words)) as running:
        assert running.ready() == b""
        assert running.process.wait(SECONDS) == 1
        assert running.output() == ("", f"{text}\nchild failed(1)\n")


def test_a_tap_that_is_in_use_is_told() -> None:
    with attached() as (ns, _), slirp("-c", str(ns.pid), "tap0") as second:
        assert second.ready() == b""
        assert second.process.wait(SECONDS) == 1
        assert second.output()[1] == "ioctl(TUNSETIFF): Device or resource busy\nchild failed(1)\n"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/" + "x" * 120, "the specified API socket path is too long (>= 108)"),
        ("/nonexistent/api", "api_bindlisten: bind: No such file or directory"),
    ],
)
def test_an_api_socket_that_cannot_be_made_is_told(path: str, text: str) -> None:
    with held() as ns, slirp("-c", "-a", path, str(ns.pid), "tap0") as running:
        assert running.ready() == b""
        assert running.process.wait(SECONDS) == 1
        assert running.output()[1].endswith(f"{text}\ndo_slirp is exiting\ndo_slirp failed\nparent failed\n")


# -- traffic ----------------------------------------------------------------------------------------------------


@BOTH
def test_the_hosts_loopback_can_be_closed(program: list[str]) -> None:
    """A connection to the gateway, or to another port of the DNS address, fails as one without a route does."""
    with attached("-c", "-6", "--disable-host-loopback", "PID", "tap0", program=program) as (ns, running):
        ns.run("ip", "-6", "address", "replace", "fd00::100/64", "dev", "tap0", "nodad")
        with tcp_server(hello) as port:
            assert ns.connect("10.0.2.2", port) == "ENETUNREACH"
            assert ns.connect("fd00::2", port) == "ENETUNREACH"
        assert ns.connect("10.0.2.3", 80) == "ENETUNREACH"
        assert ns.connect("fd00::3", 80) == "ENETUNREACH"
        assert running.leave() == 0
        assert "WARNING: 127.0.0.1" not in running.output()[0]


def test_curl_and_ncat_say_why_the_gateway_is_closed() -> None:
    needs("curl")
    with attached("-c", "--disable-host-loopback", "PID", "tap0") as (ns, _):
        done = ns.run("curl", "--verbose", "--stderr", "-", "http://10.0.2.2:80/", check=False)
        assert "Network is unreachable" in done or "Couldn't connect" in done
        if shutil.which("ncat"):
            assert "Network is unreachable" in ns.run("sh", "-c", "ncat 10.0.2.2 80 2>&1", check=False)


LISTENS = """
import socket
for family, address in (socket.AF_INET, "10.0.2.3"), (socket.AF_INET6, "fd00::3"):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(family, kind) as sock:
            sock.settimeout(1)
            try:
                sock.connect((address, 53))
                sock.send(bytes.fromhex("00070100000100000000000003646e730000010001"))
                print("answered", sock.recv(1) if kind == socket.SOCK_DGRAM else "")
            except OSError as error:
                print(type(error).__name__)
"""


def test_dns_can_be_closed() -> None:
    """Nothing at all answers at its address, over neither transport; the world is where it was."""
    needs("dig")
    with works("-c", "-6", "--disable-dns", "PID", "tap0") as (ns, _):
        names = ("example.com", "gateway.containers.internal")
        dig = ("dig", "+tries=1", "+time=1", "@10.0.2.3")
        asked = [(*dig, name, way) for name in names for way in ("+notcp", "+tcp")]
        with ThreadPoolExecutor() as pool:  # they all wait for an answer
            listens = pool.submit(ns.python, LISTENS)
            for said in pool.map(lambda command: ns.run(*command, check=False), asked):
                assert "timed out" in said or "no servers could be reached" in said
                assert "status:" not in said
            assert listens.result().split() == ["TimeoutError"] * 4


@BOTH
def test_answers_from_another_port_are_heard(program: list[str]) -> None:
    """As those of a TFTP server are (RFC 1350 4), which answers each request from a port of its own."""
    with attached(program=program) as (ns, _), tftp_server() as port:
        said = ns.python(
            f"""
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(10)
    sock.sendto(b"read", ("10.0.2.2", {port}))
    data, sender = sock.recvfrom(100)
    print(data.decode(), sender[0], sender[1] != {port})
    sock.sendto(b"ack", sender)
    print(sock.recvfrom(100)[0].decode())
"""
        )
        assert said.split("\n") == ["data 10.0.2.2 True", "end"]


@contextmanager
def tftp_server() -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(SECONDS)

        def serve() -> None:
            _, client = server.recvfrom(100)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as transfer:
                transfer.settimeout(SECONDS)
                transfer.bind(("127.0.0.1", 0))
                transfer.sendto(b"data", client)
                assert transfer.recvfrom(100)[0] == b"ack"
                transfer.sendto(b"end", client)

        with ThreadPoolExecutor(1) as thread:
            served = thread.submit(serve)
            yield server.getsockname()[1]
            served.result(SECONDS)


def test_the_gateway_answers_pings() -> None:
    needs("ping")
    needs_ping()
    with attached() as (ns, _):
        assert "1 received" in ns.run("ping", "-c1", "-W5", "10.0.2.2")


@BOTH
def test_flows_leave_from_the_address_that_was_asked_for(program: list[str]) -> None:
    """Those to the host's loopback too, of every protocol."""
    seen: list[str] = []

    def whose(sock: socket.socket) -> None:
        seen.append(sock.getpeername()[0])
        sock.sendall(b"hello")

    with attached("-c", "--outbound-addr=127.0.0.9", "PID", "tap0", program=program) as (ns, running):
        with tcp_server(whose) as port:
            assert ns.connect("10.0.2.2", port) == "hello"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            server.settimeout(SECONDS)
            send = "import socket; socket.socket(2, 2).sendto(b'x', ('10.0.2.2', {}))"
            ns.python(send.format(server.getsockname()[1]))
            seen.append(server.recvfrom(100)[1][0])
        assert seen == ["127.0.0.9"] * 2
        assert running.leave() == 0
        assert "* Outbound IPv4:    127.0.0.9\n" in running.output()[0]


def add(port: int, **arguments: object) -> dict[str, object]:
    given = {"proto": "tcp", "host_addr": "127.0.0.1", "host_port": port, "guest_addr": "", "guest_port": 80}
    return {"execute": "add_hostfwd", "arguments": {**given, **arguments}}


@pytest.mark.parametrize("sandbox", [[], ["--enable-sandbox", "--enable-seccomp"]])
def test_a_port_is_forwarded_by_the_api(short_path: Path, sandbox: list[str]) -> None:
    api = str(short_path / "api")
    with attached("-c", *sandbox, "-a", api, "PID", "tap0") as (ns, running), server_inside(ns):
        port = closed_port()
        assert ask(api, add(port)) == {"return": {"id": 1}}
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as sock:
            assert sock.recv(100) == b"10.0.2.2"
        assert running.leave() == 0
        assert os.path.exists(api) is bool(sandbox), "the sandbox has no right to remove files"


def test_a_socket_that_a_killed_one_has_left_is_replaced(short_path: Path) -> None:
    api = str(short_path / "api")
    for _ in range(2):
        with attached("-c", "-a", api, "PID", "tap0") as (_, running):
            assert ask(api, {"execute": "list_hostfwd"})["entries"] == []
            running.process.kill()
            running.process.wait(SECONDS)
            assert os.path.exists(api)


ECHO = """
import socket, sys, time
with socket.create_connection(("10.0.2.2", int(sys.argv[1])), timeout=10) as sock:
    print("ready", flush=True)
    for line in sys.stdin:
        sock.sendall(line.encode())
        print(sock.recv(100).decode(), end="", flush=True)
"""


def echo(sock: socket.socket) -> None:
    while data := sock.recv(100):
        sock.sendall(data)


@contextmanager
def conversation(ns: Held) -> Iterator[subprocess.Popen[str]]:
    """A connection from inside to the host; each line comes back."""
    with tcp_server(echo) as port:
        command = [*ENTER, str(ns.pid), sys.executable, "-S", "-E", "-I", "-c", ECHO, str(port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as inside:
            assert inside.stdout is not None
            assert inside.stdout.readline() == "ready\n"
            try:
                yield inside
            finally:
                inside.kill()


def exchange(inside: subprocess.Popen[str], text: str) -> None:
    assert inside.stdin is not None
    assert inside.stdout is not None
    inside.stdin.write(f"{text}\n")
    inside.stdin.flush()
    assert select.select([inside.stdout], [], [], SECONDS)[0], "traffic has stopped"
    assert inside.stdout.readline() == f"{text}\n"


def test_traffic_goes_on_whatever_clients_of_the_api_do(short_path: Path) -> None:
    """Silent, byte by byte, too much, gone: where slirp4netns waits for each of them."""
    api = str(short_path / "api")
    with (
        attached("-c", "-a", api, "PID", "tap0") as (ns, _),
        conversation(ns) as inside,
        ExitStack() as stack,
    ):

        def client() -> socket.socket:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.settimeout(SECONDS)
            sock.connect(api)
            return sock

        silent = [client() for _ in range(80)]
        exchange(inside, "silent")
        slow = client()
        for byte in json.dumps(add(closed_port())).encode():
            slow.sendall(bytes([byte]))
            exchange(inside, "byte by byte")
        assert json.loads(slow.recv(100)) == {"return": {"id": 1}}
        client().sendall(b"[" * 4000)
        exchange(inside, "brackets")
        client().close()
        assert ask(api, b'{"execute":"add_hostfwd"}')["error"]["desc"] == (
            "bad request: add_hostfwd: bad arguments.proto"
        )
        exchange(inside, "and so on")
        assert silent


def test_traffic_goes_on_though_nobody_reads_what_it_says(short_path: Path) -> None:
    api = str(short_path / "api")
    with attached("-c", "-a", api, "PID", "tap0") as (ns, running), conversation(ns) as inside:
        assert running.process.stderr is not None
        for _ in range(40):  # more than the pipe has room for
            ask(api, b'"' + b"x" * 4000)
        exchange(inside, "still there")
        assert running.process.poll() is None


def test_whether_a_pipe_takes_more_is_known() -> None:
    reading, writing = os.pipe()
    try:
        assert takes(writing)
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(1 << 16))
        assert not takes(writing)
    finally:
        os.close(reading)
        os.close(writing)


# -- the sandbox ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", SANDBOXES[1:])
def test_what_is_asked_for_is_on(words: list[str]) -> None:
    with works("-c", *words, "PID", "tap0") as (_, running):
        now = status(running.pid)
        assert now["NoNewPrivs"] == "1"
        assert now["Seccomp"] == ("2" if "--enable-seccomp" in words else "0")


CAP_NET_BIND_SERVICE = 1 << 10


@BOTH
def test_the_sandbox_seen_from_outside(program: list[str]) -> None:
    """A root directory with nothing in it that is not needed, mounted to be read, and one capability."""
    with attached("-c", "--enable-sandbox", "PID", "tap0", program=program) as (ns, running):
        now = status(running.pid)
        sets = [int(now[name], 16) for name in ("CapBnd", "CapPrm", "CapEff", "CapAmb")]
        assert sets == [CAP_NET_BIND_SERVICE] * 3 + [0]
        root = f"/proc/{running.pid}/root"
        assert {"etc", "run"} <= set(os.listdir(root)) <= {"etc", "run", "tmp"}
        assert os.path.exists(f"{root}/etc/passwd")
        if not program:
            assert os.listdir(f"{root}/tmp") == []
        mounts = [line.split() for line in Path(f"/proc/{running.pid}/mountinfo").read_text().splitlines()]
        points = {words[4]: words[5].split(",") for words in mounts}
        assert {"/", "/etc", "/run"} <= set(points)
        if program:  # the original leaves what this machine has mounted below /run as it is
            points = {where: points[where] for where in ("/", "/etc", "/run")}
        assert [where for where, flags in points.items() if "ro" not in flags] == []
        assert os.readlink(f"/proc/{running.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
        assert ns.connect("10.0.2.2", 1) == "ECONNREFUSED"


WITH_PRIVILEGE = """
import os, subprocess, sys
holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
    os.sched_yield()
ready, writing = os.pipe()
slirp = subprocess.Popen(
    [*sys.argv[1:], "--enable-sandbox", f"--ready-fd={writing}", "-c", str(holder.pid), "tap0"],
    pass_fds=[writing], stdout=subprocess.DEVNULL,
)
os.close(writing)
assert os.read(ready, 1) == b"1"
lines = open(f"/proc/{slirp.pid}/status").read().splitlines()
print(*(line.split()[1] for line in lines if line.startswith(("CapBnd", "CapPrm", "CapEff"))))
print(*sorted(set(os.listdir(f"/proc/{slirp.pid}/root")) - {"tmp"}))
print(os.readlink(f"/proc/{slirp.pid}/ns/user") == os.readlink("/proc/self/ns/user"))
holder.kill(), slirp.kill(), holder.wait(), slirp.wait()
"""


@BOTH
def test_the_sandbox_of_a_caller_with_privilege(program: list[str]) -> None:
    """podman's: in its user namespace all capabilities are there, and one is left, of that very namespace."""
    needs("unshare", *program)
    needs_tun()
    command = program or [sys.executable, "-m", "netns_kit", "slirp4netns"]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", WITH_PRIVILEGE, *command],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    one = f"{CAP_NET_BIND_SERVICE:016x}"
    assert done.stdout.splitlines() == [f"{one} {one} {one}", "etc run", "True"], done.stderr


def test_what_resolv_conf_leads_to_is_shown(tmp_path: Path) -> None:
    """Whatever directories the links on the way are in."""
    first, second = tmp_path / "one" / "resolv.conf", tmp_path / "two" / "real"
    for path in (first, second):
        path.parent.mkdir()
    second.write_text("nameserver 192.0.2.53\n")
    first.symlink_to("../two/real")
    code = f"""
from netns_kit.userstack.worker.sandbox import enter
print(enter([{str(first)!r}], ["root"], kept=0)["root"])
print(open({str(first)!r}).read(), end="")
import os
print(*sorted(os.listdir("/")))
try:
    open({str(second)!r}, "a")
except OSError as error:
    print(error.strerror)
"""
    needs_userns()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    top = first.parts[1]
    shown = " ".join(sorted({"etc", "run", "tmp", top}))
    assert done.stdout.splitlines() == ["on", "nameserver 192.0.2.53", shown, "Read-only file system"], (
        done.stderr
    )


IN_A_HOST_OF_ITS_OWN = """
import ctypes, os, select, socket, subprocess, sys
from dnslib import DNSRecord, QTYPE, RR, A
libc = ctypes.CDLL(None, use_errno=True)
etc, *command = sys.argv[1:]
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
assert libc.mount(etc.encode(), b"/etc", None, 0x1000, None) == 0  # MS_BIND

def server(address):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 53))
    return sock

servers = {address: server(address) for address in ("127.0.0.1", "127.0.0.2")}
holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
ready, writing = os.pipe()
while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
    os.sched_yield()
slirp = subprocess.Popen(
    [*command, f"--ready-fd={writing}", "-c", str(holder.pid), "tap0"], pass_fds=[writing], stdout=subprocess.DEVNULL
)
os.close(writing)
assert os.read(ready, 1) == b"1"
print("ready", flush=True)
ASK = '''
import socket, sys
from dnslib import DNSRecord
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(20)
    sock.sendto(DNSRecord.question("example.com").pack(), ("10.0.2.3", 53))
    print(DNSRecord.parse(sock.recv(1000)).rr[0].rdata)
'''
for line in sys.stdin:
    client = subprocess.Popen(
        ["nsenter", "--net", "--target", str(holder.pid), sys.executable, "-c", ASK],
        stdout=subprocess.PIPE, text=True,
    )
    found, _, _ = select.select(servers.values(), [], [], 20)
    query, sender = found[0].recvfrom(1000)
    record = DNSRecord.parse(query)
    answer = record.reply()
    answer.add_answer(RR(record.q.qname, QTYPE.A, rdata=A(found[0].getsockname()[0])))
    found[0].sendto(answer.pack(), sender)
    print(client.communicate(timeout=20)[0].strip(), flush=True)
slirp.kill()
holder.kill()
slirp.wait(), holder.wait()
"""


@pytest.mark.parametrize("words", SANDBOXES)
def test_resolv_conf_is_followed_whatever_is_on(tmp_path: Path, words: list[str]) -> None:
    """On a host of its own, whose /etc is ours to change."""
    needs("unshare", "nsenter", "ip")
    needs_tun()
    etc = tmp_path / "etc"
    etc.mkdir()

    def write(address: str) -> None:
        (tmp_path / "new").write_text(f"nameserver {address}\n")
        (tmp_path / "new").rename(etc / "resolv.conf")

    write("127.0.0.1")
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--kill-child", sys.executable]
    command += [
        "-c",
        IN_A_HOST_OF_ITS_OWN,
        str(etc),
        sys.executable,
        "-m",
        "netns_kit",
        "slirp4netns",
        *words,
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                process.kill()
                pytest.fail(process.communicate()[1])
            for address in ("127.0.0.1", "127.0.0.2"):
                write(address)
                process.stdin.write("ask\n")
                process.stdin.flush()
                assert process.stdout.readline() == f"{address}\n"
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors
        finally:
            process.kill()


def test_the_sandbox_does_without_landlock(tmp_path: Path) -> None:
    without = "from netns_kit.host import abi; abi.SYS_LANDLOCK_CREATE_RULESET = 9999"
    program = [executable(tmp_path, first=without)]
    with works("-c", "--enable-sandbox", "--enable-seccomp", "PID", "tap0", program=program) as (_, running):
        assert set(os.listdir(f"/proc/{running.pid}/root")) == {"etc", "run", "tmp"}


def test_a_sandbox_that_cannot_be_had_is_no_sandbox(tmp_path: Path) -> None:
    """A machine whose root directory cannot be exchanged: nothing is run then."""
    without = (
        "from netns_kit.host import abi; import netns_kit.userstack.worker.sandbox; abi.SYS_PIVOT_ROOT = {}"
    )
    program = executable(tmp_path, first=without)
    with held() as ns, slirp(
        "-c", "--enable-sandbox", str(ns.pid), "tap0", program=[program]
    ) as running:  # fmt: skip
        assert running.ready() == b""
        assert running.process.wait(SECONDS) == 1
        assert "create_sandbox failed: root is unsupported" in running.output()[1]


def test_the_installed_command_is_the_same(tmp_path: Path) -> None:
    with works("-c", "PID", "tap0", program=[executable(tmp_path)]) as (_, running):
        assert running.leave() == 0
