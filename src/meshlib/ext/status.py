"""The status page: which answer a request gets, as plain data.

Decides the paths, the statuses and the headers, and what is told of a mesh. It never changes anything, whatever is
asked, and never reads a body or a query. It knows neither ASGI nor WSGI: `meshlib.ext.asgi` and `meshlib.ext.wsgi`
translate.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

import meshlib
from meshlib.ext.given import given

if TYPE_CHECKING:
    from meshlib.mesh import Mesh

logger = logging.getLogger(__name__)

SHARED = 0.25
"""Seconds for which a snapshot answers whoever asks: ten people who look on cost what one does."""

PRIVATE = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
"""On every answer: where endpoints are is for those who asked, and for no other site."""

CLOSED = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""The policy of what is no page."""

CHALLENGE = ("WWW-Authenticate", 'Basic realm="mesh status", charset="UTF-8"')

REFUSALS = {401: "who are you?\n", 403: "not for you\n"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRequest:
    """What an `auth` hook is asked about.

    Attributes:
        method: such as `GET`.
        path: below the place where the app is mounted: "", `/`, `/snapshot.json`, or one that does not exist.
        headers: by name in lower case; of one that came more than once the values are joined by ", ".
        client: the address of who asks, as the server has it; None if it has none.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    client: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


Auth = Callable[[StatusRequest], Any]
"""True lets a request in; False and 403 refuse it; 401 asks for a user and a password."""


class Status:
    """What the status page of one mesh answers.

    Args:
        mesh: whose.
        auth: who may see it; None for everybody.

    Raises:
        TypeError: if `mesh` is none, or `auth` cannot be called.
    """

    def __init__(self, mesh: Mesh, auth: Auth | None) -> None:
        self._mesh = given(mesh, "status_app(mesh, auth=...)")
        if auth is not None and not callable(auth):
            raise TypeError(f"auth must be a function of a StatusRequest, or None, got {type(auth).__name__}")
        self._auth = auth
        self._page = _page()
        self._snapshot: tuple[float, bytes] | None = None

    def permission(self, request: StatusRequest) -> Any:
        """What the hook says; where that is awaitable, `answer` wants to know what comes of it."""
        return True if self._auth is None else self._auth(request)

    def answer(self, request: StatusRequest, permission: Any) -> Answer:
        """The answer to a request.

        Args:
            request: what is asked for.
            permission: what the hook said.

        Raises:
            TypeError: if that is nothing a hook may say: who forgets to return something lets nobody in.
        """
        return _without_body(self._whole(request, permission), request)

    def failure(self, request: StatusRequest, error: Exception) -> Answer:
        """The answer when something was raised. What, is for the log, without its message: that may hold a header."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.name} ({frame.filename}:{frame.lineno})"
        logger.error("the status page failed: %s in %s", type(error).__name__, place)
        return _without_body(_text(500, "this failed; the log of the server knows more\n"), request)

    def _whole(self, request: StatusRequest, permission: Any) -> Answer:
        if permission is not True:
            return _refusal(permission)
        if request.path not in ("", "/", "/snapshot.json"):
            return _text(404, "there is / and /snapshot.json\n")
        if request.method not in ("GET", "HEAD"):
            return _text(405, "this is for reading\n", ("Allow", "GET, HEAD"))
        return self._page if request.path in ("", "/") else _answer(200, "application/json", self._told())

    def _told(self) -> bytes:
        now = time.monotonic()
        last = self._snapshot
        if last is None or now - last[0] >= SHARED:
            services = {name: service.to_dict() for name, service in self._mesh.snapshot().items()}
            told = {"version": meshlib.__version__, "time": time.time(), "services": services}
            self._snapshot = last = (now, json.dumps(told, separators=(",", ":"), allow_nan=False).encode())
        return last[1]


def _refusal(permission: Any) -> Answer:
    status = 403 if permission is False else permission
    if isinstance(status, bool) or not isinstance(status, int) or status not in REFUSALS:
        raise TypeError(f"auth must return True, False, 401 or 403, got {type(permission).__name__}")
    return _text(status, REFUSALS[status], *([CHALLENGE] if status == 401 else []))


def _without_body(answer: Answer, request: StatusRequest) -> Answer:
    return replace(answer, body=b"") if request.method == "HEAD" else answer


def _text(status: int, text: str, *more: tuple[str, str]) -> Answer:
    return _answer(status, "text/plain; charset=utf-8", text.encode(), *more)


def _answer(status: int, kind: str, body: bytes, *more: tuple[str, str], policy: str = CLOSED) -> Answer:
    told = (("Content-Type", kind), ("Content-Length", str(len(body))), ("Content-Security-Policy", policy))
    return Answer(status, (*told, *PRIVATE, *more), body)


def _page() -> Answer:
    """The page, which is the same for every mesh: what it shows it asks for."""
    files = resources.files("meshlib.ext") / "page"
    style, script = (files.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    body = Template(files.joinpath("page.html").read_text(encoding="utf-8")).substitute(style=style, script=script)
    allowed = f"style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; img-src data:"
    return _answer(200, "text/html; charset=utf-8", body.encode(), policy=f"{CLOSED}; {allowed}")


def _hash(text: str) -> str:
    """How a policy names the one style, or script, that is allowed."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
