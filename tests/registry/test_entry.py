"""What may be said of the running process, and what is written to Consul."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from meshlib import ConfigError, Mesh, control
from meshlib.registry import Entry

pytestmark = pytest.mark.once


def test_G1_the_id_is_name_host_port_and_no_address_is_told_where_no_host_was_given() -> None:
    assert Entry("orders", port=8000, host="10.0.0.5").id == "orders-10.0.0.5-8000"
    assert Entry("orders", port=8000, host="10.0.0.5").told()["Address"] == "10.0.0.5"
    plain = Entry("orders", port=8000)
    assert plain.id == f"orders-{socket.gethostname()}-8000"
    assert "Address" not in plain.told()


def test_G1_an_entry_begins_passing_and_says_when_it_may_be_forgotten() -> None:
    told = Entry("orders", port=8000, tags=["v2"], meta={"zone": "a"}, weight=3, ttl=5).told()
    assert (told["Tags"], told["Meta"], told["Weights"]["Passing"]) == (["v2"], {"zone": "a"}, 3)
    check = told["Check"]
    assert (check["TTL"], check["Status"], check["DeregisterCriticalServiceAfter"]) == ("5s", "passing", "60s")
    assert json.dumps(told)


def test_a_check_of_consul_s_own_has_a_target_and_an_interval() -> None:
    http = Entry("orders", port=8000, host="::1", check="http", check_path="/up", check_interval=2).told()["Check"]
    assert (http["HTTP"], http["Interval"]) == ("http://[::1]:8000/up", "2s")
    assert Entry("orders", port=8000, check="tcp").told()["Check"]["TCP"] == "127.0.0.1:8000"
    assert "TTL" not in http


def test_lengths_of_time_have_no_exponent_which_consul_would_refuse() -> None:
    check = Entry("orders", port=8000, ttl=3599.25, deregister_after=30 * 86400).told()["Check"]
    assert (check["TTL"], check["DeregisterCriticalServiceAfter"]) == ("3599.25s", "2592000s")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"port": 0}, "register.port: must be >= 1"),
        ({"name": "or ders"}, "register.name: must be 1 to 128 letters"),
        ({"host": "http://x"}, "register.host: must be an IP address"),
        ({"host": "0.0.0.0"}, "register.host: must be an address that others can call; leave it out"),
        ({"host": "fe80::1"}, "register.host: must be an address that others can call; leave it out"),
        ({"tags": "v2"}, "register.tags: must be a list of texts"),
        ({"meta": {"a b": "c"}}, "register.meta: must be at most 64 texts"),
        ({"weight": 0.5}, "register.weight: must be a whole number"),
        ({"check": "grpc"}, "register.check: must be one of 'ttl', 'http', 'tcp'"),
        ({"ttl": 0.2}, "register.ttl: must be >= 1"),
        ({"alive": True}, "register.alive: must be a function"),
        ({"alive": bool, "check": "http"}, "register.alive: must be left out"),
        ({"check_path": "healthz"}, "register.check_path: must be a path"),
        ({"deregister_after": 5}, "register.deregister_after: must be >= 60"),
        ({"deregister_after": 1e9}, "register.deregister_after: must be <= "),
        ({"meta": {"Consul-x": "c"}}, "register.meta: must have no name that begins with 'consul-'"),
        ({"meta": {"a": "é" * 257}}, "register.meta: must be at most 64 texts of at most 512 bytes"),
        ({"at": "http://127.0.0.1:8500"}, "register.at: must begin with consul://"),
        ({"at": "consul://127.0.0.1:8500/orders"}, "register.at: must have nothing between the address and a '?'"),
        ({"at": "consul://127.0.0.1?tag=a"}, "register.at: must have no parameters but ca_file, token_file"),
        ({"at": "consul://127.0.0.1?token=s3cr3t"}, "register.at: must hold no token"),
        ({"at": 8500}, "register.at: must be a URL"),
    ],
)
def test_a_bad_argument_is_refused_at_once_and_by_its_name(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Mesh().register(**{"name": "orders", "port": 8000} | settings)
    assert str(refused.value).startswith(told)
    assert "s3cr3t" not in str(refused.value)


def test_all_faults_are_told_together() -> None:
    with pytest.raises(ConfigError) as refused:
        Mesh().register("", port=0, host="", at="")
    assert [fault.path for fault in refused.value.faults] == [
        f"register.{name}" for name in ("host", "at", "name", "port")
    ]


def test_S3_registrations_of_several_threads_share_a_control_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(control.Control):
        def __init__(self, rng: Any) -> None:
            time.sleep(0.2)
            super().__init__(rng)

    monkeypatch.setattr(control, "Control", Slow)
    mesh, together = Mesh(), threading.Barrier(3)

    def register(number: int) -> Any:
        together.wait(20)
        return mesh.register(f"orders-{number}", port=8000)._control

    with ThreadPoolExecutor(3) as threads:
        assert len(set(threads.map(register, range(3)))) == 1
