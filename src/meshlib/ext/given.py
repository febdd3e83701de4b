"""The mesh that an application gives to what is plugged into it.

Decides what passes for one, and says how it is given otherwise: at once, and not with the first request.
"""

from __future__ import annotations

from typing import Any

from meshlib.mesh import Mesh


def given(mesh: Any, usage: str) -> Mesh:
    """The mesh, as it is.

    Args:
        mesh: what was given.
        usage: how it is given rightly: `status_app(mesh)`.

    Raises:
        TypeError: if it is no `Mesh`.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a Mesh, {usage}, got {type(mesh).__name__}")
    return mesh
