"""Commands that are activated with sockets, given open files, and shown the host's Unix sockets."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from netns_kit import Listen, Mode, Network, OpenFile, PortForward, UnixSocket
from netns_kit.cli.command_line import FAILED
from netns_kit.errors import (
    ArgumentError,
    ArgumentTypeError,
    NotFound,
    PortInUseError,
    PortSpecError,
    PrivilegedPortError,
    StackClosed,
)
from netns_kit.host import diagnosis, sysctl
from netns_kit.namespace.namespace import Namespace
from netns_kit.namespace.process import Process
from tests.support import ROOT, missing, needs, needs_tun, needs_userns
from tests.support.servers import SECONDS, closed_port, host_address

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
            assert {sock.gettimeout() for sock in given.values()} == {None}, (
                "the objects know that they block"
            )
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


PROXY = "/lib/systemd/systemd-socket-proxyd"


async def test_a_server_of_systemds_own_takes_the_sockets(short_path: Path) -> None:
    """By libsystemd: a TCP and a Unix socket of the host, for a server on the namespace's loopback alone."""
    if not os.path.exists(PROXY):  # noqa: ASYNC240
        missing("not installed: systemd-socket-proxyd")
    with sockets(short_path) as made, anyio.fail_after(SECONDS):
        given = {"web": made["tcp"], "local": made["stream"]}
        async with (
            Namespace.create() as ns,
            await ns.popen([*PYTHON, SHOW, "SOCK_STREAM", "80"], stderr=None) as server,
            await ns.popen([PROXY, "127.0.0.1:80"], stderr=None, listen=given),
        ):
            assert server.stdout is not None
            await server.stdout.receive()
            for sock in given.values():
                assert await anyio.to_thread.run_sync(asked, sock.getsockname(), sock.family) == "127.0.0.1"


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
            with ExitStack() as waiting:
                busy = {"stream": short_path / "stream"}
                given["stream"].listen(0)
                waiting.enter_context(socket.socket(socket.AF_UNIX)).connect(str(busy["stream"]))
                with pytest.raises(BlockingIOError):
                    await ns.run(["true"], open_files=busy)
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
            _, uid, _ = struct.unpack("=iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            assert uid == os.getuid(), "to the host, the command is its caller"
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


async def test_a_host_socket_that_something_else_stands_for_inside(short_path: Path) -> None:
    """Of the two, none is shown in place of the other: an earlier command may have mounted the second."""
    (short_path / "dir").mkdir()
    (short_path / "other").mkdir()
    host = short_path / "dir" / "host"
    with greeting(host), greeting(short_path / "other" / "host"):
        async with Namespace.create() as ns:
            await ns.run(["mount", "--bind", str(short_path / "other"), str(short_path / "dir")])
            with pytest.raises(OSError, match="the path leads to something else inside") as stale:
                await ns.run(["true"], sockets={"/etc/hosts": host})
            assert (stale.value.errno, stale.value.filename) == (errno.ESTALE, str(host))


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


# -- ports of the host that commands have themselves: mode "fd" -------------------------------------------


def forward(host_port: int, guest_port: int = 80, **more: Any) -> PortForward:
    return PortForward("tcp", "127.0.0.1", host_port, None, guest_port, mode="fd", **more)


async def test_a_forwarded_port_is_the_commands_own(short_path: Path) -> None:
    """A TCP port, a UDP port and a Unix socket; the server sees who is there, and stays while our copies go."""
    needs_tun()
    path = UnixSocket(str(short_path / "socket"))
    wanted = (
        forward(0),
        PortForward("udp", "127.0.0.1", 0, None, 53, mode="fd"),
        PortForward("tcp", path, 0, None, 8080, mode="fd"),
        PortForward("tcp", "127.0.0.1", 0, None, 22),
    )
    with anyio.fail_after(SECONDS):
        async with Network() as net:
            forwards = await net.forwarder.add(*wanted)
            assert [each.guest_port for each in forwards] == [80, 53, 8080, 22], (
                "in the order that was asked for"
            )
            assert set(await net.forwarder.list()) == set(forwards)
            given = net.forwarder.sockets()
            assert [name for name, _ in given] == ["80/tcp", "53/udp", "8080/tcp"]
            async with await net.popen([*PYTHON, SERVER], stderr=None, listen=given) as server:
                said = await told(server)
                assert said["names"] == ["80/tcp", "53/udp", "8080/tcp"]
                assert said["blocking"] == [True, True, True]
                for number, each in enumerate(forwards[:3]):
                    with socket.socket(fileno=os.dup(given[number][1].fileno())) as served:
                        if each.host != path:  # whose name goes with it
                            await net.forwarder.remove(each)
                            assert (await answered(server, number, served, ("127.0.0.9", 0)))[
                                0
                            ] == "127.0.0.9"
                        else:
                            mine = str(short_path / "client")
                            assert await answered(server, number, served, mine) == mine
                            await net.forwarder.remove(each)
                assert not os.path.exists(path.path)  # noqa: ASYNC240
                with pytest.raises(NotFound):
                    await net.forwarder.remove(forwards[0])
            assert net.forwarder.sockets() == ()
            assert await net.forwarder.list() == forwards[3:]
            again = await net.forwarder.add(forwards[0])
            assert again == forwards[:1], "the port is free when the command has ended"
        assert net.forwarder.sockets() == (), "closing closes them"
        with pytest.raises(StackClosed):
            await net.forwarder.add(forward(0))


async def test_a_forward_of_mode_fd_that_cannot_be() -> None:
    """The errors are those of the other modes, and nothing of what was asked for together is left."""
    needs_tun()
    async with Network() as net:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for wanted in ((forward(0), "127.0.0.1:0:81", forward(port)), (forward(0), forward(port))):
                with pytest.raises(PortInUseError, match=f"127.0.0.1:{port}/tcp is taken"):
                    await net.forwarder.add(*wanted)
                assert await net.forwarder.list() == ()
            kept = await net.forwarder.add(forward(port, optional=True), forward(0))
            assert [each.host_port == port for each in kept] == [False]
        (start,) = sysctl.numbers(diagnosis.PORT_START)
        if start > 1 and os.geteuid():
            with pytest.raises(PrivilegedPortError):
                await net.forwarder.add(forward(1))
        leads_elsewhere = PortForward("tcp", "127.0.0.1", 0, "10.0.2.100", 80, mode="fd")
        with pytest.raises(
            PortSpecError, match="expected no address inside: the command has the host's socket itself"
        ):
            await net.forwarder.add(leads_elsewhere)
        assert await net.forwarder.list() == kept


# -- sockets that exist, published ------------------------------------------------------------------------

SHOW = """
import socket, sys
with socket.socket(socket.AF_INET, getattr(socket, sys.argv[1])) as sock:
    sock.bind(("", int(sys.argv[2])))
    if sys.argv[1] == "SOCK_STREAM":
        sock.listen()
    print("ready", flush=True)
    while True:
        if sys.argv[1] == "SOCK_STREAM":
            accepted, client = sock.accept()
            accepted.send(client[0].encode())
            accepted.close()
        else:
            data, client = sock.recvfrom(100)
            sock.sendto(client[0].encode(), client)
"""
"""A server that tells each client its address."""


def asked(
    address: Any, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, source: Any = None
) -> str:
    """What the server behind an address tells."""
    with socket.socket(family, kind) as client:
        client.settimeout(SECONDS)
        if source is not None:
            client.bind(source)
        client.connect(address)
        if kind == socket.SOCK_DGRAM:
            client.send(b"who am I?")
        return client.recv(100).decode()


@pytest.mark.parametrize("driver", ["thread", "worker"])
async def test_a_socket_that_exists_is_published(driver: Any, short_path: Path) -> None:
    """And listens on when it is published no more: whoever has made it may publish it again."""
    needs_tun()
    with sockets(short_path) as made, anyio.fail_after(SECONDS):
        async with Network(driver=driver) as net:
            tcp, udp, unix = made["tcp"], made["udp"], made["stream"]
            forwards = [
                await net.forwarder.adopt(tcp, 80),
                await net.forwarder.adopt(udp, 53, "10.0.2.100"),
                await net.forwarder.adopt(unix, 80),
            ]
            port = tcp.getsockname()[1]
            assert str(forwards[0]) == f"127.0.0.1:{port} -> 80/tcp"
            assert [each.mode for each in forwards] == ["stack", "stack", "socket"]
            assert await net.forwarder.list() == tuple(forwards)
            async with (
                await net.popen([*PYTHON, SHOW, "SOCK_STREAM", "80"], stderr=None) as web,
                await net.popen([*PYTHON, SHOW, "SOCK_DGRAM", "53"], stderr=None) as names,
            ):
                for server in (web, names):
                    assert server.stdout is not None
                    await server.stdout.receive()
                for sock, seen in ((tcp, "10.0.2.2"), (udp, "10.0.2.2"), (unix, "10.0.2.100")):
                    question = partial(asked, sock.getsockname(), sock.family, sock.type)
                    assert await anyio.to_thread.run_sync(question) == seen
                for each in forwards:
                    await net.forwarder.remove(each)
                assert await net.forwarder.list() == ()
                with socket.create_connection(tcp.getsockname(), timeout=SECONDS) as waits:
                    again = await net.forwarder.adopt(tcp, 80, mode="socket")
                    assert await anyio.to_thread.run_sync(waits.recv, 100) == b"10.0.2.100"
                    assert again.mode == "socket"
            assert net.forwarder.sockets() == ()


async def test_a_socket_of_both_families_shows_the_address_of_ipv4() -> None:
    """As systemd makes them by default: the guest sees the client's own address, which is none of loopback's."""
    needs_tun()
    own = host_address()
    if own is None:
        missing("this host has no address but loopback's")
    with (
        anyio.fail_after(SECONDS),
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both,
    ):
        port = both.getsockname()[1]
        async with (
            Network() as net,
            await net.popen([*PYTHON, SHOW, "SOCK_STREAM", "80"], stderr=None) as server,
        ):
            assert server.stdout is not None
            await server.stdout.receive()
            modes: dict[Mode, str] = {"stack": "10.0.2.2", "transparent": "10.0.2.100"}
            for mode, for_loopback in modes.items():
                forward = await net.forwarder.adopt(both, 80, mode=mode)
                assert str(forward) == f"[::]:{port} -> 80/tcp"
                assert await anyio.to_thread.run_sync(asked, (own, port)) == own
                assert await anyio.to_thread.run_sync(asked, ("127.0.0.1", port)) == for_loopback
                await net.forwarder.remove(forward)


async def test_a_socket_that_cannot_be_published(short_path: Path) -> None:
    needs_tun()
    wrong: list[tuple[Any, dict[str, Any], str]] = []
    with sockets(short_path) as made, socket.socket() as deaf:
        wrong = [
            (deaf, {}, "expected a TCP socket that listens, .*; this one does not listen"),
            (made["dgram"], {"guest_port": 80}, "this one carries no streams"),
            (made["stream"], {}, "expected ports from 1 to 65535"),
            (made["stream"], {"guest_port": 80, "mode": "stack"}, "expected the mode socket"),
            (made["tcp"], {"mode": "fd"}, r"mode='fd': expected another mode; give it to a command: popen"),
            (
                made["tcp"],
                {"guest": "127.0.0.1", "mode": "stack"},
                "expected an address that the namespace can have",
            ),
            (made["tcp"].fileno(), {}, "expected a socket"),
        ]
        async with Network() as net:
            for sock, options, match in wrong:
                with pytest.raises(ArgumentError, match=match):
                    await net.forwarder.adopt(sock, **options)
            assert await net.forwarder.list() == ()


# -- the command line -------------------------------------------------------------------------------------

NETNS_KIT = [sys.executable, "-m", "netns_kit", "run"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


async def command_line(*words: object) -> tuple[int, str]:
    """The status of `netns-kit run` with these words, and what it has written."""
    done = await anyio.run_process([*NETNS_KIT, *map(str, words)], check=False, env=environment())
    return done.returncode, (done.stdout + done.stderr).decode()


async def test_files_and_sockets_on_the_command_line(short_path: Path) -> None:
    needs_tun()
    odd = short_path / "a:b=r"
    odd.write_text("odd\n")
    with greeting(short_path / "host") as sock:
        options = [
            *(
                "--open-file",
                f"odd={odd}:r",
                "--open-file",
                f"log={short_path}/log:a",
                "--open-file",
                f"w={odd}",
            ),
            *(
                "--unix",
                f"/run/host.sock={sock.getsockname()}",
                "--unix",
                f"/etc/hosts.sock={sock.getsockname()}",
            ),
        ]
        use = (
            "echo $LISTEN_FDNAMES; cat <&3; echo more >&4; test -S /run/host.sock && test -S /etc/hosts.sock"
        )
        assert await command_line(*options, "sh", "-c", use) == (0, "odd:log:w\nodd\n")
        assert (short_path / "log").read_text() == "more\n"
        for wrong, said in (
            (("--open-file", "x"), "--open-file: 'x': expected NAME=PATH[:MODE]"),
            (
                ("--open-file", "a:b=/dev/null"),
                "--open-file 'a:b': expected names of 1 to 255 ASCII characters",
            ),
            (("--open-file", f"a={short_path}/missing"), f"{short_path}/missing: No such file or directory"),
            (("--unix", "x=/y"), "--unix: 'x=/y': expected an absolute PATH inside, and =HOSTPATH"),
            (("--unix", f"/etc/hosts={odd}"), f"--unix '{odd}': expected the path of a Unix socket"),
            (("--unix", f"/x={short_path}/missing"), f"{short_path}/missing: No such file or directory"),
            (("--unix", f"/etc/hosts={sock.getsockname()}"), "--unix '/etc/hosts': expected other paths"),
        ):
            status, text = await command_line(*wrong, "true")
            assert status == FAILED
            assert said in text


async def test_started_under_socket_activation_it_hands_the_sockets_on(short_path: Path) -> None:
    """By systemd-socket-activate: TCP and a Unix socket, and behind them what --open-file adds."""
    needs("systemd-socket-activate")
    needs_tun()
    port, path = closed_port(), short_path / "socket"
    command = [
        *("systemd-socket-activate", "-l", f"127.0.0.1:{port}", "-l", str(path), "--fdname=web:local"),
        *("--setenv=PYTHONPATH", "--setenv=PATH"),
        *(*NETNS_KIT, "--open-file", "null=/dev/null:w", "--", *PYTHON, SERVER),
    ]
    with anyio.fail_after(SECONDS):
        async with await anyio.open_process(command, env=environment(), stderr=None) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as local:
                tcp.bind(("127.0.0.9", 0))
                local.bind(str(short_path / "client"))
                for client, where in ((tcp, ("127.0.0.1", port)), (local, str(path))):
                    while client.connect_ex(where):  # it begins to listen in its own time
                        await anyio.lowlevel.checkpoint()
                    client.settimeout(SECONDS)
                said = json.loads(await server.stdout.receive())
                assert said == {
                    "mine": True,
                    "names": ["web", "local", "null"],
                    "blocking": [True] * 3,
                    "open": [0, 1, 2, 3, 4, 5],
                }
                await server.stdin.send(b"0\n1\n")
                assert json.loads(await anyio.to_thread.run_sync(tcp.recv, 100))[0] == "127.0.0.9"
                assert json.loads(await anyio.to_thread.run_sync(local.recv, 100)) == str(
                    short_path / "client"
                )
            await server.stdin.aclose()
            assert await server.wait() == 0


@pytest.mark.parametrize(("mode", "seen"), [("stack", "10.0.2.2"), ("socket", "10.0.2.100")])
async def test_what_it_was_activated_with_is_published_in_another_mode(mode: str, seen: str) -> None:
    """For servers that know no activation; the name of a socket says to which port inside it leads."""
    needs("systemd-socket-activate")
    needs_tun()
    port = closed_port()
    serve = f'{sys.executable} -S -E -I -c "$0" SOCK_STREAM 80 & read end; kill $!'
    command = [
        *("systemd-socket-activate", "-l", f"127.0.0.1:{port}", "--fdname=80"),
        *("--setenv=PYTHONPATH", "--setenv=PATH", *NETNS_KIT, "--port-mode", mode, "--"),
        *("sh", "-c", f"{serve}; echo ${{LISTEN_FDS-none}}; ls /proc/$$/fd", SHOW),
    ]
    with anyio.fail_after(SECONDS):
        async with await anyio.open_process(command, env=environment(), stderr=None) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            with socket.socket() as client:
                while client.connect_ex(("127.0.0.1", port)):  # it begins to listen in its own time
                    await anyio.lowlevel.checkpoint()
                assert await server.stdout.receive() == b"ready\n"
                if mode == "stack":  # the first has come before the server listened, and was reset
                    assert await anyio.to_thread.run_sync(asked, ("127.0.0.1", port)) == seen
            assert await anyio.to_thread.run_sync(asked, ("127.0.0.1", port)) == seen
            await server.stdin.send(b"\n")
            said = b"".join([chunk async for chunk in server.stdout])
            assert said.split()[:4] == [b"none", b"0", b"1", b"2"]
            assert b"3" not in said.split(), "the socket is not the command's"


async def test_the_mode_on_the_command_line(short_path: Path) -> None:
    needs_tun()
    port = closed_port()
    words = (
        "-p",
        f"127.0.0.1:{port}:80",
        "-p",
        f"unix:{short_path}/s:22",
        "--port-mode",
        "fd",
        "--",
        *PYTHON,
        NAMES,
    )
    status, text = await command_line(*words)
    assert (status, text.partition("[")[0]) == (0, "True 80/tcp:22/tcp ")
    attach = [*NETNS_KIT[:-1], "attach", "-p", "8080", "--port-mode", "fd", str(os.getpid())]
    done = await anyio.run_process(attach, check=False, env=environment())
    assert done.returncode == FAILED
    assert b"netns-kit attach: mode fd: it gives the port to a command, and there is none" in done.stderr


async def test_what_it_was_activated_with_is_checked() -> None:
    """Before anything runs."""
    needs_tun()
    line = 'exec 3</dev/null; export LISTEN_FDS=1 LISTEN_FDNAMES=web LISTEN_PID=$$; exec "$@"'
    command = ["sh", "-c", line, "sh", *NETNS_KIT, "--port-mode", "stack", "--", "echo", "ran"]
    done = await anyio.run_process(command, check=False, env=environment())
    assert (done.returncode, done.stdout) == (FAILED, b"")
    said = b"netns-kit: LISTEN_FDS=1, and descriptor 3 (web) is no socket: expected sockets that listen; "
    assert done.stderr.startswith(said)
