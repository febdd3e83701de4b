"""Which service a request is for.

Decides that by the URL's host alone, and refuses what no declared service answers to (rule S1). It never sends
anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from meshlib.core.cluster import Cluster
from meshlib.core.report import Report, attach
from meshlib.errors import UnknownService
from meshlib.service import Service
from meshlib.transport import binding
from meshlib.transport.draining import Clients
from meshlib.transport.exchange import Exchange, Recorder
from meshlib.transport.network import Clock
from meshlib.transport.observed import ObservedExchange
from meshlib.transport.terms import Route


class Router:
    """The services a client may call.

    Args:
        clusters: their live state, by name. More may come; none is taken out or replaced.
        clock: the mesh's.
        send_deadline: whether the next hop is told what is left of a call's time.
        inner: makes the transport for an endpoint; None for our own connections.
        clients: whom connections are made known to, so that those of an endpoint that has gone are drained.
        telemetry: finds out whether calls are observed; None if they never are.
        owner: what begins anew after a fork; it lives as long as anybody who calls.
    """

    def __init__(
        self,
        clusters: Mapping[str, Cluster],
        clock: Clock,
        *,
        send_deadline: bool = True,
        inner: Any = None,
        clients: Clients | None = None,
        telemetry: Any = None,
        owner: Any = None,
    ) -> None:
        self.clock = clock
        self.inner = inner
        self._send_deadline = send_deadline
        self._clusters = clusters
        self.clients = Clients() if clients is None else clients
        self._telemetry = telemetry
        self._owner = owner
        self._routes: dict[object, Route] = {}

    def exchange(self, request: httpx.Request, recorder: Recorder) -> Exchange:
        """The call for a request; see `Exchange`.

        Raises:
            UnknownService: if the URL does not name a declared service, or names it in a way that cannot work.
            TypeError: if the request's options hold an unknown key.
        """
        route = self._routes.get(binding.origin_of(request.url))
        if route is None or route.service is not route.cluster.service:
            route = self._route(request.url)
        if self._telemetry is not None and self.clock() >= self._telemetry.looks_at:
            self._telemetry.look()
        try:
            if route.cluster.telemetry is None:
                return Exchange(route, request, recorder)
            return ObservedExchange(route, request, recorder)
        except Exception as error:  # options that cannot be, or the user's function for the key
            attach(error, Report(route.name))
            raise

    def is_ours(self, url: httpx.URL) -> bool:
        """Whether a URL names a service, however oddly, or nothing at all: other hosts may be let through."""
        return (name := _name_in(url)) == "" or name in self._clusters

    def _route(self, url: httpx.URL) -> Route:
        """Find the way to the service that the URL names, and remember it."""
        name = _name_in(url)
        cluster = self._clusters.get(name)
        if cluster is None:
            raise self._unknown(name, "" if name else _NO_HOST)
        service = cluster.service  # once: it may be replaced meanwhile
        if hint := _obstacle(url, name, service):
            raise self._unknown(_origin(url), hint)
        host = name if url.raw_host.endswith(b".") and service.host is None else service.host
        route = Route(cluster, service, self.clock, self._send_deadline, host)
        if not url.userinfo:  # there is no end to those
            self._routes[binding.origin_of(url)] = route
        return route

    def _unknown(self, name: str, hint: str) -> UnknownService:
        error = UnknownService(name, self._clusters, hint)
        attach(error, Report(name))
        return error


def _name_in(url: httpx.URL) -> str:
    """The name that a URL has for a service, in the letters that go over the wire, without the root's dot.

    Not `url.host`, which decodes what is written as IDNA, and so raises for what only looks like it.
    """
    return url.raw_host.decode("ascii").removesuffix(".")


_NO_HOST = "the URL has no host; call http://<service>/, or take a client for a service"


def _obstacle(url: httpx.URL, name: str, service: Service) -> str:
    """Why a URL that names the service does not reach it, and what would; empty if it does."""
    scheme = url.scheme
    if scheme not in ("http", "https"):
        return f"only http and https go through a mesh; call http://{name}/"
    if url.port is not None:
        return f"endpoints bring their own ports; call http://{name}/ without ':{url.port}'"
    if scheme == "https" and service.tls is None:
        return f"it has no TLS; call http://{name}/, or give the service tls=TLS()"
    return ""


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{_name_in(url)}" + ("" if url.port is None else f":{url.port}")
