"""Magics: commands inside, flows, packets and a live view of a network, synchronous or async.

A magic is a plain function.  For an async network it returns a coroutine, and an input transformer has put await
before the call, under a name with an underscore.  Calls for synchronous networks stay as they are: in a cell with an
await, a kernel does not interrupt what blocks.

IPython has a cell magic `%%capture`, which keeps the output of a cell; ours is `%%capture_packets`.
"""

from __future__ import annotations

import re
import shlex
import sys
from codecs import getincrementaldecoder
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from inspect import iscoroutinefunction
from queue import Empty, SimpleQueue
from subprocess import DEVNULL, PIPE
from threading import TIMEOUT_MAX, Semaphore, Thread
from typing import Any, TextIO

import anyio
from IPython.core.error import UsageError
from IPython.display import display

from netns_kit.namespace.process import CommandFailed
from netns_kit.sync.loop_thread import WAKING_SECONDS

PACKETS_MOST = 16 << 20  # bytes of them that `%%capture_packets` keeps
PIECES_MOST = 64  # of output that wait to be shown; the command waits then
_CALL = re.compile(r"get_ipython\(\)\.run_(line|cell)_magic\('(inside|flows|capture_packets)', '([\w.]+)")

Shell = Any
"""IPython's shell, which has no types to speak of."""


def load(shell: Shell) -> None:
    """Give a shell the magics."""
    for name, kind, magic in (
        ("inside", "cell", inside),
        ("flows", "line", flows),
        ("capture_packets", "cell", capture_packets),
        ("live", "line", live),
    ):
        for prefix in ("", "_"):
            shell.register_magic_function(_bound(shell, magic, is_awaited=bool(prefix)), kind, prefix + name)
    if all(getattr(each, "__name__", "") != "awaited" for each in shell.input_transformers_post):

        def awaited(lines: list[str]) -> list[str]:
            return [_CALL.sub(lambda call: _rewritten(shell, call), line) for line in lines]

        shell.input_transformers_post.append(awaited)


def _rewritten(shell: Shell, call: re.Match[str]) -> str:
    try:
        is_async = _is_async(shell.ev(call[3]))
    except Exception:  # the magic will raise it
        is_async = False
    return f"await {call[0].replace(repr(call[2]), repr('_' + call[2]), 1)}" if is_async else call[0]


def _bound(shell: Shell, magic: Callable[..., Any], *, is_awaited: bool) -> Callable[..., Any]:
    def bound(line: str, *cell: str) -> Any:
        try:
            words = shlex.split(line)
        except ValueError as error:  # a quote that is not closed
            raise UsageError(f"{error}: {line}") from None
        if not words:
            raise UsageError(f"expected the name of a network, as in {str(magic.__doc__).split('`')[1]}")
        try:
            thing = shell.ev(words[0])
        except NameError as error:
            raise UsageError(
                f"{error}; expected a network, a member or another object that is open"
            ) from None
        if magic is not live and _is_async(thing) and not is_awaited:
            raise UsageError(f"{words[0]} is async: use this in a cell behind the one in which it was made")
        return magic(shell, thing, words[1:], *cell)

    bound.__doc__ = magic.__doc__
    return bound


def _is_async(thing: object) -> bool:
    return any(iscoroutinefunction(getattr(type(thing), name, None)) for name in ("popen", "flows"))


# -- commands ----------------------------------------------------------------------------------------------


def inside(_: Shell, thing: Any, words: list[str], cell: str) -> Any:
    """Run the cell inside: `%%inside net`.  What it writes is shown as it comes.

    Behind the name of a network, a member or a namespace may stand a program with its arguments, which reads the cell
    from its standard input; without, the cell is a script of sh.  Another status than 0 raises CommandFailed, but
    with `--no-check`, before the program.
    """
    is_checked = words[:1] != ["--no-check"]
    program = words if is_checked else words[1:]
    command = program or ["/bin/sh", "-c", cell]
    text = cell.encode() if program else b""

    def ended(status: int) -> None:
        if status and is_checked:
            raise CommandFailed(status, program or ["sh"])
        if status:
            print(f"status {status}", file=sys.stderr)  # noqa: T201  # whoever runs a cell looks at that

    if _is_async(thing):
        return _then(_run_async(thing, command, text), ended)
    return ended(_run(thing, command, text))


async def _then(first: Awaitable[int], then: Callable[[int], None]) -> None:
    then(await first)


def _run(thing: Any, command: list[str], text: bytes) -> int:
    said = _Said()  # this thread writes: a kernel knows its cell
    try:
        with thing.popen(command, stdin=PIPE if text else DEVNULL, stdout=PIPE, stderr=PIPE) as process:
            for stream, file in (process.stdout, sys.stdout), (process.stderr, sys.stderr):
                Thread(target=said.pass_on, args=(stream, file), daemon=True).start()
            if text:
                Thread(target=_feed, args=(process.stdin, text), daemon=True).start()
            for _ in "stdout", "stderr":
                while (piece := said.piece()) is not None:
                    _show(*piece)
                    said.room.release()
            status: int = process.wait()
    finally:
        said.end()  # it may have been interrupted, at any line
    return status


class _Said:
    """What two streams have said and nobody has shown yet."""

    def __init__(self) -> None:
        self._pieces: SimpleQueue[tuple[TextIO, str] | None] = SimpleQueue()
        self.room = Semaphore(PIECES_MOST)
        self._is_over = False

    def pass_on(self, stream: Iterable[bytes], file: TextIO) -> None:
        decoder = getincrementaldecoder("utf-8")("replace")
        with suppress(anyio.ClosedResourceError):  # the command was interrupted
            for chunk in stream:
                self.room.acquire()
                if self._is_over:
                    return
                self._pieces.put((file, decoder.decode(chunk)))
        self._pieces.put((file, decoder.decode(b"", final=True)))
        self._pieces.put(None)

    def piece(self) -> tuple[TextIO, str] | None:
        """Wait for what was said next, or for the end of a stream, which is None."""
        while True:
            with suppress(Empty):
                return self._pieces.get(timeout=WAKING_SECONDS)

    def end(self) -> None:
        """Let no stream wait for room."""
        self._is_over = True
        self.room.release(2)


def _feed(stream: Any, text: bytes) -> None:
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # it has read what it wanted
        stream.send(text)
        stream.close()


def _show(file: TextIO, piece: str) -> None:
    file.write(piece)
    file.flush()


async def _run_async(thing: Any, command: list[str], text: bytes) -> int:
    async def pass_on(stream: Any, file: TextIO) -> None:
        decoder = getincrementaldecoder("utf-8")("replace")
        async for chunk in stream:
            _show(file, decoder.decode(chunk))
        _show(file, decoder.decode(b"", final=True))

    async def feed(stream: Any) -> None:
        with suppress(anyio.BrokenResourceError):  # it has read what it wanted
            await stream.send(text)
        await stream.aclose()

    async def wake() -> None:
        # ipykernel notes an interruption in another thread, and its event loop sees it when it wakes
        while True:  # noqa: ASYNC110  # there is no event
            await anyio.sleep(WAKING_SECONDS)

    options = {"stdin": PIPE if text else DEVNULL, "stdout": PIPE, "stderr": PIPE}
    async with anyio.create_task_group() as waking, await thing.popen(command, **options) as process:
        waking.start_soon(wake)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pass_on, process.stdout, sys.stdout)
            tasks.start_soon(pass_on, process.stderr, sys.stderr)
            if text:
                tasks.start_soon(feed, process.stdin)
            status: int = await process.wait()
        waking.cancel_scope.cancel()
    return status


# -- what goes through -------------------------------------------------------------------------------------


def flows(_: Shell, thing: Any, words: list[str]) -> Any:
    """Return the flows of a network, a member or a stack: `%flows net`, or `found = %flows net`."""
    _check_no_more(words)
    return _stack_of(thing).flows()


def capture_packets(shell: Shell, thing: Any, words: list[str], cell: str) -> Any:
    """Capture the packets while the cell runs: `%%capture_packets net`, `%%capture_packets net found`.

    They are shown; with a second word they are the value of that variable, and nothing is shown.
    """
    _check_no_more(words[1:])
    block = _stack_of(thing).capture(None, max_bytes=PACKETS_MOST)

    def captured(packets: object) -> None:
        if words:
            shell.user_ns[words[0]] = packets
        else:
            display(packets)

    async def capture() -> None:
        async with block:
            result = await shell.run_cell_async(cell, transformed_cell=shell.transform_cell(cell))
        captured(await block.packets())
        result.raise_error()

    if _is_async(thing):
        return capture()
    with block:
        result = shell.run_cell(cell)
    captured(block.packets())
    return result.raise_error()


def live(_: Shell, thing: Any, words: list[str]) -> Any:
    """Show throughput and flows as they change: `%live net`, `%live net 0.5` (seconds between two looks).

    The view ends when the network is closed, and by its button.
    """
    try:
        from .live import LiveView
    except ImportError as error:
        raise UsageError(f"{error}; install ipywidgets and matplotlib, or netns-kit[notebook]") from None
    _check_no_more(words[1:])
    seconds = [_seconds(word) for word in words]
    return LiveView(thing, _stack_of(thing), *seconds)


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= TIMEOUT_MAX:
        raise UsageError(f"{word}: expected seconds between two looks, as in %live net 0.5")
    return seconds


def _stack_of(thing: Any) -> Any:
    return thing if hasattr(thing, "flows") else thing.stack


def _check_no_more(words: list[str]) -> None:
    if words:
        raise UsageError(f"expected no more words: {' '.join(words)}")
