"""What a setting must be, checked once, when it is built.

Decides whether a value given by a user is usable and words the complaint. Settings declare their rules beside their
fields; `check` collects every fault of an object before it raises, so that one run shows all of them. It never
corrects a value, and it never reads configuration files: it only judges what it is handed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

LARGEST = sys.float_info.max
"""Whatever is larger, infinite or not a number at all does not pass for a finite one."""

Rule = Callable[[Any], str | None]
"""Returns what would be right ("must be >= 1"), or None if the value is."""


_LABELS = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\Z")


_SPIFFE_ID = re.compile(r"spiffe://([a-z0-9._-]{1,255})(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+)+\Z")
_LONGEST_SPIFFE_ID = 2048

_WORD = re.compile(r"[^\s'\"]+")
_USER = re.compile(r"//[^/?#]*@")
_QUERY = re.compile(r"\?[^\s'\"]*")


def shown(value: Any) -> str:
    """A value that a setting was given, for an error: nothing of it that may be a password, a query or a key."""
    text = repr(value)
    if "-----BEGIN" in text:
        return "what looks like a certificate or a key itself"
    return bare(text)


def bare(text: str) -> str:
    """A text without what may be a user, a password or a query of a URL in it."""
    if "@" in text:
        text = _WORD.sub(_without_user, _USER.sub("...@", text))
    return _QUERY.sub("?...", text)


def _without_user(word: re.Match[str]) -> str:
    # Not by a pattern for all of it: on a long word that would take the square of its length.
    user, at, rest = word[0].rpartition("@")
    return f"...@{rest}" if at and ":" in user else word[0]


def meant(name: str, known: Iterable[str]) -> str:
    """The known name that a wrong one may stand for, as the end of a complaint; empty if none is near."""
    import difflib  # only a mistake pays for it

    near = difflib.get_close_matches(name, tuple(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True, slots=True)
class Fault:
    """One complaint about one setting.

    Args:
        path: where it is, in the user's words: `services.orders.retry.max_attempts`.
        message: what would be right, and what was given instead.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"

    def under(self, prefix: str) -> Fault:
        """The same fault, seen from further outside."""
        return Fault(f"{prefix}.{self.path}", self.message)


class ConfigError(ValueError):
    """Settings that cannot work. Raised when they are built, with every fault that was found.

    Attributes:
        faults: all of them, in the order of the fields.
    """

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(map(str, self.faults)))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Fault, ...]]]:
        return type(self), (self.faults,)


def check(settings: Any, extra: Iterable[Fault] = ()) -> None:
    """Hold a dataclass instance against the rules of its fields.

    Args:
        settings: an instance whose fields were made by `ruled` and its kin; fields without a rule are not looked at.
        extra: faults that were found otherwise, for example between two fields.

    Raises:
        ConfigError: with every fault, as `<class name in lower case>.<field>`.
    """
    faults = list(extra)
    for each in fields(settings):
        rule: Rule | None = each.metadata.get("rule")
        if rule is not None and (wrong := rule(value := getattr(settings, each.name))) is not None:
            faults.append(Fault(f"{type(settings).__name__.lower()}.{each.name}", f"{wrong}, got {shown(value)}"))
    if faults:
        raise ConfigError(faults)


def ruled(rule: Rule, **how: Any) -> Any:
    """A dataclass field with a rule; `how` goes to `dataclasses.field`."""
    return field(metadata=held_to(rule), **how)


def held_to(rule: Rule) -> dict[str, Rule]:
    """The metadata of a field with a rule, for those who call `dataclasses.field` themselves."""
    return {"rule": rule}


class Told:
    """A rule that a JSON Schema can tell as well, to an editor.

    Args:
        rule: the rule.
        schema: the same in the words of JSON Schema, or as much of it as these can say.
    """

    def __init__(self, rule: Rule, schema: Mapping[str, Any]) -> None:
        self._rule = rule
        self.schema = dict(schema)

    def __call__(self, value: Any) -> str | None:
        return self._rule(value)


def number(*, above: float | None = None, at_least: float | None = None, at_most: float | None = None) -> Rule:
    """A finite int or float within bounds."""

    def rule(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
            return "must be a finite number"
        if above is not None and not value > above:
            return f"must be > {above:g}"
        if at_least is not None and not value >= at_least:
            return f"must be >= {at_least:g}"
        if at_most is not None and not value <= at_most:
            return f"must be <= {at_most:g}"
        return None

    bounds = {"exclusiveMinimum": above, "minimum": at_least, "maximum": at_most}
    return Told(rule, {"type": "number", **{word: bound for word, bound in bounds.items() if bound is not None}})


def whole(*, at_least: int, at_most: int | None = None) -> Rule:
    """An int within bounds."""
    within = number(at_least=at_least, at_most=at_most)

    def rule(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return "must be a whole number"
        return within(value)

    bounds = {"minimum": at_least, "maximum": at_most}
    return Told(rule, {"type": "integer", **{word: bound for word, bound in bounds.items() if bound is not None}})


def choice(*values: str) -> Rule:
    """One of these strings."""
    known = " or ".join(map(repr, values))

    def rule(value: Any) -> str | None:
        return None if isinstance(value, str) and value in values else f"must be {known}"

    return Told(rule, {"enum": list(values)})


def optional(rule: Rule) -> Rule:
    """None, or what the rule says."""

    def judge(value: Any) -> str | None:
        return None if value is None else rule(value)

    return Told(judge, rule.schema) if isinstance(rule, Told) else judge


def instance(kind: type, example: str) -> Rule:
    """An instance of `kind`; `example` shows how one is written."""

    def rule(value: Any) -> str | None:
        return None if isinstance(value, kind) else f"must be a {kind.__name__}, for example {example}"

    return rule


def seconds(default: float) -> Any:
    """A field for a length of time: finite and more than nothing."""
    return ruled(number(above=0), default=default)


def is_host_name(text: str) -> bool:
    """Whether `text` is a host name in lower case: labels of at most 63 letters, digits, `-` and `_`, 253 in all."""
    return len(text) <= 253 and _LABELS.match(text) is not None


def trust_domain_of(spiffe_id: str) -> str | None:
    """The trust domain of a workload's SPIFFE id, as the standard wants it written; None if it is none."""
    found = _SPIFFE_ID.match(spiffe_id) if len(spiffe_id) <= _LONGEST_SPIFFE_ID else None
    return None if found is None else found[1]
