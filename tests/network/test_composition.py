"""Composition: what a file says, in which order, and what is said of what it cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from netns_kit import ArgumentError, Composition, Dependency, Policy

SHOP = """
name = "shop"

[network]
subnet = "10.7.0.0/16"
dns = ["192.0.2.53"]
search = ["shop.internal"]
allow_host_loopback = [5432]

[members.web]
command = ["nginx", "-g", "daemon off;"]
ports = ["127.0.0.1:8080:80"]
aliases = ["www"]
address = "10.7.0.9"
mac = "02:00:00:00:00:01"
env = { MODE = "test" }
directory = "site"
depends_on = ["db:5432", "cache:53/udp", "app"]

[members.app]
command = "exec app"
depends_on = ["db"]

[members.db]
command = ["postgres"]

[members.cache]
command = ["cache"]

[members.tools]
"""


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "whatever.toml"
    file.write_text(SHOP, encoding="utf-8")
    shop = Composition.load(file)
    assert shop.name == "shop"
    assert shop.network == {"subnet": "10.7.0.0/16"}
    assert shop.uplink["allow_host_loopback"] == [5432]
    assert shop.uplink["dns"].search == ("shop.internal",)
    assert [str(each) for each in shop.uplink["dns"].servers] == ["192.0.2.53:53"]
    assert [plan.name for plan in shop.members] == ["db", "app", "cache", "web", "tools"], (
        "whom others wait for"
    )
    web = shop.members[3]
    assert web.command == ("nginx", "-g", "daemon off;")
    assert (web.env, web.directory) == ({"MODE": "test"}, str(tmp_path / "site"))
    assert (web.setup.aliases, str(web.setup.address)) == (("www",), "10.7.0.9")
    assert [str(each) for each in web.setup.ports] == ["127.0.0.1:8080 -> 80/tcp"]
    assert web.depends_on == (
        Dependency("db", 5432, "tcp"),
        Dependency("cache", 53, "udp"),
        Dependency("app", None, "tcp"),
    )
    assert shop.members[1].command == "exec app"
    assert shop.members[4].command is None


def test_a_name_is_that_of_the_file_else(tmp_path: Path) -> None:
    file = tmp_path / "lab.json"
    file.write_text('{"members": {}}', encoding="utf-8")
    assert Composition.load(file).name == "lab"
    with pytest.raises(ArgumentError, match='name = "shop"'):
        Composition.load(file.rename(tmp_path / "my lab.json"))


def test_a_policy_is_a_table_or_another_file(tmp_path: Path) -> None:
    policy = Policy.deny().allow("example.com")
    (tmp_path / "policy.toml").write_text(policy.to_toml(), encoding="utf-8")
    for given in (policy.as_dict(), "policy.toml"):
        found = Composition.from_dict({"network": {"policy": given}}, directory=tmp_path)
        assert found.network["policy"] == policy


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"member": {}}, "member={}: expected a key that is known here; write members"),
        ({"members": []}, r"members=\[\]: expected a table; write a table for each"),
        ({"name": "a b"}, "name='a b': expected a domain name"),
        ({"name": "a" * 63 + ".b"}, "expected 63 characters at most"),
        ({"network": {"cidr": "10.0.2.0/24"}}, r"network\.cidr=.*expected a key that is known here"),
        (
            {"network": {"internal": True, "dns": ["192.0.2.1"]}},
            "expected an internal network to have no way out",
        ),
        ({"network": {"policy": {"default": "maybe"}}}, r"network\.policy\.default='maybe'"),
        ({"members": {"web": {"port": ["80:80"]}}}, r"members\.web\.port=.*write ports"),
        ({"members": {"web": {"ports": ["80:x"]}}}, r"members\.web\.port"),
        ({"members": {"web": {"ports": "80:80"}}}, r"members\.web\.ports='80:80': expected a list of ports"),
        ({"members": {"a b": {}}}, r"members\.a b='a b': expected a domain name"),
        ({"members": {"web": {"address": "x"}}}, r"members\.web\.address='x'"),
        ({"members": {"web": {"command": []}}}, r"members\.web\.command=\[\]: expected words"),
        ({"members": {"web": {"command": [1]}}}, r"members\.web\.command=\[1\]: expected words"),
        ({"members": {"web": {"command": " "}}}, r"members\.web\.command=' ': expected words"),
        (
            {"members": {"web": {"env": {"A": 1}}}},
            r"members\.web\.env\.A=1: expected text; write it in quotes",
        ),
        ({"members": {"web": {"directory": 1}}}, r"members\.web\.directory=1: expected the path"),
        (
            {"members": {"web": {"depends_on": "db"}}},
            r"members\.web\.depends_on='db': expected a list of members; write \['db'\]",
        ),
        ({"members": {"web": {"depends_on": ["db:x"]}}}, "expected MEMBER or MEMBER:PORT"),
        ({"members": {"web": {"depends_on": ["db:0"]}}}, "expected MEMBER or MEMBER:PORT"),
        ({"members": {"web": {"depends_on": ["db:53/sctp"]}}}, "expected MEMBER or MEMBER:PORT"),
        ({"members": {"web": {"depends_on": [1]}}}, "expected MEMBER or MEMBER:PORT"),
        ({"members": {"web": {"depends_on": ["db"]}}}, "'db': expected the name of a member; there are web"),
        ({"members": {"web": {"depends_on": ["db"]}, "db": {}}}, "'db': expected a member with a command"),
        ({"members": {"web": {}, "WEB": {}}}, "expected each member once"),
        (
            {"members": {n: {"command": "x", "depends_on": [d]} for n, d in (("a", "b"), ("b", "a"))}},
            r"depends_on=\['a', 'b'\]: expected no circle",
        ),
    ],
)
def test_what_cannot_be_said(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Composition.from_dict(data)
