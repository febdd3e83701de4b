"""A real Prometheus, for tests.

Decides where the programs come from (the machine's own, or else a Debian package), how a server is configured, started,
asked and ended, and how rules are held against `promtool`. It scrapes processes of a test and sends alerts to nobody.
"""

from __future__ import annotations

import functools
import http.client
import json
import shutil
import subprocess
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from components.absence import Missing
from components.debian import fetch
from components.process import Ports, Process

SUITE = "bookworm"
"""Its Prometheus, 2.42, is the oldest that the rules and the dashboard are for."""

EVERY = "1s"
"""From one scrape, and one look at the rules, to the next."""


@functools.cache
def program(name: str = "prometheus") -> str:
    """The path of a program: `prometheus` or `promtool`.

    Raises:
        Missing: if it is not to be had.
    """
    if own := shutil.which(name):
        return own
    found = fetch(SUITE, ["prometheus"]) / "usr/bin" / name
    if not found.exists():
        raise Missing(f"its package has no {name}")
    return str(found)


def promtool(*arguments: str | Path) -> str:
    """What `promtool` says; AssertionError if it does not agree."""
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Prometheus:
    """One server.

    Args:
        folder: for its configuration, its data and its log; it has to be there.
        targets: ports of 127.0.0.1 to scrape, by the name of their job.
        rules: paths of rule files.

    Usable as a context manager, which starts it and ends it.
    """

    def __init__(self, folder: Path, targets: Mapping[str, int], rules: Sequence[Path] = ()) -> None:
        self._folder = folder
        self._process: Process | None = None
        self._ports = Ports("http")
        scraped = [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for job, port in targets.items()
        ]
        config = {
            "global": {"scrape_interval": EVERY, "evaluation_interval": EVERY},
            "scrape_configs": scraped,
            "rule_files": [str(path) for path in rules],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data that the API has below `/api/v1/`.

        Raises:
            RuntimeError: with what it says, if it is not content with the question.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self._ports["http"], timeout=10)
        try:
            connection.request("GET", f"/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}")
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{path} {parameters}: {response.status} {text!r}")
        return json.loads(text)["data"]

    def during(self, query: str, start: float, end: float) -> list[tuple[dict[str, str], list[float]]]:
        """The labels and values of each series of a query, at every second between two times of day."""
        found = self.ask("query_range", query=query, start=start, end=end, step="1s")
        return [(each["metric"], [float(value) for _, value in each["values"]]) for each in found["result"]]

    def alerts(self) -> list[dict[str, Any]]:
        """What is pending or firing."""
        return list(self.ask("alerts")["alerts"])

    def _start(self) -> None:
        command = [
            program(),
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._ports['http']}",
            "--log.level=warn",
        ]
        self._process = Process(command, self._folder / "prometheus.log")
        self._process.wait_until(self._is_ready)

    def _is_ready(self) -> bool:
        """Whether each of its targets was scraped; that it answers at all comes earlier."""
        try:
            targets = self.ask("targets")["activeTargets"]
        except (OSError, http.client.HTTPException, RuntimeError):
            return False
        return bool(targets) and all(each["health"] == "up" for each in targets)

    def _close(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._ports.close()
