"""Frozen records: dataclasses that cost little to define.

`@dataclass(frozen=True, slots=True)` compiles half a dozen methods for each class, and its module imports a parser of
Python.  That was a third of the start of a program that its callers wait for.  `@frozen` makes such a class from
methods that are written once, here.  The class behaves as a dataclass: `dataclasses.fields`, `dataclasses.replace`,
`dataclasses.asdict`, `inspect.signature`, `help`, match statements and type checkers work, and what needs
`dataclasses` is made when it is first used.

>>> @frozen
... class Point:
...     x: int
...     y: int = 0
>>> Point(1), replace(Point(1), y=2) == Point(1, 2)
(Point(x=1, y=0), True)
"""

from __future__ import annotations

from operator import attrgetter

TYPE_CHECKING = False  # as type checkers know it, for importing `typing` costs as much as all of this

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn, TypeVar

    from typing_extensions import dataclass_transform

    T = TypeVar("T")
else:

    def dataclass_transform(**_):
        """Return a decorator that changes nothing; this one is for type checkers."""
        return lambda function: function


_MISSING = object()
_ASKED_OF_DATACLASSES = ("__dataclass_fields__", "__dataclass_params__", "__signature__")


class Field:
    """The options of a field, as `field` takes them."""

    __slots__ = ("compare", "default", "factory", "init", "repr")

    def __init__(
        self,
        default: object,
        factory: Callable[[], object] | None = None,
        *,
        init: bool = True,
        compare: bool = True,
        repr: bool = True,
    ) -> None:
        self.default = default
        self.factory = factory
        self.init = init
        self.compare = compare
        self.repr = repr

    @property
    def is_required(self) -> bool:
        return self.default is _MISSING and self.factory is None

    def made(self) -> object:
        """Return the value of a field that was not given."""
        return self.default if self.factory is None else self.factory()


def field(
    *,
    default: Any = _MISSING,
    default_factory: Callable[[], Any] | None = None,
    init: bool = True,
    compare: bool = True,
    repr: bool = True,
) -> Any:
    """Give a field options, as `dataclasses.field` does."""
    return Field(default, default_factory, init=init, compare=compare, repr=repr)


class _Layout:
    """The layout of a class, for the methods; `setters` are those of its slots, which bypass `__setattr__`."""

    __slots__ = ("compared", "fields", "prepares", "setters", "unset")

    def __init__(self, cls: type, fields: dict[str, Field]) -> None:
        self.fields = fields
        self.setters = [getattr(cls, name).__set__ for name, each in fields.items() if each.init]
        self.unset = [
            (getattr(cls, name).__set__, each)
            for name, each in fields.items()
            if not each.init and not each.is_required
        ]
        compared = [name for name, each in fields.items() if each.compare]
        self.compared = attrgetter(*compared) if compared else lambda _: ()
        self.prepares = hasattr(cls, "__post_init__")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """Make an immutable record of a class with annotations, its fields in slots.

    A method __post_init__ is called as a dataclass's is, and sets fields by `object.__setattr__`.  A class that takes
    other types than its fields have has an __init__ of its own instead (`netns_kit.arguments.fill`).
    """
    body = dict(cls.__dict__)
    fields = {}
    for name, kind in body.get("__annotations__", {}).items():
        if not str(kind).startswith("ClassVar"):
            given = body.pop(name, _MISSING)
            fields[name] = given if isinstance(given, Field) else Field(given)
    for name in ("__dict__", "__weakref__"):
        body.pop(name, None)
    body["__slots__"] = tuple(fields)
    body["__match_args__"] = tuple(name for name, each in fields.items() if each.init)
    asked = _ASKED_OF_DATACLASSES[:-1] if "__init__" in body else _ASKED_OF_DATACLASSES
    for name, method in _METHODS.items():
        body.setdefault(name, method)
    body.update((name, _ForDataclasses(name)) for name in asked)
    meta: Any = type(cls)
    made = meta(cls.__name__, cls.__bases__, body)
    made._layout_ = _Layout(made, fields)
    return made  # type: ignore[no-any-return]  # a new class, but for its users the same


def replace(record: T, **changes: Any) -> T:
    """Return a copy of a record with some fields changed."""
    layout: _Layout = record._layout_  # type: ignore[attr-defined]  # T is what `frozen` has made
    same = {name: getattr(record, name) for name, each in layout.fields.items() if each.init}
    return type(record)(**{**same, **changes})


# -- the methods ----------------------------------------------------------------------------------------


def _init(self: Any, *values: object, **named: object) -> None:
    layout = self._layout_
    if named or len(values) != len(layout.setters):
        values = tuple(_complete(self, values, named))
    for set_, value in zip(layout.setters, values):  # noqa: B905  # they are as many, and it is quicker
        set_(self, value)
    for set_, each in layout.unset:
        set_(self, each.made())
    if layout.prepares:
        self.__post_init__()


def _complete(self: Any, values: tuple[object, ...], named: dict[str, object]) -> Iterator[object]:
    """Yield all values in order.  Raises TypeError as a function call does."""
    name, wanted = type(self).__name__, self.__match_args__
    if len(values) > len(wanted):
        raise TypeError(f"{name}() takes {len(wanted)} arguments but {len(values)} were given")
    for key in named:
        if key not in wanted:
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}")
        if key in wanted[: len(values)]:
            raise TypeError(f"{name}() got multiple values for argument {key!r}")
    yield from values
    for key in wanted[len(values) :]:
        each = self._layout_.fields[key]
        if key not in named and each.is_required:
            raise TypeError(f"{name}() missing a required argument: {key!r}")
        yield named[key] if key in named else each.made()


def _repr(self: Any) -> str:
    fields = self._layout_.fields
    shown = ", ".join(f"{name}={getattr(self, name)!r}" for name, each in fields.items() if each.repr)
    return f"{type(self).__qualname__}({shown})"


def _eq(self: Any, other: Any) -> Any:
    if other.__class__ is not self.__class__:
        return NotImplemented
    compared = self._layout_.compared
    return compared(self) == compared(other)


def _hash(self: Any) -> int:
    return hash(self._layout_.compared(self))


def _setattr(self: Any, name: str, value: object) -> NoReturn:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> NoReturn:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _reduce(self: Any) -> tuple[object, ...]:
    return _revived, (type(self), *(getattr(self, name) for name in self._layout_.fields))


def _revived(cls: Any, *values: object) -> object:
    """Make a copy, or restore a pickled record, without checking it again."""
    self = object.__new__(cls)
    for name, value in zip(cls._layout_.fields, values, strict=True):
        object.__setattr__(self, name, value)
    return self


_METHODS = {
    "__init__": _init, "__repr__": _repr, "__eq__": _eq, "__hash__": _hash, "__setattr__": _setattr,
    "__delattr__": _delattr, "__reduce__": _reduce, "__replace__": replace,
}  # fmt: skip


class _ForDataclasses:
    """An attribute that `dataclasses` or `inspect` looks for in a class, made on first access."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: Any) -> object:
        import dataclasses
        import inspect

        body: dict[str, object] = {"__annotations__": owner.__annotations__, "__module__": owner.__module__}
        for name, each in owner._layout_.fields.items():
            options: dict[str, Any] = {"init": each.init, "compare": each.compare, "repr": each.repr}
            if each.factory is not None:
                options["default_factory"] = each.factory
            elif not each.is_required:
                options["default"] = each.default
            body[name] = dataclasses.field(**options)
        twin: Any = dataclasses.dataclass(frozen=True)(type(owner.__name__, (), body))
        owner.__dataclass_fields__ = twin.__dataclass_fields__
        owner.__dataclass_params__ = twin.__dataclass_params__
        if owner.__init__ is _init:
            owner.__signature__ = inspect.signature(twin)
        return getattr(owner, self._name)
