"""Manner: how resolvers are asked."""

from __future__ import annotations

from netns_kit import arguments
from netns_kit.frozen import frozen

DEFAULT_PATIENCE = 4.0  # seconds; stub resolvers ask again after 5, and should hear the verdict before that


@frozen
class Manner:
    """A way of asking resolvers.

    Raises:
        ArgumentError: A number is out of range.
        ArgumentTypeError: An argument has another type.
    """

    timeout: float = 1.0
    """Seconds that an upstream may take before the next one is asked."""
    attempts: int = 2
    """Number of times that a silent upstream is asked for one query."""
    patience: float = DEFAULT_PATIENCE
    """Seconds after which a query is given up that all upstreams were asked."""
    rotate: bool = False
    """Begin with another upstream for each query."""
    streams: bool = False
    """Ask over TCP, even for clients that ask over UDP."""
    ports: bool = False
    """Send no two queries in a row from the same port."""

    def __post_init__(self) -> None:
        arguments.whole_number("attempts", self.attempts, 1)
        arguments.number("timeout", self.timeout, "seconds, more than 0", lambda value: value > 0)
        arguments.number("patience", self.patience, "seconds, 0 or more", lambda value: value >= 0)


DEFAULT = Manner()
