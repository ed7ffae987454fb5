"""Fixtures of the uplink's tests: benches, whose uplink dials."""

from __future__ import annotations

from tests.support.bench import make

__all__ = ["make"]
