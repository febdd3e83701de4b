"""Whom TLS trusts, whatever the environment says (rule S1).

Decides that `SSL_CERT_FILE` and `SSL_CERT_DIR` do not change it, which OpenSSL would let them do without a word, and
that `SSLKEYLOGFILE` has no session's keys written down. What is wanted is a setting: `TLS(verify=...)`.
"""

from __future__ import annotations

import logging
import os
import ssl

import httpx

logger = logging.getLogger("meshlib.transport")

_said: set[str] = set()


def trusting(bundle: str | None) -> ssl.SSLContext:
    """A client's context that trusts a bundle of certificates, or the system's if it is None.

    Raises:
        OSError, ssl.SSLError: if the bundle cannot be read.
    """
    if bundle is not None or not (ignored := [name for name in _names() if os.environ.get(name)]):
        return _unrecorded(ssl.create_default_context(cafile=bundle))
    for name in ignored:
        if name not in _said:
            _said.add(name)
            logger.warning("%s has no effect on a mesh; say TLS(verify='/path/of/the/bundle.pem') instead", name)
    built_in = ssl.get_default_verify_paths()
    file = built_in.openssl_cafile
    return _unrecorded(
        ssl.create_default_context(cafile=file if os.path.isfile(file) else None, capath=built_in.openssl_capath)
    )


def trusting_as_httpx() -> ssl.SSLContext:
    """A client's context that trusts whom httpx trusts by itself."""
    return _unrecorded(httpx.create_ssl_context(trust_env=False))


def _names() -> tuple[str, str]:
    built_in = ssl.get_default_verify_paths()
    return built_in.openssl_cafile_env, built_in.openssl_capath_env


def _unrecorded(context: ssl.SSLContext) -> ssl.SSLContext:
    if context.keylog_filename is not None:
        # Nothing else takes it back; the type stubs know of a path alone.
        context.keylog_filename = None  # type: ignore[assignment]
    return context
