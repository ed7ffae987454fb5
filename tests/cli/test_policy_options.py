"""Rules as a command line has them, and the policy that they make."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from netns_kit import Policy
from netns_kit.cli.attach import main as attach
from netns_kit.cli.command_line import FAILED, Parser
from netns_kit.cli.policy import add_policy_options, policy_of
from netns_kit.cli.run import main as netns_kit


def options(*words: str) -> argparse.Namespace:
    parser = Parser("test", "", description="", epilog="")
    add_policy_options(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("text", "target", "more"),
    [
        ("example.org", "example.org", {}),
        ("*.example.org:443", "*.example.org", {"ports": 443}),
        ("example.org:80,443,8000-8999/tcp", "example.org", {"ports": [80, 443, "8000-8999"], "protocol": "tcp"}),
        ("192.0.2.1:53/udp", "192.0.2.1", {"ports": 53, "protocol": "udp"}),
        ("10.0.0.0/8", "10.0.0.0/8", {}),
        ("10.0.0.0/8:5432/tcp", "10.0.0.0/8", {"ports": 5432, "protocol": "tcp"}),
        ("10.0.0.0/8/icmp", "10.0.0.0/8", {"protocol": "icmp"}),
        ("2001:db8::1", "2001:db8::1", {}),
        ("2001:db8::/32/udp", "2001:db8::/32", {"protocol": "udp"}),
        ("[2001:db8::1]:443", "2001:db8::1", {"ports": 443}),
        ("[2001:db8::]/32:443/tcp", "2001:db8::/32", {"ports": 443, "protocol": "tcp"}),
        ("[2001:db8::/32]:443", "2001:db8::/32", {"ports": 443}),
        ("PRIVATE:22", "PRIVATE", {"ports": 22}),
        ("example.org/dns", "example.org", {"only": "dns"}),
        (":443/tcp", None, {"ports": 443, "protocol": "tcp"}),
        ("/icmp", None, {"protocol": "icmp"}),
    ],
)  # fmt: skip
def test_a_rule(text: str, target: str | None, more: dict[str, Any]) -> None:
    rule = {"targets": target, **more} if target else more
    for action in ("allow", "deny"):
        named = {"action": action, "name": f"--{action} {text}", **rule}
        assert policy_of(options("--allow", "first.example", f"--{action}", text)) == Policy.from_dict(
            {"default": "deny", "rules": [{**FIRST, "name": "--allow first.example"}, named]}
        )


FIRST = {"action": "allow", "targets": "first.example"}


def test_the_order_is_that_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(Policy.ask(grace=7).deny("METADATA").to_json(), encoding="utf-8")
    made = policy_of(
        options("--deny", ":25", "--policy", str(path), "--allow", "192.0.2.1", "--deny", "PRIVATE")
    )
    assert made is not None
    assert (made.default, made.grace) == ("ask", 7)
    assert [str(each) for each in made.rules] == [
        "deny everything port 25", "allow 192.0.2.1", "deny PRIVATE", "deny METADATA",
    ]  # fmt: skip
    assert made.label(1) == "rule 2 (--allow 192.0.2.1): allow 192.0.2.1"


def test_the_default_is_what_the_rules_are_for() -> None:
    for words, default in (
        ([], None),
        (["--allow", "192.0.2.1"], "deny"),
        (["--deny", "192.0.2.1"], "allow"),
        (["--deny", "192.0.2.1", "--allow", "192.0.2.0/24"], "deny"),
    ):
        made = policy_of(options(*words))
        assert (made.default if made else None) == default


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--allow", ""], "--allow: '': expected [TARGET][:PORTS][/PROTOCOL]; for everything leave TARGET out"),
        (["--allow", "*:80"], "--allow: '*:80': expected [TARGET][:PORTS][/PROTOCOL]; for everything"),
        (["--allow", "example.org:"], "--allow: 'example.org:': expected [TARGET][:PORTS][/PROTOCOL]"),
        (["--allow", "example.org:https"], "--allow: 'example.org:https': expected ports from 1 to 65535"),
        (["--allow", "example.org:443/sctp"], "--allow: 'example.org:443/sctp': expected 'tcp', 'udp', 'icmp'"),
        (["--deny", "private"], "--deny: 'private': expected a domain name, *.NAME, an address"),
        (["--allow", "https://example.org"], "--allow: 'https://example.org': expected [TARGET]"),
        (["--allow", "[::1"], "--allow: '[::1': expected a domain name"),
        (["--allow", "127.0.0.1"], "--allow: '127.0.0.1': expected an address that flows can go to"),
        (["--allow", "/icmp", "--allow", "b.example/icmp"], "--allow: 'b.ex"),
        (["--deny", "ads.example"], "--deny: 'ads.example': expected /dns: "),
        (["--policy", "{}/none.toml"], "--policy: '{}/none.toml': No such file or directory"),
        (["--policy", "{}"], "--policy: '{}': path="),
        (["--policy", "{}/bad.json"], "--policy: '{}/bad.json': rules[0].ports=0: expected ports"),
        (["--deny", "10.1.0.0/16", "--deny", "10.2.0.0/16", "--policy", "{}/good.json", "--deny", "10.0.0.0/8"],
         "--policy: rules[0].targets="),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_its_option(
    words: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = {"default": "deny", "rules": [{"action": "allow", "targets": "a.example", "ports": 0}]}
    (tmp_path / "bad.json").write_text(str(bad).replace("'", '"'), encoding="utf-8")
    (tmp_path / "good.json").write_text(Policy.allow().deny("10.9.0.0/16").to_json(), encoding="utf-8")
    for main, rest in ((netns_kit, ["--", "true"]), (attach, ["1"])):
        before = ["run"] if main is netns_kit else []
        with pytest.raises(SystemExit) as caught:
            main([*before, *(word.format(tmp_path) for word in words), *rest])
        assert caught.value.code == FAILED
        _, mistake = capfd.readouterr().err.splitlines()
        assert re.sub(r"^netns-kit \w+: ", "", mistake).startswith(said.format(tmp_path))
        assert "only=" not in mistake
