"""Our side of a conversation with the agent."""

from __future__ import annotations

import socket
from typing import Any, cast

import pytest

from netns_kit.agent_process import Conversation
from netns_kit.errors import NamespaceGone


class Racing:
    """A socket whose first reading says "end", though the answer came just before it."""

    def __init__(self, *readings: bytes) -> None:
        self.readings = list(readings)

    def recvmsg(self, *_: int) -> tuple[bytes, list[Any], int, None]:
        return self.readings.pop(0), [], 0, None


def test_an_answer_that_an_end_overtakes_is_read() -> None:
    """About one conversation in twenty thousand, on Linux 6.18: the queue is looked at before the end is."""
    conversation = Conversation(cast("socket.socket", Racing(b"", b'{"pid": 7}')))
    assert conversation.poll() == ({"pid": 7}, [])


def test_an_end_is_an_end() -> None:
    with pytest.raises(NamespaceGone):
        Conversation(cast("socket.socket", Racing(b"", b""))).poll()
