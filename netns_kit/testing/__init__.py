"""Fixtures for tests of what uses a network: `plugin` is what pytest loads.

A test is given networks that lead nowhere but to a `FakeInternet` of its own.  What it is given is opened and closed
on the test's own event loop, in the task of the test (`ground`): the plugin wraps the test function, so it does not
matter whose plugin runs that.  A plain test has the same things without async, by `netns_kit.sync`.

Nothing here is imported before a test asks for a fixture, but for `plugin`.
"""

TYPE_CHECKING = False  # as type checkers know it, without importing `typing`

if TYPE_CHECKING:
    from .clock import ManualClock as ManualClock
    from .confined import Confined as Confined
    from .ground import Networks as Networks
    from .pair import TapPair as TapPair

_HOMES = {"Confined": "confined", "ManualClock": "clock", "Networks": "ground", "TapPair": "pair"}

if not TYPE_CHECKING:  # to a type checker, a module with a __getattr__ has every name

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        from importlib import import_module

        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
