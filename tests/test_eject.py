"""`mesh.eject` and `mesh.restore`: endpoints taken out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import Colour
from meshes import mesh_of
from meshlib import Breaker, Endpoint, RoundRobin, UnknownService, report
from meshlib.testing import Upstream

PLACES = ["10.0.0.1:80", "10.0.0.2:80"]


@pytest.mark.parametrize("place", [PLACES[0], ("10.0.0.1", 80), Endpoint("10.0.0.1", 80, weight=3)], ids=repr)
def test_an_endpoint_is_named_as_text_as_a_place_or_as_itself(place: Any) -> None:
    mesh = mesh_of(*PLACES)
    mesh.eject("orders", place)
    first, second = mesh.snapshot()["orders"].nodes
    assert [(first.eligible, first.why), (second.eligible, second.why)] == [
        (False, "taken out by hand"),
        (True, "closed"),
    ]
    mesh.restore("orders", place)
    first, second = mesh.snapshot()["orders"].nodes
    assert (first.eligible, first.why, first.weight) == (True, "closed, on its ramp: 10% of its weight", 0.1)


def test_what_is_not_there_is_an_error_that_says_what_is() -> None:
    mesh = mesh_of(*PLACES)
    for act in (mesh.eject, mesh.restore):
        with pytest.raises(ValueError, match=r"orders has no endpoint 10\.0\.0\.3:80 now \(known: 10\.0\.0\.1:80, 10"):
            act("orders", "10.0.0.3:80")
        with pytest.raises(UnknownService, match="orders"):
            act("order", PLACES[0])


def test_an_ejected_endpoint_gets_no_call_and_a_restored_one_does(colour: Colour, fleet: list[Upstream]) -> None:
    mesh = mesh_of(*fleet[:2], balancer=RoundRobin(), breaker=Breaker(ramp=0))

    async def script(client: Any) -> Any:
        async def used() -> set[str]:
            return {str(report(await client.get("/")).attempts[0].endpoint) for _ in range(6)}

        both = await used()
        mesh.eject("orders", fleet[0].address)
        one = await used()
        mesh.restore("orders", fleet[0].address)
        return both, one, await used()

    every = {fleet[0].address, fleet[1].address}
    assert colour.run(mesh, script) == (every, {fleet[1].address}, every)
