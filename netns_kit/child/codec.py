"""Codec: values as JSON and back, by their types.

A worker process and its owner exchange JSON, because what the worker reads may have taken it over: its messages are
data, checked against the type that is expected, and never make anything else.

A *failure* is an exception in such a message: those of `netns_kit.errors` and of the system arrive as what they were,
and any other as its text.

A value is None, a bool, an int, a finite float, a string, an address, an Enum, a tuple, a dict with strings for keys,
a dataclass or a NamedTuple of such values; the last two become lists of their fields.

>>> encode((IPv4Address("10.0.2.2"), None))
['10.0.2.2', None]
>>> decode(tuple[IPv4Address, ...], ["10.0.2.2"])
(IPv4Address('10.0.2.2'),)
>>> decode(int, True)
Traceback (most recent call last):
    ...
netns_kit.child.codec.DecodeError: True is no int
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from netns_kit.errors import NetnsKitError
from netns_kit.frozen import frozen

_SHOWN = 80  # characters of what was not understood


class DecodeError(ValueError):
    """An error: what has come is not what was expected."""


def dump(value: object) -> bytes:
    """Return `value` as a text of JSON.  Raises TypeError if it is none of these."""
    return json.dumps(encode(value), separators=(",", ":")).encode()


def load(kind: Any, text: bytes) -> Any:
    """Return the value of type `kind` in a text of JSON.  Raises `DecodeError`, and nothing else, for any text."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"no JSON: {_shown(text)}") from error
    return decode(kind, value)


def encode(value: Any) -> Any:
    """Return `value` as what `json` takes.  Raises TypeError if it is none of these."""
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
    raise TypeError(
        f"{value!r} is no plain value: expected None, a number, text, an address or a record of such"
    )


def decode(kind: Any, value: Any) -> Any:
    """Return the value of type `kind` that `encode` has made this of.  Raises `DecodeError`, and nothing else."""
    try:
        return _decode(kind, value)
    except DecodeError:
        raise
    except Exception as error:  # of the record's own making: it may raise anything
        raise DecodeError(f"{_shown(value)} is no {kind}: {error}") from error


def _decode(kind: Any, value: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return decode(part, value)
            except DecodeError:
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
    raise DecodeError(f"{_shown(value)} is no {getattr(kind, '__name__', kind)}")


@cache
def _fields(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass or NamedTuple: types by their names."""
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
    """Return `text` as it may be shown on a terminal, whoever it came from."""
    return "".join(
        each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text
    )


@frozen
class Failure:
    """An exception: the name of its class, if the other side knows that, and its arguments."""

    kind: str
    arguments: tuple[str | int | None, ...]

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Return the failure that describes `error`."""
        if isinstance(error, NetnsKitError):
            given = tuple(each if type(each) in _TOLD else str(each) for each in error.args)
            return cls(type(error).__name__, given)
        if isinstance(error, OSError):
            filename = None if error.filename is None else str(error.filename)
            return cls("OSError", (error.errno, error.strerror or str(error), filename))
        return cls("", (f"{type(error).__name__}: {error}",))

    def exception(self) -> Exception:
        """Make the exception; a RuntimeError if its class is not known here.  Raises `DecodeError`."""
        known = {each.__name__: each for each in _errors(NetnsKitError)}
        made = {**known, "OSError": OSError, "": RuntimeError}.get(self.kind)
        arguments = [printable(each) if isinstance(each, str) else each for each in self.arguments]
        try:
            if made is not None:
                error: Exception = made(*arguments)
                return error
        except Exception as reason:
            raise DecodeError(f"{self} makes no exception") from reason
        raise DecodeError(f"{self.kind!r} is no exception")


_TOLD = (str, int, NoneType)


def _errors(base: type[NetnsKitError]) -> Iterator[type[NetnsKitError]]:
    """Yield this library's subclasses: what comes from outside must not make a caller's own."""
    for each in base.__subclasses__():
        if each.__module__.startswith(f"{__name__.partition('.')[0]}."):
            yield each
            yield from _errors(each)
