"""`doctor` on hosts where each knob in turn is set against us: the right cause is named, and nothing else is blamed.

A host is a process in namespaces of its own that turns the knob and then becomes `netns-kit doctor`.  What is wrong
there anyway is known from the same host with the knob left alone.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

import netns_kit
from netns_kit.checkup.checkup import CHECKS
from netns_kit.host.diagnosis import PING_GROUPS, PORT_START, SECCOMP, TUN
from tests.support import ROOT, missing, needs_subids, needs_tun
from tests.support.servers import SECONDS

pytestmark = pytest.mark.usefixtures("leaks")

UID, GID = (os.geteuid(), os.getegid()) if os.geteuid() else (12345, 12345)
DOCTOR = [sys.executable, "-m", "netns_kit", "doctor", "--json"]
INSIDE = {
    "tun",
    "files",
    "pids",
    "offloads",
    "queues",
    "sysctls",
    "id-ranges",
    "ipv6-inside",
    "transparent",
    "members",
    "guard",
}

HOST = """
import ctypes, fcntl, os, resource, socket, struct, sys, tempfile
libc = ctypes.CDLL(None, use_errno=True)

def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def write(path, text):
    with open(path, "w") as file:
        file.write(str(text))

def sysctl(name, value):
    write("/proc/sys/" + name.replace(".", "/"), value)

def mount(source, target, kind=None, flags=0, data=None):
    check(libc.mount(source.encode(), target.encode(), kind and kind.encode(), flags, data and data.encode()))

def private():
    check(libc.unshare(0x20000))        # CLONE_NEWNS
    mount("none", "/", None, 0x44000)   # MS_REC | MS_PRIVATE

EQUAL, ANY = 0x15, 0x45

def filtered(number, result, *conditions):
    '''Have seccomp answer a system call whose arguments fulfil all conditions: number, operation, value.'''
    steps = [(0x20, 0, 0, 0), (0x15, 0, 2 * len(conditions) + 1, number)]
    for left, (argument, operation, value) in zip(range(len(conditions), 0, -1), conditions):
        steps += [(0x20, 0, 0, 16 + 8 * argument), (operation, 0, 2 * left - 1, value)]
    steps += [(0x06, 0, 0, result), (0x06, 0, 0, 0x7fff0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    fprog = struct.pack("HP", len(steps), ctypes.addressof(program))
    check(libc.prctl(22, 2, fprog))     # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

ids = sys.argv[1]
if os.geteuid() == 0 and "same" in ids:
    os.setgroups([])
    os.setgid(12345)
    os.setuid(12345)
    check(libc.prctl(4, 1, 0, 0, 0))    # PR_SET_DUMPABLE: /proc/self is ours
uid, gid = os.geteuid(), os.getegid()
check(libc.unshare(0x10000000 | 0x40000000))
inside = (0, 0) if "root" in ids else (uid, gid)
write("/proc/self/setgroups", "deny")
write("/proc/self/uid_map", f"{inside[0]} {uid} 1")
write("/proc/self/gid_map", f"{inside[1]} {gid} 1")
with socket.socket() as sock:
    fcntl.ioctl(sock, 0x8914, struct.pack("16sH22x", b"lo", 1))
if "no-ping" not in sys.argv[1]:
    sysctl("net.ipv4.ping_group_range", f"{inside[1]} {inside[1]}")     # of a new network it is 1 0
sysctl("net.ipv4.ip_unprivileged_port_start", 0)
"""
ENTER = """
os.execv(sys.argv[2], sys.argv[2:])
"""


CALLS = {
    "x86_64": {
        "unshare": 272,
        "ioctl": 16,
        "setsockopt": 54,
        "landlock": 444,
        "pidfd_open": 434,
        "memfd": 319,
    },
    "aarch64": {
        "unshare": 97,
        "ioctl": 29,
        "setsockopt": 208,
        "landlock": 444,
        "pidfd_open": 434,
        "memfd": 279,
    },
}


def filtering(call: str, result: int | None, *conditions: str) -> str:
    """The knob: a seccomp filter that answers a system call with that errno, or kills who makes it."""
    machine = os.uname().machine
    if machine not in CALLS:
        missing(f"no numbers of system calls for {machine}")
    words = [str(CALLS[machine][call]), "0" if result is None else str(0x50000 | result), *conditions]
    return f"filtered({', '.join(words)})"


def examined(words: list[str], env: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """The exit status, and the findings by name."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment, cwd=ROOT
    )
    assert done.stdout, done.stderr
    return done.returncode, {each["name"]: each for each in json.loads(done.stdout)["findings"]}


def on_host(knob: str = "", ids: str = "root", command: list[str] = DOCTOR) -> tuple[int, dict[str, Any]]:
    """`netns-kit doctor` where the code of `knob` has run, as the root of its user namespace or as its only user."""
    needs_tun()
    if os.geteuid() == 0 and "same" in ids:
        try:
            subprocess.run([sys.executable, "-c", ""], user=UID, check=True, timeout=SECONDS)
        except PermissionError:
            pytest.skip("this Python is root's alone")
    return examined([sys.executable, "-c", HOST + knob + ENTER, ids, *command])


@cache
def usual(ids: str) -> dict[str, str]:
    """What is said of such a host anyhow."""
    return {name: each["status"] for name, each in on_host(ids=ids)[1].items()}


def changed(found: dict[str, Any], ids: str) -> dict[str, str]:
    """Names and status of what the knob has made different."""
    return {name: each["status"] for name, each in found.items() if each["status"] != usual(ids)[name]}


@pytest.mark.parametrize("ids", ["root", "same"])
def test_most_is_well_where_nothing_is_set_against_us(ids: str) -> None:
    bad = {name for name, status in usual(ids).items() if status != "ok"}
    # a new network has no route; a file of a namespace that is not ours gives no privilege
    assert bad <= {"resolver", "id-ranges"} | ({"sysctls"} if ids == "same" else set())


KNOBS = {
    "no more user namespaces": (
        "root", 'sysctl("user.max_user_namespaces", 0)',
        "user-namespace", "missing", "denied", "user.max_user_namespaces", 0,
    ),
    "no more network namespaces": (
        "root", 'sysctl("user.max_net_namespaces", 0)',
        "network-namespace", "missing", "denied", "user.max_net_namespaces", 0,
    ),
    "no more mount namespaces": (
        "root", 'sysctl("user.max_mnt_namespaces", 0)',
        "files", "missing", "denied", "user.max_mnt_namespaces", 0,
    ),
    "a chroot": (
        "root", """
private()
top = tempfile.mkdtemp()
for name in os.listdir("/"):
    path = "/" + name
    if os.path.islink(path):
        os.symlink(os.readlink(path), top + path)
    elif os.path.isdir(path):
        os.mkdir(top + path)
        mount(path, top + path, None, 0x5000)   # MS_BIND | MS_REC
here = os.getcwd()
os.chroot(top)
os.chdir(here)
""",
        "user-namespace", "missing", "denied", "the root directory", "a chroot's",
    ),
    "no node of tun": (
        "root", 'private(); mount("none", "/dev/net", "tmpfs")',
        "tun", "missing", "absent", TUN, "missing",
    ),
    "a node of tun that is mounted nodev": (
        "root", """
private()
mount("/dev/net/tun", "/dev/net/tun", None, 0x1000)
mount("none", "/dev/net/tun", None, 0x1024)     # MS_REMOUNT | MS_BIND | MS_NODEV
""",
        "tun", "missing", "denied", TUN, "on a file system mounted nodev",
    ),
    "a node of tun that is something else": (
        "root", 'private(); mount("/dev/null", "/dev/net/tun", None, 0x1000)',
        "tun", "missing", "absent", TUN, "not the tun device",
    ),
    "a node of tun that is an ordinary file": (
        "root", 'private(); mount("/etc/hostname", "/dev/net/tun", None, 0x1000)',
        "tun", "missing", "absent", TUN, "not the tun device",
    ),
    "sysctls that are read-only": (
        "root", """
private()
mount("/proc/sys", "/proc/sys", None, 0x1000)
mount("none", "/proc/sys", None, 0x1000 | 32 | 1)   # MS_BIND | MS_REMOUNT | MS_RDONLY
""",
        "sysctls", "limited", "denied", "/proc/sys/net/ipv4/ip_default_ttl", "read-only",
    ),
    "ports": (
        "same", 'sysctl("net.ipv4.ip_unprivileged_port_start", 1024)',
        "low-ports", "limited", "denied", PORT_START, 1024,
    ),
    "a few ports": (
        "same", 'sysctl("net.ipv4.ip_unprivileged_port_start", 80)',
        "low-ports", "limited", "denied", PORT_START, 80,
    ),
    "small buffers": (
        "root", 'sysctl("net.ipv4.tcp_rmem", "4096 8192 65536")',
        "tcp-buffers", "limited", "exhausted", "net.ipv4.tcp_rmem", "4096 8192 65536",
    ),
    "few descriptors": (
        "root", "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))",
        "descriptors", "limited", "exhausted", "RLIMIT_NOFILE", 300,
    ),
}  # fmt: skip
"""As whom, and what is done; what fails, how badly, why, the knob and its value."""


def check(found: dict[str, Any], ids: str, name: str, status: str) -> None:
    """That it is what the knob has made fail, and that what is not there for its sake is not blamed."""
    difference = changed(found, ids)
    assert difference.pop(name) == status
    if (
        name == "sysctls"
    ):  # nobody inside may mount a /proc while something covers a part of the one that is there
        assert difference.pop("pids") == "limited"
    dependent = {
        each for each in difference if difference[each] == "untried" and found[each]["cause"] is None
    }
    assert difference.keys() == dependent, {each: found[each]["cause"] for each in difference}
    assert not dependent or name in ("user-namespace", "network-namespace", "tun", "files", "ipv6")
    if name == "user-namespace":
        assert dependent == INSIDE - {"id-ranges"} | {"network-namespace"} | (dependent & {"id-ranges"})


@pytest.mark.parametrize("case", KNOBS)
def test_the_knob_is_named_and_nothing_else(case: str) -> None:
    ids, code, name, status, reason, knob, value = KNOBS[case]
    exit_status, found = on_host(code, ids)
    check(found, ids, name, status)
    finding = found[name]
    assert (finding["reason"], finding["knob"], finding["value"]) == (reason, knob, value)
    assert finding["fix"]
    assert finding["limits"]
    assert exit_status == (1 if status == "missing" else 0)


@pytest.mark.parametrize(
    ("call", "result", "conditions", "name", "status", "reason"),
    [
        ("unshare", errno.EPERM, (), "user-namespace", "missing", "denied"),
        ("unshare", errno.ENOSYS, (), "user-namespace", "missing", "absent"),
        ("unshare", errno.EPERM, ("(0, ANY, 0x10000000)",), "user-namespace", "missing", "denied"),
        ("unshare", None, ("(0, ANY, 0x10000000)",), "user-namespace", "missing", "denied"),
        ("unshare", errno.EPERM, ("(0, ANY, 0x40000000)",), "network-namespace", "missing", "denied"),
        ("unshare", errno.EPERM, ("(0, ANY, 0x00020000)",), "files", "missing", "denied"),
        ("pidfd_open", errno.EPERM, (), "pidfds", "missing", "denied"),
        ("memfd", errno.EPERM, (), "memfds", "limited", "denied"),
    ],
)
def test_a_filter_is_named(
    call: str, result: int | None, conditions: tuple[str, ...], name: str, status: str, reason: str
) -> None:
    exit_status, found = on_host(filtering(call, result, *conditions))
    check(found, "root", name, status)
    assert (found[name]["reason"], found[name]["knob"], found[name]["value"]) == (reason, SECCOMP, 2)
    assert exit_status == (1 if status == "missing" else 0)


def test_what_a_kernel_lacks_is_not_what_it_denies() -> None:
    """A filter that answers as an old kernel would."""
    release = os.uname().release
    _, found = on_host(filtering("landlock", errno.ENOSYS))
    check(found, "root", "landlock", "limited")
    landlock = found["landlock"]
    assert (landlock["reason"], landlock["value"]) == ("absent", "unsupported")
    assert "Linux 5.13" in landlock["fix"]
    _, found = on_host(filtering("ioctl", errno.EINVAL, "(1, EQUAL, 0x400454D0)", "(2, ANY, 0x60)"))
    check(found, "root", "offloads", "limited")
    offloads = found["offloads"]
    assert (offloads["reason"], offloads["value"]) == ("absent", release)
    assert offloads["cause"] == "the tap does without USO4 USO6"
    _, found = on_host(filtering("pidfd_open", errno.ENOSYS))
    check(found, "root", "pidfds", "missing")
    assert (found["pidfds"]["reason"], found["pidfds"]["value"]) == ("absent", release)


@pytest.mark.parametrize("inside", ["root", "same"])
def test_ping_groups(inside: str) -> None:
    """Who has CAP_NET_RAW pings anyhow."""
    _, found = on_host(ids=f"{inside}, no-ping")
    if inside == "root":
        assert changed(found, inside) == {}
        assert found["ping"]["detail"] == found["ping6"]["detail"] == "a raw socket"
        return
    assert changed(found, inside) == {"ping": "limited", "ping6": "limited"}
    for name in ("ping", "ping6"):
        assert (found[name]["reason"], found[name]["knob"]) == ("denied", PING_GROUPS)
        assert found[name]["value"] in ("1 0", "65534 65534")  # without names for these groups
        assert f'"{GID} {GID}"' in found[name]["fix"]


def test_ipv6_switched_off() -> None:
    knob = "net.ipv6.conf.all.disable_ipv6"
    if not os.path.exists("/proc/sys/net/ipv6"):
        missing("this kernel has no IPv6")
    exit_status, found = on_host(f'sysctl("{knob}", 1)')
    check(found, "root", "ipv6", "limited")
    assert (found["ipv6"]["reason"], found["ipv6"]["knob"], found["ipv6"]["value"]) == ("denied", knob, 1)
    assert found["ping6"]["status"] == "untried"
    assert found["ipv6-inside"]["status"] == "ok"
    assert exit_status == 0


def test_a_resolver_that_does_not_run() -> None:
    """On this machine's loopback; and in a network without a route, one elsewhere."""
    code = """
private()
with open(tempfile.mkdtemp() + "/resolv.conf", "w") as file:
    file.write("nameserver %s")
mount(file.name, "/etc/resolv.conf", None, 0x1000)
"""
    for address, said in ("127.0.0.7", "Connection refused"), ("192.0.2.1", "Network is unreachable"):
        _, found = on_host(code % address)
        resolver = found["resolver"]
        assert (resolver["reason"], resolver["value"]) == ("unreachable", address)
        assert said in resolver["cause"]


def test_a_user_who_may_read_no_resolv_conf_has_the_local_one() -> None:
    _, found = on_host('private(); mount("none", "/etc", "tmpfs")')
    assert found["resolver"]["value"] == "127.0.0.1"
    assert found["files"]["status"] == "ok", "commands have one of their own all the same"


# -- subordinate ids: as an ordinary user of the real host ----------------------------------------------------

AS_USER = """
import os, sys, ctypes
if sys.argv[1] == "no_new_privs":
    assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def as_user(how: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    if os.geteuid() == 0:
        pytest.skip("root needs no newuidmap")
    needs_tun()
    needs_subids()
    found = examined([sys.executable, "-c", AS_USER, how, *DOCTOR[1:]], env)[1]
    assert {name for name in found if found[name]["status"] != as_usual()[name]["status"]} == {"id-ranges"}
    assert found["id-ranges"]["status"] == "limited"
    ranges: dict[str, Any] = found["id-ranges"]
    return ranges


@cache
def as_usual() -> dict[str, Any]:
    return examined(DOCTOR)[1]


def test_a_newuidmap_without_privilege(tmp_path: Path) -> None:
    """One that is there, and is of no use: which(1) would find it."""
    for program in ("newuidmap", "newgidmap"):
        shutil.copy(shutil.which(program) or "/bin/false", tmp_path / program)
    found = as_user("", {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (found["knob"], found["reason"]) == (str(tmp_path / "newuidmap"), "denied")
    assert found["value"].startswith(f"uid {os.getuid()}'s, mode ")
    assert "setuid root" in found["fix"]


def test_no_newuidmap(tmp_path: Path) -> None:
    found = as_user("", {"PATH": str(tmp_path)})
    assert found["reason"] == "absent"
    assert "install it" in found["fix"]


def test_no_new_privileges() -> None:
    found = as_user("no_new_privs")
    assert (found["knob"], found["value"]) == ("NoNewPrivs in /proc/self/status", 1)


@pytest.mark.parametrize(
    ("text", "cause"), [("", "has no subordinate uids"), ("{user}:x:y\n", "cannot be read")]
)
def test_no_ranges(text: str, cause: str) -> None:
    """In a namespace, where the file can be covered."""
    user = pwd.getpwuid(UID).pw_name if os.geteuid() else str(UID)
    code = f"""
private()
with open(tempfile.mkdtemp() + "/subuid", "w") as file:
    file.write({text.format(user=user)!r})
mount(file.name, "/etc/subuid", None, 0x1000)
"""
    _, found = on_host(code, "same")
    assert found["id-ranges"]["status"] == "limited"
    assert cause in found["id-ranges"]["cause"]
    assert (found["id-ranges"]["knob"], found["id-ranges"]["reason"]) == ("/etc/subuid", "absent")
    assert user in found["id-ranges"]["fix"]


# -- the library says the same ------------------------------------------------------------------------------

TWICE = """
import sys
import anyio
import netns_kit

async def use():
    async with netns_kit.Namespace.create() as ns:
        async with netns_kit.TapDevice.open(ns, "probe0"):
            await ns.run(["true"], files={"/etc/resolv.conf": ""})

found = [each.error for each in netns_kit.doctor() if each.error and each.status == "missing"]
try:
    anyio.run(use)
except netns_kit.NetnsKitError as error:
    assert [(type(error), str(error), error.errno)] == [
        (type(each), str(each), each.errno) for each in found
    ], (error, found)
    print("alike:", error)
"""


@pytest.mark.parametrize(
    "code",
    [
        KNOBS["no more user namespaces"][1],
        KNOBS["no more network namespaces"][1],
        KNOBS["no more mount namespaces"][1],
        KNOBS["no node of tun"][1],
        KNOBS["a node of tun that is mounted nodev"][1],
        KNOBS["a chroot"][1],
        ("unshare", errno.EPERM),
        ("unshare", None, "(0, ANY, 0x10000000)"),
        ("unshare", errno.EPERM, "(0, ANY, 0x40000000)"),
        ("unshare", errno.EPERM, "(0, ANY, 0x00020000)"),
        ("pidfd_open", errno.EPERM),
    ],
)
def test_who_uses_the_library_is_told_the_same(code: str | tuple[Any, ...]) -> None:
    needs_tun()
    knob = code if isinstance(code, str) else filtering(*code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HOST + knob + ENTER, "root", sys.executable, "-c", TWICE],
        capture_output=True, text=True, timeout=SECONDS, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.startswith("alike:"), done.stderr


def test_a_table_for_people() -> None:
    needs_tun()
    knob = KNOBS["no more user namespaces"][1]
    done = subprocess.run(
        [sys.executable, "-c", HOST + knob + ENTER, "root", *DOCTOR[:-1]],
        capture_output=True, text=True, timeout=SECONDS, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "missing  user-namespace     unshare user: No space left on device\n" in done.stdout
    assert "user.max_user_namespaces is 0\n" in done.stdout
    assert "untried  tun                it needs user-namespace\n" in done.stdout
    assert "Needed, and not there: user-namespace, network-namespace, tun, files.\n" in done.stdout


@pytest.mark.anyio
async def test_in_a_notebook_with_a_loop_and_threads() -> None:
    """It blocks, and needs no loop; nothing is left of it."""
    needs_tun()
    report = await anyio.to_thread.run_sync(netns_kit.doctor)
    assert report.ok, str(report)
    assert {each.name for each in report} == CHECKS.keys()


def test_whatever_its_caller_does_with_signals() -> None:
    needs_tun()
    knob = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGCHLD])
"""
    assert changed(on_host(knob)[1], "root") == {}
