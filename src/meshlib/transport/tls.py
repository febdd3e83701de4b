"""TLS: one context for each setting, kept in step with its files, and whether a peer is who it should be.

Decides how the settings become an `ssl.SSLContext`, when the files behind one are looked at again, and what a
certificate must say for a SPIFFE id. Making a context reads certificates and may cost tens of milliseconds, so it is
made once for what the files hold. Files that cannot be used, or do not belong together, never replace what works. It
never connects.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary, finalize

import httpcore

from meshlib.policy import TLS
from meshlib.transport.trust import trusting
from meshlib.validation import ConfigError, Fault, shown, trust_domain_of

E = TypeVar("E", bound=BaseException)

logger = logging.getLogger("meshlib.transport")

LOOK_EVERY = 1.0
"""Seconds for which the files are taken to be as they were. They are looked at when a connection is opened."""

LONGEST_NAME = 256
"""Letters of what a stranger calls itself that are shown."""

UNREADABLE = "its certificate cannot be read"

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class IdentityError(httpcore.ConnectError):
    """The peer has not proved to be who it should be; nothing was sent to it. See `meshlib.errors.IdentityError`."""


class Made(NamedTuple):
    """A context, and what stood for its files when it was made."""

    context: ssl.SSLContext
    stamps: list[tuple[int, ...] | None]
    held: bytes | None


class Kept:
    """The context of a setting, and the state of the files it was made of.

    Args:
        tls: the setting.

    Raises:
        ConfigError: if a file cannot be read, or key and certificate do not belong together.
    """

    def __init__(self, tls: TLS) -> None:
        self._tls = tls
        paths = (tls.verify if tls.verify != "system" else None, tls.cert, tls.key)
        self._files = [path for path in paths if isinstance(path, str)]
        # In this order: whatever changes meanwhile is found by the next look.
        stamps, held = _stamps(self._files), _held(self._files)
        self._made = Made(_make(tls), stamps, held)
        self._look_at = monotonic() + LOOK_EVERY
        self._bad_looks = 0

    @property
    def context(self) -> ssl.SSLContext:
        """The newest that was whole."""
        return self._made.context

    def look(self) -> None:
        """See whether the files have changed, if it is time to, and go by what they hold if that is whole."""
        now = monotonic()
        if now < self._look_at or not self._files:
            return
        self._look_at = now + LOOK_EVERY
        stamps, made = _stamps(self._files), self._made
        if stamps == made.stamps and not self._bad_looks:
            return
        held = _held(self._files)
        context = made.context if held == made.held else self._renewed()
        if context is not None:
            # At once: another thread may be about to do the same, and context and contents must go together.
            self._made, self._bad_looks = Made(context, stamps, held), 0

    def _renewed(self) -> ssl.SSLContext | None:
        """A context of what the files hold now; None to stay with the old one.

        That is told at the second look only: files are replaced one after another, and do not fit meanwhile. They are
        tried at each look until they do: that descriptors have run out says nothing of what they hold.
        """
        try:
            context = _make(self._tls)
        except ConfigError as error:
            wrong = str(error)
        else:
            logger.info("TLS: new connections use what %s now hold", ", ".join(self._files))
            return context
        self._bad_looks += 1
        if self._bad_looks == 2:
            logger.warning("TLS: new connections keep using what %s held before: %s", ", ".join(self._files), wrong)
        return None


_contexts: WeakValueDictionary[TLS, Kept] = WeakValueDictionary()
"""By value: settings that are equal share one."""

_users: dict[int, Kept] = {}
"""By the identity of the settings in use. What nobody uses any more is forgotten."""


def context_for(tls: TLS) -> ssl.SSLContext:
    """The context of a setting, by what its files hold now or held a second ago.

    Raises:
        ConfigError: if there was none yet and a file cannot be read, or key and certificate do not belong together.
    """
    kept = _users.get(id(tls))
    if kept is None:
        kept = _begun(tls)
    else:
        kept.look()
    return kept.context


def _begun(tls: TLS) -> Kept:
    own = _own(tls)
    kept = _contexts.get(own)
    if kept is None:
        # Two threads may both make one, and the first to store it wins; a lock could be held when the process forks.
        kept = _contexts.setdefault(own, Kept(own))
    _users[id(tls)] = kept
    finalize(tls, _users.pop, id(tls), None).atexit = False
    return kept


def _own(tls: TLS) -> TLS:
    """A copy (the setting itself would be in use for ever), whose files are the same wherever the process goes."""
    files = {"cert": tls.cert, "key": tls.key, "verify": tls.verify if tls.verify != "system" else None}
    return replace(tls, **{name: os.path.abspath(file) for name, file in files.items() if isinstance(file, str)})


def whom(tls: TLS, name: str | None) -> str:
    """Whom a peer must prove to be, in words."""
    if tls.spiffe_id is not None:
        return tls.spiffe_id
    return str(name) if tls.trust_domain is None else f"of the trust domain {tls.trust_domain}"


def why_stranger(tls: TLS, peer: Any) -> str | None:
    """Why the peer's certificate, which is a valid one, does not say who it should be; None if it does.

    Args:
        tls: the setting.
        peer: the TLS side of a connection after its handshake.
    """
    if tls.spiffe_id is None and tls.trust_domain is None:
        return None  # its name was checked in the handshake
    try:
        names = [value for kind, value in (peer.getpeercert() or {}).get("subjectAltName", ()) if kind == "URI"]
    except ValueError:
        return UNREADABLE
    if len(names) != 1:
        return f"its certificate carries {len(names)} URIs, which must be exactly one"
    [name] = names
    is_right = trust_domain_of(name) == tls.trust_domain if tls.spiffe_id is None else name == tls.spiffe_id
    return None if is_right else f"its certificate says {name[:LONGEST_NAME]!a}"


def unproven(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """The failed check of a certificate that is behind an exception, if there is one."""
    return _behind(error, ssl.SSLCertVerificationError)


def is_plain(error: BaseException | None) -> bool:
    """Whether OpenSSL was answered in plain text: all that it says of that is that the version is wrong."""
    found = _behind(error, ssl.SSLError)
    return found is not None and found.reason == "WRONG_VERSION_NUMBER"


def _behind(error: BaseException | None, kind: type[E]) -> E | None:
    """The first exception of a kind among an exception and its causes."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def _stamps(files: Sequence[str]) -> list[tuple[int, ...] | None]:
    """What tells cheaply that a file may be another."""
    return [_stamp(file) for file in files]


def _stamp(file: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)
    except (OSError, ValueError):  # the latter for what no file can be called
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev


def _held(files: Sequence[str]) -> bytes | None:
    """What stands for the contents; None if they cannot be read."""
    digest = hashlib.sha256()
    if any(map(_is_odd, files)):
        return None
    try:
        for file in files:
            digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    except (OSError, ValueError):
        return None
    return digest.digest()


def _is_odd(file: str) -> bool:
    """Whether there is something that is no file; to read it might never end."""
    try:
        return not stat.S_ISREG(os.stat(file).st_mode)
    except (OSError, ValueError):
        return False


def _see_files(**files: str | None) -> None:
    """Right before they are read: to make a context takes long enough for one to be replaced."""
    if odd := [name for name, file in files.items() if file is not None and _is_odd(file)]:
        message = "must be a regular file, and no folder, pipe or device"
        raise ConfigError([Fault(f"tls.{name}", message) for name in odd])


def _make(tls: TLS) -> ssl.SSLContext:
    if isinstance(tls.verify, ssl.SSLContext):
        return tls.verify
    bundle = None if tls.verify == "system" else tls.verify
    _see_files(verify=bundle)
    try:
        context = trusting(bundle)
    except (OSError, ValueError) as error:  # among them those of TLS, and a path that cannot be one
        right = f"must be 'system' or a readable bundle of certificates, got {shown(tls.verify)}"
        raise ConfigError([Fault("tls.verify", f"{right}: {error}")]) from error
    context.hostname_checks_common_name = False  # RFC 9525: it is free text, and authorities let callers choose it
    if tls.spiffe_id is not None or tls.trust_domain is not None:
        context.check_hostname = False  # the id is checked instead; the chain is as before
        context.options |= ssl.OP_NO_RENEGOTIATION  # in TLS 1.2, another certificate could come after the check
    context.minimum_version = _VERSIONS[tls.min_version]
    context.set_alpn_protocols(["http/1.1"])
    if tls.cert is not None:
        _see_files(cert=tls.cert, key=tls.key)
        try:
            context.load_cert_chain(tls.cert, tls.key, password=_refuse)
        except (OSError, ValueError) as error:
            given = shown(tls.cert) if tls.key is None else f"{shown(tls.cert)} and the key {shown(tls.key)}"
            right = f"must be a certificate whose key fits, both readable, got {given}"
            raise ConfigError([Fault("tls.cert", f"{right}: {_in_words(error)}")]) from error
    return context


def _in_words(error: Exception) -> str:
    """What was wrong with a certificate and its key. Of a file without one of the two OpenSSL just says "PEM lib"."""
    return "there is no certificate, or no key, in PEM format" if "PEM lib" in str(error) else str(error)


def _refuse() -> str:
    """OpenSSL would ask for a pass phrase on the terminal."""
    raise ssl.SSLError("the key has a pass phrase")
