"""The status page in a real browser: what it has made of itself while an endpoint was dead."""

from __future__ import annotations

import html.parser
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from components import chromium
from components.absence import demanded
from meshlib import Breaker, Endpoint, LeastRequest, Mesh, Service
from meshlib.discovery import Resolution
from meshlib.ext.wsgi import status_app
from meshlib.testing import Upstream
from served import served

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

pytestmark = pytest.mark.component

BOUND = 20.0
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script> \"'"


class Warned:
    """A resolver whose answer comes with a warning."""

    source = "test:warned"

    async def resolve(self, service: str, previous: Resolution | None) -> Resolution:
        return Resolution([Endpoint("10.0.0.9", 80, zone="b", priority=1)], 60.0, None, warnings=(HOSTILE,))


@dataclass
class Rendered(html.parser.HTMLParser):
    """What stands in the page: cells by column, of each row; and the text of everything else, by tag or class."""

    rows: list[dict[str, str]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._column = self._mark = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self._mark = given.get("id") or given.get("class") or tag
        if tag == "tr":
            self.rows.append({"hidden": ""} if "hidden" in given else {})
        if tag != "span":  # what a cell says beside its word is in a <small>
            self._column = given.get("data-column") or "" if tag == "td" else ""

    def handle_data(self, data: str) -> None:
        if not data.strip():
            return
        if self._column:
            self.rows[-1][self._column] = data
        else:
            self.texts.setdefault(self._mark, []).append(data)

    @property
    def by_endpoint(self) -> dict[str, dict[str, str]]:
        return {row["endpoint"]: row for row in self.rows if "endpoint" in row}


@pytest.fixture(scope="module", autouse=True)
def browser() -> None:
    demanded("Chromium", chromium.program)


def rendered(url: str, **settings: Any) -> Rendered:
    loaded = chromium.load(url, **settings)
    assert loaded.console == [], "a violation of the page's policy would be told here, and so would an error"
    page = Rendered()
    page.feed(loaded.document)
    return page


@contextmanager
def load_on(mesh: Mesh) -> Iterator[None]:
    """Calls, until the end."""
    over = threading.Event()

    def call() -> None:
        with mesh.client("orders") as client:
            while not over.is_set():
                client.get("/").raise_for_status()
                over.wait(0.002)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def wait_until_open(mesh: Mesh, address: str) -> None:
    deadline = time.monotonic() + BOUND
    while {node.endpoint: node.state for node in mesh.snapshot()["orders"].nodes}[address] != "open":
        assert time.monotonic() < deadline, "the breaker has not opened"
        time.sleep(0.01)


def below(root: str, app: WSGIApplication) -> WSGIApplication:
    """Mount an app."""

    def mounted(environ: dict[str, Any], start_response: Any) -> Any:
        assert environ["PATH_INFO"].startswith(root), "the page asks where it is mounted"
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = root, environ["PATH_INFO"].removeprefix(root)
        return app(environ, start_response)

    return mounted


def test_a_dead_endpoint_is_seen_with_its_reason(fleet: list[Upstream]) -> None:
    addresses = [upstream.address for upstream in fleet]
    orders = Service("orders", addresses, balancer=LeastRequest(), breaker=Breaker(open_for=60.0, success_rate=0.0))
    with Mesh(orders, Service("users", Warned())) as mesh, served(below("/deep/status", status_app(mesh))) as url:
        mesh.wait_ready(BOUND)
        with load_on(mesh):
            fleet[1].kill()
            wait_until_open(mesh, addresses[1])
            page = rendered(f"{url}/deep/status")
    rows = page.by_endpoint
    assert rows.keys() == {*addresses, "10.0.0.9:80"}
    dead = rows[addresses[1]]
    assert (dead["state"], dead["eligible"]) == ("open", "no")
    assert dead["why"] == "ejected after 5 failures in a row"
    assert any(
        text.endswith(f"connecting to {addresses[1]} failed: Connection refused") for text in page.texts["small"]
    )
    assert "zone b; priority 1" in page.texts["small"]
    assert {"LeastRequest", "PeakEwma"} <= set(page.texts["dd"])
    assert int(dead["failures"]) >= 5
    for address in (addresses[0], addresses[2]):
        assert (rows[address]["state"], rows[address]["eligible"], rows[address]["failures"]) == ("closed", "yes", "0")
        assert float(rows[address]["p99"]) > 0
    assert page.texts["summary"] == ["2 services, 4 endpoints, 1 not eligible"]
    assert page.texts["share"] == ["2 of 3 endpoints eligible", "1 of 1 endpoint eligible"]
    assert page.texts["title"] == ["mesh: 1 not eligible"]
    assert page.texts["li"] == [f"test:warned: {HOSTILE}"]
    assert "img" not in page.tags
    assert page.texts["live"][0].startswith("live, ")


def test_it_says_since_when_nobody_answers() -> None:
    mesh = Mesh(Service("orders", ["10.0.0.1:80", "10.0.0.2:80"]))
    asked = []

    def auth(request: Any) -> Any:
        if request.path == "/snapshot.json":
            asked.append(request)
        return 403 if len(asked) > 2 else True

    with served(status_app(mesh, auth=auth)) as url:
        page = Rendered()
        page.feed(chromium.load(url).document)
    assert page.by_endpoint.keys() == {"10.0.0.1:80", "10.0.0.2:80"}
    (told,) = page.texts["live"]
    assert told.startswith("stale since ")
    assert told.endswith(": the server answers 403")


def test_rows_are_found_left_out_and_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The browser is not driven from outside, so the page gets a script that does what a user would."""
    by_hand = """setTimeout(() => {
        const find = document.getElementById("find");
        find.value = "10.0.0.1";
        find.dispatchEvent(new Event("input"));
        document.getElementById("only").click();
        const head = document.querySelector("th[data-column=endpoint] button");
        head.click();
        head.click();
    }, 1500);"""
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **how: read(self, **how) + (by_hand if self.name == "page.js" else "")
    )
    mesh = Mesh(Service("orders", [f"10.0.0.{number}:80" for number in (9, 10, 2, 1, 11)]))
    for number in (9, 1, 11):
        mesh.eject("orders", f"10.0.0.{number}:80")
    with served(status_app(mesh)) as url:
        shown = rendered(url)
    assert [row["endpoint"] for row in shown.rows if "endpoint" in row and "hidden" not in row] == [
        f"10.0.0.{number}:80" for number in (11, 1)
    ]


def test_a_thousand_endpoints_are_a_thousand_rows() -> None:
    mesh = Mesh(Service("orders", [f"10.0.{number // 250}.{number % 250 + 1}:80" for number in range(1000)]))
    with served(status_app(mesh)) as url:
        page = rendered(url)
    assert len(page.by_endpoint) == 1000
    assert page.texts["live"][0].startswith("live, ")
