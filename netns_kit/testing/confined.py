"""Confined: a network, and a child of the test's process in it.

The child is a fork that joins the network's namespaces before anything of the test runs in it, and that sees the
network's resolv.conf and hosts file.  So whatever it does, with C code and with programs that it starts, it has no
other network.  What it may still use is what the test had open before, and unix sockets at paths.

A user namespace cannot be joined by a process with several threads; a fork has one.  A PID namespace is that of the
processes that are made later, so the function runs in a fork of the fork, and whatever it leaves running ends with
the network.
"""

from __future__ import annotations

import inspect
import io
import os
import pickle
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, ParamSpec, TypeVar, cast, overload

import anyio
import anyio.to_thread
import pytest

from netns_kit.host import abi
from netns_kit.host.libc import check, libc
from netns_kit.namespace.agent_files import show_files
from netns_kit.namespace.background import asyncio_loop
from netns_kit.namespace.namespace import Namespace
from netns_kit.network.network import Network

P = ParamSpec("P")
T = TypeVar("T")
_VERDICTS: dict[str, type[BaseException]] = {
    "skip": pytest.skip.Exception,
    "xfail": pytest.xfail.Exception,  # before "fail", of which it is a kind
    "fail": pytest.fail.Exception,
}
SIZE = 8  # bytes that say how long the outcome is


class Confined(Network):
    """A network, for commands and for functions of the test that shall have no other.

    Args:
        options: Those of `Network`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(namespace=Namespace.create(ids="same"), **options)

    @overload
    async def call(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def call(self, function: Callable[..., object], *args: object, **kwargs: object) -> object:
        """Call a function in a child process that has no network but this one, and return what it returns.

        The child is a copy of this process: it has all its objects, and nothing that it changes is seen here.

        Args:
            function: The function; an async one gets an event loop of its own.
            args: Its arguments.
            kwargs: Its named arguments.

        Raises:
            BaseException: What the function raises.  Its cause has the traceback of the child.
            ChildProcessError: The child has ended without a result.
            TypeError: The result cannot be pickled.
            NamespaceGone, StackClosed: The network is not open.

        Cancellation: The child is killed.
        """
        child = await self.child()
        backend = "trio" if asyncio_loop() is None else "asyncio"
        called = partial(_called, backend, function, partial(function, *args, **kwargs))
        try:
            outcome = await anyio.to_thread.run_sync(child.run, called, abandon_on_cancel=True)
        finally:
            child.kill()
        return outcome.result()

    async def child(self) -> Child:
        """Return a child that is not started; for parts of this library."""
        with self.supervisor.guarding():
            return Child(self.namespace.pid, await self.files())


class Outcome:
    """The end of a function: its result or its exception, as a child tells it.

    Args:
        value: The result.
        error: The exception.
        trace: Its traceback.
    """

    def __init__(self, value: object = None, error: BaseException | None = None, trace: str = "") -> None:
        self.value = value
        self.error = error
        self.trace = trace
        self._verdict = next((name for name, kind in _VERDICTS.items() if isinstance(error, kind)), None)

    @classmethod
    def of(cls, function: Callable[[], object]) -> Outcome:
        """Call a function and return its outcome.

        Args:
            function: The function.
        """
        try:
            return cls(function())
        except BaseException as error:
            return cls(None, error, traceback.format_exc())

    def dump(self) -> bytes:
        """Return it as bytes.  What cannot be pickled becomes an error that says so."""
        if self._verdict is not None:  # pickle does not find these classes
            self.value, self.error = str(self.error), None
        try:
            told = pickle.dumps(self)
            pickle.loads(told)
        except BaseException as problem:
            if self.error is None:
                told_of = f"{_told(repr, self.value)}: {_told(str, problem)}"
                lost: Exception = TypeError(f"the result cannot be pickled: {told_of}")
            else:
                lost = RuntimeError(f"{type(self.error).__name__}: {_told(str, self.error)}")
            return pickle.dumps(Outcome(None, lost, self.trace))
        return told

    def result(self) -> object:
        """Return the result, or raise the exception."""
        __tracebackhide__ = True
        if self._verdict is not None:
            raise _VERDICTS[self._verdict](str(self.value))
        if self.error is not None:
            raise self.error from RuntimeError(f"in the child:\n\n{self.trace}")
        return self.value


def _told(form: Callable[[object], str], thing: object) -> str:
    """Return `form(thing)`, or its class if that raises."""
    try:
        return form(thing)
    except BaseException:
        return f"<{type(thing).__name__}>"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, or the function has closed it
            stream.flush()


def _called(backend: str, function: Callable[..., object], bound: Callable[[], Any]) -> object:
    return anyio.run(bound, backend=backend) if inspect.iscoroutinefunction(function) else bound()


def _end_at_once(*_: object) -> None:
    os._exit(0)


class Child:
    """A fork of this process in a namespace.

    Args:
        holder: A process of the namespace.
        files: The text of the files that it sees in place of the host's, by path.
    """

    def __init__(self, holder: int, files: Mapping[str, str]) -> None:
        self._holder = holder
        self._files = dict(files)
        self._lock = threading.Lock()
        self._pid = self._pidfd = self._pipe = -1
        self._is_unwanted = False

    def run(self, function: Callable[[], object]) -> Outcome:
        """Call a function in the child, and return its outcome.

        Args:
            function: The function.

        Raises:
            ChildProcessError: The child has ended without an outcome.
        """
        if self.fork():
            self.end(Outcome.of(function))
        return self.wait()

    def fork(self) -> bool:
        """Return twice: True in the child, False in the parent.

        Raises:
            ChildProcessError: The child is not to be started any more.
        """
        _flush()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        with self._lock:
            if self._is_unwanted:
                os.close(reader)
                os.close(writer)
                raise ChildProcessError("the child is not wanted any more")
            with warnings.catch_warnings():  # what other threads have locked, the child does not use
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid:
                self._pid, self._pidfd, self._pipe = pid, os.pidfd_open(pid), reader
        if pid:
            os.close(writer)
            return False
        os.close(reader)
        self._pipe = writer
        try:
            self._enter()
        except BaseException as error:
            self.end(Outcome(None, error, traceback.format_exc()))
        return True

    def _enter(self) -> None:
        """Join the namespaces, and return in a fork that is in all of them."""
        here = os.getcwd()
        kinds = {
            "user": abi.CLONE_NEWUSER,
            "net": abi.CLONE_NEWNET,
            "pid": abi.CLONE_NEWPID,
            "mnt": abi.CLONE_NEWNS,
        }
        opened = {
            name: os.open(f"/proc/{self._holder}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in kinds
        }
        for name, fd in opened.items():
            check(libc.setns(fd, kinds[name]), f"setns {name}")
            os.close(fd)
        check(libc.prctl(abi.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        signal.set_wakeup_fd(-1)  # that of an event loop outside
        before = signal.signal(signal.SIGTERM, _end_at_once)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is who passes it on
        if pid := os.fork():
            self._stand_by(pid)
        signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        check(libc.prctl(abi.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        os.chdir(here)
        for fd in show_files(self._files, {})[0].values():
            os.close(fd)

    def _stand_by(self, pid: int) -> NoReturn:
        """Wait for the end of a child, and end as it does.  SIGTERM kills it.

        Fact: what nobody outside has waited for keeps its PID namespace from ending.
        """

        def kill(*_: object) -> None:
            with suppress(ProcessLookupError):  # it has ended just now
                os.kill(pid, signal.SIGKILL)

        signal.signal(signal.SIGTERM, kill)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.close(self._pipe)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)

    def end(self, outcome: Outcome) -> NoReturn:
        """End the child, and tell the parent of its outcome.

        Args:
            outcome: The outcome.
        """
        try:
            _flush()
            told = outcome.dump()
            with open(self._pipe, "wb") as pipe:
                pipe.write(len(told).to_bytes(SIZE, "big") + told)
        finally:
            os._exit(0)

    def wait(self) -> Outcome:
        """Wait for the end of the child, and return its outcome.

        Raises:
            ChildProcessError: It has none.
        """
        with open(self._pipe, "rb", buffering=0) as pipe:
            told = None
            try:
                told = self._heard(pipe)
            finally:
                if told is None:
                    self.kill()
                _, status = os.waitpid(self._pid, 0)
                with self._lock:
                    os.close(self._pidfd)
                    self._pidfd = -1
        if told is None:
            code = os.waitstatus_to_exitcode(status)
            number = -code if code < 0 else code - 128
            named = {each.value: each.name for each in signal.Signals}  # not those behind SIGRTMIN
            how = named.get(number, f"signal {number}" if code < 0 else f"status {code}")
            raise ChildProcessError(f"the child has ended by {how} before the function did")
        return cast("Outcome", pickle.loads(told))

    def _heard(self, pipe: io.FileIO) -> bytes | None:
        """Return what the child tells, or None if it ends before.  Whatever it has started may have the pipe too."""
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN)
        waiting.register(self._pidfd, select.POLLIN)
        told = bytearray()
        while len(told) < SIZE or len(told) < SIZE + int.from_bytes(told[:SIZE], "big"):
            ready = dict(waiting.poll())
            data = pipe.read(1 << 20) if pipe.fileno() in ready else b""
            if not data:
                return None
            told += data
        return bytes(told[SIZE:])

    def kill(self) -> None:
        """Kill the child, if it runs, and have none started any more."""
        with self._lock:
            self._is_unwanted = True
            if self._pidfd >= 0:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
