"""Fixtures of tests with a whole network: a module that wants other drivers has its own."""

from __future__ import annotations

from tests.support.connections import driver, every_descriptor, net

__all__ = ["driver", "every_descriptor", "net"]
