"""Whom the registration asks whether the application is alive."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from meshlib.consul import ConsulError
from meshlib.registry import Entry
from meshlib.registry.liveness import Liveness
from meshlib.registry.stay import means_forgotten

pytestmark = pytest.mark.once

ENTRY = Entry("orders", port=1)


@pytest.fixture
def entry() -> Iterator[Entry]:
    """Of an application whose port answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield Entry("orders", port=listening.getsockname()[1])


@pytest.fixture
def loop(no_leaks: None) -> Iterator[asyncio.AbstractEventLoop]:
    """The application's, in a thread of its own."""
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    if not made.is_closed():
        made.call_soon_threadsafe(made.stop)
        thread.join()
        made.close()


def ask(liveness: Liveness, within: float = 10.0) -> bool | None:
    """The answer, or None if there is none within the time."""

    async def main() -> bool | None:
        try:
            async with asyncio.timeout(within):
                return await liveness.is_well()
        except TimeoutError:
            return None

    return asyncio.run(main())


def test_G1_a_loop_that_turns_is_well_and_one_that_is_blocked_does_not_answer(loop: Any) -> None:
    assert ask(Liveness(ENTRY, loop, None)) is True
    blocked = threading.Event()
    loop.call_soon_threadsafe(blocked.wait)
    assert ask(Liveness(ENTRY, loop, None), within=0.3) is None
    blocked.set()
    assert ask(Liveness(ENTRY, loop, None)) is True


def test_G1_a_loop_that_has_ended_is_not_well() -> None:
    ended = asyncio.new_event_loop()
    ended.close()

    async def well() -> bool:
        return True

    assert ask(Liveness(ENTRY, ended, None)) is False
    assert ask(Liveness(ENTRY, ended, well)) is False


@pytest.mark.parametrize("answer", [True, False])
def test_G1_a_function_is_asked_beside_the_loop_and_an_async_one_on_it(loop: Any, entry: Entry, answer: bool) -> None:
    ran_on: list[object] = []

    async def on_the_loop() -> bool:
        ran_on.append(asyncio.get_running_loop())
        return answer

    assert ask(Liveness(ENTRY, loop, on_the_loop)) is answer
    assert ran_on == [loop]
    assert ask(Liveness(ENTRY, loop, lambda: answer)) is answer
    assert ask(Liveness(entry, None, on_the_loop)) is answer


def test_G1_a_function_that_blocks_does_not_block_the_control_plane(entry: Entry) -> None:
    release = threading.Event()
    begun = time.monotonic()

    async def main() -> None:
        from meshlib.control import _Aside

        asyncio.get_running_loop().set_default_executor(_Aside())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await Liveness(entry, None, lambda: release.wait(20)).is_well()
        release.set()

    asyncio.run(main())
    assert time.monotonic() - begun < 10


def test_G1_where_there_is_no_loop_the_port_is_asked(entry: Entry) -> None:
    assert ask(Liveness(entry, None, None)) is True
    assert ask(Liveness(ENTRY, None, None)) is False
    assert ask(Liveness(ENTRY, None, lambda: True)) is False


@pytest.mark.parametrize(
    ("error", "is_forgotten"),
    [
        (ConsulError('Consul answered 500: CheckID "service:a" does not have associated TTL', 500), True),
        (ConsulError('Consul answered 404: Unknown check ID "service:a".', 404), True),
        (ConsulError("Consul answered 500: No cluster leader", 500), False),
        (ConsulError("Consul answered 403: Permission denied", 403), False),
        (ConsulError("no answer"), False),
    ],
)
def test_G1_only_what_consul_says_it_does_not_know_is_forgotten(error: ConsulError, is_forgotten: bool) -> None:
    assert means_forgotten(error) is is_forgotten
