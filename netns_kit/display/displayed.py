"""Displayed: an object that a notebook shows as HTML, and a terminal as text.  Importing this loads nothing else."""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from .view import View


class Displayed:
    """An object with a view.

    To make the view takes no waiting, and raises nothing, whatever has become of the object.
    """

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_repr_pretty_" not in cls.__dict__:  # IPython prefers a class's own __repr__ to a base's
            cls._repr_pretty_ = Displayed._repr_pretty_  # type: ignore[method-assign]  # it is the same

    def _view(self) -> View:
        """Return what there is to see at this moment."""
        raise NotImplementedError

    def __str__(self) -> str:
        from shutil import get_terminal_size

        return self._view().text(get_terminal_size((100, 24)).columns)

    def _repr_html_(self) -> str:
        return self._view().html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))
