"""Several resolvers as one: the order of their endpoints, and what happens when some of them fail."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from meshlib import ConfigError, Endpoint
from meshlib.discovery import Resolution
from meshlib.discovery.failover import Failover, merged
from meshlib.discovery.static import Static
from meshlib.errors import ResolveError


def at(port: int, priority: int = 0, weight: float = 1) -> Endpoint:
    return Endpoint("10.0.0.1", port, priority=priority, weight=weight)


@dataclass(eq=False)
class Scripted:
    """Answers what it is told to, and remembers what it was asked."""

    answer: Any
    source: str = "scripted:"
    asked: list[Resolution | None] = field(default_factory=list)

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        self.asked.append(previous)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]


def resolve(resolver: Failover, previous: Resolution | None = None) -> Resolution:
    return asyncio.run(resolver.resolve("orders", previous))


def test_priorities_are_the_position_then_ones_own_without_gaps() -> None:
    answers = [[at(1, priority=7), at(2, priority=3)], [], [at(3), at(4, priority=3), at(5)]]
    assert {endpoint.port: endpoint.priority for endpoint in merged(answers)} == {2: 0, 1: 1, 3: 2, 5: 2, 4: 3}
    assert merged([]) == merged([[], []]) == ()


def test_what_two_know_counts_where_it_is_first() -> None:
    endpoints = merged([[at(1, weight=2)], [at(1, weight=3), at(2)]])
    assert endpoints == (at(1, weight=2), at(2, priority=1))
    # A level that is empty without what was taken before is none.
    assert merged([[at(1)], [at(1), at(2, priority=5)]]) == (at(1), at(2, priority=1))


def test_a_url_is_split_before_anything_else_is_read() -> None:
    resolver = Failover.from_url("failover:static:10.0.0.1:1,10.0.0.1:2?weight=3|file:a%7Cb.toml | STATIC:10.0.0.1:3")
    first, second, third = resolver.parts
    assert isinstance(first, Static)
    assert isinstance(third, Static)
    assert first.endpoints == (at(1, weight=3), at(2, weight=3))
    assert str(second.path).endswith("/a|b.toml")  # type: ignore[attr-defined]
    assert third.endpoints == (at(3),)
    assert resolver.source.startswith("failover:static:|file:/")


def test_a_url_that_is_nested_without_end_is_a_fault() -> None:
    with pytest.raises(ConfigError, match="must not be nested that deeply"):
        Failover.from_url("failover:" * 5000 + "static:10.0.0.1:1")


@pytest.mark.parametrize("bar", ["%7C", "%7c"])
def test_a_bar_inside_a_part_is_escaped(bar: str) -> None:
    resolver = Failover.from_url(f"failover:failover:static:10.0.0.1:1{bar}static:10.0.0.1:2|static:10.0.0.1:3")
    assert [part.endpoints[0].port for part in resolver.parts] == [1, 2, 3]  # type: ignore[attr-defined]


def test_one_in_another_stands_for_its_parts() -> None:
    inner = Failover("static:10.0.0.1:1", "static:10.0.0.1:2")
    outer = Failover(inner, "failover:static:10.0.0.1:3|static:10.0.0.1:4", Static([at(5)]))
    assert [part.endpoints[0].port for part in outer.parts] == [1, 2, 3, 4, 5]  # type: ignore[attr-defined]
    assert [endpoint.priority for endpoint in resolve(outer).endpoints] == [0, 1, 2, 3, 4]


def test_the_faults_of_all_parts_are_listed_by_their_position() -> None:
    with pytest.raises(ConfigError) as caught:
        Failover("static:10.0.0.1:80", "static:x,10.0.0.1:0", "", "file:x", 5, Static)  # type: ignore[arg-type]
    faults = caught.value.faults
    assert [fault.path for fault in faults] == [
        "resolver[1][0]",
        "resolver[1][1]",
        "resolver[2]",
        "resolver[3]",
        "resolver[4]",
        "resolver[5]",
    ]
    assert faults[4].message.endswith("previous)', got an object of type int")
    for nothing in (lambda: Failover(), lambda: Failover.from_url("failover:")):
        with pytest.raises(ConfigError, match="resolver: must name at least one resolver, for example 'failover:"):
            nothing()


def test_asked_by_hand_it_answers_as_long_as_one_part_does() -> None:
    resolver = Failover(
        Scripted(OSError("unplugged"), "one:"),
        Scripted(Resolution([at(2)], 5.0, warnings=["old"]), "two:"),
        Scripted(ValueError(), "three:"),
        Scripted([at(4)], "four:"),
    )
    answer = resolve(resolver)
    assert answer.endpoints == (at(2),)
    assert answer.ttl == 5.0
    assert answer.warnings == (
        "one:: unplugged",
        "two:: old",
        "three:: ValueError",
        "four:: answered with a list, not with a Resolution",
    )


def test_an_empty_answer_is_an_answer() -> None:
    answer = resolve(Failover(Scripted(Resolution([], 30.0)), Scripted(OSError("unplugged"))))
    assert (answer.endpoints, answer.ttl) == ((), 5.0)


def test_asked_by_hand_it_fails_if_all_parts_do() -> None:
    with pytest.raises(ResolveError) as caught:
        resolve(Failover(Scripted(OSError("unplugged"), "one:"), Scripted(asyncio.CancelledError(), "two:")))
    assert str(caught.value) == "none of 2 resolvers answered: one:: unplugged; two:: CancelledError"


def test_asked_again_by_hand_no_part_waits_for_news() -> None:
    polling, waiting = Scripted(Resolution([at(1)], 30.0, 1)), Scripted(Resolution([at(2)], None, 2))
    resolver = Failover(polling, waiting)
    first = resolve(resolver)
    assert first.ttl == 5.0
    resolve(resolver, first)
    assert (polling.asked, waiting.asked) == ([None, polling.answer], [None, None])


def test_asked_by_hand_it_asks_all_at_once() -> None:
    async def main() -> Resolution:
        both = asyncio.Barrier(2)

        class Together:
            async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
                await both.wait()
                return Resolution([], 1.0)

        return await asyncio.wait_for(Failover(Together(), Together()).resolve("orders", None), 10)

    assert asyncio.run(main()).ttl == 1.0
