"""What a peer has sent and nobody has used yet.

Decides how much may wait for its end, and copies as little as can be. It knows nothing of what the bytes mean.
"""

from __future__ import annotations

import re

from meshlib.transport.head import LONGEST_HEAD, Malformed


class Received:
    """A buffer that is filled by reads and emptied from its front.

    Attributes:
        is_over: whether the peer has closed.
    """

    __slots__ = ("_data", "_seen", "_start", "is_over")

    def __init__(self) -> None:
        self._data: bytes | bytearray = b""
        self._start = 0
        self._seen = 0  # bytes from the start in which `until` has found no end
        self.is_over = False

    def __bool__(self) -> bool:
        return self._start < len(self._data)

    def feed(self, data: bytes) -> None:
        """Take what was read; nothing means that the peer has closed."""
        if not data:
            self.is_over = True
        elif self._start == len(self._data):
            self._data, self._start = data, 0
        else:
            if self._start or not isinstance(self._data, bytearray):
                self._data, self._start = bytearray(memoryview(self._data)[self._start :]), 0
            self._data += data

    def until(self, end: re.Pattern[bytes]) -> bytes | None:
        """Take all up to and with the first match of `end`, of three bytes at most; None if it has not come yet.

        Raises:
            Malformed: if it is too far away, or will never come.
        """
        found = end.search(self._data, self._start + self._seen)
        stop = found.end() if found else len(self._data)
        if stop - self._start > LONGEST_HEAD:
            raise Malformed(f"more than {LONGEST_HEAD} bytes without an end")
        if found:
            return self._take(stop)
        if self.is_over:
            raise Malformed("peer unexpectedly closed connection")
        self._seen = max(0, stop - self._start - 2)
        return None

    def most(self, count: int) -> bytes:
        """Take up to so many bytes; none if there are none."""
        return self._take(min(self._start + count, len(self._data)))

    def peek(self, count: int) -> bytes:
        """The next bytes, up to so many, which stay."""
        return bytes(self._data[self._start : self._start + count])

    def back(self, count: int) -> None:
        """Put back what `until` took last."""
        self._start -= count

    def _take(self, stop: int) -> bytes:
        start, self._start, self._seen = self._start, stop, 0
        return bytes(self._data[start:stop])  # which, for all of a `bytes`, copies nothing
