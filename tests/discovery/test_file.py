"""Endpoints from a file: what it may say, when it is read again, and what is said of one that is broken."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from meshlib import ConfigError, Endpoint
from meshlib.discovery import Resolution, file
from meshlib.discovery.file import File
from meshlib.errors import ResolveError

TOML = """
[[endpoints]]
host = "10.0.0.1"
port = 8080

[[endpoints]]
host = "db.internal"
port = 81
weight = 0.5
priority = 1
zone = "eu-1a"
metadata = {version = "v2"}
"""
FULL = {"host": "db.internal", "port": 81, "weight": 0.5, "priority": 1, "zone": "eu-1a", "metadata": {"version": "v2"}}
BOTH = (
    Endpoint("10.0.0.1", 8080),
    Endpoint("db.internal", 81, weight=0.5, priority=1, zone="eu-1a", metadata={"version": "v2"}),
)


def resolve(resolver: File, previous: Resolution | None = None) -> Resolution:
    return asyncio.run(resolver.resolve("orders", previous))


def written(folder: Path, content: str | bytes, name: str = "endpoints.toml") -> File:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return File(folder / name)


def faults(resolver: File) -> list[str]:
    with pytest.raises(ResolveError) as caught:
        resolve(resolver)
    said = str(caught.value)
    assert said.startswith(f"{resolver.source}: ")
    return said.removeprefix(f"{resolver.source}: ").split("; ")


# What it may say


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.toml", TOML),
        ("a.toml", f"\ufeff{TOML}"),
        ("a.json", json.dumps({"endpoints": [{"host": "10.0.0.1", "port": 8080}, FULL]})),
        ("a.json", json.dumps(["10.0.0.1:8080", FULL])),
    ],
)
def test_endpoints_are_read_from_TOML_and_JSON(name: str, content: str, tmp_path: Path) -> None:
    answer = resolve(written(tmp_path, content, name))
    assert (answer.endpoints, answer.ttl) == (BOTH, 1.0)


def test_a_list_of_addresses_will_do_even_an_empty_one(tmp_path: Path) -> None:
    answer = resolve(written(tmp_path, 'endpoints = ["10.0.0.1:8080", "[::1]:81"]'))
    assert answer.endpoints == (Endpoint("10.0.0.1", 8080), Endpoint("::1", 81))
    assert resolve(written(tmp_path, "[]", "none.json")).endpoints == ()
    assert resolve(written(tmp_path, "endpoints = []")).endpoints == ()


def test_every_fault_of_a_file_is_listed_with_its_place(tmp_path: Path) -> None:
    content = """
    endpoint = 1
    [[endpoints]]
    host = "a b"
    port = 0
    [[endpoints]]
    hots = "10.0.0.1"
    weight = -1
    metadata = {version = 2}
    [[endpoints]]
    host = "10.0.0.1"
    port = 80
    [[endpoints]]
    host = "10.0.0.1"
    port = 80
    zone = ["secret"]
    """
    assert faults(written(tmp_path, content)) == [
        "endpoint: must not be there",
        "did you mean 'endpoints'? (known: endpoints)",
        "endpoints[0].host: must be an IP address or a host name, for example '10.0.0.1', got 'a b'",
        "endpoints[0].port: must be >= 1, got 0",
        "endpoints[1].hots: must not be there",
        "did you mean 'host'? (known: host, port, weight, priority, zone, metadata)",
        "endpoints[1].host: must be given",
        "endpoints[1].port: must be given",
        "endpoints[1].metadata.version: must be a string, got 2",
        "endpoints[1].weight: must be > 0, got -1",
        "endpoints[3].zone: must be a str, for example 'eu-west-1a', got ['secret']",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('["10.0.0.1:80", "10.0.0.1:80"]', "endpoints[1]: must be listed once: 10.0.0.1:80 is there already"),
        ('["10.0.0.1"]', "endpoints[0]: must be 'host:port', for example '10.0.0.1:8080' or '[::1]:8080', got"),
        ('["u:secret@10.0.0.1"]', "endpoints[0]: must be 'host:port'"),
        ("[80]", "endpoints[0]: must be 'host:port' or a table with host and port, got 80"),
        ('[["secret"]]', "endpoints[0]: must be 'host:port' or a table with host and port, got a list"),
        (
            '{"endpoints": {"password": "secret"}}',
            "endpoints: must be a list, for example ['10.0.0.1:8080'], got a table",
        ),
        ("null", "endpoints: must be a list, for example ['10.0.0.1:8080'], got None"),
        ("{}", "endpoints: must be given, for example endpoints = ['10.0.0.1:8080']"),
        ('{"endpoints": [], "a\\nb": 1}', "'a\\nb': must not be there"),
        ("", "JSON: must be well-formed: "),
        ('["secret', "JSON: must be well-formed: "),
        (b"\xff", "JSON: must be well-formed: "),
        ("[" * 100_000, "JSON: must "),
        (f'["{"x" * 1000}"]', "endpoints[0]: must be 'host:port', for example '10.0.0.1:8080' or '[::1]:8080', got 'x"),
    ],
)
def test_a_broken_file_is_told_and_nothing_around_the_fault(content: str | bytes, said: str, tmp_path: Path) -> None:
    fault = faults(written(tmp_path, content, "a.json"))[0]
    assert fault.startswith(said)
    assert "secret" not in fault
    assert len(fault) <= 200


def test_what_is_missing_is_not_missing_twice(tmp_path: Path) -> None:
    assert faults(written(tmp_path, '[{}, {"zone": ""}]', "a.json")) == [
        "endpoints[0].host: must be given",
        "endpoints[0].port: must be given",
        "endpoints[1].host: must be given",
        "endpoints[1].port: must be given",
    ]


def test_of_many_faults_the_first_are_shown(tmp_path: Path) -> None:
    said = faults(written(tmp_path, json.dumps(["x"] * 50), "a.json"))
    assert len(said) == 21
    assert said[-1] == "and 30 more"


def test_a_TOML_file_cut_short_is_broken(tmp_path: Path) -> None:
    assert faults(written(tmp_path, TOML[:-3]))[0].startswith("TOML: must be well-formed: ")
    assert faults(written(tmp_path, ""))[0].startswith("endpoints: must be given")


def test_what_is_no_readable_file_is_an_error_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    assert faults(File(tmp_path / "gone.toml")) == ["No such file or directory"]
    assert faults(File(tmp_path / "folder.toml")) == ["Is a directory"]
    assert faults(File(tmp_path / "pipe.toml")) == ["must be a file"]
    monkeypatch.setattr(file, "LARGEST", 1 << 20)
    assert faults(written(tmp_path, b" " * ((1 << 20) + 1))) == ["must be no larger than 1 MiB"]


# When it is read again


def replaced(path: Path, content: str) -> None:
    """As it should be done: written beside, then moved into its place."""
    (path.parent / "new").write_text(content)
    os.replace(path.parent / "new", path)


def linked(path: Path, content: str) -> None:
    """As Kubernetes mounts a ConfigMap: the name stays, and what it leads to is another."""
    folder = path.parent / f"version-{len(os.listdir(path.parent))}"
    folder.mkdir()
    (folder / path.name).write_text(content)
    (path.parent / "data.new").symlink_to(folder)
    os.replace(path.parent / "data.new", path.parent / "data")
    if not path.is_symlink():
        path.unlink()
        path.symlink_to(Path("data", path.name))


@pytest.mark.parametrize("change", [Path.write_text, replaced, linked])
def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(
    change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "SETTLED", -3600.0)
    resolver = written(tmp_path, 'endpoints = ["10.0.0.1:8080"]')
    change(resolver.path, 'endpoints = ["10.0.0.1:8081"]')
    first = resolve(resolver)
    assert resolve(resolver, first).endpoints is first.endpoints
    os.utime(resolver.path, ns=(1, 1))
    again = resolve(resolver, first)
    assert again.endpoints is not first.endpoints, "another time stamp: it may be another content"
    change(resolver.path, 'endpoints = ["10.0.0.1:8082"]')
    os.utime(resolver.path, ns=(1, 1))
    assert [endpoint.port for endpoint in resolve(resolver, again).endpoints] == [8082]


def test_a_file_that_has_only_just_changed_is_not_taken_for_unchanged(tmp_path: Path) -> None:
    """Two changes within one tick of the file system's clock have one time stamp."""
    resolver = written(tmp_path, 'endpoints = ["10.0.0.1:8080"]')
    first = resolve(resolver)
    assert resolve(resolver, first).endpoints is not first.endpoints


def test_a_file_that_is_repaired_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "SETTLED", -3600.0)
    resolver = written(tmp_path, 'endpoints = ["10.0.0.1:8080"]')
    good = resolve(resolver)
    replaced(resolver.path, "endpoints = [")
    with pytest.raises(ResolveError):
        asyncio.run(resolver.resolve("orders", good))
    replaced(resolver.path, 'endpoints = ["10.0.0.1:8081"]')
    assert resolve(resolver, good).endpoints == (Endpoint("10.0.0.1", 8081),)


# Its path


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:endpoints.toml", "/srv/endpoints.toml"),
        ("file:./a/b.json", "/srv/a/b.json"),
        ("file:/etc/orders.toml", "/etc/orders.toml"),
        ("file:///etc/orders.toml", "/etc/orders.toml"),
        ("file://localhost/etc/orders.toml", "/etc/orders.toml"),
        ("file:a%20b%3F%25.toml", "/srv/a b?%.toml"),
        ("file:~/orders.toml", "/home/me/orders.toml"),
    ],
)
def test_a_url_names_a_path(url: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getcwd", lambda: "/srv")
    monkeypatch.setenv("HOME", "/home/me")
    resolver = File.from_url(url)
    assert (str(resolver.path), resolver.source, resolver.watch_key) == (path, f"file:{path}", ("file", path))
    assert repr(resolver) == f"File({path!r})"


def test_a_relative_path_counts_from_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "endpoints = []")
    resolver = File.from_url("file:endpoints.toml")
    monkeypatch.chdir("/")
    assert resolve(resolver).endpoints == ()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: File.from_url("file://endpoints.toml"), "must have no host, .* got 'endpoints.toml'"),
        (lambda: File.from_url("file://u:secret@host/x.toml"), "must have no host, .* got 'host'"),
        (lambda: File.from_url("file:x.toml?token=secret"), "must have no parameters, "),
        (lambda: File.from_url("file:endpoints.yaml"), "must be a file that ends in .toml or .json, .* got 'endp"),
        (lambda: File.from_url("file:"), "must be a file that ends in .toml or .json, .* got ''"),
        (lambda: File.from_url("file:a%00b.toml"), "must be a path, "),
        (lambda: File.from_url("file:~nobody-has-this-name/x.toml"), "must be a path that can be found, "),
        (lambda: File(5), "must be a path, for example 'file:endpoints.toml' .* got 5"),  # type: ignore[arg-type]
        (lambda: File(b"x.toml"), "must be a path, "),  # type: ignore[arg-type]
    ],
)
def test_a_path_that_cannot_be_is_refused_when_it_is_given(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"resolver: {said}") as caught:
        make()
    assert "secret" not in str(caught.value)
