"""Signals that wait for the registry, with a registry of the test's own."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from meshlib import Mesh
from meshlib.registry.departure import Departure

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals cannot be sent again"),
]


class Scene:
    """What the program hears, and what the registry was asked."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.asked: list[Callable[[], None]] = []
        self.has_something = True
        self.departure = Departure(self._leave, lambda: None)

    def _leave(self, then: Callable[[], None]) -> bool:
        if self.has_something:
            self.asked.append(then)
        return self.has_something

    def hear(self, number: int, frame: Any) -> None:
        self.heard.append(number)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, made.hear)
    made.departure.hook()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def test_G1_a_signal_is_heard_when_the_registry_has_answered_and_once(scene: Scene) -> None:
    signal.raise_signal(signal.SIGTERM)
    assert (len(scene.asked), scene.heard) == (1, [])
    threading.Thread(target=scene.asked[0]).start()
    while not scene.heard:
        pass
    assert scene.heard == [signal.SIGTERM]


def test_G1_a_second_signal_is_not_held_up(scene: Scene) -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert scene.heard == [signal.SIGTERM]
    scene.asked[0]()
    assert scene.heard == [signal.SIGTERM]


def test_G1_where_there_is_nothing_to_take_back_a_signal_is_heard_at_once(scene: Scene) -> None:
    scene.has_something = False
    signal.raise_signal(signal.SIGINT)
    assert scene.heard == [signal.SIGINT]


def test_the_handlers_of_before_are_put_back_and_those_of_others_left(scene: Scene) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    scene.departure.unhook()
    assert signal.getsignal(signal.SIGTERM) == scene.hear
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_several_registrations_are_left_one_after_the_other(scene: Scene) -> None:
    second = Scene()
    second.departure.hook()
    signal.raise_signal(signal.SIGTERM)
    assert (len(second.asked), len(scene.asked)) == (1, 0)
    second.has_something = False
    second.asked[0]()
    assert (len(scene.asked), scene.heard) == (1, [])
    scene.has_something = False
    scene.asked[0]()
    assert scene.heard == [signal.SIGTERM]
    second.departure.unhook()


def test_G1_a_loop_hears_of_a_signal_once() -> None:
    heard: list[int] = []

    async def serve() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, heard.append, signal.SIGTERM)
        scene = Scene()
        departure = Departure(scene._leave, lambda: scene.asked[0]())  # the registry answers while it is waited for
        departure.hook()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        departure.unhook()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    asyncio.run(serve())
    signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_signals_that_are_ignored_stay_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    departure = Scene().departure
    try:
        departure.hook()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        departure.unhook()
        signal.signal(signal.SIGTERM, before)


def test_G1_one_that_begins_again_over_another_passes_signals_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    one, two = (Mesh().register(name, port=1) for name in ("one", "two"))
    try:
        one.start()
        two.start()
        one.close()  # whose handler stays below that of the other
        one.start()
        signal.raise_signal(signal.SIGTERM)
        until = time.monotonic() + 20
        while not heard and time.monotonic() < until:
            time.sleep(0.01)
        assert heard == [signal.SIGTERM]
        assert one.state == two.state == "closed"
    finally:
        one.close()
        two.close()
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_G1_a_block_that_is_cancelled_waits_for_the_end_as_well(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    registration = Mesh().register("orders", port=1)
    stays: list[Any] = []

    async def serve() -> None:
        with anyio.CancelScope() as scope:
            async with registration:
                stays.append(registration._stay)
                scope.cancel()

    before = signal.getsignal(signal.SIGTERM)
    anyio.run(serve, backend=backend)
    assert stays[0].left.is_set()
    assert registration.state == "closed"
    assert signal.getsignal(signal.SIGTERM) == before
