"""A policy as plain data: what JSON and TOML have, and back.

    {"default": "deny", "rules": [{"action": "allow", "targets": ["example.org"], "ports": [443]}]}

docs/policy.schema.json says what the data may be.  An error names its place in the data, counted from 0 as jq and
Python do: `rules[3].ports`.  Data that is written has no value that is the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from netns_kit import arguments
from netns_kit.errors import FeatureUnavailable, PolicyError

from .rules import Rule, RuleAction, ports_data, usual_refusal

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from .policy import Policy

Plain: TypeAlias = dict[str, Any]
"""A JSON object."""

_ALL = ("action", "targets", "ports", "protocol", "refusal", "name")
KEYS: dict[RuleAction, tuple[str, ...]] = {
    "allow": (*_ALL, "sni", "host", "private", "only"),
    "deny": (*_ALL, "dns", "only"),
    "ask": (*_ALL, "private"),
}
"""The keys that rules have."""
SETTINGS = ("default", "audit", "grace", "refusal", "dns")
_BARE = Rule("allow")


# -- rules ----------------------------------------------------------------------------------------------


def _rule_data(rule: Rule) -> Plain:
    """Return a rule as plain data."""
    data: Plain = {}
    for name in KEYS[rule.action]:
        value = getattr(rule, name)
        usual = usual_refusal(rule.looks) if name == "refusal" else getattr(_BARE, name)
        if name == "action" or value != usual:
            data[name] = value
    if rule.targets:
        data["targets"] = list(rule.targets)
    if rule.ports:
        data["ports"] = ports_data(rule.ports)
    return data


def read(data: object) -> tuple[Plain, tuple[Rule, ...]]:
    """Return the settings and the rules of a policy.

    Raises `PolicyError` for data that has something else, and for a rule that has a value which cannot be used.
    """
    settings = _table(data, "", "a policy")
    _check_keys(settings, ("$schema", *SETTINGS, "rules"), "", "a policy")
    rules = settings.pop("rules", [])
    settings.pop("$schema", None)
    if not isinstance(rules, list | tuple):
        raise PolicyError("expected a list of rules", "rules", arguments.shown(rules))
    settings.setdefault("default", None)
    return settings, tuple(_rule(each, number) for number, each in enumerate(rules))


def policy_data(policy: Policy) -> Plain:
    """Return a policy as plain data."""
    usual = type(policy)(policy.default)
    data: Plain = {}
    for name in SETTINGS:
        value = getattr(policy, name)
        if name == "default" or value != getattr(usual, name):
            data[name] = value
    if policy.rules:
        data["rules"] = list(map(_rule_data, policy.rules))
    return data


def place(error: PolicyError, number: int) -> None:
    """Let an error about a rule name its place in the data."""
    error.knob = f"rules[{number}].{error.knob}"
    error.about(error.rule)


def _rule(data: object, number: int) -> Rule:
    path = f"rules[{number}]"
    values = _table(data, path, "a rule")
    action = values.pop("action", None)
    if not isinstance(action, str) or action not in KEYS:
        raise PolicyError(
            f"expected {arguments.listed(map(repr, KEYS))}", f"{path}.action", arguments.shown(action)
        )
    _check_keys(values, KEYS[action], path, f"the rule, action={action!r}")
    targets = values.get("targets")
    if isinstance(targets, str):
        values["targets"] = [targets]
    elif targets in ([], ()):
        expected = "expected at least one target, since the rule would be about everything"
        raise PolicyError(expected, f"{path}.targets", "[]", "leave targets out if that is meant")
    try:
        return Rule(action, **values)
    except PolicyError as error:
        place(error, number)
        raise


def _table(data: object, path: str, what: str) -> Plain:
    """Return a copy of a JSON object."""
    if not isinstance(data, Mapping):
        raise PolicyError(f"expected {what}, as an object", path or "policy", arguments.shown(data))
    return dict(data)


def _check_keys(data: Plain, known: tuple[str, ...], path: str, what: str) -> None:
    for name, value in data.items():
        if name not in known:
            from difflib import get_close_matches  # modules for what is rare are imported there

            like = get_close_matches(str(name), known, 1)
            fix = f"write {like[0]}" if like else f"such a key is {arguments.listed(known)}"
            place = f"{path}.{name}" if path else str(name)
            raise PolicyError(f"expected a key of {what}", place, arguments.shown(value), fix)


# -- JSON and TOML --------------------------------------------------------------------------------------


def to_json(data: Plain) -> str:
    """Write data as JSON."""
    import json

    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Any:
    """Read JSON.  Raises `PolicyError` for text that is none, or has a key twice."""

    def once(pairs: list[tuple[str, object]]) -> Plain:
        found = dict(pairs)
        for name, value in pairs:
            if value is not found[name]:
                raise PolicyError("expected each key once", name, arguments.shown(value))
        return found

    import json

    arguments.text("text", text)
    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=_no_number)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PolicyError("expected JSON", "text", str(error)) from error


def _no_number(word: str) -> NoReturn:
    raise PolicyError("expected a number", "text", word)


def to_toml(data: Plain) -> str:
    """Write data as TOML: the settings, and a table for each rule."""
    rules = data.get("rules", [])
    tables = [{name: value for name, value in data.items() if name != "rules"}, *rules]
    return "\n[[rules]]\n".join(
        "".join(f"{name} = {_toml(value)}\n" for name, value in table.items()) for table in tables
    )


def _toml(value: object) -> str:
    """Write a value as TOML, which has JSON's text but for U+007F, and JSON's lists, flags and numbers."""
    import json

    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def from_toml(text: str) -> Any:
    """Read TOML.

    Raises `PolicyError` for text that is none, and `FeatureUnavailable` if this Python has no reader of it.
    """
    arguments.text("text", text)
    reader = _toml_reader()
    try:
        return reader.loads(text)
    except (ValueError, RecursionError) as error:
        raise PolicyError("expected TOML", "text", str(error)) from error


def _toml_reader() -> ModuleType:
    """Return the reader of Python 3.11 and newer, or the package it was made of."""
    for name in ("tomllib", "tomli"):
        try:
            return import_module(name)
        except ImportError:
            pass
    raise FeatureUnavailable(
        "this Python cannot read TOML", fix="install netns-kit[toml], or tomli; or write the policy as JSON"
    )


def load(path: str | Path) -> Any:
    """Read a file by its suffix.

    Raises `PolicyError` for one that is no policy, `FeatureUnavailable` for TOML that cannot be read here, OSError
    for a file that cannot be read.
    """
    from pathlib import Path

    arguments.instance("path", path, (str, Path), "a path")
    file = Path(path)
    reader = {".json": from_json, ".toml": from_toml}.get(file.suffix.lower())
    if reader is None:
        fix = "call it by a name that ends in .toml or .json"
        raise PolicyError("expected a file of JSON or TOML", "path", arguments.shown(str(file)), fix)
    content = file.read_bytes()
    try:
        return reader(content.decode())
    except UnicodeDecodeError as error:
        raise PolicyError("expected text in UTF-8", "text", str(error)) from error
