"""Policies: made by rules one after another, and data."""

from __future__ import annotations

import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings

from netns_kit import METADATA, PRIVATE, ArgumentError, ArgumentTypeError, Policy, PolicyError, Rule
from netns_kit.child import codec
from netns_kit.frozen import replace
from netns_kit.userstack.worker import policy_check
from tests.support.policies import policies


def example() -> Policy:
    return (
        Policy.deny(refusal="reset", grace=5)
        .allow("example.org", "*.cdn.example.net", ports=443, name="web")
        .allow("10.1.0.0/16", protocol="tcp", ports=5432)
        .deny(METADATA, PRIVATE, refusal="forbidden")
        .ask("shop.example", ports=[80, "8000-8999"], private=False)
        .allow("api.example", sni=True, ports=443)
        .allow(icmp_type="echo-request")
    )


def asked_by_name(policy: Policy, flow: object) -> None:
    """A function that has a policy, as an uplink may have one."""


def test_rules_are_in_the_order_in_which_they_were_added() -> None:
    policy = example()
    assert policy.default == "deny"
    assert [rule.action for rule in policy.rules] == ["allow", "allow", "deny", "ask", "allow", "allow"]
    assert policy.rules[0] == Rule("allow", ["example.org", "*.cdn.example.net"], 443, name="web")
    assert policy.rules[5].protocol == "icmp"
    assert policy.label(0) == "rule 1 (web): allow example.org, *.cdn.example.net port 443"
    assert policy.label(2) == "rule 3: deny METADATA, PRIVATE"
    assert policy.label(None) == "default: deny"
    assert policy.rule(2) is policy.rules[2]
    assert policy.rule(None) == Rule("deny", refusal="reset")
    assert policy.rule(None) is policy.rule(None)


def test_a_policy_never_changes() -> None:
    before = Policy.deny().allow("a.example")
    one, other = before.allow("b.example"), before.allow("c.example")
    assert [len(each.rules) for each in (before, one, other)] == [1, 2, 2]
    assert one != other
    # of two policies made from one, each knows its own rules only
    assert one.allow("c.example").rules[2] == other.rules[1]
    with pytest.raises(PolicyError):
        other.allow("c.example")
    with pytest.raises(AttributeError):
        before.rules = ()  # type: ignore[misc]  # that is what is tried


def test_a_refused_rule_leaves_no_trace() -> None:
    policy = Policy.deny().allow("10.0.0.0/8")
    for _ in range(2):
        with pytest.raises(PolicyError, match=r"^rule 2: "):
            policy.allow("10.1.0.0/16")
        with pytest.raises(PolicyError, match=r"^rule 2: "):
            policy.allow("a.example", "10.1.0.0/16")
        policy.allow("a.example")


def test_threads_may_make_policies_of_one() -> None:
    policy = Policy.deny().allow("a.example")

    def made(number: int) -> Policy:
        return policy.allow(f"b{number}.example").allow("b.example")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(made, range(100)))
    assert [each.rules[1].targets for each in found] == [(f"b{number}.example",) for number in range(100)]


def test_equal_policies_are_one() -> None:
    assert example() == example()
    assert len({example(), example()}) == 1
    for other in (
        Policy.deny(),
        example().deny(),
        replace(example(), audit=True),
        replace(example(), grace=6),
        replace(example(), default="ask"),
    ):
        assert other != example()
    assert example().__eq__("policy") is NotImplemented


@settings(max_examples=30, deadline=None)
@given(policies())
def test_a_policy_is_printed_as_it_is_made(policy: Policy) -> None:
    names = {"Policy": Policy}
    assert eval(repr(policy), names) == policy
    assert codec.decode(Policy, codec.encode(policy)) == policy


def test_a_policy_as_text() -> None:
    assert repr(Policy.allow(audit=True)) == "Policy.allow(audit=True)"
    assert repr(Policy.deny(dns="refused", grace=1)) == "Policy.deny(dns='refused', grace=1.0)"
    policy = Policy.deny().allow("a.example", ports=[80, "8000-8999"], host=True, name="web").deny(PRIVATE)
    assert repr(policy) == (
        "Policy.deny().allow('a.example', ports=[80, '8000-8999'], host=True, name='web').deny('PRIVATE')"
    )
    assert eval(repr(example()), {"Policy": Policy}) == example()


def test_a_worker_can_have_it() -> None:
    policy = example()
    assert policy.index is policy.index
    data, modules = policy_check.pickled(policy)
    assert not any(each.startswith("tests") for each in modules)
    copy = pickle.loads(data)
    assert copy == policy
    assert copy.allow("more.example").rules[-1].targets == ("more.example",)
    assert copy.index.name(b"\4shop\7example\0").rule == 3
    with pytest.raises(PolicyError):
        copy.allow("example.org", ports=443)
    policy_check._check_constant(policy)
    policy_check._check_constant(partial(asked_by_name, policy))


@pytest.mark.parametrize(
    ("options", "knob", "kind"),
    [
        ({"default": "permit"}, "default", ArgumentError),
        ({"audit": 1}, "audit", ArgumentTypeError),
        ({"grace": -1}, "grace", ArgumentError),
        ({"grace": float("nan")}, "grace", ArgumentError),
        ({"grace": float("inf")}, "grace", ArgumentError),
        ({"grace": "1"}, "grace", ArgumentTypeError),
        ({"grace": True}, "grace", ArgumentTypeError),
        ({"refusal": "drop"}, "refusal", ArgumentError),
        ({"dns": "servfail"}, "dns", ArgumentError),
        ({"rules": "allow"}, "rules", ArgumentTypeError),
        ({"rules": ["allow"]}, "rules", ArgumentTypeError),
    ],
)
def test_a_setting_that_cannot_be_used(options: dict[str, Any], knob: str, kind: type) -> None:
    with pytest.raises(kind, match="expected ") as caught:
        Policy(**{"default": "deny", **options})
    assert isinstance(caught.value, ArgumentError)
    assert caught.value.knob == knob


@pytest.mark.parametrize("verb", ["allow", "deny", "ask"])
def test_a_default_is_no_rule(verb: str) -> None:
    with pytest.raises(
        ArgumentError, match=rf"sets the default; write Policy\.\w+\(\)\.{verb}\('a\.example', "
    ):
        getattr(Policy, verb)("a.example")


def test_both_meanings_are_told() -> None:
    for verb in ("allow", "deny", "ask"):
        on_class, on_policy = getattr(Policy, verb), getattr(Policy.deny(), verb)
        assert "audit" in inspect.signature(on_class).parameters
        assert "ports" in inspect.signature(on_policy).parameters
        assert f"On the class, `Policy.{verb}(" in (inspect.getdoc(on_class) or "")
        assert f"policy.{verb}(*targets" in (inspect.getdoc(on_policy) or "")
        assert on_class.__name__ == on_policy.__name__ == verb


@pytest.mark.parametrize(
    ("icmp_type", "options", "knob"),
    [
        ("timestamp", {}, "icmp_type"),
        (3, {}, "icmp_type"),
        ("echo-request", {"protocol": "udp"}, "protocol"),
        ("echo-request", {"ports": 7}, "ports"),
    ],
)
def test_only_pings_leave(icmp_type: Any, options: dict[str, Any], knob: str) -> None:
    with pytest.raises(PolicyError, match=r"^rule 1: allow\(.*icmp_type=") as caught:
        Policy.deny().allow(icmp_type=icmp_type, **options)
    assert caught.value.knob == knob


# -- rules that nothing reaches, contradict each other, or cannot be held to -------------------------------


def made(text: str) -> Policy:
    """A policy that is written with D and A for the two defaults."""
    names = {
        "A": Policy.allow(),
        "D": Policy.deny(),
        "Policy": Policy,
        "PRIVATE": PRIVATE,
        "METADATA": METADATA,
    }
    policy = eval(text, names)
    assert isinstance(policy, Policy)
    return policy


REFUSED: list[tuple[str, str, tuple[object, ...], dict[str, Any], str]] = [
    # covered by one earlier rule
    ('D.allow("a.example")', "allow", ("a.example",), {}, "leave it out"),
    ('D.allow("a.example")', "allow", ("a.example",), {"ports": 443}, "leave it out"),
    ('D.allow("*.example")', "allow", ("b.a.example",), {}, "rule 1: allow \\*.example decides"),
    ('D.allow("*.example")', "allow", ("*.a.example",), {}, "decides about all these flows already"),
    ('D.allow("10.0.0.0/8")', "allow", ("10.1.0.0/16",), {}, "already"),
    ('D.allow("10.0.0.0/8")', "allow", ("192.0.2.1", "10.1.0.0/16"), {}, "targets='10.1.0.0/16'"),
    ('D.allow("0.0.0.0/0")', "allow", ("10.1.0.0/16",), {}, "already"),
    ('D.allow("::/0")', "allow", ("2001:db8::/32",), {}, "already"),
    ("D.allow(ports=443)", "allow", ("a.example",), {"ports": 443, "protocol": "tcp"}, "already"),
    ('D.allow(ports=[80, "400-500"])', "allow", (), {"ports": [80, 443]}, "already"),
    ("D", "allow", (), {}, "begin with Policy.allow()"),
    ("D", "ask", (), {"private": False}, "begin with Policy.ask()"),
    ("D.allow(PRIVATE)", "allow", ("10.0.0.1",), {}, "already"),
    ('D.allow("0.0.0.0/1", "128.0.0.0/1", "::/0")', "allow", (PRIVATE,), {}, "already"),
    ('D.deny("DNS_ELSEWHERE")', "deny", ("1.1.1.1",), {"ports": [53, 853]}, "already"),
    ('D.deny("DNS_ELSEWHERE")', "allow", ("1.1.1.1",), {"ports": 443}, "contradicts"),
    ('D.allow("HOST")', "allow", ("HOST",), {"ports": 22}, "already"),
    (
        'D.allow("a.example", only="dns")',
        "allow",
        ("a.example",),
        {"only": "dns"},
        "all these queries already",
    ),
    ('D.allow("a.example", ports=443)', "allow", ("a.example",), {"only": "dns"}, "all these queries"),
    ('D.allow("a.example", sni=True)', "allow", ("a.example",), {"protocol": "udp"}, "put it before"),
    # contradicted by one
    ('D.allow("a.example")', "deny", ("a.example",), {}, "contradicts: rule 1: allow a.example"),
    ('D.deny("*.example")', "allow", ("a.example",), {}, "contradicts"),
    ("D.deny(PRIVATE)", "allow", ("10.1.0.0/16",), {}, "put it before that rule"),
    ('D.allow("a.example")', "deny", ("a.example",), {"only": "dns"}, "all these queries"),
    ('D.deny("a.example", only="dns")', "allow", ("a.example",), {}, "a name that is resolved"),
    ('D.deny(only="dns")', "allow", ("a.example",), {"ports": 443}, "a name that is resolved"),
    ("D.deny(PRIVATE)", "allow", ("db.example",), {"private": True}, "private=True"),
    ("D.deny()", "allow", ("a.example",), {}, "contradicts"),
    # a deny by name where flows pass without one
    ("A", "deny", ("ads.example",), {}, 'write only="dns"'),
    ("Policy.ask()", "deny", ("ads.example",), {"ports": 443}, 'write only="dns"'),
    ('D.deny("ads.example")', "allow", (), {}, "expected it before rule 1: deny ads.example: "),
    ('D.deny("ads.example")', "allow", ("192.0.2.0/24",), {}, "put it there"),
    ('D.deny("ads.example")', "ask", ("b.example", "HOST"), {}, "put it there"),
    ('D.deny("ads.example", ports=[80, 443])', "allow", ("0.0.0.0/0",), {"ports": "400-500"}, "put it there"),
]


@pytest.mark.parametrize(
    ("text", "verb", "targets", "options", "said"),
    REFUSED,
    ids=[f"{each[0]}.{each[1]}{each[2]}{each[3]}" for each in REFUSED],
)
def test_a_rule_without_effect_is_an_error(
    text: str, verb: str, targets: tuple[object, ...], options: dict[str, Any], said: str
) -> None:
    policy = made(text)
    with pytest.raises(PolicyError, match=said) as caught:
        getattr(policy, verb)(*targets, **options)
    number = len(policy.rules) + 1
    rule = Rule(verb, targets, **options)  # type: ignore[arg-type]  # a verb is an action
    assert str(caught.value).startswith(f"rule {number}: {rule}: ")
    with pytest.raises(PolicyError, match=said):
        Policy(policy.default, (*policy.rules, rule))


@pytest.mark.parametrize(
    "text",
    [
        'D.allow("192.0.2.0/25").allow("192.0.2.0/24")',
        'D.allow("a.example", ports=443).allow("a.example", ports=80)',
        'D.allow("a.example", ports=443).allow("a.example")',
        'D.allow("a.example").allow("*.a.example")',
        'D.allow("*.a.example").allow("a.example")',
        'D.allow("*.a.example").allow("*.example")',
        'D.allow("10.0.0.0/9", "10.128.0.0/9").allow("10.0.0.0/8")',
        'D.allow("10.1.0.0/16").deny(PRIVATE).deny(METADATA)',
        'D.deny("169.254.0.0/16").deny("LINK_LOCAL")',
        'D.allow("a.example", protocol="tcp").allow("a.example", protocol="udp")',
        'D.deny("bad.example").allow("*.example")',
        'D.deny("bad.example", only="dns").allow(protocol="tcp")',
        'D.deny("bad.example", ports=25).allow("*.example").allow("192.0.2.0/24", ports=443)',
        'D.allow("192.0.2.0/24").deny("bad.example")',
        'D.deny("bad.example", ports=[25, 500]).allow("192.0.2.0/24", ports=443)',
        'A.deny("ads.example", only="dns")',
        'D.allow("a.example", only="dns").allow("192.0.2.0/24")',
        'D.allow("a.example", ports=443).deny("a.example", refusal="silence")',
        'D.allow("a.example").deny()',
        'D.allow("db.example", private=True).deny(PRIVATE)',
        'D.deny(PRIVATE, ports=25).allow("db.example", private=True)',
        'D.deny("DNS_ELSEWHERE").allow("1.1.1.1")',
        'A.deny(METADATA).deny("HOST", ports=22).allow("HOST", ports=[22, 80])',
    ],
)
def test_a_rule_with_an_effect_is_none(text: str) -> None:
    policy = made(text)
    assert eval(repr(policy), {"Policy": Policy}) == policy


def test_an_error_can_be_pickled() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.deny().allow("a.example", ports="http")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.rule == "rule 1: allow('a.example', ports='http')"
    assert str(copy).startswith(
        "rule 1: allow('a.example', ports='http'): ports='http': expected ports from 1 "
    )
    assert str(copy).endswith("; write 80")
