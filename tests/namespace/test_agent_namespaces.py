"""How an agent begins, when its owner ends meanwhile."""

from __future__ import annotations

import os
import socket
import traceback
from typing import NoReturn

import pytest

from netns_kit.host.libc import libc
from netns_kit.namespace import agent_namespaces
from netns_kit.namespace.agent_namespaces import READY, open_quarters


def test_an_agent_that_ends_as_soon_as_it_is_ready_ends_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(telling: int, asking: int) -> NoReturn:
        os.write(telling, READY)
        os._exit(0)

    monkeypatch.setattr(libc, "unshare", lambda _: 0)
    monkeypatch.setattr(agent_namespaces, "become_agent", end)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pid = os.fork()
        if not pid:
            try:
                open_quarters("own", theirs, -1)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
