"""Checks whether a worker process can have an uplink, and pickles what it needs.

An `Uplink` is pickled.  Functions and classes are sent by name and imported in the worker, everything else is copied.
So a change here does not reach a running worker.  A policy that is made to be changed, such as an object with a list
of blocked hosts, would then let pass what its owner believes to be blocked; it is therefore refused.  Globals, and
attributes of a subclass of `Uplink`, cannot be checked from here.
"""

from __future__ import annotations

import io
import pickle
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from types import FunctionType, NoneType
from typing import Any

from netns_kit.errors import NotImportable
from netns_kit.uplink.uplink import Uplink

FIX_OF_MAIN = (
    "define it in a module beside the program, say policies.py, and import it from there; or use "
    'driver="thread"'
)
FIX = 'use a function at the top of a module that can be imported, or driver="thread"'
_CONSTANTS = frozenset(
    {NoneType, bool, int, float, str, bytes, FunctionType, re.Pattern}
    | {IPv4Address, IPv6Address, IPv4Network, IPv6Network, IPv4Interface, IPv6Interface}
)


def check(uplink: Uplink) -> None:
    """Check that a worker can have an uplink.

    Raises:
        NotImportable: It cannot.
    """
    for function in (uplink.policy, uplink.dns.hook):
        if function is not None and function is not uplink.rules:  # a Policy is data, and never changes
            _check_constant(function)
    pickled(uplink)


def _check_constant(value: object) -> None:
    """Check that a value cannot change, as far as objects tell.

    Raises:
        NotImportable: It may change, and its copy would not.
    """
    parts: Iterable[object] = ()
    if isinstance(value, partial):
        parts = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, tuple | frozenset):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type) and _is_frozen(value):
        parts = (getattr(value, each.name) for each in fields(value))
    elif type(value) not in _CONSTANTS and not isinstance(value, Enum | type):
        raise NotImportable(
            f"policy or hook has {value!r}, which may change here, and a worker process would not see it",
            fix=FIX,
        )
    for part in parts:
        _check_constant(part)


def _is_frozen(record: Any) -> bool:
    frozen: bool = record.__dataclass_params__.frozen
    return frozen


def pickled(value: object, numbers: Mapping[int, int] | None = None) -> tuple[bytes, set[str]]:
    """Pickle `value`, and return the names of the modules that are needed to unpickle it.

    Args:
        value: What the worker gets.
        numbers: The numbers in the worker of the descriptors of sockets in `value`.  None: it must not have sockets.

    Raises:
        NotImportable: Another process cannot have a part of it.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, numbers)
    try:
        pickler.dump(value)
    except NotImportable:
        raise
    except Exception as error:  # objects may raise anything when pickled
        raise NotImportable(f"a worker process cannot have this uplink: {error}", fix=FIX) from error
    return buffer.getvalue(), pickler.modules


class _Pickler(pickle.Pickler):
    """A pickler that notes the modules of functions and classes.  It refuses `__main__`: a worker has another."""

    def __init__(self, buffer: io.BytesIO, numbers: Mapping[int, int] | None) -> None:
        super().__init__(buffer)
        self.modules: set[str] = set()
        self._numbers = numbers

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, type | FunctionType):
            if value.__module__ == "__main__":
                what = (
                    f"`{value.__qualname__}`, which is of the program's own file or a notebook (`__main__`)"
                )
                raise NotImportable(f"a worker process cannot import {what}", fix=FIX_OF_MAIN)
            self.modules.add(value.__module__)
        if isinstance(value, socket.socket) and self._numbers is not None:
            return _socket_at, (self._numbers[value.fileno()],)
        return NotImplemented


def _socket_at(fd: int) -> socket.socket:
    return socket.socket(fileno=fd)
