"""Steps that are taken back when a later one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_error(*undo: Callable[[], object]) -> Iterator[None]:
    """Call these functions if the block raises, whatever it is; that goes on."""
    try:
        yield
    except BaseException:
        for each in undo:
            each()
        raise
