"""How other settings reach a running mesh: what `Mesh.update` does.

Decides what is a new service and what is a change, and in which order the parts of the mesh hear of it. Whether all of
it can be made is found out by `core.renewal`, before anything has changed. It never judges a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import replace
from typing import Any, cast

from meshlib.core.cluster import Cluster
from meshlib.core.renewal import Change, differing, renew
from meshlib.discovery.resolver import Resolver
from meshlib.discovery.static import fixed
from meshlib.service import Service
from meshlib.updates import is_same
from meshlib.upkeep import Upkeep


def roll_out(
    services: Iterable[Service],
    clusters: MutableMapping[str, Cluster],
    make: Callable[[Service], Cluster],
    upkeep: Upkeep,
    now: float,
) -> list[Cluster]:
    """Give services that are there these settings, and add the others; not from two threads at once.

    Args:
        services: each of them once.
        clusters: the mesh's, by name.
        make: a new service's live state.
        upkeep: the mesh's.
        now: on its clock.

    Returns:
        Those of which something has to be told.

    Raises:
        ConfigError: if one cannot be used; nothing has changed then.
    """
    services = list(services)
    new = {each.name: make(each) for each in services if each.name not in clusters}
    known = [each for each in services if each.name in clusters]
    changes = [change for each in known for change in _change_to(clusters[each.name], each)]
    gone = renew(changes, now)
    changed = [change.cluster for change in changes]
    clusters.update(new)
    upkeep.attend(new.values())
    upkeep.adapt(changed, gone)
    for cluster in new.values():
        cluster.announce(now)
    return [*new.values(), *changed]


def _change_to(cluster: Cluster, service: Service) -> Iterable[Change]:
    """The change of a service to these settings, unless they are the same."""
    before: Any = cluster.service.resolver
    if is_same(before, cast("Resolver", service.resolver)):
        service = replace(service, resolver=before)  # so that whoever asks it goes on
    if changed := differing(cluster.service, service):
        held = fixed(service.resolver) if "resolver" in changed else None
        endpoints, source = (None, "") if held is None else (held.endpoints, held.source)
        yield Change(cluster, service, changed, endpoints, source)
