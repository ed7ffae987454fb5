"""`netns-kit attach`: connectivity for a namespace that was there before, and how it ends."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from netns_kit import Namespace, NamespaceGone
from netns_kit.cli.command_line import FAILED
from tests.support import ROOT, needs, needs_tun
from tests.support.servers import SECONDS, bounded, closed_port, hello, tcp_server
from tests.support.slirp import Held, Slirp, held, server_inside, slirp

pytestmark = pytest.mark.usefixtures("leaks")

ATTACH = (sys.executable, "-m", "netns_kit", "attach")


@contextmanager
def attached(*words: str) -> Iterator[tuple[Held, Slirp]]:
    with held() as ns, slirp("--host-loopback", *words, str(ns.pid), program=ATTACH) as running:
        said = running.ready()
        assert said == b"1", running.output()
        yield ns, running


def attach(*words: str, pass_fds: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
    """It fails before it is ready."""
    return subprocess.run(
        [*ATTACH, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        pass_fds=pass_fds,
    )


def links(ns: Held) -> set[str]:
    return {link["ifname"] for link in json.loads(ns.run("ip", "-j", "link"))}


def test_a_process_has_connectivity_until_the_exit_pipe_is_closed() -> None:
    with attached() as (ns, running), tcp_server(hello) as port:
        assert ns.connect("10.0.2.2", port) == "hello"
        running.say(b"x")
        assert ns.connect("10.0.2.2", port) == "hello"
        assert running.leave() == 0
        assert links(ns) == {"lo"}
        assert running.output() == ("", "")


@pytest.mark.parametrize("end", ["exit pipe", "signal", "process"])
def test_what_may_leave_is_held_to_and_told_to_the_end(end: str, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    with (
        tcp_server(hello) as port,
        attached("--allow", f"HOST:{port}", "--events", str(events)) as (ns, running),
    ):
        assert ns.connect("10.0.2.2", port) == "hello"
        assert ns.connect("10.0.2.2", closed_port()) == "EHOSTUNREACH"
        if end == "exit pipe":
            running.leave()
        elif end == "signal":
            running.process.send_signal(signal.SIGTERM)
        else:
            ns.kill()
        assert running.process.wait(SECONDS) == 0
    told = [json.loads(line) for line in events.read_text(encoding="ascii").splitlines()]
    label = f"rule 1 (--allow HOST:{port}): allow HOST port {port}"
    assert {(each["kind"], each["rule"]) for each in told if each["kind"] != "opened"} == {
        ("closed", label), ("refused", "default: deny"),
    }  # fmt: skip


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_an_orderly_end(number: signal.Signals) -> None:
    with attached() as (ns, running):
        running.process.send_signal(number)
        assert running.process.wait(SECONDS) == 0
        assert running.output() == ("", "")
        assert links(ns) == {"lo"}


def test_a_signal_before_it_is_ready_leaves_nothing() -> None:
    with held() as ns, slirp(str(ns.pid), program=ATTACH) as running:
        while not os.path.exists(f"/proc/{running.pid}/task/{running.pid}/children"):
            pass
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(SECONDS) in (0, -signal.SIGTERM)
        assert links(ns) == {"lo"}


def test_it_ends_with_the_process() -> None:
    with attached() as (ns, running):
        os.kill(ns.pid, signal.SIGKILL)
        assert running.process.wait(SECONDS) == 0
        assert "has ended" in running.output()[1]


@pytest.mark.parametrize("words", [(), ("--driver=worker",)])
def test_it_ends_when_its_device_is_removed(words: tuple[str, ...]) -> None:
    needs("ip")
    with attached(*words) as (ns, running):
        ns.run("ip", "link", "delete", "tap0")
        assert running.process.wait(SECONDS) == FAILED
        assert running.output()[1].startswith("netns-kit: tap0: ")
        assert "Traceback" not in running.output()[1]


def test_a_path_of_proc_is_its_process() -> None:
    with held() as ns, slirp(ns.path, program=ATTACH) as running:
        assert running.ready() == b"1"
        os.kill(ns.pid, signal.SIGKILL)
        assert running.process.wait(SECONDS) == 0


def test_what_it_is_told_is_what_is_there(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    port = closed_port()
    words = f"--ifname=eth7 --mtu=9000 --cidr=10.9.0.0/24 -p 127.0.0.1:{port}:80 --ipv6 --pid-file={pid_file}"
    with attached(*words.split()) as (ns, running):
        assert pid_file.read_text() == f"{running.pid}\n"
        [link] = json.loads(ns.run("ip", "-j", "address", "show", "eth7"))
        assert link["mtu"] == 9000
        assert {each["local"] for each in link["addr_info"]} >= {"10.9.0.100", "fd00::100"}
        with server_inside(ns), socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as sock:
            assert sock.recv(100) == b"10.9.0.2"
        assert running.leave() == 0
    assert not pid_file.exists()


def test_two_of_them_by_different_names() -> None:
    with attached() as (ns, _):
        words = ["--ifname=tap1", "--cidr=10.0.3.0/24", str(ns.pid)]
        with slirp(*words, program=ATTACH) as second:
            assert second.ready() == b"1"
            assert links(ns) == {"lo", "tap0", "tap1"}
            assert second.leave() == 0
        assert links(ns) == {"lo", "tap0"}


TARGETS = "give the id of a process, or the path of a network namespace, like /run/netns/NAME"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["999999999"], "there is no such process; pid is 999999999; give the id of a process that runs\n"),
        (["/nonexistent"], f"netns-kit: /nonexistent: No such file or directory; {TARGETS}\n"),
        (["/etc/passwd"], f"netns-kit: /etc/passwd: not a network namespace; {TARGETS}\n"),
        (["--mtu=1", "1"], "--mtu: '1': expected a whole number from 68 to 65521"),
        (["-p", "x", "1"], "'x': expected tcp: or udp: or an address"),
    ],
)
def test_what_fails_is_told(words: list[str], text: str) -> None:
    needs_tun()
    done = attach(*words)
    assert done.returncode == FAILED
    assert done.stderr.splitlines()[-1].startswith("netns-kit")
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pid_file_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("precious")
    with held() as ns:
        for name, said in (
            ("there", "exists and is not ours; remove it or name another"),
            ("no/pid", "No such file or directory; name a file in a directory that you may write"),
        ):
            done = attach(f"--pid-file={tmp_path}/{name}", str(ns.pid))
            assert (done.returncode, done.stderr) == (
                FAILED,
                f"netns-kit: --pid-file '{tmp_path}/{name}': expected a file that can be made: {said}\n",
            )
        assert links(ns) == {"lo"}
    assert (tmp_path / "there").read_text() == "precious"


def test_a_port_that_is_taken_is_told() -> None:
    with held() as ns, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = attach("-p", f"127.0.0.1:{port}:80", str(ns.pid))
        assert (done.returncode, f"127.0.0.1:{port}/tcp is taken" in done.stderr) == (FAILED, True)
        assert links(ns) == {"lo"}


def test_a_descriptor_that_is_not_open_is_told() -> None:
    done = attach("--ready-fd=99", "1")
    assert (done.returncode, "--ready-fd: '99': expected an open descriptor" in done.stderr) == (FAILED, True)


@pytest.mark.parametrize("what", ["/etc/passwd", "/", "/dev/null"])
def test_an_exit_descriptor_that_nobody_can_close_is_told(what: str) -> None:
    fd = os.open(what, os.O_RDONLY)
    try:
        done = attach(f"--exit-fd={fd}", "1", pass_fds=[fd])
    finally:
        os.close(fd)
    assert done.returncode == FAILED
    assert f"--exit-fd: '{fd}': expected a pipe or a socket" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_exit_socket_may_be_closed_with_something_unread() -> None:
    """As by a caller who is told of ready by the same socket, and does not look."""
    ours, theirs = socket.socketpair()
    with theirs, ours, held() as ns:
        ready = os.dup(theirs.fileno())
        process = subprocess.Popen(
            [*ATTACH, f"--ready-fd={ready}", f"--exit-fd={theirs.fileno()}", str(ns.pid)],
            cwd=ROOT,
            pass_fds=(ready, theirs.fileno()),
        )
        os.close(ready)
        select.select([ours], [], [], SECONDS)
        ours.close()
        assert process.wait(SECONDS) == 0


def test_a_process_that_has_not_unshared_is_told() -> None:
    done = attach(str(os.getpid()))
    assert done.returncode == FAILED
    assert done.stderr == (
        f"netns-kit: the network namespace of process {os.getpid()} is the caller's own; attach when the process has "
        "made its own (unshare(2)), or say --allow-current if that is what is meant\n"
    )


def test_a_port_beside_an_option_that_takes_none() -> None:
    done = attach("--host-loopback", "5432", "1")
    assert done.returncode == FAILED
    assert done.stderr.endswith("unrecognized arguments: 1; for one port write --host-loopback=PORT\n")


# -- by a path, which goes ------------------------------------------------------------------------------

BIND = """
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
path, *command = sys.argv[1:]
open(path, "w").close()
holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
    os.sched_yield()
assert libc.mount(f"/proc/{holder.pid}/ns/net".encode(), path.encode(), None, 0x1000, None) == 0  # MS_BIND
holder.kill(), holder.wait()
ready, writing = os.pipe()
attach = subprocess.Popen([*command, f"--ready-fd={writing}", path], pass_fds=[writing])
os.close(writing)
assert os.read(ready, 1) == b"1"
open(path + ".other", "w").close()
os.unlink(path + ".other")
assert attach.poll() is None, "another file's end is not ours"
assert libc.umount2(path.encode(), 2) == 0  # MNT_DETACH
assert attach.poll() is None
os.unlink(path)
print(attach.wait(30))
"""


def test_it_ends_when_the_path_is_gone(tmp_path: Path) -> None:
    """As by `ip netns delete`, here in a mount namespace of our own."""
    needs("unshare")
    needs_tun()
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", BIND]
    done = subprocess.run(
        [*command, str(tmp_path / "ns"), *ATTACH],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert "the path of the namespace is gone" in done.stderr


@pytest.mark.anyio
@bounded
async def test_a_link_to_a_namespace_is_a_path_of_it(tmp_path: Path) -> None:
    with held() as ns:
        link = tmp_path / "ns"
        link.symlink_to(ns.path)
        with pytest.raises(NamespaceGone, match="the path of the namespace is gone"):
            await until_gone(link, link.unlink)


@pytest.mark.anyio
@bounded
async def test_the_block_of_a_namespace_by_a_path_of_proc_ends_with_the_process() -> None:
    with held() as ns, pytest.raises(NamespaceGone, match="has ended"):
        await until_gone(Path(ns.path), lambda: os.kill(ns.pid, signal.SIGKILL))


async def until_gone(path: Path, end: Callable[[], object]) -> None:
    async with Namespace.attach(path=path) as ns:
        end()
        await ns.wait_closed()
