"""Application: real programs in members by names, from Python and by `netns-kit up`."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from netns_kit import (
    Application,
    ArgumentError,
    ArgumentTypeError,
    Composition,
    NetnsKitError,
    NotFound,
    StackClosed,
)
from netns_kit.cli import control_socket
from netns_kit.namespace.process import Process
from tests.support import GRACE, ROOT, needs, needs_tun, wait_exit
from tests.support.servers import bounded, closed_port

SERVE = """
import os, socket, sys
with socket.create_server(("0.0.0.0", int(sys.argv[1]))) as server:
    print("listening", os.environ.get("WHO"), flush=True)
    while True:
        client, _ = server.accept()
        with client:
            client.sendall(sys.argv[2].encode())
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as sock:
    print(sock.recv(99).decode(), flush=True)
"""
LATE = ["sh", "-c", 'sleep 0.5; exec "$@"', "sh"]
"""What has a command begin a moment later."""
FILE = """
[members.web]
command = [{python}, "-ISc", {ask}, "store", "6379"]
depends_on = ["db:6379"]

[members.db]
command = [{python}, "-ISc", {serve}, "6379", "stored"]
aliases = ["store"]
ports = ["127.0.0.1:{port}:6379"]
env = {{ WHO = "db" }}

[members.tools]
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


def python(*words: str) -> list[str]:
    return [sys.executable, "-ISc", *words]


def composition(**members: dict[str, Any]) -> Composition:
    return Composition.from_dict({"members": members}, name="lab")


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_commands_wait_for_whom_they_depend_on() -> None:
    shop = composition(
        web={"command": python(ASK, "store", "6379"), "depends_on": ["db:6379"]},
        db={"command": [*LATE, *python(SERVE, "6379", "stored")], "aliases": ["store"], "env": {"WHO": "db"}},
        tools={},
    )
    lines: list[str] = []
    async with Application(shop, on_line=lambda line: lines.append(f"{line.member}: {line.text}")) as lab:
        async for line in lab.logs("web", follow=True):
            assert line.text == "stored"
        assert lines == ["db: listening db", "web: stored"]
        assert [each.text async for each in lab.logs()] == ["listening db", "stored"]
        states = {each.name: (each.state, each.status) for each in await lab.state()}
        assert states == {"db": ("running", None), "web": ("ended", 0), "tools": ("idle", None)}
        async with await lab.member("db").connect_tcp(6379) as stream:
            assert await stream.receive() == b"stored"
        with pytest.raises(NotFound, match="'nobody'"):
            lab.member("nobody")
        with pytest.raises(NotFound):
            await anext(lab.logs("nobody"))
    with pytest.raises(StackClosed):
        await lab.state()


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_it_ends_when_all_commands_have() -> None:
    async with Application(composition(a={"command": "exit 3"}, b={"command": ["true"]})) as lab:
        assert await lab.wait() == {"a": 3, "b": 0}


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_a_command_that_ends_before_it_listens() -> None:
    lab = Application(
        composition(a={"command": "echo 'no room'; exit 1"}, b={"command": ["true"], "depends_on": ["a:80"]})
    )
    with pytest.raises(NetnsKitError, match=r"a has ended with status 1, and b waits for its port 80/tcp"):
        await lab.open()


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_a_command_that_cannot_be_executed() -> None:
    lab = Application(composition(a={"command": ["no-such-program"]}))
    with pytest.raises(FileNotFoundError):
        await lab.open()


STUBBORN = "trap '' TERM; echo begun; while :; do sleep 1000; done"


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@pytest.mark.parametrize("by_group", [True, False])
@bounded
async def test_a_command_is_restarted_with_what_it_has_started(
    monkeypatch: pytest.MonkeyPatch, by_group: bool
) -> None:
    """Also by a kernel that has no signals for groups by pidfd: then it is killed at once."""
    if not by_group:
        monkeypatch.setattr(Process, "signal_group", lambda self, number: False)
    line = f"echo begun; {shlex.join(python(SERVE, '6379', 'stored'))} | cat; true"
    shop = composition(
        db={"command": line, "env": {"WHO": "db"}},
        web={"command": ["sleep", "1000"], "depends_on": ["db:6379"]},
        tools={},
    )
    async with Application(shop) as lab:
        lines = lab.logs("db", follow=True)
        assert [(await anext(lines)).text for _ in range(2)] == ["begun", "listening db"]
        before = await lab.state()
        await lab.restart("db")
        after = await lab.state()
        assert [(await anext(lines)).text for _ in range(2)] == ["begun", "listening db"]
        await lines.aclose()
        async with await lab.member("db").connect_tcp(6379) as stream:
            assert await stream.receive() == b"stored"
        assert before[0].pid != after[0].pid
        assert (before[0].address, before[1:]) == (after[0].address, after[1:])
        with pytest.raises(NetnsKitError, match=r"the member tools has no command; give it one"):
            await lab.restart("tools")
        with pytest.raises(NotFound, match="'nobody'"):
            await lab.restart("nobody")


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_a_command_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netns_kit.network.application.STOP_SECONDS", 0.2)
    async with Application(composition(a={"command": STUBBORN})) as lab:
        lines = lab.logs(follow=True)
        assert (await anext(lines)).text == "begun"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lab.restart, "a")
            assert (await anext(lines)).text == "begun"
        (state,) = await lab.state()
        assert state.state == "running"
        await lines.aclose()


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_a_command_that_has_ended_is_started_again(tmp_path: Path) -> None:
    """The application goes on meanwhile, though no other command runs; and what cannot be started has ended."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho run $$; read line <pipe; exit 5\n", encoding="utf-8")
    program.chmod(0o700)
    os.mkfifo(tmp_path / "pipe")
    told: list[str] = []
    one = {"members": {"a": {"command": [str(program)]}}}
    lab = Application(Composition.from_dict(one, directory=tmp_path), on_notice=told.append)
    async with lab, anyio.create_task_group() as tasks:

        async def state_of_a() -> tuple[str, int | None]:
            state = (await lab.state())[0]
            return state.state, state.status

        await anyio.to_thread.run_sync((tmp_path / "pipe").write_text, "end\n")
        while await state_of_a() != ("ended", 5):  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.01)
        assert told == ["a has ended with status 5"]
        await lab.restart("a")
        assert await state_of_a() == ("running", None)
        program.rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=r"members\.a: .*program"):
            await lab.restart("a")
        assert await state_of_a() == ("ended", 127)
        (tmp_path / "away").rename(program)
        ends: list[dict[str, int]] = []

        async def wait() -> None:
            ends.append(await lab.wait())

        await lab.restart("a")
        tasks.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        await lab.restart("a")
        assert ends == [], "nothing has ended by itself"
        await anyio.to_thread.run_sync((tmp_path / "pipe").write_text, "end\n")
        while not ends:  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.01)
        assert ends == [{"a": 5}]


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_people_are_told_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netns_kit.network.application.PATIENCE", 0.0)
    told: list[str] = []
    shop = composition(
        db={"command": ["sleep", "1000"]}, web={"command": ["true"], "depends_on": ["db:6379/udp"]}
    )
    with anyio.CancelScope() as scope:

        def note(text: str) -> None:
            told.append(text)
            scope.cancel()

        await Application(shop, on_notice=note).open()
    assert told == ["web waits for db, which does not listen on port 6379/udp"]


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"command": ["/nowhere/program"]}, r"members\.a: /nowhere/program'"),
        ({"command": ["true"], "directory": "/nowhere"}, r"members\.a: /nowhere'"),
        (
            {"address": "192.0.2.1"},
            r"members\.a\.address=192\.0\.2\.1: expected an address of 10\.0\.2\.0/24",
        ),
        ({"aliases": ["localhost"]}, r"members\.a\.aliases='localhost'"),
        ({"command": "true", "env": {"A=B": ""}}, r"members\.a\.env='A=B'"),
        (
            {"ports": ["192.0.2.1:0:80"]},
            r"members\.a\.ports=192\.0\.2\.1:0 -> 80/tcp: expected an",
        ),
    ],
)
@bounded
async def test_what_cannot_be_is_told_with_its_place(member: dict[str, Any], message: str) -> None:
    with pytest.raises((OSError, NetnsKitError), match=message):
        await Application(composition(a=member)).open()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"subnet": "10.0.2.0/33"}, r"network\.subnet='10\.0\.2\.0/33': expected an IPv4 network"),
        ({"driver": "fast"}, r"network\.driver='fast': expected 'thread'"),
        ({"records": ["a"]}, r"network\.records='a': expected NAME=ADDRESS"),
        ({"allow_host_loopback": "yes"}, r"network\.allow_host_loopback='yes'"),
    ],
)
def test_so_is_what_is_wrong_with_the_network(network: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Application(Composition.from_dict({"network": network}))


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
@bounded
async def test_lines_as_they_are_written() -> None:
    command = r"printf 'one\r\ntwo\nthree \377'; head -c 40000 /dev/zero | tr '\0' x >&2"
    async with Application(composition(a={"command": command})) as lab:
        await lab.wait()
        lines = [each.text async for each in lab.logs()]
    assert lines[:2] == ["one", "two"]
    assert "".join(lines[2:]) == "three \N{REPLACEMENT CHARACTER}" + 40000 * "x"
    assert max(map(len, lines)) <= 16_384


@pytest.mark.anyio
@pytest.mark.usefixtures("leaks")
async def test_what_is_no_application() -> None:
    with pytest.raises(ArgumentTypeError, match=r"expected a Composition; read one"):
        Application("shop.toml")  # type: ignore[arg-type]  # that is what it is about
    with pytest.raises(ArgumentTypeError, match="on_line='print': expected a plain function"):
        Application(composition(), on_line="print")  # type: ignore[arg-type]  # the same
    with pytest.raises(ArgumentTypeError, match="on_notice='print': expected a plain function"):
        Application(composition(), on_notice="print")  # type: ignore[arg-type]  # the same


def netns_kit(*words: str, status: int = 0) -> str:
    """What a command says; its errors are part of it."""
    done = subprocess.run(
        [sys.executable, "-m", "netns_kit", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.fixture
def name() -> str:
    """The name of a network that no other test run has."""
    return f"lab{os.getpid()}"


@contextmanager
def up(tmp_path: Path, name: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """The network of `FILE`, by the command line; it is killed in the end if it runs still."""
    file = tmp_path / f"{name}.toml"
    text = FILE.format(python=f'"{sys.executable}"', ask=f"'''{ASK}'''", serve=f"'''{SERVE}'''", port=port)
    file.write_text(text, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "netns_kit", "up", str(file)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        try:
            assert program.stderr is not None
            assert program.stderr.readline() == f"netns-kit: {name} is up\n"
            yield program
        finally:
            program.kill()


def pids(name: str) -> set[int]:
    """The processes of a network that is up."""
    from netns_kit import MemberState

    with control_socket.connect(name) as sock:
        states = list(control_socket.ask(sock, MemberState, "state"))
    return {pid for each in states for pid in (each.pid, each.namespace_pid) if pid is not None}


def test_up_ps_logs_join_and_down(tmp_path: Path, name: str) -> None:
    needs("getent", "ip")
    port = closed_port()
    with up(tmp_path, name, port) as program:
        netns_kit("logs", "-f", name, "web")  # until it has ended
        rows = [line.split() for line in netns_kit("ps", name).splitlines()]
        assert rows[0] == ["NETWORK", "MEMBER", "ADDRESS", "STATE", "PID", "PORTS"]
        assert [row[:5] for row in rows[1:]] == [
            [name, "db", "store", "10.0.2.101", "running"],
            [name, "web", "10.0.2.102", "ended", "(0)"],
            [name, "tools", "10.0.2.103", "idle"],
        ]
        assert f"127.0.0.1:{port} -> 6379/tcp" in netns_kit("ps")
        for member, row in ("web", 2), ("store", 1):
            assert [line.split() for line in netns_kit("ps", f"{name}/{member}").splitlines()][1:] == [
                rows[row]
            ]
        for member in "", "nobody":
            mistake = netns_kit("ps", f"{name}/{member}", status=125)
            assert f"there is no member {member!r}; there are db, web, tools" in mistake
        assert netns_kit("logs", name) == "db | listening db\nweb | stored\n"
        assert netns_kit("logs", name, "web") == "web | stored\n"
        assert netns_kit("logs", f"{name}/web") == "web | stored\n", "the place that join takes"
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert client.recv(99) == b"stored"
        said = netns_kit("join", f"{name}/tools", "--", "getent", "hosts", "store")
        assert said.split() == ["10.0.2.101", "store"]
        assert netns_kit("join", f"{name}/tools", sys.executable, "-ISc", ASK, "db", "6379") == "stored\n"
        assert "br0" in netns_kit("join", name, "ip", "link")
        assert netns_kit("restart", f"{name}/db") == netns_kit("restart", name) == ""
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert client.recv(99) == b"stored"
        mistake = netns_kit("restart", name, "nobody", status=125)
        assert "there is no member 'nobody'; there are db, web, tools" in mistake, "in the order of the file"
        netns_kit("join", f"{name}/tools", "sh", "-c", "exit 7", status=7)
        netns_kit("join", f"{name}/tools", "no-such-program", status=127)
        assert "there is no member 'nobody'" in netns_kit("join", f"{name}/nobody", "true", status=125)
        assert f"a network '{name}' is up" in netns_kit("up", str(tmp_path / f"{name}.toml"), status=125)
        everything = pids(name)
        assert netns_kit("down", name) == ""
        assert wait_exit(everything, time.monotonic() + GRACE) == set()
        assert program.wait(100) == 0
    assert f"no network '{name}' is up" in netns_kit("down", name, status=125)
    assert name not in netns_kit("ps")


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all(tmp_path: Path, name: str, number: int) -> None:
    with up(tmp_path, name, closed_port()) as program:
        everything = pids(name)
        assert len(everything) >= 4
        program.send_signal(number)
        assert program.wait(100) == (-9 if number == signal.SIGKILL else 0)
        assert wait_exit(everything, time.monotonic() + GRACE) == set()
    assert name not in control_socket.names()


def test_up_in_the_background(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.json"
    file.write_text('{"members": {"a": {"command": ["sleep", "1000"]}, "b": {}}}', encoding="utf-8")
    assert netns_kit("up", "-d", str(file)) == f"netns-kit: {name} is up\n"
    try:
        everything = pids(name)
        assert "sleep" not in netns_kit("logs", name)
    finally:
        netns_kit("down", name)
    assert wait_exit(everything, time.monotonic() + GRACE) == set()
    file.write_text('{"members": {"a": {"command": ["no-such-program"]}}}', encoding="utf-8")
    said = netns_kit("up", "--detach", str(file), status=125)
    assert said == f"netns-kit: {file}: members.a: no-such-program: No such file or directory\n"


@pytest.mark.usefixtures("default_signals")
def test_who_is_interrupted_before_all_is_up_leaves_nothing(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.toml"
    file.write_text(
        '[members.a]\ncommand = ["sleep", "1000"]\n[members.b]\ncommand = "true"\ndepends_on = ["a:80"]\n',
        encoding="utf-8",
    )
    with subprocess.Popen([sys.executable, "-m", "netns_kit", "up", "-d", str(file)], cwd=ROOT) as program:
        try:
            while name not in control_socket.names():
                assert program.poll() is None
                time.sleep(0.01)
            while "waiting" not in netns_kit("ps", name):  # also as soon as there is anything
                assert program.poll() is None
            everything = pids(name)
            program.send_signal(signal.SIGINT)
            assert program.wait(GRACE) == -signal.SIGINT
        finally:
            program.kill()
    assert wait_exit(everything, time.monotonic() + GRACE) == set()
    deadline = time.monotonic() + GRACE
    while name in control_socket.names():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_has_read_logs_and_gone_leaves_no_trace(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.json"
    file.write_text('{"members": {"a": {"command": "echo there; sleep 1000"}}}', encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "netns_kit", "up", str(file)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stderr.readline() == f"netns-kit: {name} is up\n"
        with subprocess.Popen(
            [sys.executable, "-m", "netns_kit", "logs", "-f", name],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        ) as reader:  # fmt: skip
            assert reader.stdout is not None
            assert reader.stdout.readline() == "a | there\n"
            reader.kill()
        netns_kit("down", name)
        assert program.stderr.read() == ""
        assert program.wait(100) == 0


def test_what_up_says_of_its_commands(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.json"
    file.write_text(
        '{"members": {"a": {"command": "echo there; exit 3"}, "b": {"command": "true"}}}', encoding="utf-8"
    )
    said = netns_kit("up", str(file), status=1)
    assert "a | there\n" in said
    assert said.count("netns-kit: a has ended with status 3\n") == 1
    file.write_text('{"members": {"a": {"port": []}}}', encoding="utf-8")
    for options in ((), ("-d",)):
        said = netns_kit("up", *options, str(file), status=125)
        assert f"netns-kit: {file}: members.a.port=[]: expected a key" in said, "it is no option"
    assert "nothing.toml: No such file" in netns_kit("up", str(tmp_path / "nothing.toml"), status=125)


def test_a_socket_of_somebody_else_is_no_network(name: str) -> None:
    """Who listens at the name is not asked for anything, if it is another user."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0{control_socket.prefix()}{name}")
        sock.listen()
        assert name in control_socket.names()
        with control_socket.connect(name):
            pass
    with pytest.raises(NotFound):
        control_socket.connect(name)


@pytest.mark.anyio
async def test_nobody_can_be_asked_for_anything_else(tmp_path: Path, name: str) -> None:
    with up(tmp_path, name, closed_port()):
        asked: list[tuple[str, dict[str, object]]] = [
            ("nothing", {}), ("logs", {"members": 5}), ("logs", {"members": [[]]}), ("join", {"member": 5}),
            ("state", {"more": 1}), ("logs", {"members": ["nobody"]}),
        ]  # fmt: skip
        for op, more in asked:
            with control_socket.connect(name) as sock, pytest.raises(NetnsKitError):
                list(control_socket.ask(sock, dict, op, **more))
        async with await anyio.connect_unix(f"\0{control_socket.prefix()}{name}") as stream:
            await stream.send(b"{\n")
            assert b"error" in await stream.receive()
