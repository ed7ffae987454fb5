"""Files that captures are written to, and memory that keeps the last of one."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit.tap import pcapng
from netns_kit.tap.pcapng import FROM_GUEST, packet_ends
from netns_kit.userstack.capture_file import BLOCK, DIRECT_LEAST, CaptureFile, KeptBlocks
from tests.support import missing

SIZES = (100, DIRECT_LEAST - 1, DIRECT_LEAST, DIRECT_LEAST + 5, 5 * DIRECT_LEAST + 77)


def block(size: int, number: int = 0) -> bytes:
    head, tail = packet_ends(number, size, size, FROM_GUEST)
    return head + bytes([number % 256]) * size + tail


@pytest.mark.parametrize("first", [0, 100, BLOCK, BLOCK + 4])
@pytest.mark.parametrize("offset", [0, 100])
def test_what_is_written_is_in_the_file(tmp_path: Path, first: int, offset: int) -> None:
    """At addresses that the disk takes, and at others, also if they are said to be what they are not."""
    path, memory = tmp_path / "file", memoryview(mmap.mmap(-1, 12 * DIRECT_LEAST))
    memory[:] = os.urandom(len(memory))
    file = CaptureFile(path)
    direct = file._direct
    file.write([memory[:first]])
    at = first
    for number, size in enumerate(SIZES):
        pieces = (
            [memory[at : at + size], memory[at + size : at + 2 * size]]
            if number % 2
            else [memory[at : at + size]]
        )
        file.write(pieces, (at + offset) % BLOCK)
        at += sum(map(len, pieces))
    assert offset or file._direct == direct, "the addresses are right"
    file.close()
    assert file.size == at
    assert path.read_bytes() == memory[:at]
    memory.release()


def test_no_long_piece_is_copied_into_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CaptureFile(tmp_path / "file")
    if file._direct is None:
        missing("the file system has no O_DIRECT")
    usual: list[int] = []
    monkeypatch.setattr(file, "_write", lambda view: usual.append(len(view)))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: len(data))
    file.write([memoryview(bytes(DIRECT_LEAST + 10))])
    assert usual == [0, 10]
    assert file.size == DIRECT_LEAST
    file.close()


@pytest.mark.parametrize("taken", [OSError(errno.EINVAL, "no"), 100, 0])
def test_a_file_system_that_has_no_direct_way_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: Any
) -> None:
    path, write, calls = tmp_path / "file", os.pwrite, list[int]()

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        calls.append(at)
        if isinstance(taken, OSError):
            raise taken
        if taken:
            plain = os.open(path, os.O_WRONLY)
            write(plain, data[:taken], at)
            os.close(plain)
        return int(taken)

    file, text = CaptureFile(path), os.urandom(2 * DIRECT_LEAST + 3)
    if file._direct is None:
        missing("the file system has no O_DIRECT")
    monkeypatch.setattr(os, "pwrite", pwrite)
    for _ in range(2):
        file.write([memoryview(text)])
    file.close()
    assert calls == [0], "it is not asked again"
    assert path.read_bytes() == text + text


def test_a_full_disk_leaves_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, write = b"".join(block(3000, number) for number in range(200)), os.pwrite

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        if at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: 10 * BLOCK], at)

    file = CaptureFile(tmp_path / "file")
    if file._direct is None:
        missing("the file system has no O_DIRECT")
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space"):
        file.write([memoryview(text)])
    file.close()
    found = (tmp_path / "file").read_bytes()
    size = len(block(3000))
    assert len(found) == file.size == 10 * BLOCK // size * size
    assert text.startswith(found)


def test_a_pipe_is_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = CaptureFile(path)
    file.write([memoryview(b"abc")])
    file.close()
    assert os.read(reader, 10) == b"abc"
    os.close(reader)


@given(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=3), max_size=60))
def test_the_last_blocks_are_kept(writes: list[list[int]]) -> None:
    kept, text, number, ends = KeptBlocks(1024, 512), b"", 0, [0]
    for sizes in writes:
        new = b""
        for size in sizes:
            number += 1
            new += block(size, number)
        cut = len(new) // 2
        kept.write([memoryview(new[:cut]), memoryview(new[cut:])])
        text += new
        ends.append(len(text))
    found = kept.blocks()
    assert text.endswith(found)
    assert pcapng.whole_blocks([memoryview(found)], len(found)) == len(found)
    assert len(found) == len(text) - min(end for end in ends if len(text) - end <= 1024)
