"""Commands of ours as processes among others: streams, signals, job control, exit statuses, as with env(1)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from netns_kit.cli.command_line import FAILED
from netns_kit.cli.run import NOT_EXECUTABLE, NOT_FOUND
from tests.support import ROOT, needs, needs_tun
from tests.support.servers import SECONDS

pytestmark = pytest.mark.usefixtures("leaks")

NETNS_KIT = [sys.executable, "-m", "netns_kit"]
CATCHABLE = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
STOPPING = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
HARMLESS = {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
TOLD = """
import os, signal, sys
wanted = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
print("ready", os.getpid(), flush=True)
while True:
    number = signal.sigwaitinfo(wanted).si_signo
    print("had", number, flush=True)
    if number == signal.SIGTERM:
        break
"""


@pytest.fixture(autouse=True)
def _tun() -> None:
    needs_tun()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def default_signals() -> None:
    """However the tests were started: nohup and shells without job control leave some ignored."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Lines:
    """A file's lines, each waited for, with a bound."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""

    def until(self, wanted: str) -> str:
        """All that is said until `wanted`, a pattern, matches; it is taken with that."""
        while True:
            text = self._rest.decode(errors="replace")
            if found := re.search(wanted, text):
                self._rest = text[found.end() :].encode()
                return text[: found.end()]
            assert select.select([self._fd], [], [], SECONDS)[0], f"no {wanted!r} in {text!r}"
            try:
                piece = os.read(self._fd, 4096)
            except OSError:  # of a terminal that nobody has open any more
                piece = b""
            assert piece, f"it ended without {wanted!r}: {text!r}"
            self._rest += piece

    def rest(self) -> str:
        """All that is said until nobody can say more."""
        while True:
            assert select.select([self._fd], [], [], SECONDS)[0], "it is still open"
            if not (piece := os.read(self._fd, 4096)):
                break
            self._rest += piece
        return self._rest.decode(errors="replace")


@contextlib.contextmanager
def running(*command: str, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], Lines]]:
    """`netns-kit run -- COMMAND` and what it says; killed at the end of the block."""
    with subprocess.Popen(
        [*NETNS_KIT, "run", "--", *command],
        stdout=subprocess.PIPE, env=environment(), preexec_fn=default_signals, **options,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            yield process, Lines(process.stdout.fileno())
        finally:
            process.kill()


# ruff: noqa: PLW1509 - no test here has threads when it forks

# -- standard streams -----------------------------------------------------------------------------------

WHOLE = "given", "closed", "full", "unread"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """What a shell makes of a line in which `$N` is netns-kit."""
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True, text=True, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL,
        env=environment(N=" ".join(NETNS_KIT)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stdin", "stdout", "stderr"),
    [  # each pair of two streams' ways, once
        ((number + other) % 2 == 0, stdout, stderr)
        for number, stdout in enumerate(WHOLE)
        for other, stderr in enumerate(WHOLE)
    ],
)
def test_the_command_has_the_streams_that_were_given(
    stdin: bool, stdout: str, stderr: str, tmp_path: Path
) -> None:
    """And runs, whatever they are; a notice of ours (the port) is never in its files."""
    streams: dict[int, str] = {}
    ways = {"given": str(tmp_path / "file"), "full": "/dev/full", "unread": "pipe"}
    code = (
        "import os, sys, errno\n"
        "def way(fd):\n"
        "    try:\n"
        "        return os.readlink(f'/proc/self/fd/{fd}').partition(':')[0]\n"
        "    except OSError:\n"
        "        return 'closed'\n"
        "ways = ' '.join(map(way, range(3)))\n"
        "open(sys.argv[1], 'w').write(ways)\n"
        "sys.exit(7)"
    )
    said = tmp_path / "said"
    reader, writer = os.pipe()
    os.close(reader)

    def arrange() -> None:
        for number, wanted in ((0, "given" if stdin else "closed"), (1, stdout), (2, stderr)):
            if wanted == "closed":
                os.close(number)
            else:
                fd = writer if wanted == "unread" else os.open(ways[wanted], os.O_RDWR | os.O_CREAT)
                os.dup2(fd, number)

    try:
        done = subprocess.run(
            [*NETNS_KIT, "run", "-p", "127.0.0.1:0:80", "--", sys.executable, "-I", "-S", "-c", code, said],
            preexec_fn=arrange, timeout=SECONDS, check=False, env=environment(), pass_fds=[writer],
        )  # fmt: skip
    finally:
        os.close(writer)
    assert done.returncode == 7
    for number, wanted in ((0, "given" if stdin else "closed"), (1, stdout), (2, stderr)):
        streams[number] = "closed" if wanted == "closed" else ways[wanted]
    assert said.read_text().split() == [streams[0], streams[1], streams[2]]
    if stdin or stdout == "given":
        notices = (tmp_path / "file").read_text()
        assert bool(notices) == (stderr == "given"), "the port, on standard error and nowhere else"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-", ">&- 2>&-", "<&- 2>&-"])
@pytest.mark.parametrize("driver", ["thread", "worker"])
def test_nothing_private_takes_the_number_of_a_stream(driver: str, closed: str) -> None:
    command = f"exec $N run --driver {driver} -- sh -c 'echo ready >&7; exec sleep 600' 7>&1 {closed}"
    look = "; ".join(f"readlink /proc/$C_PID/fd/{fd}" for fd in range(3))
    done = shell(f"coproc C {{ {command}; }}; read -u ${{C[0]}}; {look}; kill $C_PID; wait")
    assert set(done.stdout.split()) <= {"/dev/null", *re.findall(r"pipe:\S+", done.stdout)}
    assert done.stdout
    assert "socket" not in done.stdout
    assert "anon" not in done.stdout


COMMANDS = {
    "doctor": "$N doctor",
    "help": "$N run --help",
    "attach": "$N attach 4194305",
    "slirp4netns": "$N slirp4netns 4194305 tap0",
    "slirp4netns help": "$N slirp4netns --help",
    "a wrong option": "$N run --bogus",
    "not found": "$N run -- no-such-command",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_streams_change_no_status(command: str) -> None:
    status = shell(command).returncode
    for streams in ("<&-", ">&-", "2>&-", "2>/dev/full", "<&- >&- 2>&-", "2> >(true)"):
        done = shell(f"{command} {streams}; exit $?")
        assert done.returncode == status, (streams, done.stderr)
        assert "Traceback" not in done.stdout + done.stderr
        if streams == "2>&-":
            assert "netns-kit: " not in done.stdout, "what was for standard error"


@pytest.mark.parametrize("command", ["$N doctor", "$N --help", "$N run --help"])
def test_what_cannot_be_printed_is_a_failure(command: str) -> None:
    done = shell(f"{command} >/dev/full")
    assert (done.returncode, done.stderr) == (
        FAILED,
        "netns-kit: standard output: No space left on device\n",
    )
    done = shell(f"{command} > >(exit) 2>&1; exit $?")
    done = shell(f"set -o pipefail; {command} | exec true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, 1, 128 + signal.SIGPIPE), "printed in time, or not"
    assert done.stderr == ""


def test_who_reads_from_the_command_sees_it_close() -> None:
    with running("sh", "-c", "exec >&- <&-; sleep 600", stdin=subprocess.PIPE) as (process, said):
        assert said.rest() == ""
        assert process.poll() is None
        process.terminate()
        assert process.wait(SECONDS) == -signal.SIGTERM


def test_a_notice_waits_for_nobody() -> None:
    """Standard error is a pipe that somebody has filled, and nobody reads."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
        done = subprocess.run(
            [*NETNS_KIT, "run", "-p", "127.0.0.1:0:80", "--", "true"],
            stderr=writer, timeout=SECONDS, check=False, env=environment(),
        )  # fmt: skip
        assert done.returncode == 0
    finally:
        os.close(reader)
        os.close(writer)


# -- descriptors ----------------------------------------------------------------------------------------


def test_other_descriptors_are_the_commands() -> None:
    assert shell("$N run -- cat /dev/fd/9 9<<<nine").stdout == "nine\n"
    assert shell("$N run -- diff <(echo one) <(echo two)").stdout == "1c1\n< one\n---\n> two\n"
    assert shell("$N run -- sh -c 'ls -l /proc/$$/fd | grep -c socket' ").stdout == "0\n"


def test_more_descriptors_than_can_be_passed() -> None:
    opened = "for i in {20..%d}; do eval \"exec $i</dev/null\"; done; exec $N run -- sh -c 'ls /proc/$$/fd | wc -l'"
    assert int(shell(opened % 260).stdout) > 240
    done = shell(opened % 290)
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert ": expected at most 250 descriptors; close some" in done.stderr
    assert "--pass-fds" not in done.stderr, "there is no such option"


LISTENED = (
    "import os; print(os.environ.get('LISTEN_PID') == str(os.getpid()), "
    "*map(os.environ.get, ('LISTEN_FDS', 'LISTEN_FDNAMES')), os.path.exists('/proc/self/fd/3'))"
)


@pytest.mark.parametrize(
    ("before", "seen"),
    [
        ("exec 3</dev/null; export LISTEN_FDS=1 LISTEN_FDNAMES=web LISTEN_PID=$BASHPID;", "True 1 web True"),
        ("export LISTEN_FDS=1 LISTEN_FDNAMES=web LISTEN_PID=$BASHPID;", "False None None False"),
        ("exec 3</dev/null; export LISTEN_FDS=1 LISTEN_PID=1;", "False 1 None True"),
        ("export LISTEN_FDS=nonsense LISTEN_PID=$BASHPID;", "False None None False"),
    ],
)
def test_socket_activation(before: str, seen: str) -> None:
    """Variables and descriptors come together; those that are for another process are as they were."""
    done = shell(f'{before} exec $N run -- {sys.executable} -S -E -I -c "{LISTENED}"')
    assert done.stdout == f"{seen}\n", done.stderr


# -- what cannot be executed ----------------------------------------------------------------------------


def test_a_script_without_an_interpreter_is_the_shells(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$0: $*"\n')
    script.chmod(0o755)
    (tmp_path / "empty").touch(0o755)
    done = shell(f"$N run -- {script} one 'two three'")
    assert (done.returncode, done.stdout) == (0, f"{script}: one two three\n")
    assert shell(f"PATH=/nowhere:{tmp_path}:$PATH; $N run -- script").stdout == f"{script}: \n"
    assert shell(f"$N run -- {tmp_path}/empty").returncode == 0


def statuses(tmp_path: Path) -> dict[str, str]:
    """Words after `run --` or `env`, by what is wrong with them."""
    plain, folder, busy = tmp_path / "plain", tmp_path / "folder", tmp_path / "busy"
    plain.write_text("true\n")
    folder.mkdir()
    shutil.copy("/bin/true", busy)
    binary, lost, shut = tmp_path / "binary", tmp_path / "lost", tmp_path / "shut"
    binary.write_bytes(b"\x7fELF\2\1\1" + bytes(64))
    lost.write_text("#!/nowhere/interpreter\n")
    for path in (binary, lost):
        path.chmod(0o755)
    (tmp_path / "loop").symlink_to("loop")
    shut.mkdir()
    return {
        "not found": "no-such-command",
        "no such path": "/no/such/command",
        "empty": "''",
        "not executable": str(plain),
        "a folder": str(folder),
        "a folder in PATH": "folder",
        "below a file": f"{plain}/x",
        "a loop": str(tmp_path / "loop"),
        "no interpreter": str(lost),
        "being written": f"{busy} 9>>{busy}",
        "too long a word": "true $(head -c 131072 /dev/zero | tr '\\0' x)",
        "too long a name": "$(head -c 5000 /dev/zero | tr '\\0' x)",
    }


def test_statuses_are_those_of_env(tmp_path: Path) -> None:
    for what, words in statuses(tmp_path).items():
        path = f"export PATH=$PATH:{tmp_path};"
        theirs = shell(f"{path} exec env {words}")
        ours = shell(f"{path} $N run -- {words}")
        if "too long a word" in what:  # by the shell, which could not execute us either
            theirs.returncode = ours.returncode = NOT_EXECUTABLE
        assert ours.returncode == theirs.returncode, (what, ours.stderr, theirs.stderr)
        assert ours.returncode in (NOT_FOUND, NOT_EXECUTABLE)


def test_a_binary_of_another_machine_is_no_script(tmp_path: Path) -> None:
    words = statuses(tmp_path)
    assert words
    done = shell(f"$N run -- {tmp_path}/binary")
    assert done.returncode == NOT_EXECUTABLE
    assert done.stderr == f"netns-kit: {tmp_path}/binary: Exec format error\n"


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    """In a script's first line, also one with the line's end of another system; and a binary's."""
    assert statuses(tmp_path)
    (tmp_path / "crlf").write_bytes(b"#! /bin/sh\r\nexit\r\n")
    binary = Path("/bin/true").read_bytes()
    found = re.search(rb"/[\w./-]+/ld[\w.-]*\0", binary[:4096])
    assert found, "no dynamic binary"
    elsewhere = b"/nowhere/ld".ljust(len(found[0]), b"\0")
    (tmp_path / "foreign").write_bytes(binary.replace(found[0], elsewhere))
    for name in ("crlf", "foreign"):
        (tmp_path / name).chmod(0o755)
    for name, interpreter in (
        ("lost", "/nowhere/interpreter"),
        ("crlf", r"/bin/sh\r"),
        ("foreign", "/nowhere/ld"),
    ):
        done = shell(f"PATH={tmp_path}:$PATH; $N run -- {name}")
        assert done.returncode == NOT_FOUND
        said = f"netns-kit: {name}: its interpreter '{interpreter}': No such file or directory\n"
        assert done.stderr == said
    done = shell("$N run -- no-such-command")
    assert (
        done.stderr == "netns-kit: 'no-such-command' is not found in PATH; install it, or write where it is\n"
    )
    done = shell(f"$N run -- {tmp_path}/plain")
    assert done.stderr == f"netns-kit: {tmp_path}/plain: Permission denied\n"


# -- signals --------------------------------------------------------------------------------------------


def test_every_signal_goes_on_to_the_command_once() -> None:
    with running(sys.executable, "-S", "-c", TOLD) as (process, said):
        said.until("ready .*\n")
        for number in CATCHABLE:
            if number not in {signal.SIGTERM, signal.SIGCONT}:
                process.send_signal(number)
                assert said.until("had .*\n") == f"had {number}\n"
        process.send_signal(signal.SIGCONT)
        said.until(f"had {int(signal.SIGCONT)}\n")
        for _ in range(5):
            process.send_signal(signal.SIGRTMIN)
        for _ in range(5):
            assert said.until("had .*\n") == f"had {int(signal.SIGRTMIN)}\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
        assert said.rest() == f"had {int(signal.SIGTERM)}\n"


def test_a_signal_to_the_group_comes_once() -> None:
    """From kill(2) with a negative pid, as shells have it; the command has it from there."""
    with running(sys.executable, "-S", "-c", TOLD, start_new_session=True) as (process, said):
        said.until("ready .*\n")
        numbers = [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT, signal.SIGRTMIN]
        for number in numbers:
            os.killpg(process.pid, number)
            assert said.until("had .*\n") == f"had {int(number)}\n"
        process.send_signal(signal.SIGUSR2)  # when this has come, so has all that was passed on before
        assert said.until("had .*\n") == f"had {int(signal.SIGUSR2)}\n"
        process.send_signal(signal.SIGINT)
        assert said.until("had .*\n") == f"had {int(signal.SIGINT)}\n"


def test_a_command_in_a_group_of_its_own_has_what_is_sent_to_ours() -> None:
    code = "import os; os.getpgrp() == os.getpid() or os.setpgid(0, 0)\n" + TOLD
    with running(sys.executable, "-S", "-c", code, start_new_session=True) as (process, said):
        said.until("ready .*\n")
        os.killpg(process.pid, signal.SIGINT)
        assert said.until("had .*\n") == f"had {int(signal.SIGINT)}\n"


@pytest.mark.parametrize(
    "number",
    [n for n in CATCHABLE if n not in STOPPING | HARMLESS and not signal.SIGRTMIN < n < signal.SIGRTMAX],
)
def test_it_ends_as_the_command_does(number: int, tmp_path: Path) -> None:
    """By the same signal, and without a core dump."""
    code = f"import os, signal; signal.signal({number}, signal.SIG_DFL); os.kill(os.getpid(), {number})"
    done = subprocess.run(
        [*NETNS_KIT, "run", "--", sys.executable, "-S", "-c", code],
        stderr=subprocess.PIPE, timeout=SECONDS, check=False, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-number, b"")


def test_its_core_is_not_dumped_for_the_command(tmp_path: Path) -> None:
    done = shell(f"cd {tmp_path}; ulimit -c unlimited; $N run -- sh -c 'ulimit -c 0; kill -SEGV $$'; exit $?")
    assert done.returncode == 128 + signal.SIGSEGV
    assert "dumped" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_shell_says_128_and_the_signal() -> None:
    assert shell("$N run -- sh -c 'kill -TERM $$'; echo $?").stdout == f"{128 + signal.SIGTERM}\n"


def test_ignored_signals_stay_ignored() -> None:
    numbers = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGTSTP, signal.SIGUSR1, signal.SIGCHLD]

    def ignore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    code = "import sys; print(open('/proc/self/status').read(), flush=True); sys.stdin.read(1); sys.exit(4)"
    with subprocess.Popen(
        [*NETNS_KIT, "run", "--", sys.executable, "-S", "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), preexec_fn=ignore,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = Lines(process.stdout.fileno())
        mask = int(said.until("SigIgn.*\n").split()[-1], 16)
        assert {number for number in range(1, 65) if mask >> number - 1 & 1} >= {int(n) for n in numbers}
        for number in numbers:
            process.send_signal(number)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(SECONDS) == 4


STARTED = ["sh", "-c", "echo started >&2; exec sleep 600"]


@pytest.mark.parametrize(
    "words",
    [["run", "--", *STARTED], ["attach", str(os.getppid())], ["doctor"], ["--help"],
     ["slirp4netns", "--help"], ["run", "--driver", "worker", "--", *STARTED]],
    ids=lambda words: " ".join(words[:3]),
)  # fmt: skip
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_signal_at_any_moment_makes_a_traceback(words: list[str], number: signal.Signals) -> None:
    """Sent when a command of ours opens its n-th module, to all of it, as a terminal does."""
    moments = range(0, 60, 6)
    code = (
        "import os, sys, signal\n"
        "left = int(sys.argv.pop(1))\n"
        "class Finder:\n"
        "    def find_spec(self, *_):\n"
        "        global left\n"
        "        left -= 1\n"
        f"        if left == 0: os.killpg(0, {int(number)})\n"
        "from netns_kit.cli import commands\n"
        "sys.argv[0] = 'netns-kit'\n"
        "sys.meta_path.insert(0, Finder())\n"
        "commands.main()\n"
    )
    for moment in moments:
        with subprocess.Popen(
            [sys.executable, "-c", code, str(moment or 1), *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(),
            preexec_fn=default_signals, start_new_session=True,
        ) as process:  # fmt: skip
            assert process.stderr is not None
            said = process.stderr.readline()
            if said == "started\n":  # its last module was an earlier one
                os.killpg(process.pid, number)
            assert process.wait(SECONDS) in (-number, 0, 1, 125), words
            assert "Traceback" not in said + process.stderr.read()


def test_no_traceback_of_the_agent_either() -> None:
    """Which is an interpreter that has just been started when the signal comes."""
    code = (
        "import os, signal, subprocess, sys\n"
        "class Popen(subprocess.Popen):\n"
        "    def __init__(self, *arguments, **options):\n"
        "        super().__init__(*arguments, **options)\n"
        "        if library:\n"
        "            signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "        os.killpg(0, signal.SIGINT)\n"
        "library = sys.argv[1] == 'library'\n"
        "subprocess.Popen = Popen\n"
        "if library:\n"
        "    import anyio\n"
        "    from netns_kit import Namespace\n"
        "    async def main():\n"
        "        async with Namespace.create() as ns:\n"
        "            await ns.run(['true'])\n"
        "    anyio.run(main)\n"
        "else:\n"
        "    from netns_kit.cli import commands\n"
        "    commands.main()\n"
    )
    for words, status in ((["library"], 0), (["run", "--", "true"], -signal.SIGINT)):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True, check=False,
            env=environment(), timeout=SECONDS, preexec_fn=default_signals, start_new_session=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (status, "")


# -- job control ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def terminal(*argv: str) -> Iterator[tuple[int, Lines, int]]:
    """An interactive shell on a terminal of its own: the other side, what it says, its pid."""
    needs(argv[0])
    pid, master = pty.fork()
    if pid == 0:
        default_signals()
        os.chdir("/")
        os.execvpe(
            argv[0], argv, environment(PS1="prompt> ", PS2="", ENV="", N=" ".join(NETNS_KIT), TERM="dumb")
        )
    try:
        settings = termios.tcgetattr(master)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(master, termios.TCSANOW, settings)
        said = Lines(master)
        said.until("prompt> ")
        yield master, said, pid
    finally:
        for each in (*children(pid), pid):  # a command that minds the hang-up does not end by it
            os.kill(each, signal.SIGKILL)
        os.close(master)
        os.waitpid(pid, 0)


SHELLS = [("bash", "--norc", "--noprofile", "--noediting", "-i"), ("dash", "-i")]
COUNTER = r"""
import os, signal, sys
n = 0
def count(*_):
    global n
    n += 1
    os.write(1, b"interrupted %d\n" % n)  # not by print, which it may have interrupted
signal.signal(signal.SIGINT, count)
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"had all\n"))
print("ready", flush=True)
for line in sys.stdin:
    print("heard", n, line, flush=True)
    if line == "end\n":
        break
"""


@pytest.fixture(params=SHELLS, ids=lambda words: words[0])
def interactive(request: pytest.FixtureRequest) -> Iterator[tuple[int, Lines, int]]:
    with terminal(*request.param) as opened:
        yield opened


@pytest.mark.parametrize("line", ["{}", 'sh -c "trap : INT; {}; true"'], ids=["alone", "in a script"])
def test_ctrl_c_comes_once(interactive: tuple[int, Lines, int], line: str, tmp_path: Path) -> None:
    """In a process group of the command's own, and in that of a script, which is ours too."""
    master, said, shell_pid = interactive
    (tmp_path / "counter.py").write_text(COUNTER)
    os.write(master, (line.format(f"$N run -- {sys.executable} {tmp_path}/counter.py") + "\n").encode())
    said.until("ready\r\n")
    (ours,) = children(shell_pid)
    in_script = line.startswith("sh")
    if in_script:
        (ours,) = children(ours)
    for number in range(1, 4):
        if (
            in_script
        ):  # whose shell does not mind: what we pass on must not come before the command has the first
            os.kill(ours, signal.SIGSTOP)
            wait_state({ours: "T"})
        os.write(master, b"\x03")
        said.until(f"interrupted {number}\r\n")
        os.kill(ours, signal.SIGCONT)
        os.kill(ours, signal.SIGUSR1)  # when this has come, so has all that was passed on before
        said.until("had all\r\n")
    os.write(master, b"end\n")
    assert "heard 3 end" in said.until("prompt> ")


def test_ctrl_c_ends_what_it_ends(interactive: tuple[int, Lines, int]) -> None:
    master, said, _ = interactive
    os.write(master, b"$N run -- sh -c 'echo ready; exec sleep 600'\n")
    said.until("ready\r\n")
    os.write(master, b"\x03")
    said.until("prompt> ")
    os.write(master, b"echo status $?\n")
    said.until("status 130\r\n")


def test_ctrl_z_and_on_again(interactive: tuple[int, Lines, int]) -> None:
    """Stopped with its command, continued in the foreground, and in the background, where it may not read."""
    master, said, shell_pid = interactive
    os.write(master, b"$N run -- sh -c 'echo ready; read x; echo got $x; read x; echo got $x; exit 9'\n")
    said.until("ready\r\n")
    os.write(master, b"\x1a")
    assert "topped" in said.until("prompt> ")
    os.write(master, b"fg\n")
    said.until("\r\n")
    os.write(master, b"one\n")
    said.until("got one\r\n")
    os.write(master, b"\x1a")
    said.until("prompt> ")
    job = children(shell_pid)[0]
    os.write(master, b"bg\n")
    said.until("prompt> ")
    wait_state({job: "T"})  # SIGTTIN
    os.write(master, b"fg\n")
    said.until("\r\n")
    os.write(master, b"two\n")
    said.until("got two\r\n")
    said.until("prompt> ")
    os.write(master, b"echo status $?\n")
    said.until("status 9\r\n")


def test_in_the_background_with_tostop(interactive: tuple[int, Lines, int]) -> None:
    """SIGTTOU stops the command, and us with it; not our notice."""
    master, said, shell_pid = interactive
    os.write(master, b"stty tostop; $N run -p 127.0.0.1:0:80 -- sh -c 'echo written' &\n")
    said.until("netns-kit: .*\r\n")
    wait_state({children(shell_pid)[0]: "T"})
    os.write(master, b"echo seen\n")
    assert "written\r" not in said.until("seen\r\n")
    os.write(master, b"fg\n")
    said.until("written\r\n")


def test_a_program_that_minds_ctrl_z_stops_when_it_is_ready(interactive: tuple[int, Lines, int]) -> None:
    """As full-screen programs do: they put the terminal in order, and stop then.  We stop with them, not before."""
    master, said, _ = interactive
    code = (
        "trap \"trap - TSTP; echo tidy; kill -TSTP \\$\\$; echo back; exit 5\" TSTP; echo ready; "
        "while :; do :; done"
    )  # fmt: skip
    os.write(master, f"$N run -- bash -c '{code}'\n".encode())
    said.until("ready\r\n")
    os.write(master, b"\x1a")
    text = said.until("prompt> ")
    assert text.index("tidy") < text.index("topped")
    os.write(master, b"fg\n")
    said.until("back\r\n")
    said.until("prompt> ")
    os.write(master, b"echo status $?\n")
    said.until("status 5\r\n")


def test_a_program_that_ignores_ctrl_z_goes_on(interactive: tuple[int, Lines, int]) -> None:
    master, said, _ = interactive
    os.write(master, b"$N run -- sh -c 'trap \"\" TSTP; echo ready; read x; echo got $x'\n")
    said.until("ready\r\n")
    os.write(master, b"\x1a")
    os.write(master, b"one\n")
    said.until("got one\r\n")


def test_a_shell_inside_has_jobs_of_its_own(interactive: tuple[int, Lines, int]) -> None:
    """And suspends itself: its group is another than ours, so the continuing shell outside does not reach it."""
    master, said, _ = interactive
    os.write(master, b"PS1='inner> ' $N run -- bash --norc --noprofile --noediting -i\n")
    said.until("inner> ")
    for key in (b"\x03", b"\x1a"):
        os.write(master, b"sh -c 'echo started; exec sleep 600'\n")
        said.until("started\r\n")
        os.write(master, key)
        if key == b"\x03":
            said.until("inner> ")
    assert "topped" in said.until("inner> ")
    os.write(master, b"kill -9 %1; wait %1; suspend\n")
    said.until("prompt> ")
    os.write(master, b"fg\n")
    said.until("inner> ")
    os.write(master, b"exit 6\n")
    said.until("prompt> ")
    os.write(master, b"echo status $?\n")
    said.until("status 6\r\n")


def test_a_shell_inside_can_give_the_terminal_back(interactive: tuple[int, Lines, int]) -> None:
    """To the process group that it has found: ours has no number in its PID namespace."""
    needs("dash")
    master, said, _ = interactive
    os.write(master, b"PS1='inner> ' $N run -- dash -i\n")
    said.until("inner> ")
    os.write(master, b"exit 6\n")
    assert "annot" not in said.until("prompt> ")
    os.write(master, b"echo status $?; read x; echo got $x\n")
    said.until("status 6\r\n")
    os.write(master, b"one\n")
    said.until("got one\r\n")


def test_what_the_command_has_started_stops_and_goes_on_with_it(interactive: tuple[int, Lines, int]) -> None:
    """Though its process group is another than ours: in the foreground, in the background, and brought back from it
    while it runs, when only we have the terminal.
    """
    master, said, shell_pid = interactive
    os.write(master, b"$N run -- sh -c '(echo ready; read x; echo got $x; read x; echo got $x); exit 9'\n")
    said.until("ready\r\n")
    (ours,) = children(shell_pid)
    _, command = agent_and_command(ours)
    (inner,) = children(command)
    os.write(master, b"\x1a")
    said.until("prompt> ")
    wait_state({ours: "T", command: "T", inner: "T"})
    os.write(master, b"fg\n")
    said.until("\r\n")
    wait_state({ours: "S", command: "S", inner: "S"})
    os.write(master, b"one\n")
    said.until("got one\r\n")
    os.write(master, b"\x1a")
    said.until("prompt> ")
    wait_state({ours: "T", command: "T", inner: "T"})  # else it may read what follows, before it stops
    os.write(master, b"kill -HUP %1; fg\n")  # to our group
    said.until("prompt> ")
    os.write(master, b"echo status $?\n")
    said.until("status 129\r\n")


def test_a_job_that_runs_is_brought_to_the_foreground(
    interactive: tuple[int, Lines, int], tmp_path: Path
) -> None:
    """Then the shell may tell us nothing: that the command's group has not the terminal shows when it reads."""
    master, said, shell_pid = interactive
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    os.write(master, f"$N run -- sh -c 'echo ready; read x <{fifo}; read x; echo got $x; exit 9'\n".encode())
    said.until("ready\r\n")
    os.write(master, b"\x1a")
    said.until("prompt> ")
    os.write(master, b"bg\n")
    said.until("prompt> ")
    os.write(master, b"fg\n")
    said.until("\r\n")
    while os.tcgetpgrp(master) == shell_pid:
        os.sched_yield()
    fifo.write_text("go on\n")
    os.write(master, b"two\n")
    said.until("got two\r\n")
    said.until("prompt> ")
    os.write(master, b"echo status $?\n")
    said.until("status 9\r\n")


def test_others_of_the_job_share_the_terminal(interactive: tuple[int, Lines, int]) -> None:
    """A pager behind a pipe reads from it, and a script that has started us has its signals."""
    master, said, _ = interactive
    os.write(master, b"$N run -- echo text | sh -c 'cat; read x </dev/tty; echo got $x'\n")
    said.until("text\r\n")
    os.write(master, b"one\n")
    said.until("got one\r\n")
    said.until("prompt> ")
    script = "trap 'echo had' INT; $N run -- sh -c 'echo ready; exec sleep 600'; echo on"
    os.write(master, f'sh -c "{script}"\n'.encode())
    said.until("ready\r\n")
    os.write(master, b"\x03")
    said.until("had\r\n")
    said.until("on\r\n")


def test_the_window_changes_once(interactive: tuple[int, Lines, int]) -> None:
    master, said, _ = interactive
    os.write(master, f"$N run -- {sys.executable} -S -c '{TOLD}'\n".encode())
    said.until("ready .*\r\n")
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 33, 44, 0, 0))
    said.until(f"had {int(signal.SIGWINCH)}\r\n")
    os.write(master, b"\x03")
    assert said.until(f"had {int(signal.SIGINT)}\r\n").count("had") == 1


def test_stopped_and_continued_by_others(interactive: tuple[int, Lines, int]) -> None:
    """Who stops us alone has the command stopped, and the reverse; continuing is the same."""
    master, said, shell_pid = interactive
    os.write(master, b"$N run -- sh -c 'echo ready; exec sleep 600'\n")
    said.until("ready\r\n")
    (ours,) = children(shell_pid)
    _, command = agent_and_command(ours)
    for stopped, number in ((ours, signal.SIGTSTP), (command, signal.SIGSTOP), (command, signal.SIGTSTP)):
        os.kill(stopped, number)
        wait_state({ours: "T", command: "T"})
        said.until("prompt> ")
        os.write(master, b"fg\n")
        said.until("\r\n")
        wait_state({ours: "S", command: "S"})
    os.kill(command, signal.SIGSTOP)
    wait_state({ours: "T", command: "T"})
    os.kill(command, signal.SIGCONT)
    wait_state({ours: "S", command: "S"})
    said.until("prompt> ")
    os.write(master, b"fg\n")
    said.until("\r\n")
    os.kill(command, signal.SIGHUP)
    said.until("prompt> ")
    os.write(master, b"echo status $?\n")
    said.until("status 129\r\n")


def test_a_stop_that_is_over_when_we_hear_of_it() -> None:
    """We were stopped ourselves then; continued with the command, we do not stop again."""
    code = "import signal, time; signal.signal(10, lambda *_: print('had 10')); print('ready')"
    with running(sys.executable, "-u", "-c", f"{code}\nwhile True: time.sleep(60)") as (process, said):
        said.until("ready\n")
        agent, command = agent_and_command(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        wait_state({process.pid: "T"})
        for attempt in range(20):  # an agent that had no time to see the stop has nothing to tell
            os.kill(command, signal.SIGSTOP)
            wait_state({command: "T", agent: "S"})
            time.sleep(0.01 * attempt)
            os.kill(command, signal.SIGCONT)
            wait_state({command: "S"})
            with suppress(AssertionError):
                wait_state({process.pid: "S"}, SECONDS / 30)
                break
        process.send_signal(signal.SIGUSR1)
        said.until("had 10\n")


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def agent_and_command(ours: int) -> tuple[int, int]:
    """Of a `run`, see agent.py."""
    (parent,) = children(ours)
    (agent,) = children(parent)
    _, command = children(agent)  # the holder is the first
    return agent, command


def wait_state(wanted: dict[int, str], seconds: float = SECONDS) -> None:
    """Wait until these processes are in these states (proc_pid_stat(5)), all threads of those that shall be stopped.

    Fact: a process has stopped, and its shell is told of it, when the last of its threads has.
    """
    seen: dict[int, set[str]] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seen = {pid: set(_states(pid)) for pid in wanted}
        if all(seen[pid] == {state} if state == "T" else state in seen[pid] for pid, state in wanted.items()):
            return
        time.sleep(0.001)
    raise AssertionError(f"{seen}, not {wanted}")


def _states(pid: int) -> Iterator[str]:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            yield (thread / "stat").read_text().rpartition(")")[2].split()[0]
