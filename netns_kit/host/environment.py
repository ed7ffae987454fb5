"""What a process of ours is told of its parent's environment: no more than it takes to be executed.

An environment is full of secrets.  The agent runs beside hostile commands and the worker reads hostile packets: what
they do not have they cannot lose.  The environment of a command travels with the request to start it.
"""

from __future__ import annotations

import os

__all__ = ["child_environment"]

KEPT = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
"""Where the interpreter's libraries are, how file names are spelled, and which time a policy goes by."""


def child_environment() -> dict[str, str]:
    """The environment for a process of ours."""
    return {name: os.environ[name] for name in KEPT if name in os.environ}
