"""Files of a command's own: what `files=` and `sockets=` show to one command at a path, and to nobody else.

A mount needs a name to be on, and belongs to that name: when a program outside removes the name, or renames another
file over it, as programs do that replace resolv.conf, the kernel takes the mount off (detach_mounts).  So the agent
watches the names and mounts again.  For a name that does not exist the agent makes an empty file and removes it when
no command needs it any more: no mount can add a name to a directory and leave the rest of it as it is.  Where the
agent may not write, the directory is replaced by a copy of itself (`make_room`).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import stat
import sys
from contextlib import suppress

from netns_kit.child.channel import send_record
from netns_kit.host import abi
from netns_kit.host.libc import check, libc

from .agent_common import to_bytes

TYPE_CHECKING = False  # as type checkers know it: `typing` takes longer than all imports here

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

SCRATCH = "/tmp"


def show_files(
    files: dict[str, str], sockets: dict[str, tuple[str, int, int]], live: Sequence[str] = ()
) -> tuple[dict[str, int], dict[str, int]]:
    """Make a mount namespace in which each path of `files` reads as the text given for it, and each of `sockets` is
    the Unix socket of the path given for it, with the device and the inode that it has for the caller.

    Return one more mount for each, by which it can be shown again; none before Linux 5.2, which has no open_tree(2).
    Return also, for the paths in `live`, descriptors by which their text can be changed; none without such mounts.
    The texts lie on a tmpfs that covers `SCRATCH` only meanwhile.  Targets and sockets are opened before, so that
    they may themselves be below `SCRATCH`.
    """
    copies: dict[str, int] = {}
    writers: dict[str, int] = {}
    paths = [*files, *sockets]
    if not paths:
        return copies, writers
    check(libc.unshare(abi.CLONE_NEWNS), SCRATCH)
    check(libc.mount(None, b"/", None, abi.MS_REC | abi.MS_PRIVATE, None), "/")
    # Fact: a mount can be made of what this mount namespace has, and not of what the caller has opened in its own.
    opened = {path: open_socket(*given) for path, given in sockets.items()}
    for path in paths:
        if not os.path.exists(path):
            make_room(path)
    targets = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths}
    for path, fd in targets.items():
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    where, quiet = SCRATCH.encode(), abi.MS_NOSUID | abi.MS_NODEV | abi.MS_NOEXEC
    check(libc.mount(b"tmpfs", where, b"tmpfs", quiet, b"mode=0755"), SCRATCH)
    for number, text in enumerate(files.values()):
        with open(f"{SCRATCH}/{number}", "wb") as file:
            file.write(to_bytes(text))
            os.fchmod(file.fileno(), 0o644)
    if live:  # by a mount that may be written to; it is mounted nowhere, and ends with the last writer
        tree = copy_of_path(where)
        if tree >= 0:
            for number, path in enumerate(files):
                if path in live:
                    name = f"/proc/self/fd/{tree}/{number}"
                    writers[path] = os.open(name, os.O_WRONLY | os.O_CLOEXEC)
            os.close(tree)
    # Fact: a bind mount copies the flags of the mount it is made from, so this makes all of them read-only.
    check(libc.mount(None, where, None, abi.MS_REMOUNT | abi.MS_BIND | abi.MS_RDONLY | quiet, None), SCRATCH)
    sources = {path: f"{SCRATCH}/{number}" for number, path in enumerate(files)}
    sources |= {path: f"/proc/self/fd/{fd}" for path, fd in opened.items()}
    for path, fd in targets.items():
        source, target = sources[path].encode(), f"/proc/self/fd/{fd}".encode()
        check(libc.mount(source, target, None, abi.MS_BIND, None), path)
        copy = copy_of_path(source)
        if copy >= 0 or ctypes.get_errno() != errno.ENOSYS:
            check(copy, path)
            copies[path] = copy
    check(libc.umount2(where, abi.MNT_DETACH), SCRATCH)
    return copies, writers


def open_socket(path: str, device: int, inode: int) -> int:
    """Open a Unix socket of the host, by a path that leads to it in this mount namespace too."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != (device, inode):
        raise OSError(errno.ESTALE, "the path leads to something else inside", path)
    return fd


def has_places(directory: str) -> bool:
    """Whether files can be made in a directory: not in the root, where everything is, nor where nothing is a file."""
    return directory != "/" and directory.split("/")[1] not in {"proc", "sys", "dev"}


def make_place(path: str) -> tuple[str, tuple[int, int]] | None:
    """Make an empty file where there is none, or where a link leads to nowhere.

    Return its own path and its identity; None if that may not be.
    """
    target = os.path.realpath(path)
    if not has_places(os.path.dirname(target)):
        return None
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError:  # it exists; or that may not be, and `make_room` does it
        return None
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return target, (status.st_dev, status.st_ino)


def remove_place(target: str, identity: tuple[int, int]) -> None:
    """Remove what `make_place` has made, unless it has become somebody's file."""
    with suppress(OSError):  # it is gone, or may not be removed any more
        status = os.lstat(target)
        if (status.st_dev, status.st_ino) == identity and status.st_size == 0:
            os.unlink(target)


def hand_over(
    out: socket.socket,
    copies: dict[str, int],
    fds: Sequence[int] = (),
    writers: dict[str, int] | None = None,
) -> None:
    """Pass the agent a mount for each of these paths, in place of those that were used, and the writers."""
    writers = writers or {}
    told = json.dumps({"shown": list(copies), "live": list(writers)}).encode()
    send_record(out, told, [*fds, *copies.values(), *writers.values()])


def show_again(out: socket.socket, namespace: int, shown: dict[str, int]) -> NoReturn:
    """As a child of the agent, mount again what does not lead to its text any more in a command's mount namespace."""
    try:
        load_nothing()
        check(libc.setns(namespace, abi.CLONE_NEWNS))
        copies = {}
        for path, fd in shown.items():
            with suppress(FileNotFoundError):  # until it is there again
                if not os.path.samestat(os.stat(path), os.fstat(fd)):
                    copy = copy_of(fd)  # Linux before 6.15 does not copy what is mounted nowhere
                    flags = abi.MOVE_MOUNT_F_EMPTY_PATH | abi.MOVE_MOUNT_T_SYMLINKS
                    check(
                        libc.syscall(abi.SYS_MOVE_MOUNT, fd, b"", abi.AT_FDCWD, to_bytes(path), flags), path
                    )
                    if copy < 0:  # it is mounted now, unless the host has replaced the file again
                        check(copy := copy_of(fd), path)
                    copies[path] = copy
        hand_over(out, copies)
    finally:
        os._exit(0)


def copy_of_path(path: bytes) -> int:
    """Return a descriptor of a copy of the mount at a path, mounted nowhere; -1 if there can be none."""
    fd: int = libc.syscall(abi.SYS_OPEN_TREE, abi.AT_FDCWD, path, abi.OPEN_TREE_CLONE | os.O_CLOEXEC)
    return fd


def copy_of(mount: int) -> int:
    """Return a descriptor of a copy of a mount, mounted nowhere; -1 if there can be none."""
    fd: int = libc.syscall(
        abi.SYS_OPEN_TREE, mount, b"", abi.OPEN_TREE_CLONE | abi.AT_EMPTY_PATH | os.O_CLOEXEC
    )
    return fd


def make_room(path: str) -> None:
    """Make a file at `path`, where there is none or a link to nowhere, by replacing its directory.

    The new one is a read-only tmpfs that has everything else of the old one, by links and bind mounts.
    """
    directory, name = os.path.split(os.path.abspath(path))
    if not has_places(directory):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    try:
        old = f"/proc/self/fd/{os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)}"
    except OSError as exc:
        exc.filename = path
        raise
    entries = [entry for entry in os.scandir(old) if entry.name != name]
    where, quiet = to_bytes(directory), abi.MS_NOSUID | abi.MS_NODEV
    check(libc.mount(b"tmpfs", where, b"tmpfs", quiet, b"mode=0755"), directory)
    for entry in entries:
        new = f"{directory}/{entry.name}"
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), new)
            continue
        if entry.is_dir():
            os.mkdir(new)
        else:
            os.mknod(new)
        check(libc.mount(to_bytes(entry.path), to_bytes(new), None, abi.MS_BIND | abi.MS_REC, None), new)
    os.mknod(path)
    check(
        libc.mount(None, where, None, abi.MS_REMOUNT | abi.MS_BIND | abi.MS_RDONLY | quiet, None), directory
    )


def load_nothing() -> None:
    """Import nothing any more, codecs included.

    The process is about to enter a mount namespace where commands may have mounted modules of theirs, and still has
    all that is the agent's.
    """
    sys.meta_path.clear()
