"""Values as JSON and back, told by their types.

What a worker process and its owner say to each other is JSON, because the worker may have been taken over by what
it reads: what it says is data, checked against the type that was to come, and never makes anything else.

A *failure* is an exception on its way: those of `netns_kit.errors` and of the system arrive as what they were, and
of any other its text.

A value is None, a bool, an int, a finite float, a string, an address, an Enum, a tuple, a dict with strings for keys,
a dataclass or a NamedTuple of such; the last two lose their names and are lists of their fields.

>>> encode((IPv4Address("10.0.2.2"), None))
['10.0.2.2', None]
>>> decode(tuple[IPv4Address, ...], ["10.0.2.2"])
(IPv4Address('10.0.2.2'),)
>>> decode(int, True)
Traceback (most recent call last):
    ...
netns_kit.child.codec.Nonsense: True is no int
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from netns_kit.errors import NetnsKitError

_SHOWN = 80  # characters of what was not understood


class Nonsense(ValueError):
    """What came is not what was to come."""


def dump(value: object) -> bytes:
    """`value` as a text of JSON.  Raises TypeError for what is no plain value."""
    return json.dumps(encode(value), separators=(",", ":")).encode()


def load(kind: Any, text: bytes) -> Any:
    """The value of type `kind` that `text` says.  Raises `Nonsense`, and nothing else, whatever `text` is."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Nonsense(f"no JSON: {_shown(text)}") from error
    return decode(kind, value)


def encode(value: Any) -> Any:
    """`value` as what `json` takes.  Raises TypeError for what is no plain value."""
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, IPv4Address | IPv6Address):
        return str(value)
    if isinstance(value, tuple | list):
        return [encode(each) for each in value]
    if isinstance(value, dict):
        return {key: encode(each) for key, each in value.items()}
    if is_dataclass(value):
        record: Any = type(value)
        return [encode(getattr(value, name)) for name in _fields(record)]
    raise TypeError(f"{value!r} is no plain value")


def decode(kind: Any, value: Any) -> Any:
    """What `encode` has made of a value of type `kind`.  Raises `Nonsense`, and nothing else."""
    try:
        return _decode(kind, value)
    except Nonsense:
        raise
    except Exception as error:  # of the record's own making: it may raise anything
        raise Nonsense(f"{_shown(value)} is no {kind}: {error}") from error


def _decode(kind: Any, value: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return decode(part, value)
            except Nonsense:
                continue
    elif origin is Literal:
        if any(type(value) is type(part) and value == part for part in parts):
            return value
    elif kind is Any:
        return value
    elif kind in (None, NoneType):
        if value is None:
            return None
    elif kind in (bool, int, str):
        if type(value) is kind:
            return value
    elif kind is float:
        if type(value) is float and isfinite(value):
            return value
    elif origin is dict:
        if isinstance(value, dict):
            return {_decode(parts[0], key): _decode(parts[1], each) for key, each in value.items()}
    elif origin is tuple and parts[1:] == (...,):
        if isinstance(value, list):
            return tuple(_decode(parts[0], each) for each in value)
    elif origin is tuple:
        if isinstance(value, list) and len(value) == len(parts):
            return tuple(map(_decode, parts, value))
    elif isinstance(kind, type):
        if issubclass(kind, Enum | IPv4Address | IPv6Address):
            if isinstance(value, str):
                return kind(value)
        else:
            record: Any = kind
            types = _fields(record)
            if isinstance(value, list) and len(value) == len(types):
                return record(*map(_decode, types.values(), value))
    raise Nonsense(f"{_shown(value)} is no {getattr(kind, '__name__', kind)}")


@cache
def _fields(record: Any) -> dict[str, Any]:
    """The names and types of what a dataclass or NamedTuple is made of."""
    hints = get_type_hints(record)
    if is_dataclass(record):
        return {field.name: hints[field.name] for field in fields(record)}
    return hints  # a NamedTuple


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


def printable(text: str) -> str:
    """`text` as it may be shown on a terminal, whoever it came from."""
    return "".join(
        each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text
    )


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception: the name of its class, if that is known on the other side, and what it was made with."""

    kind: str
    arguments: tuple[str | int | None, ...]

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What tells of `error`."""
        if isinstance(error, NetnsKitError):
            given = tuple(each if type(each) in _TOLD else str(each) for each in error.args)
            return cls(type(error).__name__, given)
        if isinstance(error, OSError):
            filename = None if error.filename is None else str(error.filename)
            return cls("OSError", (error.errno, error.strerror or str(error), filename))
        return cls("", (f"{type(error).__name__}: {error}",))

    def exception(self) -> Exception:
        """The exception, made anew; a RuntimeError if its class is not known here.  Raises `Nonsense`."""
        known = {each.__name__: each for each in _errors(NetnsKitError)}
        made = {**known, "OSError": OSError, "": RuntimeError}.get(self.kind)
        arguments = [printable(each) if isinstance(each, str) else each for each in self.arguments]
        try:
            if made is not None:
                error: Exception = made(*arguments)
                return error
        except Exception as reason:
            raise Nonsense(f"{self} makes no exception") from reason
        raise Nonsense(f"{self.kind!r} is no exception")


_TOLD = (str, int, NoneType)


def _errors(base: type[NetnsKitError]) -> Iterator[type[NetnsKitError]]:
    """Of this library; a caller's own are not to be made by what comes from outside."""
    for each in base.__subclasses__():
        if each.__module__.startswith(f"{__name__.partition('.')[0]}."):
            yield each
            yield from _errors(each)
