"""Our side of a conversation with the agent, which is not believed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.child.codec import Nonsense
from netns_kit.errors import NamespaceGone
from netns_kit.namespace.agent_client import (
    AgentProcess,
    Conversation,
    Done,
    NotStarted,
    Ready,
    Started,
    Unmapped,
    parse,
)
from tests.support import Possessions


class Racing:
    """A socket whose first reading says "end", though the answer came just before it."""

    def __init__(self, *readings: bytes) -> None:
        self.readings = list(readings)

    def recvmsg(self, *_: int) -> tuple[bytes, list[Any], int, None]:
        return self.readings.pop(0), [], 0, None


class Impostor(AgentProcess):
    """An agent whose place somebody has taken: a child of ours, `agent`, whose end is all that can come of it."""

    def __init__(self, agent: int = 0) -> None:
        super().__init__()
        self.agent = agent
        self.complaints: list[str] = []

    @property
    def pid(self) -> int:
        return self.agent

    def betrayed(self, why: str) -> NamespaceGone:
        self.complaints.append(why)
        return self.lost(why)


@contextmanager
def conversation(agent: AgentProcess) -> Iterator[tuple[Conversation, socket.socket]]:
    """One, and the agent's end of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with theirs:
        it = Conversation(ours, agent)
        try:
            yield it, theirs
        finally:
            it.close()


def racing(*readings: bytes) -> Conversation:
    return Conversation(cast("socket.socket", Racing(*readings)), Impostor())


def test_an_answer_that_an_end_overtakes_is_read() -> None:
    """About one conversation in twenty thousand, on Linux 6.18: the queue is looked at before the end is."""
    assert racing(b"", b'{"pid": 7}').poll(Started) == (Started(7), [])


def test_an_end_is_an_end() -> None:
    with pytest.raises(NamespaceGone):
        racing(b"", b"").poll(Started)


NONSENSE = [
    b"{", b"[]", b"{}", b"7", b"null", b"\xff", b'"pid"', b"[" * 100_000, b'{"pid": "7"}', b'{"pid": true}',
    b'{"pid": 1.5}', b'{"pid": NaN}', b'{"pid": 7, "more": 1}', b'{"status": 0}', b'{"pid": null}',
    b'{"errno": "x", "op": "", "message": "", "filename": null}',
    b'{"errno": 1, "op": [], "message": "", "filename": null}', b'{"errno": 1}', b'{"pid": 1' + b"0" * 5000 + b"}",
    b'{"pid": 7} {"pid": 7}', b"x" * (1 << 17),
]  # fmt: skip


@pytest.mark.parametrize("record", NONSENSE, ids=lambda record: record[:20].decode(errors="replace"))
@pytest.mark.usefixtures("leaks")
def test_what_makes_no_sense_is_one_error_and_its_descriptors_are_closed(record: bytes) -> None:
    agent = Impostor()
    with conversation(agent) as (it, theirs):
        reader, writer = os.pipe()
        socket.send_fds(theirs, [record], [reader, writer])
        before = Possessions()
        with pytest.raises(NamespaceGone):
            it.poll(Started, 1)
        assert not before.difference()
        assert agent.complaints
        os.close(reader)
        os.close(writer)


KEYS = st.sampled_from(["pid", "errno", "op", "message", "filename", "state", "status"]) | st.text()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(KEYS, each, max_size=5),
)


@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_record_is_an_answer_or_one_error(record: bytes) -> None:
    for kinds in ((Ready, NotStarted, Unmapped), (Started,), (Done,)):
        with suppress(Nonsense):
            assert isinstance(parse(record, *kinds), kinds)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 200])
@pytest.mark.usefixtures("leaks")
def test_descriptors_that_were_not_to_come_are_closed(count: int) -> None:
    for wanted in range(3):
        agent = Impostor()
        with conversation(agent) as (it, theirs), open(os.devnull) as file:
            socket.send_fds(theirs, [b"{}"], [file.fileno()] * count)
            before = Possessions()
            if count == wanted:
                received = it.poll(Done, wanted)
                assert received is not None
                for fd in received[1]:
                    assert not os.get_inheritable(fd)
                    os.close(fd)
            else:
                with pytest.raises(NamespaceGone):
                    it.poll(Done, wanted)
                assert agent.complaints == ["descriptors that were not to come"]
            assert not before.difference()


@pytest.mark.parametrize("status", [-1, 0x137F, 0xFFFF, 1 << 16, 1 << 64, 0x7F])
def test_a_status_that_none_can_have(status: int) -> None:
    with conversation(Impostor()) as (it, theirs):
        theirs.send(json.dumps({"status": status}).encode())
        with pytest.raises(NamespaceGone):
            it.news()


@contextmanager
def waiting(code: str = "") -> Iterator[subprocess.Popen[str]]:
    """A child that runs `code` and waits for us to close its standard input."""
    argv = [sys.executable, "-ISc", f"import subprocess, sys\n{code}\nprint(flush=True)\nsys.stdin.read()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child


def only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


NESTED = f"""if True:
    child = subprocess.Popen(
        [{sys.executable!r}, "-ISc", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
"""


@pytest.mark.parametrize("whose", ["ours", "our child's", "init's", "no pidfd", "a grandchild's"])
@pytest.mark.usefixtures("leaks")
@pytest.mark.anyio
async def test_a_pidfd_of_what_is_no_child_of_the_agent_is_refused(whose: str) -> None:
    """Else `Process.kill` would kill for whoever has taken the agent's place."""
    with ExitStack() as stack:
        agent = Impostor(stack.enter_context(waiting(NESTED)).pid)
        if whose == "no pidfd":
            given = os.open("/dev/null", os.O_RDONLY)
        else:
            if whose == "a grandchild's":
                middle = agent.pid
                agent.agent = os.getpid()
            pids = {
                "ours": os.getpid(),
                "our child's": agent.pid,
                "init's": 1,
            }
            if whose == "a grandchild's":
                pids[whose] = only_child(middle)
            given = os.pidfd_open(pids[whose])
        stack.callback(os.close, given)
        it, theirs = stack.enter_context(conversation(agent))
        socket.send_fds(theirs, [b'{"pid": 7}'], [given])
        before = Possessions()
        with pytest.raises(NamespaceGone), anyio.fail_after(20):
            await it.started("true")
        assert not before.difference()
        assert agent.complaints


@pytest.mark.anyio
async def test_a_pidfd_of_a_child_of_the_agent_tells_its_pid() -> None:
    with waiting(NESTED) as agent, conversation(Impostor(agent.pid)) as (it, theirs):
        child = only_child(agent.pid)
        given = os.pidfd_open(child)
        socket.send_fds(theirs, [b'{"pid": 7}'], [given])
        os.close(given)
        pid, pidfd = await it.started("true")
        os.close(pidfd)
        assert pid == child, "not what it says"
