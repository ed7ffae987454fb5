"""Which ids a user namespace has: all that its maker may give away (user_namespaces(7), subuid(5))."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import subprocess
from pathlib import Path

from netns_kit.errors import IdMapError
from netns_kit.host import diagnosis

__all__ = ["map_ranges"]


def map_ranges(pid: int) -> None:
    """Give the user namespace of `pid` all the ids its owner may give away.  Blocks; raises `IdMapError`."""
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if os.geteuid() == 0:
            _map_all(pid, kind)
            continue
        words = [f"new{kind}map", str(pid), "0", str(own), "1"]
        inside = 1
        for first, count in _ranges(kind):
            words += [str(inside), str(first), str(count)]
            inside += count
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        except OSError as exc:
            fix = "install it: package uidmap or shadow-utils"
            raise IdMapError(f"{words[0]}: {exc.strerror}", fix=fix, errno=exc.errno) from exc
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
            raise diagnosis.id_ranges(words[0], said, shutil.which(words[0]))


def _map_all(pid: int, kind: str) -> None:
    """Every id that we, being root, have ourselves."""
    held = [line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
    target = Path(f"/proc/{pid}/{kind}_map")
    try:
        target.write_text("".join(f"{first} {first} {count}\n" for first, _, count in held))
    except OSError as exc:
        fix = "keep CAP_SETUID, CAP_SETGID and CAP_SETFCAP"
        raise IdMapError(f"{target}: {exc.strerror}", fix=fix, errno=exc.errno) from exc


def _ranges(kind: str) -> list[tuple[int, int]]:
    """(first, count) of every subordinate range of the caller, see subuid(5)."""
    path = f"/etc/sub{kind}"
    uid = os.getuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    found = []
    try:
        for line in Path(path).read_text().splitlines():
            who, *numbers = line.split(":")
            if who in {user, str(uid)} and len(numbers) == 2:
                found.append((int(numbers[0]), int(numbers[1])))
    except (OSError, ValueError) as exc:
        fix = f"chmod 0644 {path}, with lines of the form {user}:100000:65536"
        number = exc.errno if isinstance(exc, OSError) else errno.EINVAL
        raise IdMapError(f"{path} cannot be read: {exc}", path, "not to be read", fix, number) from exc
    if not found:
        fix = f"usermod --add-sub{kind}s 100000-165535 {user}"
        raise IdMapError(
            f"{user} has no subordinate {kind}s", path, f"without a line for {user}", fix, errno.ENOENT
        )
    return found
