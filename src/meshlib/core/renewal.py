"""How services that are in use get other settings: all of them, or none.

Decides what is a change, and that it is made only if every one of them can be. What each part of the live state does
with its new settings is its own affair: in general it goes by them from now on, and by what it has learned before. It
never judges a setting and knows no resolver but by whether it is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

from meshlib.core.cluster import Cluster
from meshlib.endpoint import Endpoint, Place
from meshlib.validation import ConfigError, Fault

if TYPE_CHECKING:
    from meshlib.service import Service


class Change(NamedTuple):
    """Other settings for a service.

    Attributes:
        cluster: its live state.
        service: the settings.
        changed: the names of those that are others than before.
        endpoints: the whole set, if the settings say it; None for the one there is.
        source: where it came from, for people.
    """

    cluster: Cluster
    service: Service
    changed: tuple[str, ...]
    endpoints: Sequence[Endpoint] | None = None
    source: str = ""


def differing(before: Service, after: Service) -> tuple[str, ...]:
    """The names of the settings that are not the same."""
    return tuple(each.name for each in fields(after) if _differs(getattr(before, each.name), getattr(after, each.name)))


def renew(changes: Sequence[Change], now: float) -> list[list[Place]]:
    """Make all of these changes, or none.

    Returns:
        For each, the places that are no longer endpoints.

    Raises:
        ConfigError: if a balancer fails with the endpoints that it would get; nothing has changed then.
    """
    with ExitStack() as held:  # nobody publishes in between
        for change in sorted(changes, key=lambda each: each.service.name):
            held.enter_context(change.cluster.publishing)
        if faults := [fault for change in changes for fault in _rehearsed(change, now)]:
            raise ConfigError(faults)
        for change in changes:
            change.cluster.adopt(change.service, change.changed, now)
        return [_taken_over(change, now) for change in changes]


def _rehearsed(change: Change, now: float) -> list[Fault]:
    try:
        change.cluster.rehearse(change.service, change.endpoints, now)
    except Exception as error:  # the user's balancer may raise anything
        wrong = f"must get on with the endpoints there are: it raised {type(error).__name__}: {error}"
        return [Fault(f"services.{change.service.name}.balancer", wrong)]
    return []


def _taken_over(change: Change, now: float) -> list[Place]:
    return [] if change.endpoints is None else change.cluster.take_over(change.endpoints, change.source, now, None)


def _differs(before: object, after: object) -> bool:
    return before is not after and before != after
