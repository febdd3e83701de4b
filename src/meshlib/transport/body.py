"""Request bodies: what may be sent again, and how.

Decides, for rule C3, whether the body of a request can be sent whole once more. Bytes always can. Anything else is
pulled through a recording: as long as what was pulled fits the limit it is kept, and a second sending plays the record
and then pulls on from where the first one stopped. Beyond the limit the record is thrown away and the body goes once.
So a retry never carries an empty or cut body. It never reads ahead of the connection.

Also decides whose time it is while the caller's source makes a sending wait: the caller's. The source is bounded by the
call's deadline and not by the attempt's, and what it takes is not on the endpoint's account. An async source is
cancelled at the deadline. A sync one cannot be interrupted: it ends the call when it comes back too late.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpcore
import httpx

from meshlib.transport.network import Bounded, Clock
from meshlib.transport.waits import within

_END: Any = object()
"""What a source gives that has no more; a caller's might give None by mistake, which is no end."""


class Stalled(httpcore.WriteTimeout):
    """The caller's source did not go on in time."""

    def __init__(self) -> None:
        super().__init__("the source of the body did not go on")


class SourceFailed(Exception):
    """Stands for an exception of the caller's source that would be taken for the connection's."""


class Bytes(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that is all here.

    httpx's own is a generator, and one that is left half-way, because the connection broke, is cleaned up by the event
    loop at some later time, which trio complains about.

    Args:
        content: all of it.
    """

    is_resendable = True
    error = None
    waited = 0.0
    bounds: Bounded | None = None

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __iter__(self) -> Iterator[bytes]:
        return iter((self.content,))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Once(self.content)


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
        clock: the mesh's.
        deadline: see below.

    Attributes:
        deadline: when the source is given up: the call's deadline, over an inner transport the attempt's.
        error: what the source raised, or that it has not gone on, if so: the caller's own.
        bounds: what bounds the attempt that is sending; it is put off by the time that the source takes.
        waited: seconds that the source took, of those nobody has accounted for.
    """

    content = None

    def __init__(self, limit: float, clock: Clock, deadline: float) -> None:
        self.error: Exception | None = None
        self.bounds: Bounded | None = None
        self.waited = 0.0
        self._clock = clock
        self.deadline = deadline
        self._room = limit
        self._record: list[bytes] = []

    @property
    def is_resendable(self) -> bool:
        """Whether iterating again gives the whole body."""
        return self._room >= 0 and self.error is None

    def _broke(self, error: Exception) -> Exception:
        """The source raised, so there is no second half to play on with. Returns what is to be raised."""
        self.error = error
        # A server may answer before it has the whole body: whoever sends goes on to read when it sees this one.
        return SourceFailed() if isinstance(error, httpcore.WriteError) else error

    def _went_on(self, began: float) -> None:
        """The source was asked at `began` and has answered."""
        now = self._clock()
        if now >= self.deadline:
            self.error = Stalled()
            raise self.error
        self.waited += now - began
        if self.bounds is not None:
            self.bounds.deadline = min(self.bounds.deadline + now - began, self.deadline)

    def _keep(self, chunk: bytes) -> bytes:
        self._room -= len(chunk)
        if self._room < 0:
            self._record.clear()
        else:
            self._record.append(chunk)
        return chunk


class RecordedBody(Recording, httpx.SyncByteStream):
    """A body for a sync client.

    Args:
        source: what httpx made of the caller's body.
        limit, clock, deadline: see `Recording`.
    """

    def __init__(self, source: httpx.SyncByteStream, limit: float, clock: Clock, deadline: float) -> None:
        super().__init__(limit, clock, deadline)
        self._rest = iter(source)

    def __iter__(self) -> Iterator[bytes]:
        yield from tuple(self._record)
        while True:
            began = self._clock()
            try:
                chunk = next(self._rest, _END)
            except Exception as error:  # the caller's own
                raise self._broke(error)  # noqa: B904
            self._went_on(began)
            if chunk is _END:
                return
            yield self._keep(chunk)


class AsyncRecordedBody(Recording, httpx.AsyncByteStream):
    """A body for an async client; see `RecordedBody`."""

    def __init__(self, source: httpx.AsyncByteStream, limit: float, clock: Clock, deadline: float) -> None:
        super().__init__(limit, clock, deadline)
        self._rest = aiter(source)
        self._sending: Sending | None = None

    def __aiter__(self) -> Sending:
        self._sending = Sending(self, tuple(self._record))
        return self._sending

    async def pull(self, sending: Sending) -> Any:
        """The source's next chunk, or `_END`; only for the latest sending."""
        if sending is not self._sending or self.error is not None:
            raise self.error or SourceFailed()  # an inner transport's attempt that was left alone has not ended yet
        began = self._clock()
        self.error = Stalled()  # until it has gone on: a source that is cancelled meanwhile never will
        try:
            chunk = await within(self.deadline - began, self._next())
        except TimeoutError:
            raise self.error  # noqa: B904  # which is the source's own TimeoutError, if it was that
        self.error = None
        self._went_on(began)
        return chunk if chunk is _END else self._keep(chunk)

    async def _next(self) -> Any:
        try:
            return await anext(self._rest, _END)
        except Exception as error:  # the caller's own
            raise self._broke(error)  # noqa: B904


class Sending(AsyncIterator[bytes]):
    """One pass over a body: the record, and then what the source has beyond it.

    Not a generator: one that is left half-way is cleaned up by the event loop at some later time.
    """

    def __init__(self, body: AsyncRecordedBody, record: tuple[bytes, ...]) -> None:
        self._body = body
        self._record = iter(record)

    async def __anext__(self) -> bytes:
        chunk = next(self._record, None)
        if chunk is None:
            chunk = await self._body.pull(self)
        if chunk is _END:
            raise StopAsyncIteration
        return chunk
