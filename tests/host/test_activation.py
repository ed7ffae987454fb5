"""What a process that was activated finds: in a process of its own, whose descriptors are those of the test."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import ROOT, needs_ipv6

LOOK = """
import os, sys
for number, fd in enumerate(map(int, sys.argv[2:]), 3):
    os.dup2(fd, number)
os.environ["LISTEN_PID"] = sys.argv[1].replace("mine", str(os.getpid()))
from netns_kit import activated
from netns_kit.errors import ArgumentError
try:
    for name, sock in activated():
        print(name, sock.family.name, sock.type.name, sock.fileno(), sock.get_inheritable())
        sock.close()
    print(activated())
except ArgumentError as error:
    print(error)
    print("as before" if all(map(os.get_inheritable, range(3, 3 + len(sys.argv[2:])))) else "changed")
print([name for name in os.environ if name.startswith("LISTEN_")])
"""
ALL = ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"]


def look(
    *sockets: socket.socket | int, count: str | None = None, names: str = "", pid: str = "mine"
) -> list[str]:
    """What a process finds that has these as descriptors 3 and so on."""
    with ExitStack() as owned:
        high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 50) for each in sockets]
        for fd in high:
            owned.callback(os.close, fd)
        variables = {"LISTEN_FDS": str(len(sockets)) if count is None else count, "LISTEN_FDNAMES": names}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", LOOK, pid, *map(str, high)], check=True, capture_output=True,
            text=True, pass_fds=high, env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        )  # fmt: skip
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def tcp() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def test_the_sockets_and_their_names(tcp: socket.socket, short_path: Path) -> None:
    """Every kind is told by itself, whatever it is called; the variables are gone, and the second call finds none."""
    needs_ipv6()
    with (
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as stream,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as packets,
    ):
        for name, sock in (("stream", stream), ("datagrams", datagrams), ("packets", packets)):
            sock.bind(str(short_path / name))
        stream.listen()
        packets.listen()
        assert look(tcp, udp, stream, datagrams, packets, names="a:b::c:c") == [
            "a AF_INET SOCK_STREAM 3 False",
            "b AF_INET6 SOCK_DGRAM 4 False",
            " AF_UNIX SOCK_STREAM 5 False",
            "c AF_UNIX SOCK_DGRAM 6 False",
            "c AF_UNIX SOCK_SEQPACKET 7 False",
            "()",
            "[]",
        ]


def test_names_that_are_not_as_many(tcp: socket.socket) -> None:
    assert look(tcp, names="a:b")[0] == "unknown AF_INET SOCK_STREAM 3 False"
    assert look(tcp)[0] == " AF_INET SOCK_STREAM 3 False", "an empty name is one name"


def test_nothing_for_us(tcp: socket.socket) -> None:
    assert look(tcp, pid="1") == ["()", str(ALL)]
    assert look(tcp, pid="") == ["()", str(ALL)]
    assert look(count="0") == ["()", "[]"]


def test_what_cannot_be_served_is_named(tcp: socket.socket) -> None:
    """And everything is as it was, for whoever knows what to do with it."""
    with (
        socket.socket() as deaf,
        Path(os.devnull).open("rb") as file,
        socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM) as odd,
    ):
        for given, problem in (
            (deaf, "does not listen"),
            (file.fileno(), "is no socket"),
            (odd, "is a socket of another family (16)"),
        ):
            said, state, variables = look(tcp, given, names="a:b")
            assert said.startswith(
                f"LISTEN_FDS=2, and descriptor 4 (b) {problem}: expected sockets that listen; "
            )
            assert (state, variables) == ("as before", str(ALL))
    assert look(tcp, count="3", names="a:b:c")[0].startswith(
        "LISTEN_FDS=3, and descriptor 4 (b) is not open: "
    )


@pytest.mark.parametrize("count", ["", "x", "-1", "9" * 5000])
def test_a_number_that_is_none(count: str, tcp: socket.socket) -> None:
    assert look(tcp, count=count) == [
        f"LISTEN_FDS={count!r}: expected the number of descriptors that were passed", "as before", str(ALL),
    ]  # fmt: skip
