"""What is made at a path of the user's: nothing of somebody else's is overwritten, followed or removed."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from netns_kit.host.paths import bind, write_pid_file
from tests.support import Possessions

pytestmark = pytest.mark.usefixtures("leaks")


def ended() -> int:
    """The pid of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-ISc", ""])
    child.wait()
    return child.pid


def test_a_pid_file_is_made_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    made = write_pid_file(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    made.remove()
    assert not path.exists()
    made.remove()  # it has gone already


def test_a_pid_file_that_cannot_be_written_is_not_left(tmp_path: Path) -> None:
    """As on a full disk: nobody could tell it from a file of somebody else's, and it would stay for ever."""
    path = tmp_path / "pid"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write_pid_file(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()


def test_the_pid_file_of_a_process_that_has_ended_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{ended()}\n")
    write_pid_file(str(path)).remove()
    assert not path.exists()


@pytest.mark.parametrize(
    "kind", ["text", "empty", "alive", "zero", "long", "fifo", "link", "dangling", "directory"]
)
def test_what_is_no_stale_pid_file_stays(kind: str, tmp_path: Path) -> None:
    path, target = tmp_path / "pid", tmp_path / "target"
    target.write_text(f"{ended()}\n")
    texts = {
        "text": "precious\n",
        "empty": "",
        "alive": f"{os.getppid()}\n",
        "zero": "0\n",
        "long": "1" * 40 + "\n",
    }
    if kind in texts:
        path.write_text(texts[kind])
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(target if kind == "link" else tmp_path / "nowhere")
    before = os.lstat(path)
    with pytest.raises(FileExistsError, match="exists and is not ours; remove it or name another"):
        write_pid_file(str(path))
    assert os.path.samestat(before, os.lstat(path))
    assert kind not in texts or path.read_text() == texts[kind]
    assert target.read_text().strip().isdigit()
    assert not (tmp_path / "nowhere").exists()


def test_what_came_to_be_at_the_path_since_is_not_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "pid", tmp_path / "other"
    made = write_pid_file(str(path))
    other.write_text("another instance's\n")
    other.rename(path)
    made.remove()
    assert path.read_text() == "another instance's\n"
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        path = tmp_path / "socket"
        made = bind(first, str(path))
        path.unlink()
        others = bind(second, str(path))
        made.remove()
        assert path.is_socket()
        others.remove()


def test_what_came_to_be_at_the_path_while_we_looked_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another instance finds the same stale file, or socket, and is faster."""
    path, other = tmp_path / "pid", tmp_path / "other"
    path.write_text(f"{ended()}\n")
    other.write_text("another instance's\n")
    asked = os.kill

    def kill(pid: int, number: int) -> None:
        other.rename(path)
        asked(pid, number)

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(FileExistsError, match="remove it"):
        write_pid_file(str(path))
    assert path.read_text() == "another instance's\n"

    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with socket.socket(socket.AF_UNIX) as faster, socket.socket(socket.AF_UNIX) as slower:

        class Client(socket.socket):
            def connect_ex(self, address: object) -> int:
                answer = super().connect_ex(address)  # type: ignore[arg-type]  # as it was given
                path.unlink()
                faster.bind(str(path))
                faster.listen()
                return answer

        monkeypatch.setattr(socket, "socket", Client)
        with pytest.raises(OSError, match="in use"):
            bind(slower, str(path))
        assert path.is_socket()


@pytest.mark.parametrize("made", ["pid", "socket"])
def test_an_inode_s_number_is_nobody_else_s_while_we_may_remove_it(made: str, tmp_path: Path) -> None:
    """File systems give the number of a removed file to the next one, which would be taken for ours."""
    path = tmp_path / made
    with socket.socket(socket.AF_UNIX) as sock:
        ours = write_pid_file(str(path)) if made == "pid" else bind(sock, str(path))
        before = path.lstat()
        sock.close()
        path.unlink()
        for _ in range(100):
            path.write_text("another instance's\n")
            assert not os.path.samestat(before, path.lstat())
            path.unlink()
        path.write_text("another instance's\n")
        ours.remove()
    assert path.read_text() == "another instance's\n"


@pytest.mark.parametrize("umask", [0, 0o022, 0o277, 0o777])
def test_nobody_else_may_connect_or_write(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            made = bind(sock, str(tmp_path / "socket"))
            assert (tmp_path / "socket").lstat().st_mode & 0o777 == 0o600
            made.remove()
        made = write_pid_file(str(tmp_path / "pid"))
        assert (tmp_path / "pid").lstat().st_mode & 0o022 == 0
        made.remove()
        assert os.umask(umask) == umask, "it is the whole process's"
    finally:
        os.umask(before)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_socket_where_nobody_listens_is_replaced(kind: socket.SocketKind, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, kind) as left:
        left.bind(str(path))
    with socket.socket(socket.AF_UNIX, kind) as sock:
        made = bind(sock, str(path))
        sock.listen()
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.connect(str(path))
        made.remove()
    assert not path.exists()


@pytest.mark.parametrize("there", ["stream", "seqpacket", "file", "link", "dangling", "fifo"])
def test_what_is_no_deserted_socket_stays(there: str, tmp_path: Path) -> None:
    path, target = tmp_path / "socket", tmp_path / "target"
    kind = socket.SOCK_SEQPACKET if there == "seqpacket" else socket.SOCK_STREAM
    with socket.socket(socket.AF_UNIX, kind) as other, socket.socket(socket.AF_UNIX) as sock:
        if there in {"stream", "seqpacket"}:
            other.bind(str(path))
            other.listen()
        elif there == "file":
            path.write_text("precious")
        elif there == "fifo":
            os.mkfifo(path)
        else:
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(target))
            path.symlink_to(target if there == "link" else tmp_path / "nowhere")
        before = Possessions(), os.lstat(path)
        with pytest.raises(OSError, match="in use") as caught:
            bind(sock, str(path))
        assert caught.value.errno == errno.EADDRINUSE
        assert os.path.samestat(before[1], os.lstat(path))
        assert not before[0].difference()
