"""The environment of our own child processes: no more than they need to be executed.

An environment is full of secrets.  The agent runs beside hostile commands and the worker reads hostile packets: they
cannot lose what they do not have.  The environment of a command travels with the request to start it.
"""

from __future__ import annotations

import os

__all__ = ["child_environment"]

KEPT = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
"""Variables for the interpreter's libraries, the encoding of file names, and the time zone of a policy."""


def child_environment() -> dict[str, str]:
    """Return the environment for a child process of ours."""
    return {name: os.environ[name] for name in KEPT if name in os.environ}
