"""What the modules of the agent have in common, among them what it and its owner say alike."""

from __future__ import annotations

import errno
import os

FOLLOW_STOPS = 0
"""What a client sends in place of a signal, to be told when its command has been stopped."""
IN_MEMFD = b"@"
"""A request whose text is in a memfd, the last descriptor that comes with it."""


def to_bytes(text: str) -> bytes:
    """Return the bytes that a name had at the client, whatever the locales of the two are."""
    return text.encode("utf-8", "surrogateescape")


def write_file(path: str, text: str) -> None:
    """Write to a file of /proc, by one call: the kernel takes the text as one value."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def read_file(path: str) -> str:
    """Read a file of /proc."""
    with open(path, encoding="ascii") as file:
        return file.read()


def read_bytes(path: str, most: int) -> bytes:
    """Read at most so many bytes of a file of /proc."""
    with open(path, "rb", buffering=0) as file:
        parts = []
        while most > 0 and (part := file.read(most)):
            parts.append(part)
            most -= len(part)
        return b"".join(parts)


def children_of(pid: int) -> list[int]:
    """Return the direct children of a process, zombies included; none if it is gone."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    except OSError:
        pass
    return found


def failure(exc: BaseException, op: str) -> dict[str, object]:
    """Return the record of an error that the operation or step `op` has met."""
    if isinstance(exc, OSError):
        filename = exc.filename
        if isinstance(filename, bytes):
            filename = filename.decode("utf-8", "surrogateescape")
        return {
            "errno": exc.errno or errno.EIO,
            "op": op,
            "message": exc.strerror or str(exc),
            "filename": filename,
        }
    return {"errno": errno.EINVAL, "op": op, "message": f"{type(exc).__name__}: {exc}", "filename": None}
