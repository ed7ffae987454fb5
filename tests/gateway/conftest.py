"""Fixtures of the gateway's tests: benches, and the host's sockets that a guest reaches."""

from __future__ import annotations

from tests.support.bench import listener, make

__all__ = ["listener", "make"]
