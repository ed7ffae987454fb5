"""Fixtures of the forwarder's tests: benches."""

from __future__ import annotations

from tests.support.bench import make

__all__ = ["make"]
