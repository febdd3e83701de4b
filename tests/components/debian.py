"""Real components from Debian packages, for tests.

Decides how the files of packages of any Debian suite get into a cache of ours: from the mirror that this machine's own
apt already uses, unpacked and never installed, without root. It never starts what it unpacks, follows a package's
dependencies only where it is told to, and never touches the lists, the archives or the packages of the machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from components.absence import Missing

PATIENCE = 300.0
"""Seconds that one step may take: a slow mirror serves a hundred megabytes in this."""

_KEYRINGS = [Path(f"/usr/share/keyrings/debian-archive-keyring.{ending}") for ending in ("gpg", "pgp")]
_RELEASE = re.compile(r"^'(\S+)/dists/[^/']+/InRelease'", re.MULTILINE)


def cache() -> Path:
    """The folder where components are kept from one run to the next."""
    if chosen := os.environ.get("MESHLIB_COMPONENT_CACHE"):
        return Path(chosen).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "meshlib-components"


def own_suite() -> str:
    """The suite of this machine.

    Raises:
        Missing: if it is not a Debian.
    """
    try:
        return platform.freedesktop_os_release()["VERSION_CODENAME"]
    except (OSError, KeyError):
        raise Missing("this is no Debian, which a program that needs much of the machine is to be had for") from None


def fetch(suite: str, packages: Sequence[str], *, with_lacking: bool = False) -> Path:
    """Unpack packages of one suite into one folder, or find them there from an earlier call.

    A program that needs shared libraries from the same folder finds them by `libraries(root)`. Several processes may
    call this at once: one downloads, the others wait for it.

    Args:
        suite: such as "bookworm"; it need not be the machine's own.
        packages: names of packages; a library that the machine may lack is one of them.
        with_lacking: take as well what these packages depend on and the machine lacks; the suite must be its own.

    Returns:
        The folder that stands for `/`.

    Raises:
        Missing: if the packages are not to be had here, with the reason.
    """
    root = cache() / _folder_of(suite, packages)
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with _alone(root.with_name(f"{root.name}.lock")):
        if not root.is_dir():
            _download(suite, packages, root, with_lacking=with_lacking)
    return root


def libraries(root: Path) -> dict[str, str]:
    """The environment in which a program under `root` finds the shared libraries there first."""
    folders = sorted({str(path.parent) for path in root.rglob("*.so*")})
    return os.environ | {"LD_LIBRARY_PATH": ":".join(folders)}


def _folder_of(suite: str, packages: Sequence[str]) -> str:
    names = "+".join(packages)
    if len(names) > 100:
        names = f"{packages[0]}+{hashlib.sha256(names.encode()).hexdigest()[:16]}"
    return f"{suite}-{platform.machine()}-{names}"


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of one that died."""
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _download(suite: str, packages: Sequence[str], root: Path, *, with_lacking: bool) -> None:
    mirror = _mirror()
    with tempfile.TemporaryDirectory(prefix=".work-", dir=root.parent, ignore_cleanup_errors=True) as name:
        work = Path(name)
        apt = _private_apt(work, mirror, suite)
        _run([*apt, "update"], work)
        if with_lacking:
            own = ["-o", "Dir::State::status=/var/lib/dpkg/status"]
            _run([*apt, *own, "install", "--download-only", "--no-install-recommends", "-y", *packages], work)
        else:
            _run([*apt, "download", *packages], work)
        unpacked = work / "root"
        for archive in sorted([*work.glob("*.deb"), *work.glob("archives/*.deb")]):
            _run(["dpkg-deb", "-x", str(archive), str(unpacked)], work)
        unpacked.chmod(0o755)
        unpacked.rename(root)  # whole or not there at all


def _mirror() -> str:
    """The first mirror among apt's sources that is not the one for security.

    `apt-get indextargets` says nothing before the first `update` on a machine; what an update would fetch is always
    known, and asking for it needs neither lists nor root.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Missing("there is no apt here to take a Debian package from")
    printed = _run(["apt-get", "-o", "Debug::NoLocking=1", "--print-uris", "update"], Path("/"))
    mirrors = [found for found in _RELEASE.findall(printed) if "security" not in found]
    if not mirrors:
        raise Missing("apt has no Debian mirror among its sources")
    return str(mirrors[0])


def _private_apt(work: Path, mirror: str, suite: str) -> list[str]:
    """An `apt-get` that reads and writes below `work` alone."""
    for folder in ("lists/partial", "archives/partial", "empty", "state", "cache"):
        (work / folder).mkdir(parents=True)
    signed = next((f"[signed-by={keyring}] " for keyring in _KEYRINGS if keyring.exists()), "")
    (work / "sources.list").write_text(f"deb {signed}{mirror} {suite} main\n")
    settings = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": work / "empty",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": work / "empty",
        "Dir::State": work / "state",
        "Dir::State::lists": work / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": work / "cache",
        "Dir::Cache::archives": work / "archives",
        "APT::Sandbox::User": "",
        "APT::Update::Post-Invoke": "",
        "APT::Update::Post-Invoke-Success": "",
        "APT::Update::Error-Mode": "any",  # a mirror that is away is an error, not a warning
        "Acquire::Languages": "none",
        "Acquire::Check-Valid-Until": "false",  # the last suite that had a package may be long out of date
        "Acquire::Retries": 3,
        "Debug::NoLocking": 1,
    }
    return ["apt-get", "-qq", *(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))]


def _run(command: list[str], folder: Path) -> str:
    """What the command printed; it runs in `folder`."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except subprocess.TimeoutExpired:
        raise Missing(f"{command[0]} {command[-1]} took more than {PATIENCE:g} s") from None
    except subprocess.CalledProcessError as error:
        complaint = " ".join(error.stderr.split())[-400:]
        raise Missing(f"{command[0]} {command[-1]} failed: {complaint}") from error
    return done.stdout
