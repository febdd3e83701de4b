"""Request bodies: what may be sent again, and how.

Decides, for rule C3, whether the body of a request can be sent whole once more. Bytes always can. Anything else is
pulled through a recording: as long as what was pulled fits the limit it is kept, and a second sending plays the record
and then pulls on from where the first one stopped. Beyond the limit the record is thrown away and the body goes once.
So a retry never carries an empty or cut body. It never reads ahead of the connection.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx


class Bytes(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that is all here.

    httpx's own is a generator, and one that is left half-way, because the connection broke, is cleaned up by the event
    loop at some later time, which trio complains about.

    Args:
        content: all of it.
    """

    is_resendable = True
    error = None

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __iter__(self) -> Iterator[bytes]:
        return iter((self._content,))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Once(self._content)


class _Once(AsyncIterator[bytes]):
    def __init__(self, content: bytes) -> None:
        self._rest = [content]

    async def __anext__(self) -> bytes:
        if not self._rest:
            raise StopAsyncIteration
        return self._rest.pop()


class Recording:
    """What the recordings of both colours share.

    Args:
        limit: bytes kept.

    Attributes:
        is_resendable: whether iterating again gives the whole body.
        error: what the source raised, if it did: the caller's own.
    """

    def __init__(self, limit: int) -> None:
        self.is_resendable = True
        self.error: BaseException | None = None
        self._room = limit
        self._record: list[bytes] = []

    def _broke(self, error: BaseException) -> None:
        """The source raised, or was closed under way: there is no second half to play on with."""
        self.error = error
        self.is_resendable = False
        self._record.clear()

    def _keep(self, chunk: bytes) -> None:
        self._room -= len(chunk)
        if self._room < 0:
            self.is_resendable = False
            self._record.clear()
        elif self.is_resendable:
            self._record.append(chunk)


class RecordedBody(Recording, httpx.SyncByteStream):
    """A body for a sync client.

    Args:
        source: what httpx made of the caller's body.
        limit: bytes kept.
    """

    def __init__(self, source: httpx.SyncByteStream, limit: int) -> None:
        super().__init__(limit)
        self._rest = iter(source)

    def __iter__(self) -> Iterator[bytes]:
        yield from tuple(self._record)
        while True:
            try:
                chunk = next(self._rest)
            except StopIteration:
                return
            except BaseException as error:
                self._broke(error)
                raise
            self._keep(chunk)
            yield chunk


class AsyncRecordedBody(Recording, httpx.AsyncByteStream):
    """A body for an async client; see `RecordedBody`."""

    def __init__(self, source: httpx.AsyncByteStream, limit: int) -> None:
        super().__init__(limit)
        self._rest = aiter(source)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in tuple(self._record):
            yield chunk
        while True:
            try:
                chunk = await anext(self._rest)
            except StopAsyncIteration:
                return
            except BaseException as error:
                self._broke(error)
                raise
            self._keep(chunk)
            yield chunk
