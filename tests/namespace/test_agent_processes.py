"""The search for a process, in this one: what it looks at first, and when it stops."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from netns_kit.namespace import agent_processes
from netns_kit.namespace.agent_processes import process_of

LOOPBACK = "127.0.0.1"


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((LOOPBACK, 0))
        yield sock


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes there are: this one, which the search would pass over."""
    monkeypatch.setattr(agent_processes, "_processes", lambda: iter([os.getpid()]))


def found(sock: socket.socket) -> dict[str, object]:
    answer, fds = process_of("udp", LOOPBACK, sock.getsockname()[1], LOOPBACK, 9)
    for fd in fds:
        os.close(fd)
    return answer


@pytest.mark.usefixtures("ours")
def test_it_is_found_wherever_its_descriptor_is(sock: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_processes, "BUDGET", 3600.0)
    for first in (sock.fileno() + 1, 0):
        monkeypatch.setattr(agent_processes, "FIRST", first or 1)
        answer = found(sock)
        assert answer["uid"] == os.getuid()
        assert "unknown" not in answer


@pytest.mark.usefixtures("ours")
def test_after_its_time_it_looks_at_no_more(sock: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_processes, "BUDGET", -1.0)
    monkeypatch.setattr(agent_processes, "FIRST", 1)
    looked: list[str] = []
    readlink = os.readlink

    def counted(path: str) -> str:
        looked.append(path)
        return readlink(path)

    monkeypatch.setattr(os, "readlink", counted)
    assert found(sock) == {"unknown": True}
    assert len(looked) == 1


@pytest.mark.usefixtures("ours")
def test_what_is_told_is_of_the_process_that_has_the_socket(
    sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of another one that got its number meanwhile."""

    def described(_: int) -> dict[str, object]:
        sock.close()
        return {"name": "another one"}

    monkeypatch.setattr(agent_processes, "_described", described)
    port = sock.getsockname()[1]
    assert process_of("udp", LOOPBACK, port, LOOPBACK, 9) == ({"unknown": True}, [])


def test_of_several_sockets_it_is_whose_they_all_are(
    sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of raw sockets, of which none says what it has sent."""
    inode = os.fstat(sock.fileno()).st_ino
    places = [(1, f"/proc/self/fd/{sock.fileno()}"), (2, f"/proc/self/fd/{sock.fileno()}")]
    monkeypatch.setattr(agent_processes, "_descriptors", lambda: iter(places[:1]))
    assert agent_processes._holders({inode: 0, 5: 0}) == [(1, places[0][1], inode)]
    monkeypatch.setattr(agent_processes, "_descriptors", lambda: iter(places))
    assert agent_processes._holders({inode: 0, 5: 0}) == []
    assert agent_processes._holders({inode: 0}) == [(1, places[0][1], inode)], "of one it is the first"
    assert agent_processes._holders({}) == []


def test_this_process_is_passed_over(sock: socket.socket) -> None:
    assert os.getpid() not in list(agent_processes._processes())
