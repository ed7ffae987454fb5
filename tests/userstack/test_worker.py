"""The worker process: it does what the other drivers do, gives up what it can, and ends when it should."""

# ruff: noqa: PT012 - what raises is a whole `async with` block

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from netns_kit import (
    AddressError,
    DeviceGone,
    DnsSettings,
    Flow,
    Forwarder,
    Limits,
    NotImportable,
    PortInUseError,
    Record,
    Refusal,
    SandboxUnavailable,
    StackClosed,
    StackCrashed,
    TapDevice,
    Uplink,
    UserStack,
)
from netns_kit.child import child
from netns_kit.child.channel import Channel
from netns_kit.forwarder import forwarder
from netns_kit.forwarder.ports import PortForward
from netns_kit.gateway.captures import Captures
from netns_kit.stack.wire import ethernet
from netns_kit.userstack import userstack
from netns_kit.userstack.worker import owner, pool
from netns_kit.userstack.worker.sandbox import KEPT, ON
from tests.support import ROOT, children, dns_hooks, uplinks
from tests.support.packets import GATEWAY, GATEWAY_MAC, GUEST_MAC, datagram, echo_request
from tests.support.servers import SECONDS, bounded, cancelled_at_any_moment

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leaks")]

ELSEWHERE = bytes((203, 0, 113, 9))


@asynccontextmanager
async def worker(uplink: Uplink | None = None, **options: Any) -> AsyncIterator[tuple[UserStack, TapDevice]]:
    """A stack in a worker, and the guest's end of its device."""
    guest, host = TapDevice.pair(vnet_header=False)
    async with guest, host, UserStack(host, uplink, driver="worker", **options) as stack:
        yield stack, guest


def send(guest: TapDevice, port: int = 9, payload: bytes = b"x") -> None:
    """A datagram to somewhere far away."""
    packet = datagram(ELSEWHERE, port, payload)
    assert guest.write(ethernet.pack(GATEWAY_MAC, GUEST_MAC, ethernet.IPV4), packet)


async def answer(guest: TapDevice) -> bytes:
    """The next frame."""
    frame = bytearray(2048)
    while (size := guest.read_into(frame)) is None:
        await anyio.wait_readable(guest.fileno())
    return bytes(frame[:size])


def status(pid: int) -> dict[str, str]:
    """Of a process, see proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def limit(pid: int, name: str) -> list[str]:
    """The soft and the hard one, see proc_pid_limits(5)."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line[26:].split()[:2] for line in lines if line.startswith(f"Max {name} "))


async def ended(pid: int) -> None:
    """Wait until that process, nobody's child here, has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await anyio.wait_readable(pidfd)
    finally:
        os.close(pidfd)


# -- it does what the others do --------------------------------------------------------------------------


@bounded
async def test_it_is_another_process_in_a_session_of_its_own() -> None:
    async with worker() as (stack, _):
        pid = stack.workers.processes[0].pid
        assert pid in children()
        assert os.getsid(pid) == pid, "what a terminal sends is not for it"
        soft, hard = limit(pid, "open files")
        assert soft == hard, "each flow has one"
    assert pid not in children()


@bounded
async def test_what_is_asked_is_answered_in_the_same_types() -> None:
    async with worker() as (stack, guest):
        assert await stack.flows() == ()
        send(guest)
        while not (flows := await stack.flows()):
            await anyio.lowlevel.checkpoint()
        assert [(flow.protocol, str(flow.remote), flow.state) for flow in flows] == [
            ("udp", "203.0.113.9:9", "open")
        ]
        stats = await stack.stats()
        assert stats["udp_flows"] == 1
        assert stats["tap_received"] == 1


@bounded
async def test_errors_arrive_as_what_they_are() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with worker() as (stack, _), Forwarder(stack) as forwarder:
            with pytest.raises(PortInUseError, match="taken") as caught:
                await forwarder.add(f"127.0.0.1:{port}:80")
            assert caught.value.errno == 98
            assert caught.value.fix
            with pytest.raises(AddressError, match="expected an address of this host"):
                await forwarder.add("203.0.113.9:0:80")
            with pytest.raises(OSError, match="No such device"):
                await forwarder.add("127.0.0.1%nowhere0:0:80")
            with pytest.raises(KeyError):
                await forwarder.remove(PortForward("tcp", ip("127.0.0.1"), port, None, 80))
            assert await forwarder.list() == ()


def ip(text: str) -> Any:
    from ipaddress import ip_address

    return ip_address(text)


@bounded
async def test_many_ports_at_once() -> None:
    """More than one record of the channel takes, both ways; and all are free afterwards."""
    async with worker() as (stack, _):
        async with Forwarder(stack) as forwarder:
            some = [PortForward("udp", ip("127.0.0.1"), 0, ip("10.0.2.100"), port) for port in range(1, 900)]
            async with anyio.create_task_group() as tasks:
                for forward in some:
                    tasks.start_soon(forwarder.add, forward)
            listening = await forwarder.list()
            assert sorted(each.guest_port for each in listening) == list(range(1, 900))
        async with Forwarder(stack) as other:
            assert await other.list() == ()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", listening[0].host_port))


@bounded
async def test_forwarders_of_one_stack_have_their_own_ports() -> None:
    async with worker() as (stack, _), Forwarder(stack) as one:
        (mine,) = await one.add("127.0.0.1:0:80")
        async with Forwarder(stack) as other:
            (theirs,) = await other.add("127.0.0.1:0:80")
            with pytest.raises(KeyError):
                await other.remove(mine)
            assert await other.list() == (theirs,)
        assert await one.list() == (mine,)


@bounded
async def test_limits_and_the_device_go_along() -> None:
    guest, host = TapDevice.pair(vnet_header=True, mtu=9000)
    async with guest, host, UserStack(host, driver="worker", limits=Limits(udp_flows=2)) as stack:
        for port in range(5):
            header = ethernet.pack(GATEWAY_MAC, GUEST_MAC, ethernet.IPV4)
            assert guest.write(bytes(10), header, datagram(ELSEWHERE, 9 + port))
        while (await stack.stats())["tap_received"] < 5:
            await anyio.lowlevel.checkpoint()
        assert (await stack.stats())["udp_flows"] == 2


@bounded
async def test_a_quick_conversation() -> None:
    """Questions so quick that it polls for them, which takes calls of its own."""
    async with worker() as (stack, guest):
        frame = bytearray(2048)
        for _ in range(1000):
            header = ethernet.pack(GATEWAY_MAC, GUEST_MAC, ethernet.IPV4)
            assert guest.write(header, echo_request(GATEWAY))
            while guest.read_into(frame) is None:
                assert select.select([guest.fileno()], [], [], SECONDS)[0]
        assert (await stack.stats())["tap_received"] == 1000


@bounded
async def test_what_it_is_asked_after_the_block() -> None:
    async with worker() as (stack, _):
        pass
    with pytest.raises(StackClosed):
        await stack.flows()


@bounded
async def test_a_question_that_is_taken_back_does_no_harm() -> None:
    async with worker() as (stack, _):
        for _ in range(20):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await stack.flows()
        assert (await stack.stats())["udp_flows"] == 0


# -- policies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [uplinks.refuse, uplinks.Saying(Refusal.PROHIBITED), partial(uplinks.refuse_ports, frozenset({9}))],
    ids=["function", "object", "partial"],
)
@bounded
async def test_a_policy_decides_there(policy: Any) -> None:
    async with worker(Uplink(policy=policy)) as (stack, guest):
        send(guest)
        frame = await answer(guest)
        assert frame[ethernet.SIZE + 20 : ethernet.SIZE + 22] == bytes((3, 13)), "administratively prohibited"
        assert (await stack.stats())["flows_refused"] == 1


@bounded
async def test_a_policy_knows_the_local_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Though it can read no file: CPython has read the zone when it imported `time`."""
    zone = tmp_path / "zone"  # RFC 9636: one type, 5:45 east of Greenwich
    zone.write_bytes(
        b"TZif"
        + bytes(16)
        + struct.pack(">6I", 0, 0, 0, 0, 1, 4)
        + struct.pack(">iBB4s", 20700, 0, 0, b"XXX")
    )
    monkeypatch.setenv("TZ", f":{zone}")
    async with worker(Uplink(policy=uplinks.out_of_hours, dns=[])) as (stack, guest):
        send(guest)
        while not (stats := await stack.stats())["tap_received"]:
            await anyio.lowlevel.checkpoint()
        assert stats["flows_refused"] == 0


def _of_main(flow: Flow) -> None:
    """As one that a program's own file defines."""


_of_main.__module__ = "__main__"


class _Unpicklable(Uplink):
    def __init__(self) -> None:
        super().__init__()
        self.sock = socket.socketpair

    def __reduce__(self) -> Any:
        raise ValueError("not me")


@pytest.mark.parametrize(
    ("uplink", "why"),
    [
        (Uplink(policy=lambda _: Refusal.PROHIBITED), "lambda"),
        (
            Uplink(policy=_of_main),
            "`_of_main`, .* the program's own file .* define it in a module beside the program",
        ),
        (Uplink(dns=DnsSettings(hook=lambda _: None)), "lambda"),
        (Uplink(dns=DnsSettings(hook=partial(dns_hooks.known, []))), "may change"),
        (_Unpicklable(), "not me"),
        (Uplink(policy=uplinks.Changing()), "may change"),
        (Uplink(policy=uplinks.Changing().policy), "may change"),
        (Uplink(policy=partial(uplinks.refuse_ports, {9})), "may change"),
        (Uplink(policy=partial(uplinks.Changing())), "may change"),
        (Uplink(policy=partial(uplinks.Holding([1]))), "may change"),
        (Uplink(policy=uplinks.Holding(frozenset({(1, uplinks.Changing())}))), "may change"),
    ],
)
async def test_what_it_cannot_import_is_refused_before_anything_runs(uplink: Uplink, why: str) -> None:
    guest, host = TapDevice.pair()
    with pytest.raises(NotImportable, match=why) as caught:
        UserStack(host, uplink, driver="worker")
    assert "thread" in str(caught.value.fix)
    async with guest, host:
        pass


@bounded
async def test_a_hook_may_have_what_does_not_change() -> None:
    hook = partial(dns_hooks.known, (Record("a.test", "192.0.2.1"), Record("a.test", "1 b.test", "MX")))
    async with worker(Uplink(dns=DnsSettings(hook=hook))) as (stack, _):
        assert (await stack.stats())["dns_hooked"] == 0


@bounded
async def test_what_it_does_not_find_ends_it_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A module that is found here, and not there, or is another file there."""
    name = "netns_kit_policy_of_this_test"
    (tmp_path / f"{name}.py").write_text("def policy(flow):\n    return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    policy = __import__(name).policy
    try:
        async with worker(Uplink(policy=policy)):
            pass
        other = tmp_path / "other"
        other.mkdir()
        (other / f"{name}.py").write_text("def policy(flow):\n    return None\n")
        monkeypatch.syspath_prepend(str(other))
        with pytest.raises(NotImportable, match="elsewhere"):
            async with worker(Uplink(policy=policy)):
                pass
        monkeypatch.setattr(sys, "path", [each for each in sys.path if str(tmp_path) not in each])
        with pytest.raises(NotImportable, match=name):
            async with worker(Uplink(policy=policy)):
                pass
    finally:
        del sys.modules[name]


# -- the sandbox -----------------------------------------------------------------------------------------


@bounded
async def test_every_layer_is_on() -> None:
    async with worker() as (stack, _):
        assert dict(stack.sandbox) == dict.fromkeys(
            ("core", "dumpable", "capabilities", "no_new_privs", "landlock", "seccomp"), ON
        )
        pid = stack.workers.processes[0].pid
        told = status(pid)
        assert told["NoNewPrivs"] == "1"
        assert told["Seccomp"] == "2"
        assert told["Threads"] == "1"
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(told[name], 16) & ~KEPT == 0, name
        if os.geteuid() == 0:
            assert int(told["CapEff"], 16) == KEPT
            assert int(told["CapBnd"], 16) == 0
        else:
            assert os.stat(f"/proc/{pid}/mem").st_uid == 0, "not dumpable: it is not ours to look into"
        assert limit(pid, "core file size") == ["0", "0"]


@bounded
async def test_what_can_be_done_inside(caplog: pytest.LogCaptureFixture) -> None:
    """A policy tries; what it writes on standard error is logged here."""
    caplog.set_level(logging.WARNING, owner.__name__)
    async with worker(Uplink(policy=uplinks.attempt)) as (stack, guest):
        send(guest)
        await answer(guest)
        while not any("the end" in line for line in caplog.messages):
            await stack.flows()
    outcomes = dict(json.loads(line) for line in caplog.messages)
    assert outcomes.pop("the end") == "done"
    assert outcomes.keys() == uplinks.ATTEMPTS.keys()
    assert {name for name, outcome in outcomes.items() if outcome == "done"} == uplinks.ALLOWED
    assert set(outcomes.values()) == {"done", "EPERM", "EACCES"}
    with pytest.raises(FileNotFoundError):
        os.unlink(uplinks.new_file(os.getpid()))


@pytest.mark.parametrize("what", ["forwarder", "events"])
@bounded
async def test_one_that_does_not_answer_holds_nobody_up(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does it hold up leaving the block, which ends it."""
    monkeypatch.setattr(child, "PATIENCE", 0.2)
    monkeypatch.setattr(forwarder, "CLOSING_SECONDS", 0.2)
    monkeypatch.setattr(userstack, "CLOSING_SECONDS", 0.2)
    async with worker() as (stack, _):
        if what == "forwarder":
            async with Forwarder(stack):
                os.kill(stack.workers.processes[0].pid, signal.SIGSTOP)
        else:
            async with aclosing(stack.events()) as events, anyio.create_task_group() as tasks:
                tasks.start_soon(events.__anext__)
                await stack.flows()  # by then it has subscribed
                os.kill(stack.workers.processes[0].pid, signal.SIGSTOP)
                tasks.cancel_scope.cancel()


@pytest.mark.parametrize("call", uplinks.FATAL)
@bounded
async def test_what_nobody_means_well_by_kills_it(call: str) -> None:
    with pytest.raises(StackCrashed, match="SIGSYS"):
        async with worker(Uplink(policy=uplinks.die)) as (stack, guest):
            send(guest, 1000 + list(uplinks.FATAL).index(call))
            await stack.wait_closed()


WITHOUT = """
from netns_kit.userstack.worker import sandbox
def missing(calls, *, files):
    raise sandbox.Missing("not on this kernel")
sandbox._few_calls = missing
"""


@bounded
async def test_a_layer_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    path, rest = child.BOOT.split("__import__", 1)
    monkeypatch.setattr(child, "BOOT", f"{path}{WITHOUT}__import__{rest}")
    async with worker() as (stack, _):
        assert stack.sandbox["seccomp"] == "not on this kernel"
        assert stack.sandbox["landlock"] == ON
    with pytest.raises(SandboxUnavailable, match=r"no seccomp.*not on this kernel"):
        async with worker(require=["landlock", "seccomp"]):
            pytest.fail("it runs")


async def test_what_can_be_required() -> None:
    guest, host = TapDevice.pair()
    async with guest, host:
        with pytest.raises(ValueError, match="require='armour': expected 'core'"):
            UserStack(host, driver="worker", require=["armour"])  # type: ignore[list-item]  # that is the point
        with pytest.raises(ValueError, match="expected 'worker', which alone has a sandbox"):
            UserStack(host, driver="thread", require=["seccomp"])
        with pytest.raises(ValueError, match="driver='horse': expected 'thread'"):
            UserStack(host, driver="horse")  # type: ignore[arg-type]  # the same


# -- how it ends -----------------------------------------------------------------------------------------


@bounded
async def test_killed() -> None:
    with pytest.raises(StackCrashed, match="killed by SIGKILL"):
        async with worker() as (stack, _), Forwarder(stack) as forwarder:
            await forwarder.add("127.0.0.1:0:80")
            os.kill(stack.workers.processes[0].pid, signal.SIGKILL)
            await stack.wait_closed()


@bounded
async def test_killed_while_it_is_asked() -> None:
    with pytest.raises(StackCrashed, match="killed by SIGKILL"):
        async with worker() as (stack, _):
            os.kill(stack.workers.processes[0].pid, signal.SIGSTOP)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_crashes, stack)
                await anyio.wait_all_tasks_blocked()
                os.kill(stack.workers.processes[0].pid, signal.SIGKILL)


async def _crashes(stack: UserStack) -> None:
    """What is asked ends with the failure, at once."""
    with pytest.raises(StackCrashed):
        await stack.flows()


@pytest.mark.parametrize("death", uplinks.DEATHS)
@bounded
async def test_a_death_is_told_by_its_name(death: str) -> None:
    with pytest.raises(StackCrashed, match=death) as caught:
        async with worker(Uplink(policy=uplinks.die)) as (stack, guest):
            send(guest, 2000 + list(uplinks.DEATHS).index(death))
            await stack.wait_closed()
    if death.startswith("SIG"):
        assert "uplinks.py" in str(caught.value.value), "and where it was, by faulthandler"


@bounded
async def test_a_bug_is_told_with_its_traceback() -> None:
    with pytest.raises(StackCrashed, match="LookupError: a bug") as caught:
        async with worker(uplinks.Broken()) as (stack, guest):
            send(guest)
            await stack.wait_closed()
    assert "uplinks.py" in str(caught.value)
    assert "status 1" in str(caught.value)


@bounded
async def test_a_device_that_goes_away() -> None:
    with pytest.raises(DeviceGone):
        async with worker() as (stack, guest):
            await guest.close()
            await stack.wait_closed()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that we had to kill."""
    pids: list[int] = []
    real = subprocess.Popen.kill

    def kill(process: subprocess.Popen[bytes]) -> None:
        pids.append(process.pid)
        real(process)

    monkeypatch.setattr(subprocess.Popen, "kill", kill)
    return pids


@bounded
async def test_left_it_ends_by_itself(monkeypatch: pytest.MonkeyPatch, killed: list[int]) -> None:
    monkeypatch.setattr(child, "PATIENCE", 10)
    async with worker() as (_, guest):
        send(guest)
    assert killed == []


@bounded
async def test_one_that_was_stopped_ends_by_itself(
    monkeypatch: pytest.MonkeyPatch, killed: list[int]
) -> None:
    monkeypatch.setattr(child, "PATIENCE", 10)
    async with worker() as (stack, _):
        os.kill(stack.workers.processes[0].pid, signal.SIGSTOP)
    assert killed == []


@bounded
async def test_one_that_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch, killed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child, "PATIENCE", 0.1)
    caplog.set_level(logging.WARNING, owner.__name__)
    async with worker(Uplink(policy=uplinks.stuck)) as (stack, guest):
        pid = stack.workers.processes[0].pid
        send(guest)
        while "stuck" not in caplog.messages:  # noqa: ASYNC110 - a log tells nobody
            await anyio.sleep(0.01)
    assert killed == [pid]


@bounded
async def test_cancelled_at_any_moment_of_entering() -> None:
    await cancelled_at_any_moment(worker)


OWNER = """
import os, sys
import anyio
from netns_kit import Forwarder, TapDevice, UserStack

async def main():
    guest, host = TapDevice.pair()
    async with guest, host, UserStack(host, driver="worker") as stack, Forwarder(stack) as forwarder:
        (forward,) = await forwarder.add("127.0.0.1:0:80")
        if sys.argv[1:]:
            if os.fork() == 0:  # it has a copy of everything
                sys.stdin.read()
                os._exit(0)
        print(stack.workers.processes[0].pid, forward.host_port, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


@pytest.mark.parametrize("forks", [(), ("forks",)])
@bounded
async def test_it_dies_with_its_owner(forks: tuple[str, ...]) -> None:
    owner = subprocess.Popen(  # noqa: ASYNC220 - as anybody may start one
        [sys.executable, "-W", "ignore", "-c", OWNER, *forks],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert owner.stdin is not None
    assert owner.stdout is not None
    with owner.stdin, owner.stdout:
        pid, port = map(int, (await anyio.to_thread.run_sync(owner.stdout.readline)).split())
        owner.kill()
        await ended(pid)
        owner.wait(SECONDS)
    with socket.create_server(("127.0.0.1", port)):
        pass


@bounded
async def test_a_user_who_has_many_pipes_has_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the hundredth worker on: pipe(7), pipe-user-pages-soft."""
    real = fcntl.fcntl

    def refusing(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETPIPE_SZ:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    async with worker() as (stack, _):
        assert await stack.flows() == ()


# -- a worker that has been taken over ------------------------------------------------------------------

READY = b'["ready",{}]'
EVIL = """
import os, socket, sys
sock = socket.socket(fileno=int(sys.argv[3]))
sock.recv(99999)
for record in {records!r}:
    sock.send(record)
sock.recv(1)
"""


@pytest.mark.parametrize(
    "records",
    [
        [b"x"],
        [b"\0"],
        [b"not JSON"],
        [b"[" * 30000],
        [b'["ready",{},1]'],
        [b'["ready",{"seccomp":1}]'],
        [READY, READY],
        [READY, b'["result",[]]'],
        [READY, b'["error",["",["x"]]]'],
        [READY, b'["news",true]'],
        [READY, b'["news",NaN]'],
        [READY, b'["exec","x"]'],
        [READY, b'["failed",["SystemExit",[0]]]'],
        [READY, b'["failed",["AddressError",[[]]]]'],
        [READY, b'["failed",["AddressError",[]]]'],
        [READY, pickle.dumps(print)],
        [READY, b"x" * 40000],
        [READY, b"x" * 32769],
    ],
)
@bounded
async def test_what_it_says_is_data(monkeypatch: pytest.MonkeyPatch, records: list[bytes]) -> None:
    monkeypatch.setattr(child, "BOOT", EVIL.format(records=records))
    with pytest.raises(StackCrashed, match="makes no sense"):
        async with worker() as (stack, _):
            await stack.wait_closed()


@pytest.mark.parametrize(
    "answer",
    [
        b'["result",{"a":"b"}]',
        b'["result",[["tcp",["10.0.2.100",1],["10.0.2.2","2"],"open"]]]',
        b'["result",[["sctp",["10.0.2.100",1],["10.0.2.2",2],"open"]]]',
        b'["result",[["tcp",["10.0.2.100",1],["10.0.2.2",2]]]]',
        b'["result",[["tcp",["10.0.2.500",1],["10.0.2.2",2],"open"]]]',
    ],
)
@bounded
async def test_an_answer_is_of_the_type_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    evil = EVIL.replace("sock.recv(1)", "sock.recv(9999)\nsock.send({answer!r})\nsock.recv(1)")
    monkeypatch.setattr(child, "BOOT", evil.format(records=[READY], answer=answer))
    with pytest.raises(StackCrashed, match="makes no sense"):
        async with worker() as (stack, _):
            await stack.flows()


FLOOD = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[3]))
sock.recv(99999)
sock.send({ready!r})
while True:
    sock.send({record!r})
"""


@pytest.mark.parametrize("record", [b'["news",1]', b"x" * 32768])
@bounded
async def test_a_flood_leaves_the_loop_its_turns(monkeypatch: pytest.MonkeyPatch, record: bytes) -> None:
    monkeypatch.setattr(child, "BOOT", FLOOD.format(ready=READY, record=record))
    turns = 0
    try:
        async with worker():
            while turns < 20:
                await anyio.sleep(0.001)
                turns += 1
    except StackCrashed as error:
        assert "more than" in str(error)  # noqa: PT017 - it may come to this, or not
        assert turns


@bounded
async def test_however_much_it_says_others_have_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is always one more message, up to a point."""
    said = turns = 0

    def one_more(_: Channel) -> bytes:
        nonlocal said
        said += 1
        if said > 100 * owner.MESSAGES_AT_ONCE:
            raise ValueError("enough")
        return b'["news",1]'

    with pytest.raises(StackCrashed, match="enough"):
        async with worker() as (stack, _), anyio.create_task_group() as tasks:
            monkeypatch.setattr(Channel, "receive", one_more)
            tasks.start_soon(_crashes, stack)  # the answer is never read
            while stack.supervisor.failure is None:
                await anyio.lowlevel.checkpoint()
                turns += said > 0
    assert turns > 50


@bounded
async def test_what_it_writes_is_bounded_and_harmless(caplog: pytest.LogCaptureFixture) -> None:
    """Its owner does not listen for a while: it goes on, and what nobody reads is lost."""
    caplog.set_level(logging.WARNING, owner.__name__)
    async with worker(Uplink(policy=uplinks.chatter)) as (stack, guest):
        send(guest)
        assert select.select([guest.fileno()], [], [], SECONDS)[0], "our loop stood still meanwhile"
        await stack.flows()
    assert 0 < len(caplog.messages) <= owner.LINES_LOGGED + 1
    assert caplog.messages[-1].endswith("the rest is not logged")
    assert not any("\x1b" in line for line in caplog.messages)


@pytest.mark.parametrize("ended", [0, 1])
async def test_descriptors_for_workers_of_which_one_has_ended_are_closed(ended: int) -> None:
    """What it holds for the others too: the fixture looks for descriptors that are left."""
    given = [os.pipe() for _ in range(2)]
    taken: list[int] = []

    class Fake:
        def __init__(self, number: int) -> None:
            self.number = number

        def put(self, *_: object, fds: Sequence[int]) -> owner.Question:
            if self.number == ended:
                for fd in fds:
                    os.close(fd)
                raise StackClosed("it has ended")
            taken.extend(fds)
            return owner.Question(type(None))

    workers = pool.Workers.__new__(pool.Workers)
    workers.processes = (Fake(0), Fake(1))  # type: ignore[assignment]  # they have what is needed
    workers._ended = anyio.Event()
    workers._ended.set()
    with pytest.raises(StackClosed):
        await workers.hand(given, Captures.begin)
    assert taken == [*given[0]] * ended
    for fd in taken:
        os.close(fd)
