"""Which URL is read by which resolver, the built-in ones and those of installed packages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from meshlib import ConfigError, Service
from meshlib.discovery import File, Static, schemes
from meshlib.discovery.schemes import is_url, resolver_of
from packages import install

ENTRY_POINTS = """
acme = acme_resolvers:Counted
refuses = acme_resolvers:refuses
breaks = acme_resolvers:breaks
nothing = acme_resolvers:nothing
gone = acme_resolvers:gone
absent = absent_module:Class
static = acme_resolvers:Counted
"""


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with schemes."""
    install(tmp_path, ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_resolvers", raising=False)
    return tmp_path


def fault_of(url: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolver_of(url)
    (fault,) = caught.value.faults
    assert fault.path == "resolver"
    return fault.message


def test_the_schemes_are_those_of_the_design() -> None:
    assert schemes.BUILT_IN == {
        "static": "Static",
        "file": "File",
        "dns": "Dns",
        "dns+srv": "DnsSrv",
        "consul": "Consul",
        "consul+https": "Consul",
        "failover": "Failover",
    }


def test_a_scheme_may_be_written_in_capitals_and_with_space_around() -> None:
    resolver = resolver_of(" STATIC:10.0.0.1:80\n")
    assert isinstance(resolver, Static)
    assert resolver.endpoints[0].place == ("10.0.0.1", 80)
    assert isinstance(resolver_of("File:x.toml"), File)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("static:10.0.0.1:80", True),
        ("dns+srv://_http._tcp.users", True),
        ("CONSUL://127.0.0.1/orders", True),
        ("file:8080.toml", True),
        ("acme:anything", True),
        ("static:", True),
        ("static:80", False),
        ("acme:80 ", False),
        ("consul.internal:8500", False),
        ("localhost:http", False),
        ("10.0.0.1:80", False),
        ("[::1]:80", False),
        ("2001:db8::1", False),
        ("", False),
        (":", False),
    ],
)
def test_a_url_is_a_known_scheme_and_more_than_a_port(text: str, expected: bool, acme: Path) -> None:
    assert is_url(text) is expected


def test_installed_packages_are_looked_at_for_other_schemes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**kwargs: Any) -> Any:
        raise AssertionError("looked up")

    monkeypatch.setattr("importlib.metadata.entry_points", never)
    assert is_url("static:10.0.0.1:80")
    assert not is_url("orders:80")
    Service("orders", ["10.0.0.1:80", "orders.internal:80", "[::1]:80"])
    resolver_of("failover:static:10.0.0.1:80|file:x.toml")
    with pytest.raises(AssertionError, match="looked up"):
        is_url("acme:x")


def test_a_package_brings_a_scheme(acme: Path) -> None:
    resolver: Any = resolver_of("ACME://user:secret@host/?b=c")
    assert type(resolver).__name__ == "Counted"
    assert resolver.source == "acme://user:secret@host/?b=c"
    assert Service("orders", ["acme:1.2", "static:10.0.0.1:80"]).resolver
    assert isinstance(resolver_of("static:10.0.0.1:80"), Static), "a built-in scheme cannot be taken over"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("refuses:x", "must be nicer"),
        (
            "breaks:secret",
            "entry point 'breaks' of meshlib.resolvers (acme_resolvers:breaks) takes: it raised RuntimeE",
        ),
        ("nothing:x", "previous)', got an object of type NoneType from entry point 'nothing' of meshlib.resolvers"),
        ("gone:x", "entry point 'gone' of meshlib.resolvers (acme_resolvers:gone) raised AttributeError"),
        ("absent:x", "entry point 'absent' of meshlib.resolvers (absent_module:Class) raised ModuleNotFoundError"),
    ],
)
def test_a_packages_scheme_that_does_not_work_is_named(url: str, said: str, acme: Path) -> None:
    message = fault_of(url)
    assert said in message
    assert "secret" not in message


def test_a_scheme_of_two_packages_is_nobodys(acme: Path) -> None:
    install(acme, "acme = other_resolvers:Counted", name="other")
    assert fault_of("acme:x") == (
        "must be of one package's scheme: 'acme' is acme_resolvers:Counted and other_resolvers:Counted"
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("consol://127.0.0.1:8500/orders", "got 'consol://127.0.0.1:8500/orders'; did you mean 'consul:'?"),
        ("acne:x", "got 'acne:x'; did you mean 'acme:'?"),
        ("http://10.0.0.1", "got 'http://10.0.0.1'"),
        ("10.0.0.1:80", "got '10.0.0.1:80'; did you mean 'static:10.0.0.1:80'?"),
        ("http://10.0.0.1:80/", "got 'http://10.0.0.1:80/'; did you mean 'static:10.0.0.1:80'?"),
        ("https://h:80", "got 'https://h:80'; did you mean 'static:h:80' with tls=TLS()?"),
        ("static:80", "got 'static:80'; did you mean 'static:static:80'?"),
        ("endpoints.toml", "got 'endpoints.toml'"),
        ("", "got ''"),
    ],
)
def test_an_unknown_scheme_names_the_known_ones_and_the_one_that_was_meant(url: str, said: str, acme: Path) -> None:
    message = fault_of(url)
    assert message.endswith(said)
    assert "(static:, file:, dns:, dns+srv:, consul:, consul+https:, failover:, absent:, acme:, breaks:, " in message


@pytest.mark.parametrize(
    "url",
    [
        "consol://u:secret@host/",
        "x:/?token=secret",
        "x:/#secret",
        "x:token=secret",
        "x:pa?ss@secret",
        "u:secret@host:80",
        "u@secret",
    ],
)
def test_T3_no_secret_of_an_unknown_url_reaches_an_error(url: str) -> None:
    assert "secret" not in fault_of(url)
