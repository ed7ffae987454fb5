"""Policy: an immutable list of rules with a default, which is data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import inf
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, NoReturn, ParamSpec, get_args, overload

from netns_kit import arguments
from netns_kit.arguments import shown
from netns_kit.display.displayed import Displayed
from netns_kit.errors import ArgumentError, PolicyError
from netns_kit.frozen import frozen
from netns_kit.stack import Transport

from . import plain, rules
from .addresses import PortRanges
from .explanation import Explanation, explain
from .index import Index
from .reach import Reach, label
from .rules import DnsRefusal, RefusalName, Rule, RuleAction, RulePorts, RuleTarget, usual_refusal

if TYPE_CHECKING:
    from pathlib import Path

    from netns_kit.display.view import View

GRACE = 60.0  # seconds
P = ParamSpec("P")
Q = ParamSpec("Q")


class _TwoMeanings(Generic[Q, P]):
    """A method that makes a policy when it is called on the class, and adds a rule when it is called on a policy."""

    def __init__(
        self,
        make: Callable[Concatenate[type[Policy], Q], Policy],
        add: Callable[Concatenate[Policy, P], Policy],
    ) -> None:
        self._make, self._add = make, add
        self.__doc__ = make.__doc__ = add.__doc__
        make.__name__, make.__qualname__ = add.__name__, add.__qualname__

    @overload
    def __get__(self, policy: None, owner: type[Policy]) -> Callable[Q, Policy]: ...
    @overload
    def __get__(self, policy: Policy, owner: type[Policy]) -> Callable[P, Policy]: ...
    def __get__(
        self, policy: Policy | None, owner: type[Policy]
    ) -> Callable[Q, Policy] | Callable[P, Policy]:
        return MethodType(self._make, owner) if policy is None else MethodType(self._add, policy)


def _on_class(
    make: Callable[Concatenate[type[Policy], Q], Policy],
) -> Callable[[Callable[Concatenate[Policy, P], Policy]], _TwoMeanings[Q, P]]:
    """Let a method have another meaning when it is called on the class."""
    return lambda add: _TwoMeanings(make, add)


def _no_targets(verb: str, targets: tuple[object, ...]) -> None:
    """Raise `ArgumentError` if somebody takes the default for a rule."""
    if targets:
        given = ", ".join(map(shown, targets))
        other = "allow" if verb == "deny" else "deny"
        fix = f"write Policy.{other}().{verb}({given}, ...) for a rule"
        raise ArgumentError(f"expected none, since Policy.{verb}() sets the default", "targets", given, fix)


def _default_allow(
    cls: type[Policy], /, *targets: NoReturn, audit: bool = False, grace: float = GRACE
) -> Policy:
    _no_targets("allow", targets)
    return cls("allow", audit=audit, grace=grace)


def _default_deny(
    cls: type[Policy],
    /,
    *targets: NoReturn,
    refusal: RefusalName = "prohibited",
    dns: DnsRefusal = "nxdomain",
    audit: bool = False,
    grace: float = GRACE,
) -> Policy:
    _no_targets("deny", targets)
    return cls("deny", audit=audit, grace=grace, refusal=refusal, dns=dns)


def _default_ask(
    cls: type[Policy],
    /,
    *targets: NoReturn,
    refusal: RefusalName = "prohibited",
    audit: bool = False,
    grace: float = GRACE,
) -> Policy:
    _no_targets("ask", targets)
    return cls("ask", audit=audit, grace=grace, refusal=refusal)


class _Kept:
    """What a policy keeps beside its fields, and is no part of what it says."""

    __slots__ = ("_default_rule", "_index", "_reach")

    _default_rule: Rule
    _index: Index
    _reach: list[Reach]


@frozen
class Policy(_Kept, Displayed):
    """A policy: which flows a namespace may open, and which names it may resolve.

    Rules are asked in order, and the first that matches decides; if none does, the default decides.  A policy never
    changes: `allow`, `deny` and `ask` return another one with one more rule.  On the class, they make one without
    rules.

        Policy.deny().allow("example.org", "*.cdn.example.net", ports=443).deny(PRIVATE)

    Policies are equal if their rules and settings are.  `repr` returns the expression that makes one.

    Args:
        default: What happens if no rule matches: "allow", "deny" or "ask".
        rules: The rules in order.
        audit: Whether what would be refused is let pass, and only told.
        grace: For how long an address may be reached by name after the answer's TTL has passed, in seconds.
        refusal: How the default refuses a flow, see `deny`.  It is not for "allow".
        dns: How the default refuses a query, see `deny`.  It is only for "deny".

    Raises:
        PolicyError: A rule cannot be used, can never decide about anything, or cannot be enforced.
        ArgumentError: Another value cannot be used.
        ArgumentTypeError: An argument has the wrong type.
    """

    default: RuleAction
    rules: tuple[Rule, ...]
    audit: bool
    grace: float
    refusal: RefusalName
    dns: DnsRefusal

    def __init__(
        self,
        default: RuleAction,
        rules: Iterable[Rule] = (),
        audit: bool = False,
        grace: float = GRACE,
        refusal: RefusalName = "prohibited",
        dns: DnsRefusal = "nxdomain",
    ) -> None:
        arguments.one_of("default", default, get_args(RuleAction))
        arguments.items("rules", rules, "a list of Rule")
        arguments.boolean("audit", audit)
        arguments.number("grace", grace, "seconds, 0 or more", lambda value: 0 <= value < inf)
        arguments.one_of("refusal", refusal, get_args(RefusalName))
        arguments.one_of("dns", dns, get_args(DnsRefusal))
        for name, given, usual, unused in (
            ("refusal", refusal, "prohibited", ("allow",)),
            ("dns", dns, "nxdomain", ("allow", "ask")),
        ):
            if default in unused and given != usual:
                expected = f"expected no such setting where the default is {default!r}"
                raise ArgumentError(expected, name, repr(given), "leave it out")
        kept = tuple(rules)
        reach = Reach(default)
        for rule in kept:
            arguments.instance("rules", rule, Rule, "a list of Rule")
            _add(reach, rule)
        arguments.fill(self, locals(), rules=kept, grace=float(grace), _reach=[reach])

    @_on_class(_default_allow)
    def allow(
        self,
        *targets: RuleTarget,
        ports: RulePorts | None = None,
        protocol: Transport | None = None,
        icmp_type: str | int | None = None,
        sni: bool = False,
        host: bool = False,
        refusal: RefusalName | None = None,
        private: bool = False,
        only: Literal["dns"] | None = None,
        name: str | None = None,
    ) -> Policy:
        """Return a policy with one more rule, which allows: `policy.allow(*targets, ports=None, protocol=None, ...)`.

        On the class, `Policy.allow(audit=False, grace=60.0)` makes a policy without rules that allows by default.

        Args:
            targets: What the rule is about; none of them for everything.  A domain name is that name only, and
                "*.example.org" every name below it, not itself.  A flow is one to a name if our DNS has answered
                the name with its address.  Else an address, a network such as "10.0.0.0/8", a preset such as
                `PRIVATE` or its name.  An IPv6 address that embeds an IPv4 address (IPv4-mapped, NAT64, 6to4) counts
                as that address.  A port is no part of a target.
            ports: 443, "8000-8999", or a list of such; None for all.  Ports are those of TCP and UDP.
            protocol: "tcp", "udp" or "icmp"; None for any.
            icmp_type: "echo-request", the only one that can leave; it means the protocol "icmp".
            sni, host: Whether the name in a TLS ClientHello, or in the Host of an HTTP/1 request, must be one of the
                targets: so a name is told from others at the same address.  With both, either will do.  It is for
                TCP; UDP to these names is refused.
            refusal: How a connection is refused whose first bytes do not say such a name: "reset", which is meant if
                it is None, or "forbidden", see `deny`.  It is only for `sni` and `host`.
            private: Whether answers for these names may have private addresses, see `PRIVATE`.
            only: "dns": the names are resolved, and other rules decide about the flows.
            name: What the rule is called in messages and events.

        Raises:
            PolicyError: The rule cannot be used, can never decide about anything, or cannot be enforced.
        """
        return self._with(
            "allow", targets, icmp_type, ports=ports, protocol=protocol, sni=sni, host=host, refusal=refusal,
            private=private, only=only, name=name,
        )  # fmt: skip

    @_on_class(_default_deny)
    def deny(
        self,
        *targets: RuleTarget,
        ports: RulePorts | None = None,
        protocol: Transport | None = None,
        icmp_type: str | int | None = None,
        refusal: RefusalName = "prohibited",
        dns: DnsRefusal = "nxdomain",
        only: Literal["dns"] | None = None,
        name: str | None = None,
    ) -> Policy:
        """Return a policy with one more rule, which denies: `policy.deny(*targets, ports=None, protocol=None, ...)`.

        On the class, `Policy.deny(refusal="prohibited", dns="nxdomain", audit=False, grace=60.0)` makes a policy
        without rules that denies by default.

        Args:
            targets, ports, protocol, icmp_type, name: The same as of `allow`.
            refusal: How flows are refused: "prohibited" (ICMP administratively prohibited), "reset" (RST, or ICMP
                port unreachable), "silence" (nothing), or "forbidden" (HTTP requests are answered 403, TLS by the
                alert access_denied; other TCP is reset).
            dns: How queries are refused: "nxdomain" or "refused".  Queries for a name are refused if the rule is for
                all ports and protocols.
            only: "dns": only queries are refused.  A name cannot be denied otherwise where flows to addresses are
                let pass, since these may be the name's.

        Raises:
            PolicyError: The rule cannot be used, can never decide about anything, or cannot be enforced.
        """
        return self._with(
            "deny",
            targets,
            icmp_type,
            ports=ports,
            protocol=protocol,
            refusal=refusal,
            dns=dns,
            only=only,
            name=name,
        )

    @_on_class(_default_ask)
    def ask(
        self,
        *targets: RuleTarget,
        ports: RulePorts | None = None,
        protocol: Transport | None = None,
        icmp_type: str | int | None = None,
        refusal: RefusalName = "prohibited",
        private: bool = False,
        name: str | None = None,
    ) -> Policy:
        """Return a policy with one more rule, which asks: `policy.ask(*targets, ports=None, protocol=None, ...)`.

        About each flow that it matches, the function on_flow of the stack is asked.  Names are resolved.
        On the class, `Policy.ask(refusal="prohibited", audit=False, grace=60.0)` makes a policy without rules that
        asks by default.

        Args:
            targets, ports, protocol, icmp_type, private, name: The same as of `allow`.
            refusal: How flows are refused if the answer is False, or does not come: see `deny`.

        Raises:
            PolicyError: The rule cannot be used, can never decide about anything, or cannot be enforced.
        """
        return self._with(
            "ask",
            targets,
            icmp_type,
            ports=ports,
            protocol=protocol,
            refusal=refusal,
            private=private,
            name=name,
        )

    def _with(
        self, action: RuleAction, targets: tuple[RuleTarget, ...], icmp_type: str | int | None, **options: Any
    ) -> Policy:
        number = len(self.rules) + 1
        try:
            if icmp_type is not None:
                _check_icmp(icmp_type, options["protocol"])
                options["protocol"] = "icmp"
            if options["name"] is None:
                options["name"] = ""
            rule = Rule(action, targets, **options)
        except PolicyError as error:
            if icmp_type is not None:
                options["icmp_type"] = icmp_type
            error.about(f"rule {number}: {_call(action, targets, options)}")
            raise
        try:
            reach = self._reach.pop()  # the first to take it has it: nobody else sees what is added
        except (AttributeError, IndexError):  # it is a copy, or another policy was made of this one
            reach = Reach(self.default, self.rules)
        _add(reach, rule)
        made = object.__new__(type(self))
        arguments.fill(
            made, default=self.default, rules=(*self.rules, rule), audit=self.audit, grace=self.grace,
            refusal=self.refusal, dns=self.dns, _reach=[reach],
        )  # fmt: skip
        return made

    @property
    def index(self) -> Index:
        """The policy made fast to ask, for parts of the library.  It is made when it is first asked for."""
        try:
            return self._index
        except AttributeError:
            arguments.fill(self, _index=Index(self))
            return self._index

    def rule(self, number: int | None) -> Rule:
        """Return a rule, or the default as a rule.

        Args:
            number: The rule's number, from 0; None for the default.
        """
        if number is not None:
            return self.rules[number]
        try:
            return self._default_rule
        except AttributeError:
            arguments.fill(self, _default_rule=Rule(self.default, refusal=self.refusal, dns=self.dns))
            return self._default_rule

    def label(self, number: int | None) -> str:
        """Return what messages and events call a rule: `rule 2 (web): allow example.org port 443`.

        Args:
            number: The rule's number, from 0; None for the default.
        """
        return f"default: {self.default}" if number is None else label(number, self.rules[number])

    def explain(self, text: str) -> Explanation:
        """Explain what the policy says of something, and which rule says so.

        What only a running stack knows is left out: the host's addresses (`HOST`), what names were resolved to, and
        the names in its hosts file.  The reason says which rule it could be up to.

        Args:
            text: A URL: "https://example.org", "tcp://10.0.0.1:5432", "udp://example.org:53" or "icmp://10.0.0.1"; or
                NAME:PORT or ADDRESS:PORT, which is TCP.  A name alone, or "dns:example.org", is a query.
                What nothing is ever sent to, as loopback addresses and localhost, is denied.

        Raises:
            ArgumentError: The text is none of these.
            ArgumentTypeError: It is not text.
        """
        return explain(self, text)

    # -- plain data, see `netns_kit.policy.plain` ---------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Return the policy as plain data, as docs/policy.schema.json has it.  What is usual is left out."""
        return plain.policy_data(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """Make a policy of plain data.  An error names its place there: `rules[3].ports`, counted from 0.

        Args:
            data: The data, as docs/policy.schema.json has it.

        Raises:
            PolicyError: The data has another form, or is a policy that cannot be used.
            ArgumentError: A setting cannot be used.
            ArgumentTypeError: A setting has the wrong type.
        """
        settings, rules = plain.read(data)
        try:
            return cls(rules=rules, **settings)
        except PolicyError as error:
            for number, rule in enumerate(rules):
                if error.rule == label(number, rule):
                    plain.place(error, number)
            raise

    def to_json(self) -> str:
        """Return the policy as JSON."""
        return plain.to_json(self.as_dict())

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Make a policy of JSON.

        Args:
            text: The JSON.

        Raises:
            PolicyError: The text is not JSON, or see `from_dict`.
            ArgumentTypeError: It is not text, or see `from_dict`.
        """
        return cls.from_dict(plain.from_json(text))

    def to_toml(self) -> str:
        """Return the policy as TOML."""
        return plain.to_toml(self.as_dict())

    @classmethod
    def from_toml(cls, text: str) -> Policy:
        """Make a policy of TOML.  Before Python 3.11 it needs the package tomli.

        Args:
            text: The TOML.

        Raises:
            PolicyError: The text is not TOML, or see `from_dict`.
            ArgumentTypeError: It is not text, or see `from_dict`.
            FeatureUnavailable: This Python cannot read TOML.
        """
        return cls.from_dict(plain.from_toml(text))

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Make a policy of a file.

        Args:
            path: A file of TOML or JSON, whose name ends in .toml or .json.

        Raises:
            PolicyError: The file has none of the two, or see `from_dict`.
            ArgumentTypeError: It is no path, or see `from_dict`.
            FeatureUnavailable: This Python cannot read TOML.
            OSError: The file cannot be read.
        """
        return cls.from_dict(plain.load(path))

    def _view(self) -> View:
        from .display import policy_view

        return policy_view(self)

    def __repr__(self) -> str:
        made = [f"{type(self).__name__}.{self.default}({_options(self, _SETTINGS)})"]
        return ".".join((*made, *map(_as_made, self.rules)))


def _add(reach: Reach, rule: Rule) -> None:
    try:
        reach.add(rule)
    except PolicyError as error:
        error.about(label(len(reach.rules), rule))
        raise


def _check_icmp(icmp_type: object, protocol: object) -> None:
    """Raise `PolicyError` for a type of ICMP that cannot leave."""
    if icmp_type not in ("echo-request", 8, 128):
        raise PolicyError(
            "expected 'echo-request': no other type of ICMP leaves a namespace, and errors come in by themselves",
            "icmp_type", shown(icmp_type), "leave the rule out",
        )  # fmt: skip
    if protocol not in (None, "icmp"):
        raise PolicyError(
            "expected the protocol icmp, or none", "protocol", shown(protocol), "leave the protocol out"
        )


_DEFAULTS = {
    "audit": False, "grace": GRACE, "dns": "nxdomain", "ports": (), "protocol": None,
    "sni": False, "host": False, "private": False, "only": None, "name": "",
}  # fmt: skip
_SETTINGS = ("refusal", "dns", "audit", "grace")
_OPTIONS = ("ports", "protocol", "refusal", "dns", "sni", "host", "private", "only", "name")


def _options(record: object, names: Iterable[str]) -> str:
    """Return the options that are not the usual ones, as they are written in a call."""
    given = {name: getattr(record, name) for name in names}
    if given["refusal"] == usual_refusal(getattr(record, "looks", False)):
        del given["refusal"]
    return ", ".join(
        f"{name}={_written(value) if name == 'ports' else repr(value)}"
        for name, value in given.items()
        if value != _DEFAULTS.get(name)
    )


def _written(ports: PortRanges) -> str:
    written = rules.ports_data(ports)
    return repr(written[0] if len(written) == 1 else written)


def _as_made(rule: Rule) -> str:
    parts = (*map(repr, rule.targets), _options(rule, _OPTIONS))
    return f"{rule.action}({', '.join(filter(None, parts))})"


def _call(action: str, targets: Iterable[object], options: dict[str, Any]) -> str:
    """Return the call of a rule as the caller has written it, but for what is usual."""
    given = (
        f"{name}={shown(value)}"
        for name, value in options.items()
        if value not in (None, _DEFAULTS.get(name))
    )
    return f"{action}({', '.join((*map(shown, targets), *given))})"
