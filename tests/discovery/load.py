"""What the tests under load share: who calls a hundred times a second, and thirty addresses that answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence

import httpx

from meshlib import Mesh, report

EVERY = 0.01


class Load:
    """GETs at 100 per second from a thread, for as long as it is open.

    Attributes:
        failed: what failed, in words.
        answered: calls by the place that answered.
        last: when each place answered last.
    """

    def __init__(self, mesh: Mesh, service: str = "orders") -> None:
        self.failed: list[str] = []
        self.answered: Counter[str] = Counter()
        self.last: dict[str, float] = {}
        self._client = mesh.client(service)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def wait_for(self, *places: str, seconds: float = 5.0) -> float:
        """Wait until each of these has answered a call made from now on; returns the seconds it took."""
        began = time.monotonic()
        while not all(self.last.get(place, 0) > began for place in places):
            assert time.monotonic() < began + seconds, f"{places} do not answer, but {self.last}"
            time.sleep(0.005)
        return time.monotonic() - began

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            self._call()
            due = max(due + EVERY, time.monotonic() - 1)
            time.sleep(max(0.0, due - time.monotonic()))

    def _call(self) -> None:
        try:
            response = self._client.get("/")
        except httpx.TransportError as error:
            self.failed.append(repr(error))
            return
        if response.status_code != 200:
            self.failed.append(str(response.status_code))
        place = str(report(response).attempts[-1].endpoint)
        self.answered[place] += 1
        self.last[place] = time.monotonic()


class Answering:
    """Answers 200 on these addresses of this machine, all with one port."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0

    def close(self, addresses: Sequence[str]) -> None:
        """Listen no longer on these, and hang up on whoever is connected to them."""
        asyncio.run_coroutine_threadsafe(self._close(addresses), self._loop).result(10)

    def __enter__(self) -> Answering:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        self._writers: dict[str, set[asyncio.StreamWriter]] = {address: set() for address in self._addresses}
        self._servers: dict[str, asyncio.Server] = {}
        for address in self._addresses:
            server = await asyncio.start_server(self._answer, address, self.port)
            self.port = server.sockets[0].getsockname()[1]
            self._servers[address] = server
        self._started.set()
        await self._over.wait()
        await self._close(list(self._servers))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = self._writers[writer.get_extra_info("sockname")[0]]
        mine.add(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client hung up
        finally:
            mine.discard(writer)
            writer.close()

    async def _close(self, addresses: Sequence[str]) -> None:
        for address in addresses:
            self._servers.pop(address).close()
            for writer in list(self._writers[address]):
                writer.transport.abort()
        await asyncio.sleep(0.05)
