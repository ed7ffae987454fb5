"""Commands in a namespace behave as `anyio.run_process` and `anyio.open_process` have them."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import os
import pickle
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from netns_kit.errors import ArgumentError, NamespaceGone, NetnsKitError
from netns_kit.namespace.namespace import Namespace
from netns_kit.namespace.process import CommandFailed, Process
from tests.support import ROOT, Possessions, needs, needs_userns, seen_outside
from tests.support.servers import SECONDS

pytestmark = pytest.mark.anyio

DESCRIPTORS = (
    24  # the agent's own are eight: stdio, control, owner, signal pipe, mount namespace; a command's are ten
)


@pytest.fixture(autouse=True)
def _userns() -> None:
    needs_userns()


@asynccontextmanager
async def namespace() -> AsyncIterator[Namespace]:
    """One with a bound on all waiting in it."""
    with anyio.fail_after(SECONDS):
        async with Namespace.create() as ns:
            yield ns


async def line(process: Process) -> str:
    """The next line it prints; it prints one at a time."""
    assert process.stdout is not None
    return (await process.stdout.receive()).decode().strip()


async def at_rest(ns: Namespace) -> None:
    """Wait until the agent has no child but the holder, and see that it has few descriptors, not to be listed."""
    agent = ns._agent.pid
    while len(children_of(agent)) > 1:
        await anyio.lowlevel.checkpoint()
    soft, hard = resource.prlimit(agent, resource.RLIMIT_NOFILE)
    resource.prlimit(agent, resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
    for _ in range(2):
        await ns.run(["true"])
    resource.prlimit(agent, resource.RLIMIT_NOFILE, (soft, hard))


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@contextmanager
def watching(pid: int) -> Iterator[int]:
    """A pidfd of a process that is running now."""
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


async def ends(pidfd: int) -> None:
    """Wait for the end of a process that is nobody's child here."""
    with anyio.fail_after(SECONDS):
        await anyio.wait_readable(pidfd)


async def test_output_and_status() -> None:
    async with namespace() as ns:
        done = await ns.run(["sh", "-c", "echo out; echo err >&2"])
        assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")
        with pytest.raises(subprocess.CalledProcessError) as caught:
            await ns.run("echo said; exit 7")
        assert (caught.value.returncode, caught.value.stdout) == (7, b"said\n")
        assert (await ns.run(["false"], check=False)).returncode == 1
        assert (await ns.run("kill -TERM $$", check=False)).returncode == -signal.SIGTERM


async def test_input_bigger_than_a_pipe() -> None:
    text = os.urandom(3_000_000)
    async with namespace() as ns:
        assert (await ns.run(["cat"], input=text)).stdout == text
        assert (await ns.run(["head", "-c", "5"], input=text)).stdout == text[:5]
        assert (await ns.run(["cat"], input=b"")).stdout == b""
        with pytest.raises(ValueError, match="stdin=-3: expected None where input is given"):
            await ns.run(["cat"], input=b"", stdin=DEVNULL)


async def test_arguments_and_environment_are_bytes() -> None:
    word, long = b"caf\xe9 \xff", "x" * 70_000
    environment = {"PATH": os.environ["PATH"], **{f"V{n}": long for n in range(4)}}
    async with namespace() as ns:
        assert (await ns.run([b"printf", b"%s", word])).stdout == word
        assert (await ns.run([Path("/bin/echo"), "x"])).stdout == b"x\n"
        done = await ns.run(["env"], env=environment)
        assert set(done.stdout.decode().split()) == {f"{name}={value}" for name, value in environment.items()}
        with pytest.raises(ValueError, match="null"):
            await ns.run(["a\0b"])
        with pytest.raises(ValueError, match="expected names without ="):
            await ns.run(["true"], env={"a=b": ""})
        with pytest.raises(ValueError, match="expected a word at least"):
            await ns.run([])


async def test_the_callers_environment_and_directory_of_now(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with namespace() as ns:
        monkeypatch.setenv("CHANGED_SINCE", "yes")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "below").mkdir()
        assert (await ns.run("echo $CHANGED_SINCE; pwd")).stdout == f"yes\n{tmp_path}\n".encode()
        assert (await ns.run(["pwd"], cwd="below")).stdout == f"{tmp_path}/below\n".encode()


async def test_what_cannot_be_executed_fails_as_subprocess_does(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/nowhere\n")
    attempts: list[tuple[list[str], Path | None]] = [
        (["no-such-command"], None),
        (["/no/such/command"], None),
        (["/etc/passwd/x"], None),
        ([str(script)], None),
        ([str(tmp_path)], None),
        (["true"], tmp_path / "missing"),
        (["true"], script),
        (["true", "x" * 200_000], None),
    ]
    async with namespace() as ns:
        for argv, cwd in attempts:
            with pytest.raises(OSError) as ours:
                await ns.run(argv, cwd=cwd)
            with pytest.raises(OSError) as theirs:
                subprocess.run(argv, cwd=cwd, check=False)  # noqa: ASYNC221 - the model, and it fails at once
            assert type(ours.value) is type(theirs.value), argv
            assert ours.value.errno == theirs.value.errno, argv
            assert str(ours.value.filename) == str(theirs.value.filename), argv
            script.chmod(0o755)
        with pytest.raises(FileNotFoundError):
            await ns.run(["no-such-command"], env={"PATH": "/etc/passwd:/bin"})
        assert (await ns.run(["true"])).returncode == 0


async def test_standard_streams(tmp_path: Path) -> None:
    async with namespace() as ns:
        done = await ns.run("echo out; echo err >&2", stderr=STDOUT)
        assert done.stdout == b"out\nerr\n"
        assert not done.stderr
        path = tmp_path / "out"
        with path.open("wb") as file:
            await ns.run(
                "cat; echo out; readlink /proc/self/fd/2", stdin=DEVNULL, stdout=file, stderr=DEVNULL
            )
        assert path.read_bytes() == b"out\n/dev/null\n"
        reader, writer = os.pipe()
        os.write(writer, b"through fd 0")
        os.close(writer)
        try:
            assert (await ns.run(["cat"], stdin=reader)).stdout == b"through fd 0"
        finally:
            os.close(reader)
        with pytest.raises(ValueError, match="STDOUT"):
            await ns.run(["true"], stdout=STDOUT)


async def test_inherited_streams_are_the_callers(capfd: pytest.CaptureFixture[str]) -> None:
    async with namespace() as ns:
        await ns.run("echo to stdout; echo to stderr >&2", stdout=None, stderr=None)
    assert capfd.readouterr() == ("to stdout\n", "to stderr\n")


async def test_passed_descriptors_keep_their_numbers_and_nothing_else_is_open() -> None:
    async with namespace() as ns:
        reader, writer = os.pipe()
        high = os.dup2(writer, 77)
        try:
            low = f"echo low > /proc/self/fd/{writer}"
            done = await ns.run(
                f"{low}; echo high > /proc/self/fd/77; ls /proc/self/fd", pass_fds=[writer, high]
            )
            assert os.read(reader, 100) == b"low\nhigh\n"
        finally:
            for fd in (reader, writer, high):
                os.close(fd)
        assert {writer, high} < set(map(int, done.stdout.split()))
        assert len(done.stdout.split()) == 6  # with the directory that ls reads


async def test_signals_are_as_a_command_expects() -> None:
    async with namespace() as ns:
        status = (await ns.run(["grep", "Sig", "/proc/self/status"])).stdout.decode()
        fields = {name: int(mask, 16) for name, mask in re.findall(r"Sig(\w+):\t(\w+)", status)}
        mine = Path("/proc/self/status").read_text()  # noqa: ASYNC240 - /proc
        ignored = re.search(r"SigIgn:\t(\w+)", mine)
        assert ignored
        python_ignores = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)
        assert fields["Ign"] == int(ignored[1], 16) & ~python_ignores
        assert fields["Blk"] == 0


async def test_blocked_signals_are_not_handed_down() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        async with namespace() as ns:
            assert (await ns.run("kill -USR2 $$; sleep 60", check=False)).returncode == -signal.SIGUSR2
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


DAEMON = """
import anyio, os, sys
from netns_kit.namespace.namespace import Namespace

async def main():
    os.closerange(0, 3)
    async with Namespace.create() as ns:
        done = await ns.run(["ls", "/proc/self/fd"], stderr=None)
        os.write(int(sys.argv[2]), done.stdout)

anyio.run(main, backend=sys.argv[1])
"""


async def test_a_caller_without_standard_streams(anyio_backend_name: str) -> None:
    reader, writer = os.pipe()
    try:
        with anyio.fail_after(SECONDS):
            argv = [sys.executable, "-c", DAEMON, anyio_backend_name, str(writer)]
            await anyio.run_process(argv, pass_fds=[writer], cwd=ROOT)
        assert os.read(reader, 100) == b"0\n1\n", "stdout, and the directory that ls reads"
    finally:
        os.close(reader)
        os.close(writer)


async def test_quick_commands_that_a_busy_agent_hears_of_late() -> None:
    environment = {"PATH": os.environ["PATH"], **{f"V{n}": "x" * 50_000 for n in range(10)}}
    async with namespace() as ns, anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(partial(ns.run, ["true"], env=environment))


async def test_signals_sent() -> None:
    async with namespace() as ns:
        async with await ns.popen(
            "trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 1; done"
        ) as it:
            assert await line(it) == "ready"
            assert it.returncode is None
            it.send_signal(signal.SIGUSR1)
            assert await line(it) == "caught"
            assert await it.wait() == 3
            assert it.returncode == 3
            it.terminate()  # gone already: no error
        async with await ns.popen(["sleep", "60"]) as it:
            it.terminate()
            assert await it.wait() == -signal.SIGTERM
        async with await ns.popen(["sleep", "60"]) as it:
            it.kill()
            assert await it.wait() == -signal.SIGKILL


async def test_streams_of_a_running_command() -> None:
    async with namespace() as ns:
        process = await ns.popen(["cat"])
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send(b"one")
        assert await process.stdout.receive() == b"one"
        await process.stdin.aclose()
        with pytest.raises(anyio.EndOfStream):
            await process.stdout.receive()
        with pytest.raises(anyio.ClosedResourceError):
            await process.stdin.send(b"two")
        assert await process.wait() == 0
        await process.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await process.stdout.receive()
        async with await ns.popen(["true"]) as process:
            await process.wait()
            assert process.stdin is not None
            with pytest.raises(anyio.BrokenResourceError):
                await process.stdin.send(b"nobody listens")


async def test_a_stream_closed_while_somebody_waits_for_it() -> None:
    async with namespace() as ns, await ns.popen(["sleep", "60"]) as process:
        assert process.stdout is not None
        stream = process.stdout

        async def read() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            await stream.aclose()


async def test_several_may_wait() -> None:
    codes = []

    async def wait(process: Process) -> None:
        codes.append(await process.wait())

    async with (
        namespace() as ns,
        await ns.popen("read x; exit 5") as process,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(3):
            tasks.start_soon(wait, process)
        await anyio.wait_all_tasks_blocked()
        assert process.stdin is not None
        await process.stdin.send(b"\n")
    assert codes == [5, 5, 5]


async def test_who_waits_is_told_though_another_has_looked_before() -> None:
    """`returncode` may take the news of the end that `wait` waits for."""
    codes = []

    async def wait(process: Process) -> None:
        codes.append(await process.wait())

    async with (
        namespace() as ns,
        await ns.popen("read x; exit 5") as process,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(wait, process)
        await anyio.wait_all_tasks_blocked()
        assert process.stdin is not None
        await process.stdin.send(b"\n")
        while process.returncode is None:  # the loop does not run in between
            select.select([], [], [], 0.01)
    assert codes == [5]


GENERATIONS = "sh -c 'sleep 600 & echo $!; wait' & wait"


async def test_cancelling_run_kills_the_command_and_what_it_started(tmp_path: Path) -> None:
    fifo = tmp_path / "pids"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with namespace() as ns:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ns.run, f"{{ {GENERATIONS}; }} > {fifo}")
                await anyio.wait_readable(reader)
                grandchild = seen_outside(int(os.read(reader, 100)), ns.pid)
                with watching(grandchild) as pidfd:
                    assert not select.select([pidfd], [], [], 0)[0]
                    tasks.cancel_scope.cancel()
                    with anyio.CancelScope(shield=True):
                        await ends(pidfd)
            assert (await ns.run(["true"])).returncode == 0
    finally:
        os.close(reader)


async def test_leaving_the_block_of_a_process_kills_what_it_started() -> None:
    async with namespace() as ns:
        async with await ns.popen(GENERATIONS) as process:
            grandchild = seen_outside(int(await line(process)), ns.pid)
            pidfd = os.pidfd_open(grandchild)
        assert process.returncode == -signal.SIGKILL
        await ends(pidfd)
        os.close(pidfd)


async def test_leaving_the_namespace_kills_orphans_too() -> None:
    async with namespace() as ns:
        async with await ns.popen("setsid sh -c 'sleep 600 </dev/null >/dev/null 2>&1 & echo $!'") as process:
            pidfd = os.pidfd_open(seen_outside(int(await line(process)), ns.pid))
            assert await process.wait() == 0
        assert not select.select([pidfd], [], [], 0)[0]  # an orphan by now, and not the process's any more
    assert select.select([pidfd], [], [], 0)[0]
    os.close(pidfd)


async def test_fifty_at_once() -> None:
    async with namespace() as ns:
        await ns.run(["true"])
        await at_rest(ns)
        before = Possessions()
        seen = set()

        async def one(number: int) -> None:
            text = b"%d" % number
            done = await ns.run(["sh", "-c", 'cat; exit "$0"', text], input=text, check=False)
            assert done.returncode == number
            seen.add(int(done.stdout))

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(one, number)
        assert seen == set(range(50))
        assert not before.difference()
        await at_rest(ns)


@pytest.mark.parametrize("limit", [40, 64, 90])
async def test_an_agent_that_is_short_of_descriptors_goes_on(limit: int) -> None:
    """A command runs, or its error says what is short; the namespace and the other commands stay."""
    files = {f"/etc/{name}": "x" for name in ("hosts", "passwd", "group", "resolv.conf", "services")}
    running: list[Process] = []
    errors: list[Exception] = []

    async def start(ns: Namespace) -> None:
        try:
            running.append(await ns.popen(["sleep", "600"], stdin=DEVNULL, files=files))
        except (OSError, NamespaceGone) as error:  # the conversation itself may be what there was no room for
            errors.append(error)

    async with namespace() as ns:
        agent = ns._agent.pid
        soft, hard = resource.prlimit(agent, resource.RLIMIT_NOFILE)
        resource.prlimit(agent, resource.RLIMIT_NOFILE, (limit, hard))
        for _ in range(10):  # one by one,
            await start(ns)
        async with anyio.create_task_group() as tasks:  # and at the same time
            for _ in range(20):
                tasks.start_soon(start, ns)
        resource.prlimit(agent, resource.RLIMIT_NOFILE, (soft, hard))
        assert errors
        await ns.run(["true"])
        assert not [process.returncode for process in running if process.returncode is not None]
        for process in running:
            await process.aclose()


async def test_cancelled_at_any_moment_nothing_is_left() -> None:
    async with namespace() as ns:
        await ns.run(["true"])
        before = Possessions()
        for microseconds in range(0, 6000, 150):
            with anyio.move_on_after(microseconds / 1e6):
                await ns.run(["sleep", "60"])
        assert not before.difference()
        await at_rest(ns)


async def test_files_are_shown_to_the_command_alone(tmp_path: Path) -> None:
    below_tmp, link = tmp_path / "real", tmp_path / "link"
    below_tmp.write_text("the host's\n")
    link.symlink_to(below_tmp)
    hosts = Path("/etc/hosts").read_bytes()  # noqa: ASYNC240
    shown: dict[str, str | bytes] = {"/etc/hosts": "shown\n", str(link): b"bytes \xff\n"}
    async with namespace() as ns:
        with tempfile.NamedTemporaryFile(dir="/tmp") as mine:  # /tmp served as scratch, and is there again
            done = await ns.run(f"cat /etc/hosts {below_tmp}; ls {mine.name}", files=shown)
        assert done.stdout == b"shown\nbytes \xff\n" + mine.name.encode() + b"\n"
        assert (await ns.run("echo x > /etc/hosts", files=shown, check=False)).returncode != 0
        assert (await ns.run(["cat", "/etc/hosts"])).stdout == hosts
        with pytest.raises(FileNotFoundError) as caught:
            await ns.run("echo ran >&2; touch ran", cwd=tmp_path, files={"/etc/hosts": "", "/no/such": ""})
        assert caught.value.filename == "/no/such"
        for impossible in ("/not-there", "/proc/not-there"):
            with pytest.raises(FileNotFoundError) as caught:
                await ns.run(["true"], files={impossible: ""})
            assert caught.value.filename == impossible
        assert not (tmp_path / "ran").exists()
        with pytest.raises(ValueError, match="absolute"):
            await ns.run(["true"], files={"hosts": ""})
    assert Path("/etc/hosts").read_bytes() == hosts  # noqa: ASYNC240
    assert below_tmp.read_text() == "the host's\n"


async def test_a_file_that_is_not_there_is_shown_all_the_same(anyio_backend_name: str) -> None:
    """A host may have no resolv.conf, or a link to one that nobody has written yet."""
    needs("unshare")
    code = """if True:
        import anyio, os, subprocess, sys
        subprocess.run(["mount", "-t", "tmpfs", "none", "/etc"], check=True)
        os.mkdir("/etc/directory")
        open("/etc/directory/file", "w").write("in a directory ")
        os.symlink("directory/file", "/etc/link")
        os.symlink("/nowhere/stub-resolv.conf", "/etc/resolv.conf")
        from netns_kit.namespace.namespace import Namespace
        show = "cat /etc/link /etc/hosts /etc/resolv.conf; ls /etc; touch /etc/new"
        async def main():
            async with Namespace.create() as ns:
                files = {"/etc/resolv.conf": "shown\\n", "/etc/hosts": "too "}
                done = await ns.run(["sh", "-c", show], files=files, check=False)
                print(done.stdout, done.returncode)
                print(sorted(os.listdir("/etc")))
        anyio.run(main, backend=sys.argv[1])
    """
    apart = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        sys.executable,
        "-c",
        code,
        anyio_backend_name,
    ]
    done = await anyio.run_process(apart, cwd=ROOT, stderr=None)
    seen, _, after = done.stdout.decode().partition("\n")
    assert seen == str(b"in a directory too shown\ndirectory\nhosts\nlink\nresolv.conf\n") + " 1"
    assert after.strip() == "['directory', 'link', 'resolv.conf']"


async def test_a_file_that_is_not_there_leaves_its_directory_as_it_is(tmp_path: Path) -> None:
    """Writable, and without the file afterwards; there is one, empty, while a command is shown it."""
    missing, link = tmp_path / "missing", tmp_path / "link"
    link.symlink_to("target")
    files: dict[str, str | bytes] = {str(missing): "shown\n", str(link): "by a link\n"}
    async with namespace() as ns:
        done = await ns.run("cat missing link target; echo written > other; ls", cwd=tmp_path, files=files)
        assert done.stdout.decode().split("\n") == [
            *("shown", "by a link", "by a link", "link", "missing", "other", "target", ""),
        ]
        assert sorted(os.listdir(tmp_path)) == ["link", "other"]
        assert (tmp_path / "other").read_text() == "written\n"
        async with await ns.popen(
            "echo; while read x; do cat missing; echo; done", cwd=tmp_path, files=files
        ) as first:
            await line(first)
            assert missing.read_bytes() == b""
            with missing.open("rb") as empty:
                assert (await ns.run(["cat", str(missing)], files=files)).stdout == b"shown\n"
                assert os.path.samestat(os.fstat(empty.fileno()), missing.stat()), "the first needs it still"
            assert first.stdin is not None
            await first.stdin.send(b"\n")
            assert await line(first) == "shown", "another command has ended that was shown it"
            missing.unlink()
            seen = ""
            while seen != "shown":
                await first.stdin.send(b"\n")
                seen = await line(first)
        assert not missing.exists()
        async with await ns.popen("echo; exec sleep 60", cwd=tmp_path, files=files) as second:
            await line(second)
            missing.write_text("somebody's\n")
        assert missing.read_text() == "somebody's\n"
        missing.unlink()
        last = await ns.popen("exec sleep 60", files=files)
        assert missing.exists()
    await last.aclose()
    assert sorted(os.listdir(tmp_path)) == ["link", "other"]


async def test_a_file_is_shown_though_the_hosts_is_replaced(tmp_path: Path) -> None:
    """By renaming, as programs do that write resolv.conf; removed and made anew; or led elsewhere by its link."""
    path, link, other = tmp_path / "file", tmp_path / "link", tmp_path / "other"
    for each in (path, other):
        each.write_text("the host's\n")
    link.symlink_to(path)
    show = f"while read x; do cat {link}; echo; done"

    def rename() -> None:
        (tmp_path / "new").write_text("the host's new one\n")
        os.replace(tmp_path / "new", path)

    def anew() -> None:
        path.unlink()
        path.write_text("made anew\n")

    def elsewhere() -> None:
        os.symlink(other, tmp_path / "new")
        os.replace(tmp_path / "new", link)

    async with namespace() as ns, await ns.popen(show, files={str(link): "shown\n"}) as command:
        assert command.stdin is not None
        for change in (rename, anew, rename, elsewhere):
            change()
            seen = ""
            while seen != "shown":
                await command.stdin.send(b"\n")
                seen = await line(command)
        assert other.read_text() == "the host's\n"


async def test_a_command_inherits_nothing_of_what_another_is_shown() -> None:
    async with namespace() as ns, await ns.popen(["sleep", "60"], files={"/etc/resolv.conf": "x\n"}):
        shown = (await ns.run(["ls", "/proc/self/fd"])).stdout.split()
    assert shown == [b"0", b"1", b"2", b"3"], "the standard streams, and the directory itself"


async def test_files_do_not_spread_to_the_callers_mounts(anyio_backend_name: str) -> None:
    needs("unshare")
    code = """if True:
        import anyio, sys
        from netns_kit.namespace.namespace import Namespace
        before = open("/etc/hosts").read()
        async def main():
            async with Namespace.current() as ns:
                print(await ns.run(["cat", "/etc/hosts"], files={"/etc/hosts": "shown"}))
                assert open("/etc/hosts").read() == before
        anyio.run(main, backend=sys.argv[1])
    """
    async with namespace() as ns:
        shared = [
            "unshare",
            "--mount",
            "--propagation",
            "shared",
            sys.executable,
            "-c",
            code,
            anyio_backend_name,
        ]
        assert b"shown" in (await ns.run(shared, cwd=ROOT, stderr=None)).stdout


@pytest.mark.parametrize("victim", ["agent", "parent"])
async def test_a_killed_agent_takes_its_commands_along(victim: str) -> None:
    with anyio.fail_after(SECONDS), pytest.raises(NamespaceGone) as caught:
        async with Namespace.create() as ns:
            process = await ns.popen(["sleep", "60"])
            pidfd = os.pidfd_open(process.pid)
            try:
                agent = ns._agent
                os.kill(agent.pid if victim == "agent" else agent._child.pid, signal.SIGKILL)
                await process.wait()
            finally:
                await process.aclose()
    assert isinstance(caught.value, NetnsKitError)
    await ends(pidfd)
    os.close(pidfd)


OWNER = """
import anyio, os, sys, time
from netns_kit.namespace.namespace import Namespace

async def main():
    async with Namespace.create() as ns:
        process = await ns.popen("sleep 600 & sleep 600 & echo $! $$; wait")
        pids = (await process.stdout.receive()).decode().split()
        if sys.argv[2] == "forked":
            if (copy := os.fork()) == 0:  # it holds a copy of every descriptor of ours
                time.sleep(600)
            print(copy, flush=True)
        print(ns.pid, ns._agent.pid, *pids, flush=True)
        await anyio.sleep_forever()

anyio.run(main, backend=sys.argv[1])
"""


@pytest.mark.parametrize("how", ["alone", "forked"])
async def test_a_killed_owner_takes_agent_and_commands_along(anyio_backend_name: str, how: str) -> None:
    copies = 1 if how == "forked" else 0
    text = b""
    with anyio.fail_after(SECONDS), ExitStack() as stack:
        owner = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", OWNER, anyio_backend_name, how], stdout=subprocess.PIPE, cwd=ROOT
        )
        stack.enter_context(owner)
        stack.callback(owner.kill)
        assert owner.stdout is not None
        while text.count(b"\n") < 1 + copies:
            await anyio.wait_readable(owner.stdout)
            text += os.read(owner.stdout.fileno(), 1000)
        *outside, holder, agent, first, second = map(int, text.split())
        inside = [seen_outside(pid, holder) for pid in (first, second)]
        pidfds = [stack.enter_context(watching(pid)) for pid in (*outside, holder, agent, *inside)]
        for pidfd in pidfds[:copies]:
            stack.callback(signal.pidfd_send_signal, pidfd, signal.SIGKILL)
        owner.kill()
        for pidfd in pidfds[copies:]:
            await ends(pidfd)
        assert len(pidfds) == 4 + copies


async def test_other_threads_do_not_matter() -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=spin) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        async with namespace() as ns:
            assert (await ns.run(["echo", "x"])).stdout == b"x\n"
    finally:
        stop.set()
        for thread in threads:
            thread.join()


async def test_requests_from_another_thread_and_loop() -> None:
    async def elsewhere(ns: Namespace) -> bytes:
        return (await ns.run(["echo", "there"])).stdout

    async with namespace() as ns:
        outputs = []
        async with anyio.create_task_group() as tasks:

            async def here() -> None:
                outputs.extend([(await ns.run(["echo", "here"])).stdout for _ in range(10)])

            tasks.start_soon(here)
            for backend in ("asyncio", "trio"):
                call = partial(anyio.run, elsewhere, ns, backend=backend)
                outputs.append(await anyio.to_thread.run_sync(call))
        assert sorted(outputs) == [b"here\n"] * 10 + [b"there\n"] * 2


async def test_what_a_command_said_is_in_the_error() -> None:
    async with namespace() as ns:
        command = ["/bin/sh", "-c", "echo kept; echo why >&2; exit 3"]
        with pytest.raises(subprocess.CalledProcessError, match="exit status 3; it says:\nwhy") as failed:
            await ns.run(command)
        assert isinstance(failed.value, CommandFailed)
        assert (failed.value.returncode, failed.value.output, failed.value.stderr) == (3, b"kept\n", b"why\n")
        copy = pickle.loads(pickle.dumps(failed.value))
        assert (str(copy), copy.returncode, copy.cmd) == (str(failed.value), 3, command)
        with pytest.raises(CommandFailed) as long:
            await ns.run("for i in $(seq 1000); do echo line $i >&2; done; kill -9 $$")
        assert "SIGKILL" in str(long.value)
        assert "line 1000" in str(long.value)
        assert "line 1\n" not in str(long.value)
        with pytest.raises(CommandFailed) as obeyed:
            await ns.run(r"printf '\033[2J\033]0;title\007a\tb\r\342\200\256' >&2; exit 1")
        assert not set("\x1b\x07\t\r\u202e") & set(str(obeyed.value)), "a terminal would obey it"
        assert "title" in str(obeyed.value)


MANY = """
import anyio, resource
from contextlib import AsyncExitStack
from subprocess import DEVNULL
from netns_kit import Namespace

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))

async def main():
    async with Namespace.create() as ns, AsyncExitStack() as stack:
        print((await ns.run("ulimit -Sn; ulimit -Hn")).stdout.decode().split() == ["64", str(hard)])
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for _ in range(80):
            process = ns.popen(["sleep", "60"], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
            await stack.enter_async_context(await process)
        print((await ns.run("ulimit -Sn")).stdout.decode())

anyio.run(main)
"""


async def test_the_agent_has_descriptors_for_many_commands_and_commands_have_the_callers_limit() -> None:
    done = await anyio.run_process([sys.executable, "-c", MANY], cwd=ROOT, check=False)
    assert (done.stdout.decode().split(), done.stderr) == (["True", "64"], b"")


async def test_run_waits_for_whoever_has_the_commands_streams_and_wait_does_not() -> None:
    async with namespace() as ns:
        with anyio.move_on_after(0.2) as waiting:
            await ns.run("sleep 600 & echo started")
        assert waiting.cancelled_caught
        async with await ns.popen("sleep 600 & echo started") as process:
            assert await process.wait() == 0


@pytest.mark.parametrize("more", [{}, {"stdin": DEVNULL}, {"stdin": None, "start_new_session": True}])
async def test_the_foreground_takes_a_terminal(more: dict[str, Any]) -> None:
    """Else it would be accepted, and have no effect."""
    async with Namespace.create() as ns:
        with pytest.raises(
            ArgumentError, match="foreground=True: expected a command that is given the terminal"
        ):
            await ns.popen(["true"], foreground=True, **more)
        assert (await ns.run(["true"])).returncode == 0
