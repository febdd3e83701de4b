"""Which of the workers of a host speaks for all of them.

Decides it by two lock files for each id: the worker that holds `owner` registers and sends the heartbeats; all hold
`members` together. The kernel lets go of them when a worker dies, however it dies. Who leaves and finds nobody else in
`members` is the last one, and takes the registration back; all others leave it to those who stay. It never waits for a
lock.

Law: `members` is shared by those who are there and held alone by the one that takes the registration back, so nobody
comes in between.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

logger = logging.getLogger("meshlib.registry")


class Ownership(Protocol):
    """One worker's part in it."""

    def join(self) -> bool:
        """Be one of those who are there; False while somebody takes the registration back."""
        ...

    def claim(self) -> bool:
        """Become the owner; False while another one is."""
        ...

    def give_up(self) -> None:
        """Be the owner no longer, so that another one may."""

    def leave(self) -> bool:
        """Be no longer there. True if nobody else is: then nobody can come before `close`."""
        ...

    def close(self) -> None:
        """Let go of everything. In a forked child, this leaves the parent what it has."""


def ownership_of(key: str) -> Ownership:
    """What is owned by the same key in all workers of this user on this host."""
    try:
        return Shared(key)
    except (OSError, ImportError) as error:
        logger.warning("no lock files can be had (%s), so each worker registers for itself", error)
        return Alone()


class Shared:
    """Among those who use the same lock files.

    Raises:
        OSError: if there is no place for them that is ours alone.
        ImportError: if the system does not know such locks.
    """

    def __init__(self, key: str) -> None:
        import fcntl

        self._flock, self._one, self._many, self._none = fcntl.flock, fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN
        self._at_once = fcntl.LOCK_NB
        # The key may be longer than a file's name.
        stem = f"{quote(key, safe='')[:100]}-{sha256(key.encode()).hexdigest()[:16]}"
        folder = _folder()
        self._members = _opened(folder / f"{stem}.members")
        try:
            self._owner = _opened(folder / f"{stem}.owner")
        except BaseException:
            os.close(self._members)
            raise

    def join(self) -> bool:
        """See `Ownership`, here and below."""
        return self._take(self._members, self._many)

    def claim(self) -> bool:
        return self._take(self._owner, self._one)

    def give_up(self) -> None:
        self._flock(self._owner, self._none)

    def leave(self) -> bool:
        self.give_up()
        return self._take(self._members, self._one)

    def close(self) -> None:
        # Not unlocked: a child shares the lock with its parent, and it is held until every copy is closed.
        for descriptor in (self._owner, self._members):
            if descriptor >= 0:
                os.close(descriptor)
        self._owner = self._members = -1

    def _take(self, descriptor: int, how: int) -> bool:
        """Hold a lock, maybe otherwise than before; False if others are in the way, and then it is not held at all."""
        try:
            self._flock(descriptor, how | self._at_once)
        except BlockingIOError:
            return False
        return True


class Alone:
    """Where there are no locks: this worker owns what it registers, and is always the last."""

    def join(self) -> bool:
        """See `Ownership`, here and below."""
        return True

    def claim(self) -> bool:
        return True

    def give_up(self) -> None:
        pass

    def leave(self) -> bool:
        return True

    def close(self) -> None:
        pass


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _folder() -> Path:
    """A folder of this user alone: nobody else shall be able to hold our locks."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):  # it is another's where a server has changed its user
        folder = Path(runtime) / "meshlib"
    else:
        folder = Path(tempfile.gettempdir()) / f"meshlib-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a folder of ours")
    return folder
