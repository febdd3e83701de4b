"""Real Consul agents, for tests.

Decides where the program comes from (`CONSUL_BIN`, the path, else Debian's last package), and how agents are
configured, started, joined and ended. What they hold is in memory, or in a folder of the test.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from components.absence import Missing
from components.debian import fetch
from components.process import Ports, Process


@functools.cache
def binary() -> str:
    """The path of the program.

    Raises:
        Missing: if there is none, and none is to be had.
    """
    if chosen := os.environ.get("CONSUL_BIN"):
        if not os.access(chosen, os.X_OK):
            raise Missing("CONSUL_BIN names no program")
        return chosen
    return shutil.which("consul") or str(fetch("bullseye", ["consul"]) / "usr/bin/consul")


class Agent:
    """One Consul server, which is an agent as well.

    Args:
        folder: for its configuration, its log, and its data if it keeps any; it has to be there.
        name: of its node.
        config: more of its configuration, which goes before ours.
        is_alone: whether it elects itself and keeps everything in memory; else it waits for others, see `cluster`.

    Usable as a context manager, which starts it and ends it.
    """

    def __init__(
        self, folder: Path, name: str = "n1", config: Mapping[str, Any] | None = None, *, is_alone: bool = True
    ) -> None:
        self.name = name
        self._folder = folder
        self._config = dict(config or {})
        self._is_alone = is_alone
        self._process: Process | None = None
        self.joins: list[str] = []
        self._ports = Ports("http", "server", "serf_lan", "serf_wan")

    @property
    def address(self) -> str:
        """Of its HTTP API."""
        return f"127.0.0.1:{self._ports['http']}"

    @property
    def rpc(self) -> str:
        """The address by which a cluster names its leader."""
        return f"127.0.0.1:{self._ports['server']}"

    def serf(self, network: str) -> str:
        """The address to join it at; the network is "lan" or "wan"."""
        return f"127.0.0.1:{self._ports[f'serf_{network}']}"

    def start(self) -> None:
        """Start it, and wait until it knows a leader."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start it, and do not wait."""
        self._process = Process([binary(), "agent", *self._arguments()], self._folder / f"{self.name}.log")

    def wait_ready(self) -> None:
        """Wait until it knows a leader, and answers for the cluster."""
        assert self._process is not None
        self._process.wait_until(self._has_leader)

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.kill()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, such as SIGSTOP, after which it hangs, and SIGCONT."""
        assert self._process is not None
        self._process.signal(number)

    def close(self) -> None:
        """End it, and give its ports back."""
        self.kill()
        self._ports.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def put(self, path: str, data: Any = None, *, token: str = "") -> Any:
        """Change something; every status but 200 is a RuntimeError."""
        return self._ask("PUT", path, data, token)

    def put_new(self, path: str, data: Any) -> Any:
        """Make something that gets an id of its own."""
        return self._ask("POST", path, data, "")

    def delete(self, path: str, *, token: str = "") -> None:
        self._ask("DELETE", path, None, token)

    def get(self, path: str) -> Any:
        """Look at something; every status but 200 is a RuntimeError."""
        return self._ask("GET", path, None, "")

    def register(self, service: str, port: int, *, token: str = "", **more: Any) -> None:
        """Register an instance, called `service-port`, that is well until told otherwise."""
        check = {"TTL": "10m", "Status": "passing"}
        told = {"ID": f"{service}-{port}", "Name": service, "Address": "127.0.0.1", "Port": port, "Check": check}
        self.put("agent/service/register", told | more, token=token)

    def deregister(self, service: str, port: int) -> None:
        self.put(f"agent/service/deregister/{service}-{port}")

    def mark(self, service: str, port: int, state: str) -> None:
        """Set the state of an instance's check: "pass", "warn" or "fail"."""
        self.put(f"agent/check/{state}/service:{service}-{port}")

    def _ask(self, method: str, path: str, data: Any, token: str) -> Any:
        connection = http.client.HTTPConnection(self.address, timeout=10)
        try:
            body = None if data is None else json.dumps(data)
            connection.request(method, f"/v1/{path}", body, {"X-Consul-Token": token} if token else {})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: {response.status} {text!r}")
        return json.loads(text) if text else None

    def _has_leader(self) -> bool:
        try:
            return bool(self.get("status/leader"))
        except (OSError, http.client.HTTPException, RuntimeError):
            return False

    def _arguments(self) -> list[str]:
        ports = {name: self._ports[name] for name in ("http", "server", "serf_lan", "serf_wan")}
        config = self._config | {
            "node_name": self.name,
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "ports": ports | {"dns": -1, "grpc": -1},
            "disable_update_check": True,  # it would ask its makers
            "log_level": "warn",
        }
        if not self._is_alone:
            config |= {
                "retry_join": self.joins,
                "server": True,
                "data_dir": str(self._folder / self.name),
                "performance": {"raft_multiplier": 1},
            }
        file = self._folder / f"{self.name}.json"
        file.write_text(json.dumps(config))
        return [*(["-dev"] if self._is_alone else []), "-config-file", str(file)]


@contextmanager
def cluster(folder: Path, count: int) -> Iterator[list[Agent]]:
    """Servers that have joined and know a leader; the first of them is the leader."""
    agents = [Agent(folder, f"s{number}", {"bootstrap_expect": count}, is_alone=False) for number in range(count)]
    with ExitStack() as stack:
        for agent in agents:
            stack.callback(agent.close)
            agent.joins = [other.serf("lan") for other in agents if other is not agent]
        for agent in agents:
            agent.launch()
        for agent in agents:
            agent.wait_ready()
        leader = agents[0].get("status/leader")
        yield sorted(agents, key=lambda agent: agent.rpc != leader)
