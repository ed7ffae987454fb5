"""Checks of what callers give, made before anything is changed.

A public call that takes an address takes text, an address or an interface alike, by `address`.  Whatever cannot be
used raises an `ArgumentError` that names the argument, what was given and what was expected.

>>> address("10.0.2.100") == address(IPv4Interface("10.0.2.100/24"))
True
>>> whole_number("mtu", "1500", 68, 65535)
Traceback (most recent call last):
    ...
netns_kit.errors.ArgumentTypeError: mtu='1500': expected a whole number from 68 to 65535
>>> one_of("driver", "fast", ("thread", "loop"))
Traceback (most recent call last):
    ...
netns_kit.errors.ArgumentError: driver='fast': expected 'thread' or 'loop'
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address
from typing import Any, TypeAlias, TypeVar

from .errors import AddressError, ArgumentError, ArgumentTypeError

Address: TypeAlias = IPv4Address | IPv6Address
AddressLike: TypeAlias = str | IPv4Address | IPv6Address
"""An address as callers may give it.  An `ipaddress` interface counts as one: its prefix is ignored."""

F = TypeVar("F", bound=Callable[..., Any])

SHOWN = 200  # characters of a value in a message
LARGEST_PORT = 65535


def address(given: AddressLike, name: str = "address", *, version: int | None = None) -> Address:
    """Return the address that text, an address or an interface means.

    Raises `AddressError` for text that is not an address and for an address of another family than `version`,
    `ArgumentTypeError` for any other type.
    """
    kind = type(given)
    if kind is IPv4Address or kind is IPv6Address:
        found: Address = given  # type: ignore[assignment]  # mypy does not narrow by `kind`
    elif isinstance(given, IPv4Interface | IPv6Interface):
        found = given.ip
    elif isinstance(given, IPv4Address | IPv6Address):
        found = given
    elif isinstance(given, str):
        try:
            found = ip_address(given)
        except ValueError as error:
            fix = "give one address, without a prefix" if "/" in given else "resolve names first"
            raise AddressError("expected an IPv4 or IPv6 address", name, shown(given), fix) from error
    else:
        raise ArgumentTypeError("expected an address: text, or an object of ipaddress", name, shown(given))
    if version is not None and found.version != version:
        raise AddressError(f"expected an IPv{version} address", name, shown(str(found)))
    return found


def instance(
    name: str, given: object, kinds: type | tuple[type, ...], expected: str, fix: str | None = None
) -> None:
    """Raise `ArgumentTypeError` unless `given` has one of the types.  A bool is no int here."""
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(given, allowed) or (isinstance(given, bool) and bool not in allowed):
        raise ArgumentTypeError(f"expected {expected}", name, shown(given), fix)


def boolean(name: str, given: object) -> None:
    """Raise `ArgumentTypeError` for anything but True and False."""
    instance(name, given, bool, "True or False")


def text(name: str, given: object, expected: str = "text", fix: str | None = None) -> None:
    """Raise `ArgumentTypeError` for anything but a str."""
    instance(name, given, str, expected, fix)


def whole_number(name: str, given: object, least: int, most: int | None = None) -> None:
    """Raise `ArgumentTypeError` for anything but an int, `ArgumentError` for one out of range."""
    expected = (
        f"a whole number from {least} to {most}" if most is not None else f"a whole number, {least} or more"
    )
    instance(name, given, int, expected)
    assert isinstance(given, int)
    if given < least or (most is not None and given > most):
        raise ArgumentError(f"expected {expected}", name, shown(given))


def number(name: str, given: object, expected: str, holds: Callable[[float], bool]) -> None:
    """Raise `ArgumentTypeError` for anything but an int or a float, `ArgumentError` for one that does not hold."""
    instance(name, given, (int, float), expected)
    assert isinstance(given, int | float)
    if not holds(given):
        raise ArgumentError(f"expected {expected}", name, shown(given))


def descriptor(name: str, given: object) -> os.stat_result:
    """Return the status of an open descriptor.

    Raises `ArgumentTypeError` for anything but an int, `ArgumentError` for one that is no open descriptor.
    """
    whole_number(name, given, 0)
    assert isinstance(given, int)
    try:
        return os.fstat(given)
    except (OSError, OverflowError) as error:
        raise ArgumentError("expected an open descriptor", name, repr(given)) from error


def port(name: str, given: object, least: int = 0) -> None:
    """Raise `ArgumentTypeError` for anything but an int, `ArgumentError` for one that is not a port."""
    whole_number(name, given, least, LARGEST_PORT)


def one_of(name: str, given: object, choices: Iterable[object]) -> None:
    """Raise `ArgumentError` unless `given` is one of the choices, `ArgumentTypeError` if none has its type."""
    known = tuple(choices)
    if not any(type(given) is type(each) and given == each for each in known):
        expected = f"expected {listed(map(repr, known))}"
        same_type = any(type(given) is type(each) for each in known)
        raise (ArgumentError if same_type else ArgumentTypeError)(expected, name, shown(given))


def items(name: str, given: object, expected: str = "a list") -> None:
    """Raise `ArgumentTypeError` for what cannot be iterated, and for text, which would be a list of its letters."""
    if isinstance(given, str | bytes):
        raise ArgumentTypeError(f"expected {expected}", name, shown(given), f"write [{shown(given)}]")
    if not isinstance(given, Iterable):
        raise ArgumentTypeError(f"expected {expected}", name, shown(given))


def mapping(name: str, given: object, expected: str) -> None:
    """Raise `ArgumentTypeError` for anything but a mapping."""
    instance(name, given, Mapping, expected)


def sequence(name: str, given: object, expected: str) -> None:
    """Raise `ArgumentTypeError` for anything but a sequence, and for text."""
    items(name, given, expected)
    instance(name, given, Sequence, expected)


def plain_function(name: str, given: object) -> None:
    """Raises `ArgumentTypeError` unless it is None, or can be called and returns at once what it returns."""
    if given is not None:
        from inspect import iscoroutinefunction  # it reads source, for which it knows all of Python's grammar

        if not callable(given) or iscoroutinefunction(given):
            raise ArgumentTypeError("expected a plain function, or None", name, shown(given))


def listed(words: Iterable[str]) -> str:
    """Return words as a message lists what it could be: "one, two or three"."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def shown(given: object) -> str:
    """Return the value as a message shows it: its `repr`, cut after `SHOWN` characters."""
    whole = repr(given)
    return whole if len(whole) <= SHOWN else f"{whole[:SHOWN]}..."


def fill(record: Any, given: Mapping[str, object] | None = None, /, **values: object) -> None:
    """Set fields of a frozen record while it is being made.

    Args:
        record: The record.
        given: Values of the other fields, as `locals()` of its `__init__` has them; None: these are not set.
        values: Values of fields by their names.
    """
    if given is not None:
        for name in record._layout_.fields.keys() - values.keys():
            object.__setattr__(record, name, given[name])
    for name, value in values.items():
        object.__setattr__(record, name, value)


def spelled_out(source: Callable[..., object], **defaults: object) -> Callable[[F], F]:
    """Let `inspect.signature`, and with it help() and notebooks, show what `**options` of a function may be.

    Args:
        source: The function whose keyword arguments they are.
        defaults: Where this function has others than `source`.
    """
    from inspect import Parameter, signature  # which whoever shows a function has

    def spell_out(function: F) -> F:
        declared = signature(function)
        own = {
            name: each for name, each in declared.parameters.items() if each.kind is not Parameter.VAR_KEYWORD
        }
        options = [
            each.replace(default=defaults.get(name, each.default))
            for name, each in signature(source).parameters.items()
            if each.kind is Parameter.KEYWORD_ONLY and name not in own
        ]
        vars(function)["__signature__"] = declared.replace(parameters=[*own.values(), *options])
        return function

    return spell_out
