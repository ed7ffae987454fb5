"""Displayed: an object that a notebook shows as HTML, and `print` as text.  Importing this loads nothing else."""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from .view import View


class Displayed:
    """An object with a view.

    To make the view takes no waiting, and raises nothing, whatever has become of the object.
    """

    __slots__ = ()

    def _view(self) -> View:
        """Return what there is to see at this moment."""
        raise NotImplementedError

    def __str__(self) -> str:
        from shutil import get_terminal_size

        return self._view().text(get_terminal_size((100, 24)).columns)

    def _repr_html_(self) -> str:
        return self._view().html()
