"""What a new view is news of: endpoints that have come and gone, and panics.

Decides what is noted when one view takes the place of another. It changes nothing and tells nobody: see `journal`.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshlib.core.journal import Journal
from meshlib.core.node import Node
from meshlib.core.view import Level, View
from meshlib.endpoint import Place
from meshlib.events import EndpointAdded, EndpointRemoved, Event, PanicBegan, PanicEnded

Nodes = Mapping[Place, Node]


def of_endpoints(service: str, before: Nodes, after: Nodes, journal: Journal, now: float) -> list[Event]:
    """Who is gone and who has come, if anybody wants to hear of it. They may be thousands, so this needs no lock."""
    news: list[Event] = []
    if after is not before:
        if journal.hears(EndpointRemoved):
            gone = [node for place, node in before.items() if place not in after]
            news += [EndpointRemoved(service, now, node.endpoint) for node in gone]
        if journal.hears(EndpointAdded):
            come = [node for place, node in after.items() if place not in before]
            news += [EndpointAdded(service, now, node.endpoint) for node in come]
    return news


def note_panic(before: View, after: View, journal: Journal, now: float) -> None:
    """A panic that begins or ends with the new view. Under the cluster's lock."""
    if after.panic and not before.panic:
        called = [node for node in after.nodes if node.endpoint.priority == after.priority]
        level = Level.of(after.priority, called)
        journal.note(PanicBegan, now, level.healthy, level.known)
    elif before.panic and not after.panic:
        journal.note(PanicEnded, now)
