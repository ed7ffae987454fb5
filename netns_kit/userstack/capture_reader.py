"""Captures as they are read back."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import BinaryIO, Literal

from netns_kit import arguments
from netns_kit.display.packet import CapturedPacket
from netns_kit.display.packets import Packets
from netns_kit.errors import ArgumentTypeError, CaptureError
from netns_kit.tap import pcapng

_DIRECTIONS: dict[int, Literal["from guest", "to guest"]] = {
    pcapng.FROM_GUEST: "from guest",
    pcapng.TO_GUEST: "to guest",
}


def read_capture(target: str | os.PathLike[str] | BinaryIO) -> Packets:
    """Read the packets of a capture, as `UserStack.capture` writes them: pcapng, Ethernet, written on this machine.

    Args:
        target: The path of the file, or a file that is open for bytes.

    Raises:
        CaptureError: The file cannot be opened or read, or is no such capture.
        ArgumentTypeError: It is neither a path nor a file.
    """
    if isinstance(target, str | os.PathLike):
        return read_captures([target])
    if not callable(getattr(target, "read", None)):
        expected = "expected a path, or a file that is open for bytes"
        raise ArgumentTypeError(expected, "target", arguments.shown(target))
    return packets_of([target.read()])


def read_captures(paths: Iterable[str | os.PathLike[str]]) -> Packets:
    """Return the packets of several files of one capture, oldest first.

    Raises:
        CaptureError: A file cannot be read, or is no capture.
    """
    files: list[bytes] = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                files.append(file.read())
        except OSError as error:
            why = f"the capture cannot be read: {error.strerror}"
            raise CaptureError(why, "the file", os.fspath(path), None, error.errno) from error
    return packets_of(files)


def packets_of(files: Iterable[bytes]) -> Packets:
    """Return the packets of the files of one capture, oldest first.

    Raises:
        CaptureError: They are no capture.
    """
    frames: list[pcapng.Frame] = []
    names: dict[str, str] = {}
    for data in files:
        try:
            found, named = pcapng.read(data)
        except ValueError as error:
            fix = "give a file that `UserStack.capture` has written on this machine"
            raise CaptureError(f"the capture cannot be read: {error}", None, None, fix, None) from error
        frames += found
        names |= named
    began = frames[0].time if frames else 0
    return Packets.of(
        (
            CapturedPacket(
                at,
                (each.time - began) / 1e9,
                _DIRECTIONS.get(each.flags & 3, ""),
                each.data,
                each.size,
                each.comment,
            )
            for at, each in enumerate(frames, 1)
        ),
        names,
    )
