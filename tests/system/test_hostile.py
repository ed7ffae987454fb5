"""What a program in a namespace may try against whoever has put it there, and what stops it: see docs/security.md."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import encodings
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio
import pytest

from netns_kit.errors import NamespaceGone
from netns_kit.namespace.namespace import Namespace, Pids
from tests.support import ROOT, finds_the_callers_keys, needs, needs_subids, needs_userns, seen_outside
from tests.support.servers import SECONDS

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]


@pytest.fixture(autouse=True)
def _userns() -> None:
    needs_userns()


@asynccontextmanager
async def namespace(pids: Pids = "own") -> AsyncIterator[Namespace]:
    """One with a bound on all waiting in it."""
    with anyio.fail_after(SECONDS):
        async with Namespace.create(pids=pids) as ns:
            yield ns


def is_stopped(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat[stat.rindex(")") + 2] == "T"


async def until_stopped(*pids: int) -> None:
    with anyio.fail_after(SECONDS):
        while not all(map(is_stopped, pids)):
            await anyio.lowlevel.checkpoint()


# Each attempt is made on every pid given, and told: what has worked, or the errno.
ATTEMPTS = """
import ctypes, errno, json, os, sys

libc = ctypes.CDLL(None, use_errno=True)
libc.mount(None, b"/", None, 0x44000, None)
while libc.umount2(b"/proc", 2) == 0:  # as far as this is the command's own; what is below may be the host's
    pass

def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result

def steal(pid):
    pidfd = os.pidfd_open(pid)
    for number in range(64):
        try:
            return check(libc.syscall(438, pidfd, number, 0))  # pidfd_getfd
        except OSError as exc:
            if exc.errno != errno.EBADF:
                raise

ATTEMPTS = {
    "environ": lambda pid: open(f"/proc/{pid}/environ", "rb").read(),
    "memory": lambda pid: open(f"/proc/{pid}/mem", "r+b"),
    "descriptors": lambda pid: [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")],
    "maps": lambda pid: open(f"/proc/{pid}/maps").read(),
    "directory": lambda pid: os.readlink(f"/proc/{pid}/cwd"),
    "root": lambda pid: os.listdir(f"/proc/{pid}/root"),
    "trace": lambda pid: check(libc.ptrace(0x4206, pid, 0, 0)),
    "descriptor": steal,
}
for pid in map(int, sys.argv[1:]):
    for name, attempt in ATTEMPTS.items():
        try:
            attempt(pid)
            outcome = "done"
        except OSError as exc:
            outcome = errno.errorcode[exc.errno]
        print(json.dumps([pid, name, outcome]))
"""


@pytest.mark.parametrize("pids", ["own", "host"])
async def test_the_agent_keeps_its_memory_environment_and_descriptors(pids: Pids) -> None:
    async with namespace(pids) as ns:
        targets = {ns._agent.pid, ns._agent._child.pid, os.getpid()}
        done = await ns.run([sys.executable, "-ISc", ATTEMPTS, *map(str, targets)], stderr=None)
        outcomes = [json.loads(line) for line in done.stdout.decode().splitlines()]
        assert {pid for pid, _, _ in outcomes} == targets
        assert len(outcomes) == len(targets) * 8
        denied = {"EACCES", "EPERM"} if pids == "host" else {"EACCES", "EPERM", "ESRCH"}
        assert all(outcome in denied for _, _, outcome in outcomes), outcomes


async def test_of_our_processes_a_command_sees_only_the_holder_which_has_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "do not tell")
    async with namespace() as ns:
        look = "ls /proc/1/fd; cat /proc/1/environ; echo; echo $PPID; ls -d /proc/[0-9]*"
        done = await ns.run(look, env={"PATH": os.environ["PATH"]})
        *environment, parent, first, second, _ = done.stdout.decode().split("\n")
        assert "SECRET" not in "".join(environment)
        assert "PATH" not in "".join(environment)
        assert (parent, first, second) == ("0", "/proc/1", "/proc/2")
        assert not (await ns.run("ls /proc/1/fd")).stdout


async def test_nobody_inside_is_in_the_owners_session() -> None:
    """Its group could be signalled by kill(0, ...), its terminal opened as /dev/tty: by a command that has pipes, and
    by one that traces the holder.
    """
    async with namespace() as ns, await ns.popen(["sleep", "600"]) as process:
        for pid in (ns.pid, process.pid):
            assert os.getsid(pid) == os.getpgid(pid) == pid
    async with namespace("host") as ns:
        assert os.getsid(ns.pid) == os.getpgid(ns.pid) == ns.pid


async def test_nothing_of_ours_loads_what_commands_have_mounted(tmp_path: Path) -> None:
    """It would run with the agent's memory and descriptors: codecs, say, are modules, loaded when first used."""
    needs("mount")
    mark, modules = tmp_path / "loaded", tmp_path / "modules"
    modules.mkdir()
    library = Path(encodings.__file__).parent
    for each in library.glob("*.py"):
        (modules / each.name).write_text(f"import os\nos.open({str(mark)!r}, os.O_CREAT)\n")
    async with namespace() as ns:
        await ns.run(["mount", "--bind", modules, library])
        with pytest.raises(FileNotFoundError):
            await ns.run(["true"], cwd=tmp_path / "nowhere")
        with pytest.raises(IsADirectoryError):
            await ns.run(["true"], files={str(tmp_path): ""})
        assert (await ns.run(["true"])).returncode == 0
    assert not mark.exists()


@pytest.mark.parametrize("pids", ["own", "host"])
def test_subordinate_ids_do_not_have_the_callers_keys(pids: Pids) -> None:
    needs_subids()
    assert finds_the_callers_keys(f"Namespace.create(ids='subids', pids={pids!r})") == "False"
    assert finds_the_callers_keys(f"Namespace.create(pids={pids!r})") == "True", "docs/security.md says so"


@pytest.mark.parametrize("pids", ["own", "host"])
async def test_an_empty_environment_is_empty_whoever_looks(
    pids: Pids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "do not tell")
    code = """if True:
        import glob, os
        assert not os.environ.keys() - {"LC_CTYPE"}, os.environ  # which Python may set for itself
        for path in glob.glob("/proc/[0-9]*/environ"):
            try:
                text = open(path, "rb").read()
            except OSError:
                continue
            if b"SECRET=do not" in text:
                print(path)
    """
    async with namespace(pids) as ns:
        assert (await ns.run([sys.executable, "-ISc", code], env={}, stderr=None)).stdout == b""


async def test_no_signal_from_inside_reaches_whoever_is_outside_or_ends_the_namespace() -> None:
    every = "import os, signal\nfor n in range(1, 65):\n  try: os.kill(%s, n)\n  except (OSError, ValueError): pass"
    async with namespace() as ns:
        for target in ("1", "-1", "0"):
            argv = [sys.executable, "-ISc", every % target]
            await ns.run(argv, check=False)
        numbers = f"{ns._agent.pid} {ns._agent._child.pid} {os.getpid()}"
        await ns.run(f"kill -STOP {numbers}; kill -KILL {numbers}", check=False)
        assert not is_stopped(ns._agent.pid)
        assert (await ns.run(["echo", "on"])).stdout == b"on\n"
        assert await ns.get_sysctl("net.ipv4.ip_forward") == "0"


DAEMON = """
import ctypes, os, signal, sys
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG
for number in map(int, sys.argv[1:]):
    try:
        os.kill(number, signal.SIGSTOP)
    except OSError:
        pass
print(os.getpid(), flush=True)
os.closerange(0, 100)
while True:
    signal.pause()
"""


async def daemon(ns: Namespace, *stopping: int) -> int:
    """The pid of one that stays, and has tried to stop those."""
    argv = [sys.executable, "-ISc", DAEMON, *map(str, stopping)]
    pid = int((await ns.run(argv, stderr=None)).stdout)
    return seen_outside(pid, ns.pid) if ns.pids == "own" else pid


@pytest.mark.parametrize("stopped", ["nobody", "agent", "parent", "both"])
async def test_nothing_outlives_the_block(stopped: str) -> None:
    with anyio.fail_after(SECONDS), ExitStack() as stack:
        async with Namespace.create(pids="own") as ns:
            agent, parent = ns._agent.pid, ns._agent._child.pid
            pidfds = [os.pidfd_open(pid) for pid in (await daemon(ns, agent, parent, 1), ns.pid, agent)]
            for pidfd in pidfds:
                stack.callback(os.close, pidfd)
            victims = {"nobody": [], "agent": [agent], "parent": [parent], "both": [agent, parent]}[stopped]
            for victim in victims:
                os.kill(victim, signal.SIGSTOP)
            await until_stopped(*victims)
        for pidfd in pidfds:
            await anyio.wait_readable(pidfd)


async def test_a_daemon_that_stops_the_agent_does_not_outlive_the_block_without_pid_namespace() -> None:
    with anyio.fail_after(SECONDS), ExitStack() as stack:
        async with Namespace.create(pids="host") as ns:
            agent = ns._agent.pid
            pidfd = os.pidfd_open(await daemon(ns))
            stack.callback(os.close, pidfd)
            os.kill(agent, signal.SIGSTOP)
            await until_stopped(agent)
        await anyio.wait_readable(pidfd)


OWNER = """
import anyio, sys
from netns_kit.namespace.namespace import Namespace

async def main():
    async with Namespace.create(pids="own") as ns:
        pid = int((await ns.run([sys.executable, "-ISc", sys.argv[2]])).stdout)
        print(ns._agent.pid, ns._agent._child.pid, ns.pid, pid, flush=True)
        await anyio.sleep_forever()

anyio.run(main, backend=sys.argv[1])
"""


@pytest.mark.parametrize("stopped", ["nobody", "agent", "parent", "both", "killed with it"])
async def test_nothing_outlives_a_killed_owner(anyio_backend_name: str, stopped: str) -> None:
    with anyio.fail_after(SECONDS), ExitStack() as stack:
        argv = [sys.executable, "-c", OWNER, anyio_backend_name, DAEMON]
        owner = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT))  # noqa: ASYNC220
        stack.callback(owner.kill)
        assert owner.stdout is not None
        await anyio.wait_readable(owner.stdout)
        agent, parent, holder, inside = map(int, owner.stdout.readline().split())
        pidfds = [os.pidfd_open(pid) for pid in (agent, parent, holder, seen_outside(inside, holder))]
        for pidfd in pidfds:
            stack.callback(os.close, pidfd)
        victims = {"agent": [agent], "parent": [parent], "both": [agent, parent]}.get(stopped, [])
        for victim in victims:
            os.kill(victim, signal.SIGSTOP)
        await until_stopped(*victims)
        if stopped == "killed with it":
            os.kill(parent, signal.SIGKILL)
        owner.kill()
        for pidfd in pidfds:
            await anyio.wait_readable(pidfd)


MASKED = """
import anyio, sys
from netns_kit import FeatureUnavailable, Namespace

async def main():
    async with Namespace.create() as ns:
        print(ns.pids, (await ns.run("echo $$")).stdout.strip() != b"2")
    try:
        async with Namespace.create(pids="own"):
            pass
    except FeatureUnavailable as exc:
        print(exc.errno, exc.knob, exc.value)

anyio.run(main, backend=sys.argv[1])
"""


async def test_a_container_with_a_masked_proc_is_told_and_served_all_the_same(
    anyio_backend_name: str,
) -> None:
    needs("unshare", "mount")
    mask = 'mount --bind /proc/sys /proc/sys && exec "$@"'
    argv = [
        "unshare",
        "-Ur",
        "--mount",
        "sh",
        "-c",
        mask,
        "sh",
        sys.executable,
        "-c",
        MASKED,
        anyio_backend_name,
    ]
    with anyio.fail_after(SECONDS):
        done = await anyio.run_process(argv, cwd=ROOT, stderr=None)
    assert done.stdout.decode() == f"host True\n{errno.EPERM} /proc masked\n"


async def test_a_host_without_pid_namespaces_is_told_which_setting(anyio_backend_name: str) -> None:
    limit = 'open("/proc/sys/user/max_pid_namespaces", "w").write("0")\n'
    with anyio.fail_after(SECONDS):
        async with Namespace.create() as ns:
            argv = [sys.executable, "-c", limit + MASKED, anyio_backend_name]
            done = await ns.run(argv, cwd=ROOT, stderr=None)
    assert done.stdout.decode() == f"host True\n{errno.ENOSPC} user.max_pid_namespaces 0\n"


async def test_who_takes_the_agents_place_is_not_believed() -> None:
    """By a stranger's means, which a command does not have: the owner may trace the agent's socket, say."""
    with anyio.fail_after(SECONDS), pytest.raises(NamespaceGone, match="makes no sense"):
        async with Namespace.create() as ns:
            conversation = await ns._converse("sysctl_get", path="net/ipv4/ip_forward")
            try:
                from netns_kit.namespace.agent_client import Started

                await conversation.receive(Started, 1)  # as if that were the answer
            finally:
                conversation.close()
            await anyio.sleep_forever()


def test_pids_are_own_or_the_hosts() -> None:
    with pytest.raises(ValueError, match="pids='mine': expected 'own' or 'host'"):
        Namespace.create(pids="mine")  # type: ignore[arg-type]  # that is the test


MOUNT_OF_DOT = """
import os
fd = os.open(".", os.O_PATH)
mounts = [line.split()[0] for line in open("/proc/self/mountinfo")]
(mount,) = [line.split()[1] for line in open(f"/proc/self/fdinfo/{fd}") if line.startswith("mnt_id:")]
print(mount in mounts)
"""


async def test_a_directory_has_its_name_inside(tmp_path: Path) -> None:
    """Else getcwd(2) says that it is unreachable, which some C libraries cannot do anything with."""
    gone = tmp_path / "gone"
    gone.mkdir()
    async with namespace() as ns:
        here = os.getcwd()
        try:
            os.chdir(tmp_path)
            assert (await ns.run(["/bin/pwd"])).stdout.decode().strip() == str(tmp_path)
            assert (await ns.run([sys.executable, "-ISc", MOUNT_OF_DOT], stderr=None)).stdout == b"True\n"
            os.chdir(gone)
            gone.rmdir()
            assert (await ns.run(["true"])).returncode == 0
        finally:
            os.chdir(here)


async def test_who_looks_from_outside_finds_the_namespaces_by_the_holder() -> None:
    needs("nsenter", "ps")
    async with namespace() as ns:
        async with await ns.popen(["sleep", "60"]):
            enter = ["nsenter", "--target", str(ns.pid), *"-U -n -p -m --preserve-credentials".split()]
            done = await anyio.run_process([*enter, "sh", "-c", "cat /proc/1/comm; ps -o comm= -C sleep"])
        assert done.stdout.decode().split()[-1] == "sleep"
        done = await ns.run(["cat", "/proc/1/status"])
        assert b"NSpid:\t1\n" in done.stdout
