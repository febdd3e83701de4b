"""Which endpoints of an answer may be called (rule D5).

Decides that by the very address that is dialled: no name is looked up after this. Whoever answers may lie, so
forbidden addresses are left out. What settings list themselves is not held against this. It never asks and never dials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshlib.endpoint import Endpoint
from meshlib.forbidden import is_forbidden
from meshlib.plain import plain

LONGEST_ZONE = 128

SHOWN = 3
"""Addresses that a warning names."""


def admitted(endpoints: Sequence[Endpoint]) -> tuple[tuple[Endpoint, ...], list[str]]:
    """The endpoints that may be called, with zones that may be shown, and the hosts of the others."""
    kept = tuple(_shown(endpoint) for endpoint in endpoints if not is_forbidden(endpoint.host))
    if len(kept) == len(endpoints):
        return kept, []
    return kept, [endpoint.host for endpoint in endpoints if is_forbidden(endpoint.host)]


def _shown(endpoint: Endpoint) -> Endpoint:
    zone = plain(endpoint.zone, LONGEST_ZONE)
    return endpoint if zone == endpoint.zone else replace(endpoint, zone=zone)


def in_words(dropped: Sequence[str]) -> str:
    """What people should know of those that were left out."""
    hosts = sorted(set(dropped))
    more = f" and {len(hosts) - SHOWN} more" if len(hosts) > SHOWN else ""
    return f"{len(dropped)} left out, since no resolver may send us there: {', '.join(hosts[:SHOWN])}{more}"
