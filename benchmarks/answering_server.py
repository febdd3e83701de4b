"""The upstream of the benchmarks: a program that answers every GET with the same small JSON, as cheaply as it can.

Decides nothing by what it is asked. It is a process of its own, so that none of its time is counted, and it listens on
the loopback alone. It keeps no log and plays no faults: `meshlib.testing.upstreams` does, and pays for it per request.

Usage: answering_server.py COUNT. Listens on COUNT free ports, prints them as a JSON list, and ends with its stdin.
"""

import asyncio
import contextlib
import json
import sys

END = b"\r\n\r\n"
BODY = b'{"id": "5", "state": "paid", "items": [{"sku": "a-1", "count": 2}], "total": 1290}'
ANSWER = b"HTTP/1.1 200 OK\r\nserver: bench\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
ANSWER = ANSWER % (len(BODY), BODY)


class Answering(asyncio.Protocol):
    """One connection. Requests have no body, so each ends with its headers."""

    def connection_made(self, transport):
        self._transport = transport
        self._rest = b""

    def data_received(self, data):
        *requests, self._rest = (self._rest + data).split(END)
        self._transport.write(ANSWER * len(requests))


async def serve(count):
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        ports = []
        for _ in range(count):
            server = await loop.create_server(Answering, "127.0.0.1", 0, backlog=1024)
            stack.callback(server.close)
            ports.append(server.sockets[0].getsockname()[1])
        print(json.dumps(ports), flush=True)
        loop.add_reader(sys.stdin, over.set)
        await over.wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
