"""Named: a tuple that is shown, with the names of addresses in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, SupportsIndex, TypeVar, overload

from typing_extensions import Self

from .displayed import Displayed

K = TypeVar("K")
T = TypeVar("T")


class Named(Displayed, tuple[T, ...], Generic[K, T]):  # noqa: SLOT001  # a tuple of its own has none
    """A tuple that is shown as a table.  A part of it is shown in the same way."""

    names: Mapping[K, str] = {}

    @classmethod
    def of(cls, rows: Iterable[T], names: Mapping[K, str]) -> Self:
        """Make the tuple; for parts of this library.

        Args:
            rows: What is in it.
            names: The names of addresses.
        """
        made = cls(rows)
        made.names = names
        return made

    @overload
    def __getitem__(self, at: SupportsIndex) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Self: ...
    def __getitem__(self, at: SupportsIndex | slice) -> T | Self:
        """Return one, or several that are shown in the same way."""
        if isinstance(at, slice):
            return self.of(super().__getitem__(at), self.names)
        return super().__getitem__(at)
