"""Run a command in a root file system of its own, without root: `python runtime.py TREE COMMAND...`."""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from typing import BinaryIO

SIGNALS = signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
"""What is passed on.  SIGINT and SIGQUIT of a terminal reach the command by themselves."""
DEVICES = "null zero full random urandom tty".split()
STREAMS = {"stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
READ_ONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC = 0x1, 0x2, 0x4, 0x8, 0x20, 0x1000, 0x4000  # of mount(2)
KEPT = NOSUID | NODEV | NOEXEC | 0x400 | 0x800  # what who is not the owner of a mount may not take from it
DETACH = 2
FAILED, NOT_EXECUTABLE = 125, 127  # as podman has them
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
libc = ctypes.CDLL(None, use_errno=True)


# -- outside: the namespaces are made, and get their network --------------------------------------


def run(given: argparse.Namespace) -> int:
    """Start the container, give it its network, pass on signals, and return the command's status."""
    from netns_kit import Policy
    from netns_kit.sync import Namespace, Network

    policy = Policy.load(given.policy) if given.policy else None
    ids = ["--map-root-user", "--map-auto"] if given.subids else ["--map-root-user"]
    spec_in, control = os.pipe()
    ready, ready_in = os.pipe()
    inside = [sys.executable, "-IS", __file__, "--inside", str(spec_in), str(ready_in)]
    unshare = ["unshare", "--user", *ids, "--net", "--mount", "--uts", "--ipc", "--pid", "--fork"]
    with subprocess.Popen([*unshare, *inside], pass_fds=[spec_in, ready_in]) as container:
        os.close(spec_in)
        os.close(ready_in)
        with os.fdopen(control, "wb", buffering=0) as told, os.fdopen(ready, "rb") as created:
            if not created.read(1):
                return FAILED  # unshare has said why
            with (
                open(f"/proc/{container.pid}/ns/net", "rb") as net_ns,
                Network(
                    namespace=Namespace.attach(fd=net_ns.fileno()), ports=given.publish, policy=policy
                ) as net,
            ):
                for port in net.forwarder.list():
                    tell(f"{port.host}:{port.host_port} → {port.guest_port}/{port.protocol}")
                spec = {
                    "tree": os.path.realpath(given.tree),
                    "volumes": given.volume,
                    "files": net.files(),
                    "hostname": given.hostname,
                    "command": given.command or ["sh"],
                }
                told.write(json.dumps(spec).encode() + b"\n")
                for number in SIGNALS:
                    signal.signal(number, partial(pass_on, told))
                return container.wait()


def tell(text: object) -> None:
    """Write a line for the user."""
    print(text, file=sys.stderr, flush=True)


def volume(text: str) -> list[str]:
    """Return the parts of a volume."""
    source, *rest = text.split(":")
    if not source or rest[1:] not in ([], ["ro"]) or not "".join(rest[:1]).startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected HOST:INSIDE or HOST:INSIDE:ro, INSIDE with a /")
    return [source, *rest]


def pass_on(told: BinaryIO, number: int, _: object) -> None:
    """Tell the container of a signal."""
    with suppress(BrokenPipeError):
        told.write(bytes([number]))


# -- inside: process 1 of the container, in the namespaces that unshare(1) has made ----------------


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Call mount(2)."""
    words = [word.encode() for word in (source, target, kind)]
    if libc.mount(*words, ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def bind(descriptor: int, target: str, *, read_only: bool = False) -> None:
    """Show an open file or directory at a path of the tree, which is made if it is not there."""
    if os.path.isdir(f"/proc/self/fd/{descriptor}"):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with suppress(FileNotFoundError):
            os.unlink(target)  # a symbolic link that leads nowhere, as resolv.conf often is
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(f"/proc/self/fd/{descriptor}", target, flags=BIND | REC)
    if read_only:
        kept = os.statvfs(target).f_flag & KEPT
        mount("", target, flags=REMOUNT | BIND | READ_ONLY | kept)


def enter(tree: str, volumes: list[list[str]], files: dict[str, str]) -> None:
    """Make the tree the root, with what belongs in it.

    What is shown of the host is opened first.  Paths in the tree are followed when it is the root already, so that
    its symbolic links lead nowhere else.
    """
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    shown = [(os.open(source, os.O_PATH), target, "ro" in mode) for source, target, *mode in volumes]
    mount(tree, tree, flags=BIND | REC)
    os.chdir(tree)
    if libc.pivot_root(b".", b"."):
        raise OSError(ctypes.get_errno(), "pivot_root: " + os.strerror(ctypes.get_errno()))
    for path in "/proc", "/sys", "/dev", "/run", "/tmp":
        with suppress(OSError):
            os.unlink(path)  # debootstrap may have made a symbolic link of /proc
        os.makedirs(path, exist_ok=True)
    mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC)
    mount("sysfs", "/sys", "sysfs", NOSUID | NODEV | NOEXEC | READ_ONLY)
    for path, mode in (("/dev", "755"), ("/run", "755"), ("/tmp", "1777")):
        mount("tmpfs", path, "tmpfs", NOSUID | NODEV, f"mode={mode}")
    for name, descriptor in devices.items():
        bind(descriptor, f"/dev/{name}")
    os.mkdir("/dev/pts")
    mount("devpts", "/dev/pts", "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666")
    bind(devices["null"], "/dev/console")
    os.mkdir("/dev/shm", 0o1777)
    for name, target in {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", **STREAMS}.items():
        os.symlink(target, f"/dev/{name}")
    for path, text in files.items():
        with open(f"/run/{os.path.basename(path)}", "w") as file:
            file.write(text)
            file.flush()
            bind(file.fileno(), path)
    for descriptor, target, read_only in shown:
        bind(descriptor, target, read_only=read_only)
    if libc.umount2(b".", DETACH):  # the host's root, which is mounted over ours
        raise OSError(ctypes.get_errno(), "umount2: " + os.strerror(ctypes.get_errno()))
    os.chdir("/")


def init(control: int, ready: int) -> int:
    """Be process 1: make the container, start the command, pass on signals, reap, and return a status."""
    for number in *SIGNALS, signal.SIGINT, signal.SIGQUIT:
        signal.signal(number, signal.SIG_IGN)
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))
    os.write(ready, b"\n")
    os.close(ready)
    told = os.fdopen(control, "rb", buffering=0)
    spec = json.loads(told.readline() or sys.exit(FAILED))  # the network is there
    enter(spec["tree"], spec["volumes"], spec["files"])
    socket.sethostname(spec["hostname"])
    child = os.fork()
    if child == 0:
        for number in *SIGNALS, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE:
            signal.signal(number, signal.SIG_DFL)
        command = spec["command"]
        try:
            os.closerange(3, 1 << 16)
            os.execvpe(command[0], command, ENVIRONMENT | {"TERM": os.environ.get("TERM", "dumb")})
        except OSError as error:
            tell(f"{command[0]}: {error.strerror}")
        finally:
            os._exit(NOT_EXECUTABLE)

    def listen() -> None:
        while number := told.read(1):
            with suppress(ProcessLookupError):
                os.kill(child, number[0])
        os._exit(FAILED)  # the runtime has ended, and with process 1 ends all that is in here

    threading.Thread(target=listen, daemon=True).start()
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> int:
    """Read the command line, run the container, and return the command's status."""
    if sys.argv[1:2] == ["--inside"]:
        try:
            os._exit(init(int(sys.argv[2]), int(sys.argv[3])))
        except OSError as error:
            tell(error)
            return FAILED
    from netns_kit import NetnsKitError

    parser = argparse.ArgumentParser(
        description="Run a command in a root file system of its own, without root."
    )
    parser.add_argument(
        "-v", "--volume", action="append", default=[], type=volume, metavar="HOST:INSIDE[:ro]"
    )
    parser.add_argument("-p", "--publish", action="append", default=[], metavar="SPEC", help="docs/ports.md")
    parser.add_argument("--policy", metavar="FILE", help="docs/policy.md")
    parser.add_argument("--hostname", default="container")
    parser.add_argument("--subids", action="store_true", help="map the range of /etc/subuid, too")
    parser.add_argument("tree")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="default: sh")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return run(given)
    except (NetnsKitError, OSError) as error:
        tell(error)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
