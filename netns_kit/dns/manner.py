"""Manner: how resolvers are asked."""

from __future__ import annotations

from netns_kit.frozen import frozen

PATIENCE = 4.0  # seconds; stub resolvers ask again after 5, and they should hear the verdict before that


@frozen
class Manner:
    """How the upstreams of a route are asked.

    timeout: seconds an upstream may take before the next one is asked.
    attempts: how often a silent upstream is asked for one query.
    patience: seconds after which a query that all were asked about is given up.
    rotate: begin with another upstream each time.
    streams: ask over TCP, also what clients ask in datagrams.
    ports: send no two queries in a row from the same port.

    Raises ValueError for a number out of range.
    """

    timeout: float = 1.0
    attempts: int = 2
    patience: float = PATIENCE
    rotate: bool = False
    streams: bool = False
    ports: bool = False

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"timeout must be positive, not {self.timeout}")
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {self.attempts}")
        if not self.patience >= 0:
            raise ValueError(f"patience must not be negative, but is {self.patience}")


DEFAULT = Manner()
