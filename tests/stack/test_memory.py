"""Buffers for what is in flight: each has one holder, and is used again."""

from __future__ import annotations

from random import Random

from netns_kit.stack.windows import BUFFER, LARGE, OVERHEAD, SPARE, Memory


def fill(memory: Memory, size: int, byte: int) -> bytes | memoryview:
    memory.buffer[:size] = bytes([byte]) * size
    data = memory.take(size)
    memory.held += BUFFER if size >= LARGE else size + OVERHEAD
    return data


def test_what_is_held_stays_as_it_was() -> None:
    memory, random = Memory(1 << 30), Random(1)
    held: list[tuple[int, bytes | memoryview]] = []
    for _ in range(2000):
        if held and random.random() < 0.5:
            byte, data = held.pop(random.randrange(len(held)))
            assert bytes(data) == bytes([byte]) * len(data)
            memory.forget(data)
        else:
            byte = random.randrange(256)
            held.append((byte, fill(memory, random.choice((1, 100, LARGE - 1, LARGE, BUFFER)), byte)))
    for byte, data in held:
        assert bytes(data) == bytes([byte]) * len(data)
        memory.forget(data)
    assert memory.held == 0


def test_buffers_are_used_again_and_few_are_kept() -> None:
    memory = Memory(1 << 30)
    first = memory.buffer.obj
    held = [fill(memory, BUFFER, 1) for _ in range(2 * SPARE)]
    for data in held:
        memory.forget(data)
    again = {id(memory.buffer.obj)}
    for _ in range(SPARE):
        fill(memory, BUFFER, 2)
        again.add(id(memory.buffer.obj))
    assert id(first) in again
    assert len(memory._spare) == 0
