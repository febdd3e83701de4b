"""Which service a request is for.

Decides that by the URL's host alone, and refuses what no declared service answers to (rule S1). It never sends
anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from meshlib.core.cluster import Cluster
from meshlib.errors import UnknownService
from meshlib.transport import binding
from meshlib.transport.exchange import Exchange, Recorder
from meshlib.transport.network import Clock


class Router:
    """The services a client may call.

    Args:
        clusters: their live state, by name.
        clock: the mesh's.
        send_deadline: whether the next hop is told what is left of a call's time.
        inner: makes the transport for an endpoint; None for our own connections.
    """

    def __init__(
        self, clusters: Mapping[str, Cluster], clock: Clock, *, send_deadline: bool = True, inner: Any = None
    ) -> None:
        self.clock = clock
        self.inner = inner
        self._send_deadline = send_deadline
        self._clusters = clusters

    def exchange(self, request: httpx.Request, recorder: Recorder) -> Exchange:
        """The call for a request; see `Exchange`.

        Raises:
            UnknownService: if the URL does not name a declared service, or names it in a way that cannot work.
            TypeError: if the request's options hold an unknown key.
        """
        url = request.url
        name = binding.service_name(url)
        cluster = self._clusters.get(name)
        if cluster is None:
            raise UnknownService(name, self._clusters)
        if url.port is not None:
            hint = f"endpoints bring their own ports; call http://{name}/ without ':{url.port}'"
            raise UnknownService(f"{name}:{url.port}", self._clusters, hint)
        if url.scheme != "http" and cluster.service.tls is None:
            hint = f"it has no TLS; call http://{name}/, or give the service tls=TLS()"
            raise UnknownService(f"{url.scheme}://{name}", self._clusters, hint)
        return Exchange(cluster, request, self.clock, recorder=recorder, send_deadline=self._send_deadline)
