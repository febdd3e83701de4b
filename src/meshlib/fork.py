"""What happens when the process forks.

Decides that a child keeps none of its parent's sockets: two processes on one connection read each other's answers. The
child closes its descriptors without a word to the peer, whose connections are the parent's, and connects anew. What was
learned of the endpoints stays. A fork waits for what a child must not find half done.
"""

from __future__ import annotations

import errno
import logging  # noqa: F401  # before the hooks below: so a fork takes its lock after `whole`, as whoever imports does
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

T = TypeVar("T")


class Inherited(Protocol):
    """Something that a forked child must begin anew."""

    def forget(self) -> None:
        """Let go of everything that belongs to the parent."""

    def __hash__(self) -> int: ...


whole = threading.RLock()
"""Held by who makes or changes a mesh. A fork waits for it: a child would have to do with half of the change, and would
wait for ever for a module that is imported meanwhile, since nobody there goes on with it."""

inherited: WeakSet[Inherited] = WeakSet()
"""Everything of this process that a child will find."""

_held_by_users: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()
"""The same, where `forget` would be a method among those that are for users; and what is called in its place."""

strays: list[object] = []
"""What must not be finalized in the child, since its finalizer would meddle with the parent's event loop."""


def inherit(held: T, forget: Callable[[T], None]) -> None:
    """Have a child begin anew what users hold: `forget(held)` does, for as long as it is held."""
    _held_by_users[held] = forget


def close_inherited(descriptor: int) -> None:
    """Close a descriptor of the parent's. A stream on a loop of ours is known to both, and either may be first; the
    number is nobody else's yet, since nothing is opened while all this goes on."""
    try:
        os.close(descriptor)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise


def _in_child() -> None:
    try:
        for each in list(inherited):
            each.forget()
        for held, forget in list(_held_by_users.items()):
            forget(held)
    finally:
        whole.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=whole.acquire, after_in_parent=whole.release, after_in_child=_in_child)
