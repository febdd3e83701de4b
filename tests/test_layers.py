"""The laws of the house, as the design page (section 3) states them: who may import whom, and how a module is made.

The checker reads sources, so it sees imports inside functions and behind `TYPE_CHECKING` as well. Each law is first
shown a source that breaks it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src" / "meshlib"

LONGEST = 50
"""Lines of a function."""

VAGUE = {"utils", "util", "helpers", "helper", "common", "manager", "handler", "base", "misc"}

CORE_NEVER = {"httpx", "httpcore", "dns", "opentelemetry", "asyncio", "time", "random", "threading"}
"""`from threading import Lock` is the exception."""

SIBLINGS = ("discovery", "registry", "transport", "telemetry")

LAZY = {"httpcore", "dns", "tenacity", "opentelemetry.sdk", "rich", "fastapi", "starlette", "flask", "aiohttp", "trio"}
LAZY |= {"anyio", "mmh3", "uvicorn", "prometheus_client", "httpx_aiohttp"}
"""Costly, or not always there: none of these is loaded by `import meshlib`."""


@dataclass(frozen=True)
class Import:
    """One name that a module imports."""

    target: str
    """Dotted: `threading.Lock` for `from threading import Lock`."""

    module: str
    """What is loaded: `threading`."""

    line: int
    is_lazy: bool
    """In a function, or only for the type checker."""


class Module:
    """A module's source, and what the laws look at."""

    def __init__(self, name: str, source: str, *, is_package: bool = False) -> None:
        self.name = name
        self.tree = ast.parse(source)
        self._package = name if is_package else name.rpartition(".")[0]
        self.imports = list(self._imports(self.tree, is_lazy=False))

    @property
    def area(self) -> str:
        """The first part of its name inside meshlib: `core`, `transport`, `mesh`; "" for meshlib itself."""
        return self.name.partition(".")[2].partition(".")[0]

    def imported(self, prefix: str) -> list[Import]:
        """The imports of a package, its modules and their names."""
        return [each for each in self.imports if is_in(each.target, prefix)]

    def functions(self) -> Iterator[tuple[str, int]]:
        """Every function with the lines of its body."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, (node.end_lineno or 0) - node.body[0].lineno + 1

    def _imports(self, tree: ast.AST, *, is_lazy: bool) -> Iterator[Import]:
        for node in ast.iter_child_nodes(tree):
            inner = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, alias.name, node.lineno, is_lazy) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = self._absolute(node)
                yield from (Import(f"{module}.{alias.name}", module, node.lineno, is_lazy) for alias in node.names)
            elif isinstance(node, ast.Call) and (name := _imported_by_call(node)) is not None:
                yield Import(name, name, node.lineno, is_lazy)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                for child in node.body:
                    yield from self._imports(ast.Module([child], []), is_lazy=True)
                for child in node.orelse:
                    yield from self._imports(ast.Module([child], []), is_lazy=is_lazy)
            else:
                yield from self._imports(node, is_lazy=inner)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self._package.split(".")
        return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def _imported_by_call(node: ast.Call) -> str | None:
    """`importlib.import_module("x")` and `__import__("x")` are imports, too."""
    function = ast.unparse(node.func).rpartition(".")[2]
    if function in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
        return str(node.args[0].value)
    return None


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _name(path: Path) -> str:
    return ".".join(["meshlib", *path.relative_to(SOURCES).with_suffix("").parts]).removesuffix(".__init__")


def _read(path: Path) -> Module:
    return Module(_name(path), path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py")


MODULES = {module.name: module for module in map(_read, sorted(SOURCES.rglob("*.py")))}


# The laws. Each gives its complaints about a module.


def law_core_is_pure(module: Module) -> list[str]:
    if module.area != "core":
        return []
    return [
        f"{module.name}:{each.line} imports {each.target}"
        for package in CORE_NEVER
        for each in module.imported(package)
        if each.target != "threading.Lock"
    ]


def law_siblings_do_not_meet(module: Module) -> list[str]:
    if module.area not in SIBLINGS:
        return []
    return [
        f"{module.name}:{each.line} imports {each.target}"
        for other in SIBLINGS
        if other != module.area
        for each in module.imported(f"meshlib.{other}")
    ]


def law_the_sdk_has_one_room(module: Module) -> list[str]:
    """The request path goes by OpenTelemetry's API alone, and nobody else's exporters are touched (rule T1)."""
    if module.name == "meshlib.telemetry.sdk":
        return []
    return [
        f"{module.name}:{each.line} imports {each.target}"
        for package in ("opentelemetry.sdk", "opentelemetry.exporter", "prometheus_client")
        for each in module.imported(package)
    ]


def law_telemetry_knows_no_http_client(module: Module) -> list[str]:
    if module.area != "telemetry":
        return []
    return [
        f"{module.name}:{each.line} imports {each.target}"
        for package in ("httpx", "httpcore")
        for each in module.imported(package)
    ]


def law_who_imports_the_mesh(module: Module) -> list[str]:
    """`from meshlib import Mesh` in the inside would be the same, and a cycle."""
    if module.area in ("", "ext", "cli", "testing"):
        return []
    through_the_door = [
        each
        for each in module.imports
        if each.target == "meshlib" or (each.module == "meshlib" and not _is_module(each))
    ]
    return [
        f"{module.name}:{each.line} imports {each.target}"
        for each in module.imported("meshlib.mesh") + through_the_door
    ]


def _is_module(each: Import) -> bool:
    return each.target in MODULES


def law_nothing_imports_ext_or_cli(module: Module) -> list[str]:
    return [
        f"{module.name}:{each.line} imports {each.target}"
        for outer in ("ext", "cli")
        if module.area != outer
        for each in module.imported(f"meshlib.{outer}")
    ]


def law_frameworks_live_in_ext(module: Module) -> list[str]:
    if module.area == "ext":
        return []
    return [
        f"{module.name}:{each.line} imports {each.target}"
        for framework in ("fastapi", "starlette", "flask", "werkzeug")
        for each in module.imported(framework)
    ]


def law_each_library_has_one_room(module: Module) -> list[str]:
    rooms = {"tenacity": "meshlib.core.backoff", "mmh3": "meshlib.core.balance.hashing"}
    return [
        f"{module.name}:{each.line} imports {each.target}"
        for library, room in rooms.items()
        if module.name != room
        for each in module.imported(library)
    ]


def law_every_module_says_what_it_is_for(module: Module) -> list[str]:
    return [] if (ast.get_docstring(module.tree) or "").strip() else [f"{module.name} has no docstring"]


def law_functions_are_short(module: Module) -> list[str]:
    return [f"{module.name}.{name} has {lines} lines" for name, lines in module.functions() if lines > LONGEST]


def law_names_say_something(module: Module) -> list[str]:
    return [f"{module.name} is called {part}" for part in module.name.split(".") if part.strip("_") in VAGUE]


LAWS = [
    law_core_is_pure,
    law_siblings_do_not_meet,
    law_the_sdk_has_one_room,
    law_telemetry_knows_no_http_client,
    law_who_imports_the_mesh,
    law_nothing_imports_ext_or_cli,
    law_frameworks_live_in_ext,
    law_each_library_has_one_room,
    law_every_module_says_what_it_is_for,
    law_functions_are_short,
    law_names_say_something,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_house_keeps(law: object) -> None:
    assert callable(law)
    assert [complaint for module in MODULES.values() for complaint in law(module)] == []


# What `import meshlib` loads


def loaded_by(root: str, modules: dict[str, Module]) -> set[str]:
    """The modules that are loaded by an import of `root`, from imports at module level alone."""
    found: set[str] = set()
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name in found or name not in modules:
            continue
        found.add(name)
        parents = name.split(".")
        waiting += [".".join(parents[:length]) for length in range(1, len(parents))]
        waiting += [
            target for each in modules[name].imports if not each.is_lazy for target in (each.target, each.module)
        ]
    return found


def costly(root: str, modules: dict[str, Module]) -> list[str]:
    return [
        f"{name}:{each.line} imports {each.target}"
        for name in sorted(loaded_by(root, modules))
        for each in modules[name].imports
        if not each.is_lazy and any(is_in(each.target, library) for library in LAZY)
    ]


def test_what_is_costly_is_imported_lazily() -> None:
    assert {"meshlib.mesh", "meshlib.service"} <= loaded_by("meshlib", MODULES)
    assert costly("meshlib", MODULES) == []


def test_the_core_reaches_nothing_impure_through_the_rest_of_the_house() -> None:
    """A module that the core imports is part of it, as far as purity goes."""
    reached: set[str] = set()
    waiting = [name for name, module in MODULES.items() if module.area == "core"]
    while waiting:
        name = waiting.pop()
        if name not in reached and name in MODULES:
            reached.add(name)
            imports = [each for each in MODULES[name].imports if not each.is_lazy]
            waiting += [target for each in imports for target in (each.target, each.module) if target != "meshlib"]
    assert "meshlib.policy" in reached
    impure = CORE_NEVER - {"threading", "time", "random"}  # settings and values may do with these as they like
    assert [
        f"{name}:{each.line} imports {each.target}"
        for name in sorted(reached)
        for each in MODULES[name].imports
        if not each.is_lazy and any(is_in(each.target, package) for package in impure)
    ] == []


# The checker can fail


@pytest.mark.parametrize(
    ("law", "name", "source"),
    [
        (law_core_is_pure, "meshlib.core.x", "import httpx"),
        (law_core_is_pure, "meshlib.core.x", "from httpx._models import Request"),
        (law_core_is_pure, "meshlib.core.x", "import dns.resolver as r"),
        (law_core_is_pure, "meshlib.core.x", "from time import monotonic"),
        (law_core_is_pure, "meshlib.core.x", "import threading"),
        (law_core_is_pure, "meshlib.core.x", "from threading import Lock, Thread"),
        (law_core_is_pure, "meshlib.core.x", "def f():\n    import random"),
        (law_core_is_pure, "meshlib.core.x", "class A:\n    def f(self):\n        from asyncio import sleep"),
        (
            law_core_is_pure,
            "meshlib.core.x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import httpcore",
        ),
        (law_core_is_pure, "meshlib.core.x", "try:\n    import opentelemetry.trace\nexcept ImportError:\n    pass"),
        (law_core_is_pure, "meshlib.core.x", "import importlib\nt = importlib.import_module('time')"),
        (law_core_is_pure, "meshlib.core.balance.x", "t = __import__('random')"),
        (law_siblings_do_not_meet, "meshlib.transport.x", "from meshlib.discovery.static import Static"),
        (law_siblings_do_not_meet, "meshlib.discovery.x", "import meshlib.registry"),
        (law_siblings_do_not_meet, "meshlib.telemetry.x", "from meshlib import transport"),
        (law_siblings_do_not_meet, "meshlib.registry.x", "from ..discovery import static"),
        (law_siblings_do_not_meet, "meshlib.registry.x", "from .. import discovery"),
        (law_the_sdk_has_one_room, "meshlib.telemetry.x", "def f():\n    from opentelemetry.sdk import trace"),
        (law_the_sdk_has_one_room, "meshlib.mesh", "import prometheus_client"),
        (law_telemetry_knows_no_http_client, "meshlib.telemetry.x", "from httpx import Request"),
        (law_who_imports_the_mesh, "meshlib.core.x", "from meshlib.mesh import Mesh"),
        (law_who_imports_the_mesh, "meshlib.config", "from meshlib import Mesh"),
        (law_who_imports_the_mesh, "meshlib.config", "import meshlib"),
        (law_who_imports_the_mesh, "meshlib.config", "from . import mesh"),
        (law_who_imports_the_mesh, "meshlib.transport.x", "def f():\n    from ..mesh import Mesh"),
        (law_nothing_imports_ext_or_cli, "meshlib.mesh", "from meshlib.cli import main"),
        (law_nothing_imports_ext_or_cli, "meshlib.cli.x", "from meshlib.ext.fastapi import lifespan"),
        (law_nothing_imports_ext_or_cli, "meshlib.testing.x", "import meshlib.ext"),
        (law_frameworks_live_in_ext, "meshlib.mesh", "def f():\n    from flask import g"),
        (law_each_library_has_one_room, "meshlib.core.call", "import tenacity"),
        (law_each_library_has_one_room, "meshlib.core.balance.ring", "from mmh3 import hash"),
        (law_every_module_says_what_it_is_for, "meshlib.core.x", "x = 1"),
        (law_every_module_says_what_it_is_for, "meshlib.core.x", ""),
        (law_every_module_says_what_it_is_for, "meshlib.core.x", "''"),
        (law_functions_are_short, "meshlib.core.x", "def f():\n" + "    x = 1\n" * 51),
        (law_functions_are_short, "meshlib.core.x", "class A:\n    async def f(self):\n" + "        x = 1\n" * 51),
        (law_names_say_something, "meshlib.core.utils", ""),
        (law_names_say_something, "meshlib.helpers.x", ""),
        (law_names_say_something, "meshlib.transport._base", ""),
    ],
)
def test_the_checker_sees(law: object, name: str, source: str) -> None:
    assert callable(law)
    assert law(Module(name, source)) != []


@pytest.mark.parametrize(
    ("law", "name", "source"),
    [
        (law_core_is_pure, "meshlib.core.x", "from threading import Lock"),
        (law_core_is_pure, "meshlib.core.x", "import timeit\nimport randomness\nfrom meshlib.core import time"),
        (law_core_is_pure, "meshlib.transport.x", "import httpx"),
        (law_siblings_do_not_meet, "meshlib.transport.x", "from meshlib.transport.body import Recording"),
        (law_siblings_do_not_meet, "meshlib.mesh", "from meshlib.discovery.static import Static"),
        (law_the_sdk_has_one_room, "meshlib.telemetry.x", "from opentelemetry.metrics import Meter"),
        (law_who_imports_the_mesh, "meshlib.ext.flask", "from meshlib import Mesh"),
        (law_who_imports_the_mesh, "meshlib.transport.x", "from meshlib import errors"),
        (law_nothing_imports_ext_or_cli, "meshlib.cli.demo", "from meshlib.cli.load import run"),
        (law_frameworks_live_in_ext, "meshlib.ext.flask", "from flask import g"),
        (law_each_library_has_one_room, "meshlib.core.backoff", "import tenacity"),
        (law_functions_are_short, "meshlib.core.x", "def f():\n" + "    x = 1\n" * 50),
        (law_names_say_something, "meshlib.core.database", ""),
    ],
)
def test_the_checker_lets_pass(law: object, name: str, source: str) -> None:
    assert callable(law)
    assert law(Module(name, source)) == []


def test_the_checker_follows_imports_at_module_level_and_no_others() -> None:
    house = {
        "meshlib": Module("meshlib", "from meshlib.mesh import Mesh", is_package=True),
        "meshlib.mesh": Module("meshlib.mesh", "from meshlib.a import b\ndef f():\n    import meshlib.late"),
        "meshlib.a": Module("meshlib.a", "import rich.table", is_package=True),
        "meshlib.a.b": Module("meshlib.a.b", "import opentelemetry.sdk.metrics\nimport opentelemetry.trace"),
        "meshlib.late": Module("meshlib.late", "import httpcore"),
    }
    assert loaded_by("meshlib", house) == {"meshlib", "meshlib.mesh", "meshlib.a", "meshlib.a.b"}
    assert costly("meshlib", house) == [
        "meshlib.a:1 imports rich.table",
        "meshlib.a.b:1 imports opentelemetry.sdk.metrics",
    ]


def test_the_checker_has_found_the_house() -> None:
    assert {"meshlib", "meshlib.mesh", "meshlib.core.call", "meshlib.core.balance.least_request"} <= MODULES.keys()
    assert len(MODULES) > 30
    assert MODULES["meshlib.core.cluster"].imported("threading.Lock")
