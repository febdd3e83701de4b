"""Registration on a real Consul agent (rule G1): when it begins, what keeps it, and how it ends."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from workers import (
    FASTAPI,
    FLASK,
    FORKING,
    GUNICORN,
    ON_A_LOOP,
    PLAIN,
    SERVING,
    WAITING,
    Worker,
    accepts,
    states,
    until,
)

from components.absence import demanded
from components.consul import Agent, binary
from components.process import Ports
from meshlib import Mesh
from meshlib.registry import Registration

pytestmark = pytest.mark.component

BUSY = 2.0
"""Seconds that a busy machine may add to a bar; left to itself it needs about half of each."""


@pytest.fixture(scope="session", autouse=True)
def _consul_is_there() -> None:
    demanded("Consul", binary)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CONSUL_HTTP_TOKEN", "CONSUL_HTTP_TOKEN_FILE", "CONSUL_CACERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture(scope="session")
def agent(_consul_is_there: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """One agent for all tests that share it; each has a port of its own."""
    with Agent(tmp_path_factory.mktemp("consul")) as started:
        yield started


@pytest.fixture
def frail(_consul_is_there: None, tmp_path: Path) -> Iterator[Agent]:
    """An agent that the test may harm."""
    with Agent(tmp_path) as started:
        yield started


@pytest.fixture
def port() -> Iterator[int]:
    """The application's port, which answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def quiet_port() -> Iterator[int]:
    """A port on which nobody listens yet."""
    ports = Ports("app")
    yield ports["app"]
    ports.close()


def registration(agent: Agent, port: int, **settings: Any) -> Registration:
    settings = {"port": port, "at": f"consul://{agent.address}", "ttl": 1.0, "drain": 0.0} | settings
    return Mesh().register("orders", **settings)


def is_registered(entered: Registration) -> bool:
    return entered.state == "registered"


def test_G1_registers_once_the_port_answers_and_is_passing_at_once(
    agent: Agent, quiet_port: int, no_leaks: None
) -> None:
    mesh = Mesh()
    with mesh.register(
        "orders", port=quiet_port, at=f"consul://{agent.address}", tags=["here"], weight=3, ttl=60
    ) as entered:
        time.sleep(0.5)
        assert (states(agent, quiet_port), entered.state) == ([], "waiting")
        with socket.create_server(("127.0.0.1", quiet_port)):
            until(lambda: is_registered(entered))
            assert states(agent, quiet_port) == ["passing"]
            until(lambda: agent.get("health/service/orders?passing&tag=here"))
            (found,) = agent.get("health/service/orders?passing&tag=here")
            assert found["Service"]["Weights"]["Passing"] == 3
            assert (found["Service"]["Address"], found["Node"]["Address"]) == ("", "127.0.0.1")
            assert found["Service"]["ID"] == entered.id == f"orders-{socket.gethostname()}-{quiet_port}"
    assert (states(agent, quiet_port), entered.state) == ([], "closed")
    mesh.close()


def test_G1_heartbeats_keep_it_and_what_was_forgotten_is_registered_again(agent: Agent, port: int) -> None:
    with registration(agent, port) as entered:
        until(lambda: entered.counts["heartbeats"] > 5)
        assert states(agent, port) == ["passing"]
        agent.put(f"agent/service/deregister/{entered.id}")
        assert until(lambda: states(agent, port) == ["passing"]) < 3 + BUSY
        assert entered.counts["forgotten"] == 1


def test_G1_a_registry_that_was_away_gets_it_again_and_is_spoken_of_once(
    frail: Agent, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    frail.kill()
    caplog.set_level("INFO", "meshlib.registry")
    with registration(frail, port) as entered:
        for turn in (1, 2):  # before it was ever registered, and after
            errors = entered.counts["errors"]
            until(lambda errors=errors: entered.counts["errors"] > errors + 6)
            assert entered.state == "lost"
            frail.start()
            until(lambda: is_registered(entered))
            assert states(frail, port) == ["passing"]
            said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            assert len(said) == turn
            assert "is not known to be registered" in said[-1]
            assert "no answer from" in said[-1]
            frail.kill()


def test_G1_consul_checks_by_itself_where_it_is_told_to(agent: Agent, port: int) -> None:
    with registration(agent, port, check="tcp", check_interval=1.0) as entered:
        until(lambda: is_registered(entered))
        until(lambda: agent.get("agent/checks")[f"service:{entered.id}"]["Output"].startswith("TCP connect"))
        assert states(agent, port) == ["passing"]
        until(lambda: entered.counts["heartbeats"] > 0)
        agent.put(f"agent/service/deregister/{entered.id}")
        until(lambda: entered.counts["forgotten"] == 1 and states(agent, port) == ["passing"])


def test_G1_a_function_that_does_not_say_yes_stops_the_heartbeat(agent: Agent, port: int) -> None:
    well = threading.Event()
    well.set()

    def alive() -> bool:
        if not well.is_set():
            raise SystemExit("not well")
        return True

    with registration(agent, port, alive=alive) as entered:
        until(lambda: is_registered(entered))
        well.clear()
        assert until(lambda: states(agent, port) == ["critical"]) < 3 + BUSY
        until(lambda: entered.state == "critical")
        well.set()
        assert until(lambda: states(agent, port) == ["passing"]) < 3 + BUSY


def test_G1_a_token_goes_as_a_header_from_a_file(tmp_path: Path, port: int) -> None:
    acl = {"acl": {"enabled": True, "default_policy": "deny"}}
    (tmp_path / "token").write_text("not-one-that-is-known\n")
    with Agent(tmp_path, config=acl) as guarded:
        token = guarded.put("acl/bootstrap")["SecretID"]
        at = f"consul://{guarded.address}?token_file={tmp_path / 'token'}"
        with registration(guarded, port, at=at) as entered:
            until(lambda: entered.state == "lost")
            assert "403" in entered.why
            (tmp_path / "token").write_text(token)
            until(lambda: is_registered(entered))


@pytest.mark.parametrize("program", [SERVING, FASTAPI], ids=["app", "FastAPI"])
def test_G1_uvicorn_listens_before_it_is_registered_and_until_it_is_deregistered(
    program: str, agent: Agent, quiet_port: int, tmp_path: Path
) -> None:
    with Worker(tmp_path, program, agent, quiet_port, DRAIN="0.8") as worker:
        until(lambda: "is registered at" in worker.output)
        assert worker.output.index("Uvicorn running") < worker.output.index("is registered at")
        worker.signal(signal.SIGTERM)
        begun = time.monotonic()
        until(lambda: not states(agent, quiet_port))
        assert accepts(quiet_port)
        assert "Shutting down" not in worker.output
        worker.wait()
        assert time.monotonic() - begun < 3 + BUSY
        assert worker.output.index("is deregistered") < worker.output.index("Shutting down")
        assert "Finished server process" in worker.output


def test_G1_uvicorn_on_uvloop_hears_of_it_as_well(agent: Agent, quiet_port: int, tmp_path: Path) -> None:
    with Worker(tmp_path, SERVING, agent, quiet_port, LOOP="uvloop") as worker:
        until(lambda: states(agent, quiet_port) == ["passing"])
        worker.signal(signal.SIGINT)
        assert worker.wait() < 3 + BUSY
        assert worker.output.index("is deregistered") < worker.output.index("Shutting down")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_G1_the_handlers_of_a_loop_hear_of_it_when_it_is_deregistered(
    loop: str, agent: Agent, port: int, tmp_path: Path
) -> None:
    with Worker(tmp_path, ON_A_LOOP, agent, port, LOOP=loop) as worker:
        until(lambda: worker.output.count("is registered at") == 2)
        worker.signal(signal.SIGTERM)
        worker.wait()
        assert worker.output.rindex("is deregistered") < worker.output.index("told")
        assert (states(agent, port), worker.popen.returncode) == ([], 0)


@pytest.mark.parametrize("app", [PLAIN, FLASK], ids=["app", "Flask"])
@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_G1_gunicorn_s_workers_have_one_registration_and_the_last_one_takes_it_back(
    kind: str, app: str, agent: Agent, quiet_port: int, tmp_path: Path
) -> None:
    with Worker(tmp_path, app + GUNICORN, agent, quiet_port, KIND=kind) as worker:
        until(lambda: "by another worker" in worker.output and "is registered at" in worker.output)
        assert states(agent, quiet_port) == ["passing"]
        worker.signal(signal.SIGTERM)
        until(lambda: not states(agent, quiet_port))
        assert accepts(quiet_port)
        assert worker.wait() < 3 + BUSY
        assert worker.output.count("is left to another worker") == worker.output.count("is deregistered") == 1


def test_G1_a_forked_child_neither_registers_nor_holds_its_parent_s_part(
    agent: Agent, port: int, tmp_path: Path
) -> None:
    with Worker(tmp_path, FORKING, agent, port) as worker:
        until(lambda: "forked" in worker.output)
        worker.signal(signal.SIGKILL)
        until(lambda: states(agent, port) == ["critical"])
        with Worker(tmp_path, WAITING, agent, port) as other:
            until(lambda: "is registered at" in other.output)
            assert "by another worker" not in other.output
            assert states(agent, port) == ["passing"]


def test_G1_a_blocked_event_loop_turns_it_critical_and_it_recovers(
    agent: Agent, quiet_port: int, tmp_path: Path
) -> None:
    with Worker(tmp_path, SERVING, agent, quiet_port) as worker:
        until(lambda: states(agent, quiet_port) == ["passing"])
        with socket.create_connection(("127.0.0.1", quiet_port)) as connection:
            connection.sendall(b"GET /block HTTP/1.1\r\nhost: a\r\n\r\n")
            until(lambda: states(agent, quiet_port) == ["critical"], within=4)
            connection.recv(1000)
            assert until(lambda: states(agent, quiet_port) == ["passing"]) < 2 + BUSY
        assert "has not answered for 1 s" in worker.output


def test_G1_one_worker_of_a_host_owns_it_and_another_takes_over(agent: Agent, port: int, tmp_path: Path) -> None:
    with Worker(tmp_path, WAITING, agent, port) as first:
        until(lambda: "is registered at" in first.output)
        with Worker(tmp_path, WAITING, agent, port) as second:
            until(lambda: "by another worker" in second.output)
            first.signal(signal.SIGKILL)
            until(lambda: "is registered at" in second.output)
            time.sleep(1.5)
            assert states(agent, port) == ["passing"]
            with Worker(tmp_path, WAITING, agent, port) as third:
                until(lambda: "by another worker" in third.output)
                second.signal(signal.SIGTERM)
                second.wait()
                assert "is left to another worker" in second.output
                until(lambda: "is registered at" in third.output)
                assert states(agent, port) == ["passing"]
                third.signal(signal.SIGTERM)
                assert third.wait() < 2 + BUSY
                assert states(agent, port) == []
                assert third.popen.returncode == -signal.SIGTERM


def test_G1_a_worker_that_does_not_answer_leaves_it_to_one_that_does(agent: Agent, port: int, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    with Worker(tmp_path, WAITING, agent, port, SICK=str(sick)) as first:
        until(lambda: "is registered at" in first.output)
        with Worker(tmp_path, WAITING, agent, port) as second:
            until(lambda: "by another worker" in second.output)
            sick.touch()
            until(lambda: "is registered at" in second.output)
            assert states(agent, port) == ["passing"]
            sick.unlink()
            until(lambda: "by another worker" in first.output)


def test_G1_who_is_killed_is_critical_within_the_ttl_and_a_second(agent: Agent, port: int, tmp_path: Path) -> None:
    with Worker(tmp_path, WAITING, agent, port) as worker:
        until(lambda: states(agent, port) == ["passing"])
        worker.signal(signal.SIGKILL)
        assert until(lambda: states(agent, port) == ["critical"]) < 2 + BUSY


@pytest.mark.parametrize("end", ["signal", "exit"])
def test_G1_a_registry_that_hangs_holds_the_exit_up_for_two_seconds_at_most(
    end: str, frail: Agent, port: int, tmp_path: Path
) -> None:
    program = WAITING if end == "signal" else "register().start()\nsys.stdin.read()\n"
    with Worker(tmp_path, program, frail, port) as worker:
        until(lambda: "is registered at" in worker.output)
        frail.signal(signal.SIGSTOP)
        try:
            worker.signal(signal.SIGTERM) if end == "signal" else worker.popen.stdin.close()
            assert worker.wait() < 2.5 + BUSY
        finally:
            frail.signal(signal.SIGCONT)
        assert "could not be deregistered" in worker.output
