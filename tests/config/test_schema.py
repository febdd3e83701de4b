"""The JSON Schema for editors: it is the file that is shipped, and it says nothing else than the settings do."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_config import PROPERTY, VALUES, WHOLE, orders

from meshlib import ConfigError
from meshlib.config import schema
from meshlib.config.reading import configured
from meshlib.config.tables import keys_of
from meshlib.service import Service

VALIDATOR = jsonschema.Draft7Validator(schema.schema())


def is_usable(document: Any) -> bool:
    try:
        configured(document)
    except ConfigError:
        return False
    return True


def test_the_file_is_what_the_settings_say() -> None:
    """If this fails: `meshlib check --schema > src/meshlib/mesh.schema.json`."""
    file = Path(schema.__file__).parents[1] / "mesh.schema.json"
    assert file.read_text(encoding="utf-8") == schema.written()
    jsonschema.Draft7Validator.check_schema(schema.schema())


def test_defaults_and_texts_are_there() -> None:
    service = schema.schema()["properties"]["services"]["additionalProperties"]["properties"]
    assert service["retry"]["properties"]["max_attempts"] == {
        "description": "attempts in all, the first included; failovers do not count. Default 3; 1 means no retry.",
        "type": "integer",
        "minimum": 1,
        "default": 3,
    }
    assert service["retry"]["properties"]["on_status"]["default"] == [502, 503, 504]
    assert service["limit"]["required"] == ["max_in_flight"]
    assert "stop" not in service["retry"]["properties"]


@pytest.mark.parametrize("text", [WHOLE, orders(""), orders("balancer = 'random'"), orders("retry.wait = 0")])
def test_what_is_right_is_right_for_editors(text: str) -> None:
    document = tomllib.loads(text)
    assert is_usable(document)
    assert list(VALIDATOR.iter_errors(document)) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "services = {}",
        "[service.orders]",
        "[services.orders]\nbalancer = 'random'",
        "[services.orders]\nresolver = 5",
        "[services.orders]\nresolver = []",
        "[services.orders]\nresolver = [{host = '10.0.0.1'}]",
        "[services.orders]\nresolver = [{host = '10.0.0.1', port = 80, wieght = 2}]",
        orders("colour = 1"),
        orders("timeout = 5"),
        orders("timeout = {atempt = 1}"),
        orders("timeout = {total = 0}"),
        orders("timeout = {total = '1'}"),
        orders("retry = {max_attempts = 0}"),
        orders("retry = {max_attempts = 1.5}"),
        orders("retry = {on = 1}"),
        orders("retry = {wait = -1}"),
        orders("retry = {on_status = [200]}"),
        orders("retry = {budget = {capacity = 0}}"),
        orders("breaker = {enforce = 1}"),
        orders("breaker = {slow_call = 0}"),
        orders("breaker = {panic = 1.5}"),
        orders("limit = {}"),
        orders("health = {interval = 1}"),
        orders("tls = {min_version = '1.1'}"),
        orders("scheme = 'ftp'"),
        orders("balancer = 'least-request'"),
        orders("balancer = {choices = 2}"),
        orders("balancer = {type = 'least_request', choices = 1}"),
        orders("balancer = {type = 'random', choices = 3}"),
        orders("[mesh]\nspans = 'none'"),
        orders("[mesh]\nzones = 'a'"),
    ],
)
def test_what_is_wrong_is_wrong_for_editors(text: str) -> None:
    document = tomllib.loads(text)
    assert not is_usable(document)
    assert list(VALIDATOR.iter_errors(document)) != []


@PROPERTY
@given(st.dictionaries(st.sampled_from(list(keys_of(Service))), VALUES, max_size=3))
def test_editors_refuse_nothing_that_can_be_used(table: dict[str, Any]) -> None:
    document = {"services": {"orders": {"resolver": ["10.0.0.1:80"], **table}}}
    if is_usable(document) and None not in table.values():  # which TOML has no word for
        assert list(VALIDATOR.iter_errors(document)) == []
