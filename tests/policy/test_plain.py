"""Policies as plain data: there and back, what is wrong named by its place, and the schema that editors have."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns_kit import FeatureUnavailable, Policy, PolicyError
from netns_kit.errors import ArgumentError
from netns_kit.policy import plain
from netns_kit.policy.presets import PRESETS
from netns_kit.policy.rules import DnsRefusal, RefusalName, Rule, RuleAction
from netns_kit.stack import Transport
from tests.support import ROOT

SCHEMA = json.loads((ROOT / "docs" / "policy.schema.json").read_text(encoding="utf-8"))
WHOLE = (
    Policy.deny(refusal="reset", dns="refused", audit=True, grace=1.5)
    .allow(
        "example.org",
        "*.cdn.example.net",
        ports=[443, "8000-8999"],
        sni=True,
        name='the "web" \\ é\U0001f600',
    )
    .deny("METADATA", "10.0.0.0/8", refusal="silence")
    .allow("192.0.2.1", "2001:db8::/32", protocol="tcp", ports=5432)
    .allow("db.example", private=True, host=True, protocol="tcp")
    .deny("ads.example", only="dns", dns="refused")
    .ask("asked.example", protocol="udp")
    .allow(protocol="icmp")
)
WHOLE_TOML = r"""default = "deny"
audit = true
grace = 1.5
refusal = "reset"
dns = "refused"

[[rules]]
action = "allow"
targets = ["example.org", "*.cdn.example.net"]
ports = [443, "8000-8999"]
name = "the \"web\" \\ é😀"
sni = true
"""


# -- there and back ---------------------------------------------------------------------------------------

ADDRESSES = ["192.0.2.1", "10.1.0.0/16", "2001:db8::7", "fd00:7::/48", "PRIVATE", "METADATA", "HOST"]
NAMES = ["example.org", "*.example.org", "a.b.example", "*.b.example", "x_y.test"]
RANGES = st.builds("{}-{}".format, st.integers(1, 99), st.integers(99, 65535))
PORTS = st.lists(st.one_of(st.integers(1, 65535), RANGES), min_size=1, max_size=4)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """Any rule that can be one."""
    action: RuleAction = draw(st.sampled_from(get_args(RuleAction)))
    options: dict[str, Any] = {"name": draw(st.sampled_from(["", "web", 'a "b"']))}
    by_name = draw(st.booleans())
    targets = draw(st.lists(st.sampled_from(NAMES if by_name else ADDRESSES), max_size=3))
    if draw(st.booleans()):
        options["protocol"] = draw(st.sampled_from(get_args(Transport)))
    if draw(st.booleans()):
        options["ports"] = draw(PORTS)
    for name in plain.KEYS[action]:
        if name in ("sni", "host", "private"):
            options[name] = draw(st.booleans())
        if name in ("refusal", "dns"):
            options[name] = draw(st.sampled_from(get_args(RefusalName if name == "refusal" else DnsRefusal)))
        if name == "only" and draw(st.booleans()):
            options[name] = "dns"
    try:
        return Rule(action, targets, **options)
    except PolicyError:
        return Rule(action, targets)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy that can be one: a rule that cannot be reached is left out."""
    made = Policy(
        draw(st.sampled_from(get_args(RuleAction))), audit=draw(st.booleans()), grace=draw(st.floats(0, 1e6))
    )
    for rule in draw(st.lists(rules(), max_size=6)):
        try:
            made = Policy(made.default, (*made.rules, rule), made.audit, made.grace)
        except PolicyError:
            continue
    return made


@given(policies())
def test_a_policy_comes_back(policy: Policy) -> None:
    data = policy.as_dict()
    assert Policy.from_dict(data) == policy
    assert Policy.from_json(policy.to_json()) == policy
    assert json.loads(policy.to_json()) == data
    assert faults(SCHEMA, data) == []
    if sys.version_info >= (3, 11):
        assert Policy.from_toml(policy.to_toml()) == policy


def test_a_policy_as_people_read_it() -> None:
    assert WHOLE.to_toml().startswith(WHOLE_TOML + "\n[[rules]]\n")
    assert Policy.from_dict(WHOLE.as_dict()) == WHOLE
    assert Policy.deny().as_dict() == {"default": "deny"}
    assert (
        Policy.from_json('{"$schema": "policy.schema.json", "default": "allow", "rules": []}')
        == Policy.allow()
    )


def test_what_is_one_needs_no_list() -> None:
    short = {"action": "allow", "targets": "example.org", "ports": 443}
    long = {"action": "allow", "targets": ["example.org"], "ports": [443]}
    assert Policy.from_dict({"default": "deny", "rules": [short]}) == Policy.from_dict(
        {"default": "deny", "rules": [long]}
    )


@pytest.mark.parametrize("suffix", [".json", ".toml", ".JSON"])
def test_a_policy_of_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"policy{suffix}"
    path.write_text(WHOLE.to_toml() if suffix == ".toml" else WHOLE.to_json(), encoding="utf-8")
    assert Policy.load(path) == Policy.load(str(path)) == WHOLE


# -- mistakes ---------------------------------------------------------------------------------------------


def of_rule(**rule: object) -> dict[str, object]:
    """A policy whose second rule is wrong."""
    return {"default": "deny", "rules": [{"action": "allow", "targets": "a.example"}, rule]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "policy=[]: expected a policy, as an object"),
        ({}, "default=None: expected 'allow', 'deny' or 'ask'"),
        ({"default": "block"}, "default='block': expected 'allow', 'deny' or 'ask'"),
        ({"defualt": "deny"}, "defualt='deny': expected a key of a policy; write default"),
        ({"default": "deny", "audit": 1}, "audit=1: expected True or False"),
        ({"default": "deny", "grace": -1}, "grace=-1: expected seconds, 0 or more"),
        ({"default": "allow", "refusal": "reset"}, "refusal='reset': expected no such setting"),
        ({"default": "deny", "rules": {}}, "rules={}: expected a list of rules"),
        ({"default": "deny", "rules": ["a.example"]}, "rules[0]='a.example': expected a rule, as an object"),
        (of_rule(), "rules[1].action=None: expected 'allow', 'deny' or 'ask'"),
        (of_rule(action=["allow"]), "rules[1].action=['allow']: expected 'allow', 'deny' or 'ask'"),
        (of_rule(action="ask", port=80), "rules[1].port=80: expected a key of the rule, action='ask'; write ports"),
        (of_rule(action="allow", refusal="reset"), "rules[1].refusal='reset': expected a rule that denies or asks"),
        (of_rule(action="deny", sni=True), "rules[1].sni=True: expected a key of the rule, action='deny'"),
        (of_rule(action="allow", targets="b.example", ports=[80, 70000]), "rules[1].ports=70000: expected ports"),
        (of_rule(action="allow", targets="b.example", ports="http"), "rules[1].ports='http': expected ports from 1"),
        (of_rule(action="allow", targets=["b.example", "*"]), "rules[1].targets='*': expected a domain name"),
        (of_rule(action="allow", targets=[7]), "rules[1].targets=7: expected a domain name"),
        (of_rule(action="allow", targets=[]), "rules[1].targets=[]: expected at least one target"),
        (of_rule(action="deny", targets=[], ports=25), "rules[1].targets=[]: expected at least one target"),
        (of_rule(action="allow", targets=7), "rules[1].targets=7: expected a list of targets"),
        (of_rule(action="allow", targets="b.example", protocol="sctp"), "rules[1].protocol='sctp': expected 'tcp', "),
        (of_rule(action="allow", targets="b.example", sni="yes"), "rules[1].sni='yes': expected True or False"),
        (of_rule(action="allow", targets="b.example", name=7), "rules[1].name=7: expected a name"),
        (of_rule(action="allow", targets="a.example", ports=443), "rules[1].targets"),  # it cannot be reached
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_place(data: object, said: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(said)) as caught:
        Policy.from_dict(data)  # type: ignore[arg-type]  # that is what is tried
    assert caught.value.knob == said.partition("=")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"text=.*line 1 column 2.*: expected JSON"),
        ('{"default": "deny", "default": "allow"}', "default='deny': expected each key once"),
        ('{"default": "deny", "grace": NaN}', "text=NaN: expected a number"),
        ("[" * 100_000, "expected JSON"),
        ("null", "policy=None: expected a policy"),
    ],
)
def test_text_that_is_no_json(text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Policy.from_json(text)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("default = deny", r"text=.*line 1, column 11.*: expected TOML"),
        ('default = "deny"\ndefault = "allow"', "expected TOML"),
        ('default = "deny"\ngrace = nan', "grace=nan: expected seconds"),
        (
            'default = "deny"\nrules = 1979-05-27',
            r"rules=datetime.date\(1979, 5, 27\): expected a list of rules",
        ),
    ],
)
def test_text_that_is_no_toml(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Policy.from_toml(text)


def test_a_python_that_cannot_read_toml(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FeatureUnavailable, match=r"cannot read TOML; install netns-kit\[toml\]"):
        Policy.from_toml(WHOLE_TOML)


def test_files_that_are_no_policies(tmp_path: Path) -> None:
    with pytest.raises(
        PolicyError, match=r"policy.yaml'?: expected a file of JSON or TOML; call it by a name that ends in"
    ):
        Policy.load(tmp_path / "policy.yaml")
    with pytest.raises(FileNotFoundError):
        Policy.load(tmp_path / "policy.json")
    (tmp_path / "policy.json").write_bytes(b'{"default": "\xff"}')
    with pytest.raises(PolicyError, match="expected text in UTF-8"):
        Policy.load(tmp_path / "policy.json")
    with pytest.raises(ArgumentError, match="path=7: expected a path"):
        Policy.load(7)  # type: ignore[arg-type]  # that is what is tried


# -- the schema -------------------------------------------------------------------------------------------


def faults(schema: dict[str, Any], data: object) -> list[str]:
    """What a JSON schema has against data: those words of it that ours has."""
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "number": (int, float),
        "integer": int,
    }
    found = []
    for word, value in schema.items():
        match word:
            case "type":
                fits = isinstance(data, kinds[value]) and (value == "boolean" or not isinstance(data, bool))
            case "enum" | "const":
                fits = data in value if word == "enum" else data == value
            case "minimum" | "maximum" if isinstance(data, int | float):
                fits = value <= data if word == "minimum" else data <= value
            case "minItems" if isinstance(data, list):
                fits = len(data) >= value
            case "pattern" if isinstance(data, str):
                fits = re.search(value, data) is not None
            case "anyOf" | "oneOf":
                fitting = sum(not faults(each, data) for each in value)
                fits = fitting >= 1 if word == "anyOf" else fitting == 1
            case "items" if isinstance(data, list):
                fits = not any(faults(value, each) for each in data)
            case "properties" if isinstance(data, dict):
                fits = not any(faults(value[name], each) for name, each in data.items() if name in value)
            case "required" if isinstance(data, dict):
                fits = data.keys() >= set(value)
            case "additionalProperties" if isinstance(data, dict):
                fits = data.keys() <= schema["properties"].keys()
            case "$schema" | "title" | "description":
                continue
            case (
                "minimum"
                | "maximum"
                | "minItems"
                | "pattern"
                | "items"
                | "properties"
                | "required"
                | "additionalProperties"
            ):
                continue  # of another type
            case _:
                raise AssertionError(f"the schema has {word}, which is not checked")
        if not fits:
            found.append(f"{word} of {data!r}")
    return found


def schema_of(action: str) -> dict[str, Any]:
    [found] = [
        each["properties"]
        for each in SCHEMA["properties"]["rules"]["items"]["oneOf"]
        if each["properties"]["action"]["const"] == action
    ]
    return dict(found)


@pytest.mark.parametrize(
    "policy",
    [
        Policy.ask(refusal="forbidden"),
        Policy.deny().ask("a.example", refusal="silence"),
        Policy.deny().allow("a.example", sni=True, refusal="forbidden"),
        Policy.deny().allow("a.example", sni=True),
    ],
)
def test_how_it_is_refused_is_kept(policy: Policy) -> None:
    assert Policy.from_toml(policy.to_toml()) == Policy.from_json(policy.to_json()) == policy
    assert eval(repr(policy), {"Policy": Policy}) == policy
    policy.explain("https://a.example")


@pytest.mark.parametrize(
    ("default", "setting"),
    [("allow", {"refusal": "reset"}), ("allow", {"dns": "refused"}), ("ask", {"dns": "refused"})],
)
def test_a_default_that_refuses_nothing_has_no_way_to(default: Any, setting: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="no such setting where the default is") as caught:
        Policy(default, **setting)
    assert caught.value.fix == "leave it out"
    with pytest.raises(ArgumentError):
        Policy.from_dict({"default": default, **setting})


def test_the_schema_has_what_the_code_has() -> None:
    assert set(SCHEMA["properties"]) == {"$schema", "rules", *plain.SETTINGS}
    assert set(plain.KEYS) == set(get_args(RuleAction)) == set(SCHEMA["properties"]["default"]["enum"])
    for action, keys in plain.KEYS.items():
        properties = schema_of(action)
        assert set(properties) == set(keys)
        for name, alias in (("protocol", Transport), ("refusal", RefusalName), ("dns", DnsRefusal)):
            if name in properties:
                assert properties[name]["enum"] == list(get_args(alias))
    assert all(name in str(SCHEMA) for name in PRESETS if name == "PRIVATE")


PIECES = st.one_of(
    st.sampled_from(["allow", "deny", "ask", "dns", "tcp", "icmp", "reset", "refused", "a.example", ""]),
    st.booleans(), st.none(), st.integers(-1, 70000), st.floats(allow_nan=False),
    st.sampled_from(["80", "80-90", " 80 - 90", "80:90", "0", "90-80", "8o"]),
    st.lists(st.sampled_from(["b.example", "PRIVATE", 80, "80-90", None]), max_size=2),
)  # fmt: skip


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "default": PIECES,
            "audit": PIECES,
            "grace": PIECES,
            "refusal": PIECES,
            "dns": PIECES,
            "x": PIECES,
        },
    ),
    st.lists(
        st.fixed_dictionaries(
            {"action": st.sampled_from(["allow", "deny", "ask"])},
            optional=dict.fromkeys(
                ["targets", "ports", "protocol", "name", "sni", "only", "refusal", "private"], PIECES
            ),
        ),
        max_size=2,
    ),
)
def test_what_the_schema_refuses_is_refused(data: dict[str, object], rules: list[object]) -> None:
    """And what is refused raises nothing but an error about it."""
    data = {**data, "rules": rules}
    try:
        Policy.from_dict(data)
    except ArgumentError:
        return
    assert faults(SCHEMA, data) == []
