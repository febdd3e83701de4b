"""`reload=True`: the mesh follows its file, and keeps what it has when the file cannot be used."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshlib import Mesh, UnknownService, report
from meshlib.config import reload
from meshlib.testing import Upstream
from waiting import until

LONG = 20.0

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.once]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "EVERY", 0.02)


def text(*addresses: str, more: str = "") -> str:
    return f"[services.orders]\nresolver = {list(addresses)}\n{more}"


def replace(file: Path, content: str) -> None:
    """As editors do it."""
    fresh = file.with_suffix(".new")
    fresh.write_text(content)
    fresh.rename(file)


def swap(file: Path, content: str) -> None:
    """As Kubernetes does it with a mounted ConfigMap: the folder behind a link is another one."""
    folder = file.parent / f"..{time.monotonic_ns()}"
    folder.mkdir()
    (folder / file.name).write_text(content)
    (file.parent / "..tmp").symlink_to(folder.name)
    (file.parent / "..tmp").rename(file.parent / "..data")
    if not file.is_symlink():
        file.unlink(missing_ok=True)
        file.symlink_to(Path("..data", file.name))


def warnings_of(mesh: Mesh) -> str:
    return "; ".join(mesh.snapshot()["orders"].warnings)


def total(mesh: Mesh) -> float:
    return mesh._clusters["orders"].service.timeout.total


@pytest.mark.parametrize("write", [Path.write_text, replace, swap])
def test_a_change_is_taken_over_and_nodes_stay(
    tmp_path: Path, fleet: list[Upstream], write: Callable[[Path, str], Any]
) -> None:
    first, second, _ = fleet
    file = tmp_path / "mesh.toml"
    write(file, text(first.address))
    with Mesh.from_toml(file, reload=True) as mesh, mesh.client("orders") as client:
        client.get("/")
        (node,) = mesh._clusters["orders"].view.nodes
        for number in (11, 12):
            write(file, text(first.address, second.address, more=f"timeout.total = {number}"))
            until(lambda: total(mesh) == number)  # noqa: B023
        assert mesh._clusters["orders"].view.nodes[0] is node
        until(lambda: report(client.get("/")).attempts[-1].endpoint.port == second.port)
        assert warnings_of(mesh) == ""


def test_a_broken_file_changes_nothing_and_is_told_once(
    tmp_path: Path, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text(upstream.address))
    with Mesh.from_toml(file, reload=True) as mesh, mesh.client("orders") as client:
        client.get("/")
        before = mesh._clusters["orders"].service
        replace(file, text("nonsense", more="retry.max_attempts = 0\n[services.users]\nresolver=['10.0.0.1:80']"))
        until(lambda: "is not taken over" in warnings_of(mesh))
        assert "services.orders.retry.max_attempts: must be >= 1, got 0" in warnings_of(mesh)
        assert "services.orders.resolver[0]" in warnings_of(mesh)
        os.utime(file)
        time.sleep(0.2)
        told = [each for each in caplog.records if each.name == "meshlib.config"]
        assert [each.levelno for each in told] == [logging.WARNING]
        assert "must be >= 1, got 0" in told[0].getMessage()
        assert mesh._clusters["orders"].service is before
        with pytest.raises(UnknownService):
            client.get("http://users/")
        assert client.get("/").status_code == 200
        replace(file, text(upstream.address))
        until(lambda: warnings_of(mesh) == "")


def test_a_file_that_goes_is_told_and_taken_over_when_it_is_back(tmp_path: Path, upstream: Upstream) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text(upstream.address))
    with Mesh.from_toml(file, reload=True) as mesh:
        mesh.wait_ready(LONG)
        file.unlink()
        until(lambda: "No such file" in warnings_of(mesh))
        file.write_text(text(upstream.address))
        until(lambda: warnings_of(mesh) == "")


def test_a_file_whose_certificate_was_missing_is_taken_over_when_it_is_touched(
    tmp_path: Path, upstream: Upstream, certificates: tuple[str, str]
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text(upstream.address))
    with Mesh.from_toml(file, reload=True) as mesh:
        mesh.wait_ready(LONG)
        mesh._upkeep._controlled().ensure()
        replace(file, text(upstream.address, more="tls.verify = 'ca.pem'"))
        until(lambda: "tls.verify" in warnings_of(mesh))
        shutil.copy(certificates[0], tmp_path / "ca.pem")
        os.utime(file)
        until(lambda: warnings_of(mesh) == "")
        assert mesh._clusters["orders"].service.tls is not None


def test_a_service_that_goes_can_be_called_and_one_that_comes_as_well(tmp_path: Path, upstream: Upstream) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text(upstream.address))
    users = text(upstream.address).replace("orders", "users")
    with Mesh.from_toml(file, reload=True) as mesh, mesh.client() as client:
        client.get("http://orders/")
        replace(file, f"mesh.zone = 'b'\n{users}")
        until(lambda: "services.orders is gone from it" in warnings_of(mesh))
        assert "mesh.zone takes effect at the next start" in warnings_of(mesh)
        assert client.get("http://orders/").status_code == 200
        assert client.get("http://users/").status_code == 200


def test_what_changes_before_the_first_use_is_taken_over_by_it(tmp_path: Path, upstream: Upstream) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text(upstream.address))
    with Mesh.from_toml(file, reload=True) as mesh, mesh.client("orders") as client:
        replace(file, text(upstream.address, more="timeout.total = 3"))
        time.sleep(0.1)
        assert total(mesh) == 30.0  # nothing runs that nobody uses
        client.get("/")
        until(lambda: total(mesh) == 3)


def test_half_a_file_is_not_taken_for_the_whole(tmp_path: Path, upstream: Upstream) -> None:
    """Somebody writes in place, slowly."""
    file = tmp_path / "mesh.toml"
    file.write_text(text(upstream.address, more="timeout.total = 5"))
    totals = set()
    with Mesh.from_toml(file, reload=True) as mesh:
        following = mesh._upkeep.reload
        assert following is not None
        whole = text(upstream.address, more="timeout.total = 5\nretry.max_attempts = 2")
        with file.open("w") as out:
            for letter in whole:
                out.write(letter)
                out.flush()
                following.look()
                totals.add(total(mesh))
        for _ in range(3):
            following.look()
        assert totals == {5.0}
        assert mesh._clusters["orders"].service.retry.max_attempts == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_S3_a_forked_child_follows_the_file_on_its_own(tmp_path: Path, upstream: Upstream) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text(upstream.address))
    with Mesh.from_toml(file, reload=True) as mesh, mesh.client("orders") as client:
        client.get("/")
        child = os.fork()
        if not child:
            status = 1
            try:
                client.get("/")
                until(lambda: total(mesh) == 3)
                status = 0
            finally:
                os._exit(status)
        replace(file, text(upstream.address, more="timeout.total = 3"))
        assert os.waitpid(child, 0)[1] == 0


def test_a_mesh_that_nobody_holds_goes_with_its_thread(tmp_path: Path, upstream: Upstream) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text(upstream.address))
    mesh = Mesh.from_toml(file, reload=True)
    mesh.wait_ready(LONG)
    gone = weakref.ref(mesh)
    del mesh
    gc.collect()
    until(lambda: gone() is None)


def test_the_file_of_the_environment_is_followed_under_it(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text(upstream.address))
    monkeypatch.setenv("MESHLIB_CONFIG", str(file))
    monkeypatch.setenv("MESHLIB_SERVICES__ORDERS__TIMEOUT__TOTAL", "9")
    with Mesh.from_env(reload=True) as mesh:
        mesh.wait_ready(LONG)
        replace(file, text(upstream.address, more="timeout = {total = 3, attempt = 2}"))
        until(lambda: mesh._clusters["orders"].service.timeout.attempt == 2)
        assert total(mesh) == 9
