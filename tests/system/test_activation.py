"""Commands that are activated with sockets, given open files, and shown the host's Unix sockets."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from netns_kit import Listen, OpenFile
from netns_kit.errors import ArgumentError, ArgumentTypeError
from netns_kit.namespace.namespace import Namespace
from netns_kit.namespace.process import Process
from tests.support import needs_userns
from tests.support.servers import SECONDS

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

SERVER = """
import json, os, socket, stat, sys
fds = range(3, 3 + int(os.environ["LISTEN_FDS"]))
names = os.environ["LISTEN_FDNAMES"].split(":")
print(json.dumps({
    "mine": os.environ["LISTEN_PID"] == str(os.getpid()), "names": names,
    "blocking": [os.get_blocking(fd) for fd in fds],
    "open": sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")),
}), flush=True)
sockets = [socket.socket(fileno=fd) for fd in fds if stat.S_ISSOCK(os.fstat(fd).st_mode)]
for line in sys.stdin:
    sock = sockets[int(line)]
    if sock.type == socket.SOCK_DGRAM:
        data, client = sock.recvfrom(100)
        sock.sendto(json.dumps(client).encode(), client)
    else:
        accepted, client = sock.accept()
        accepted.send(json.dumps(client).encode())
        accepted.close()
    print(end="\\n", flush=True)
"""
"""It tells what it was given.  For each number that it reads it answers a client of that socket by its address."""
PYTHON = [sys.executable, "-S", "-E", "-I", "-c"]


@pytest.fixture(autouse=True)
def _userns() -> None:
    needs_userns()


@contextmanager
def sockets(path: Path) -> Iterator[dict[str, socket.socket]]:
    """A TCP, a UDP and three Unix sockets, none of which blocks."""
    with ExitStack() as owned:
        made = {
            "tcp": socket.create_server(("127.0.0.1", 0)),
            "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "stream": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            "dgram": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
            "seqpacket": socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
        }
        for name, sock in made.items():
            owned.enter_context(sock)
            sock.setblocking(False)
            if name == "udp":
                sock.bind(("127.0.0.1", 0))
            elif name != "tcp":
                sock.bind(str(path / name))
                if name != "dgram":
                    sock.listen()
        yield made


async def told(server: Process) -> Any:
    """What it tells when it has started."""
    assert server.stdout is not None
    return json.loads(await server.stdout.receive())


async def answered(server: Process, number: int, served: socket.socket, name: object) -> Any:
    """What the server tells a client whose own address is `name` of that client's address."""

    def ask() -> bytes:
        with socket.socket(served.family, served.type) as client:
            client.settimeout(SECONDS)
            client.bind(name)  # type: ignore[arg-type]  # whatever the family has
            client.connect(served.getsockname())
            if served.type == socket.SOCK_DGRAM:
                client.send(b"who am I?")
            return client.recv(100)

    assert server.stdin is not None
    assert server.stdout is not None
    await server.stdin.send(b"%d\n" % number)
    answer = json.loads(await anyio.to_thread.run_sync(ask))
    assert await server.stdout.receive() == b"\n"
    return answer


async def test_a_command_serves_the_sockets_it_is_given_without_any_interface(short_path: Path) -> None:
    """TCP, UDP and all kinds of Unix sockets, with the client's own address; the namespace has nothing but `lo`."""
    with sockets(short_path) as given, anyio.fail_after(SECONDS):
        async with (
            Namespace.create() as ns,
            await ns.popen([*PYTHON, SERVER], stderr=None, listen=given) as server,
        ):
            said = await told(server)
            assert said == {
                "mine": True, "names": list(given), "blocking": [True] * 5, "open": [0, 1, 2, 3, 4, 5, 6, 7],
            }  # fmt: skip
            for number, (name, sock) in enumerate(given.items()):
                if sock.family == socket.AF_INET:
                    seen = await answered(server, number, sock, ("127.0.0.9", 0))
                    assert seen[0] == "127.0.0.9", name
                else:
                    mine = str(short_path / f"client-{name}")
                    assert await answered(server, number, sock, mine) == mine


async def test_the_command_keeps_the_sockets_that_the_caller_closes(short_path: Path) -> None:
    with sockets(short_path) as given, anyio.fail_after(SECONDS):
        async with Namespace.create() as ns:
            async with await ns.popen([*PYTHON, SERVER], listen=[given["tcp"]]) as server:
                assert (await told(server))["names"] == ["unknown"]
                kept = given["tcp"].dup()
                given["tcp"].close()
                assert (await answered(server, 0, kept, ("127.0.0.1", 0)))[0] == "127.0.0.1"
            with kept, socket.create_connection(kept.getsockname(), timeout=SECONDS):
                pass  # still listening: a copy of it is here


NAMES = """
import os
print(os.environ["LISTEN_PID"] == str(os.getpid()), os.environ["LISTEN_FDNAMES"], sorted(os.listdir("/proc/self/fd")))
"""


@pytest.mark.parametrize("pids", ["own", "host"])
async def test_names_and_descriptors(pids: Any, short_path: Path) -> None:
    with sockets(short_path) as given:
        ways: list[tuple[Listen, str]] = [
            ([given["tcp"].fileno(), ("b", given["udp"])], "unknown:b"),
            ({"a b": given["tcp"], "x" * 255: given["udp"].fileno()}, "a b:" + "x" * 255),
            ((("same", given["tcp"]), ("same", given["tcp"])), "same:same"),
        ]
        async with Namespace.create(pids=pids) as ns:
            for listen, names in ways:
                done = await ns.run([*PYTHON, NAMES], listen=listen)
                assert done.stdout.decode() == f"True {names} {[str(number) for number in range(6)]}\n"
            done = await ns.run("env", listen=[])
            assert b"LISTEN" not in done.stdout


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "ä", "x" * 256])
async def test_a_name_that_cannot_be_announced(name: str) -> None:
    async with Namespace.create() as ns:
        for options in ({"listen": {name: 0}}, {"open_files": {name: "/dev/null"}}):
            with pytest.raises(ArgumentError, match="names of 1 to 255 ASCII characters, without colons"):
                await ns.run(["true"], **options)


async def test_what_is_no_socket_is_told() -> None:
    closed = socket.socket()
    closed.close()
    wrong: list[Any] = ["tcp", 3.5, [None], [closed], [("a", "b")], {"a": object()}, [10**9], [True]]
    async with Namespace.create() as ns:
        for listen in wrong:
            with pytest.raises(ArgumentError, match=r"^listen="):
                await ns.run(["true"], listen=listen)


# -- open files -----------------------------------------------------------------------------------------


async def test_files_are_given_open_by_name(tmp_path: Path) -> None:
    """The command can read and write them where it cannot open them, after the sockets."""
    read, written, appended, both = (tmp_path / name for name in ("read", "written", "appended", "both"))
    for path in (read, written, appended, both):
        path.write_text(f"{path.name}\n")
    use = (
        'echo "$LISTEN_FDNAMES"; cat <&4; echo new >&5; echo more >&6; '
        'read line <&7; echo "$line"; echo end >&7; cat <&8; echo refused >&4'
    )
    with socket.create_server(("127.0.0.1", 0)) as sock, read.open("rb") as file:
        given: dict[str, OpenFile] = {
            "r": read, "w": (written, "w"), "a": (str(appended), "a"), "r+": (os.fsencode(both), "r+"), "file": file,
        }  # fmt: skip
        async with Namespace.create() as ns:
            done = await ns.run(use, listen=[("s", sock)], open_files=given, check=False)
    assert done.stdout.decode().split() == ["s:r:w:a:r+:file", "read", "both", "read"]
    assert done.returncode != 0, "what is open for reading is not written to"
    assert (read.read_text(), written.read_text()) == ("read\n", "new\n")
    assert (appended.read_text(), both.read_text()) == ("appended\nmore\n", "both\nend\n")


async def test_opening_a_file_waits_for_nobody(short_path: Path) -> None:
    """A FIFO that nobody writes to; and a Unix socket is connected to, as systemd does."""
    fifo = short_path / "fifo"
    os.mkfifo(fifo)
    with sockets(short_path) as given, anyio.fail_after(SECONDS):
        async with Namespace.create() as ns:
            look = "import os; print(os.get_blocking(3))"
            assert (await ns.run([*PYTHON, look], open_files={"fifo": fifo})).stdout == b"True\n"
            for kind in ("stream", "seqpacket", "dgram"):
                await ns.run("echo hello >&3", open_files={kind: given[kind].getsockname()})
                with given[kind].dup() if kind == "dgram" else given[kind].accept()[0] as heard:
                    assert heard.recv(10) == b"hello\n"
            given["stream"].close()
            with pytest.raises(ConnectionRefusedError) as refused:
                await ns.run(["true"], open_files={"stream": short_path / "stream"})
            assert refused.value.filename == str(short_path / "stream")


async def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    async with Namespace.create() as ns:
        with pytest.raises(FileNotFoundError) as missing:
            await ns.run(["true"], open_files={"a": __file__, "b": tmp_path / "missing"})
        assert missing.value.filename == str(tmp_path / "missing")
        with pytest.raises(
            ArgumentError, match=r"mode of open_files\['a'\]='x': expected 'r', 'w', 'a' or 'r\+'"
        ):
            await ns.run(["true"], open_files={"a": (tmp_path, "x")})  # type: ignore[dict-item]  # is told at run time too
        for wrong in (None, 1.5, (tmp_path,), (1, "r")):
            with pytest.raises(ArgumentTypeError, match=r"open_files\['a'\]"):
                await ns.run(["true"], open_files={"a": wrong})  # type: ignore[dict-item]  # the same


# -- the host's Unix sockets ------------------------------------------------------------------------------

ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(20)
    sock.connect(sys.argv[1])
    print(sock.recv(100).decode())
"""


@contextmanager
def greeting(path: Path) -> Iterator[socket.socket]:
    """A Unix socket that listens."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        yield sock


async def greet(sock: socket.socket, text: bytes) -> None:
    def one() -> None:
        sock.settimeout(SECONDS)
        with sock.accept()[0] as client:
            client.send(text)

    await anyio.to_thread.run_sync(one)


async def test_a_host_socket_is_at_a_path_for_one_command(short_path: Path) -> None:
    """Where there is a file, and where there is none: that place is there for as long as the command is."""
    host, there, missing = short_path / "host", short_path / "there", short_path / "missing"
    there.write_text("a file\n")
    with greeting(host) as sock, anyio.fail_after(SECONDS):
        async with Namespace.create() as ns:
            for inside in (there, missing, Path("/etc/hosts")):
                command = [*PYTHON, ASK, str(inside)]
                async with await ns.popen(command, stderr=None, sockets={str(inside): host}) as asker:
                    await greet(sock, b"the host's")
                    assert asker.stdout is not None
                    assert await asker.stdout.receive() == b"the host's\n"
                    await asker.wait()
                assert not missing.exists()
            assert (await ns.run(["cat", str(there)])).stdout == b"a file\n", "another command sees the file"
            look = f"test -S {there}; test -S {missing}; cat /etc/hosts"
            done = await ns.run(
                look,
                files={"/etc/hosts": "text\n"},
                sockets={str(there): host, str(missing): os.fsencode(host)},
            )
            assert done.stdout == b"text\n"


async def test_a_host_socket_by_a_relative_path(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(short_path)
    with greeting(short_path / "host"):
        async with Namespace.create() as ns:
            await ns.run("test -S /etc/hosts", cwd="/", sockets={"/etc/hosts": "host"})


async def test_a_host_socket_that_is_none(short_path: Path) -> None:
    (short_path / "file").touch()
    with greeting(short_path / "host") as sock:
        host = sock.getsockname()
        async with Namespace.create() as ns:
            with pytest.raises(
                ArgumentError, match=r"sockets\['/x'\]=.*file'.*: expected the path of a Unix socket"
            ):
                await ns.run(["true"], sockets={"/x": short_path / "file"})
            with pytest.raises(FileNotFoundError) as missing:
                await ns.run(["true"], sockets={"/x": short_path / "missing"})
            assert missing.value.filename == str(short_path / "missing")
            with pytest.raises(ArgumentError, match="expected absolute paths"):
                await ns.run(["true"], sockets={"x": host})
            with pytest.raises(
                ArgumentError, match=r"sockets='/etc/hosts': expected other paths than those of `files`"
            ):
                await ns.run(["true"], files={"/etc/hosts": ""}, sockets={"/etc/hosts": host})
            with pytest.raises(IsADirectoryError):
                await ns.run(["true"], sockets={"/etc": host})


async def test_a_host_socket_is_shown_though_its_place_is_replaced(short_path: Path) -> None:
    place = short_path / "place"
    place.touch()
    with greeting(short_path / "host") as sock, anyio.fail_after(SECONDS):
        show = f"while read x; do test -S {place} && echo socket || echo other; done"
        async with (
            Namespace.create() as ns,
            await ns.popen(show, sockets={str(place): sock.getsockname()}) as command,
        ):
            assert command.stdin is not None
            assert command.stdout is not None
            (short_path / "new").write_text("new")
            os.replace(short_path / "new", place)
            seen = b""
            while seen != b"socket\n":
                await command.stdin.send(b"\n")
                seen = await command.stdout.receive()
