"""TLS contexts: one for each setting.

Decides how the settings become an `ssl.SSLContext`. Making one reads the system's certificates and costs tens of
milliseconds, so it is made once and kept. It never connects.
"""

from __future__ import annotations

import ssl

from meshlib.policy import TLS
from meshlib.transport.trust import trusting
from meshlib.validation import ConfigError, Fault

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_contexts: dict[TLS, ssl.SSLContext] = {}


def context_for(tls: TLS) -> ssl.SSLContext:
    """The context of a setting.

    Raises:
        ConfigError: if a file cannot be read, or key and certificate do not belong together.
    """
    context = _contexts.get(tls)
    if context is None:
        # Two threads may both make one, and the first to store it wins; a lock could be held when the process forks.
        context = _contexts.setdefault(tls, _make(tls))
    return context


def _make(tls: TLS) -> ssl.SSLContext:
    if isinstance(tls.verify, ssl.SSLContext):
        return tls.verify
    try:
        context = trusting(None if tls.verify == "system" else tls.verify)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            [Fault("tls.verify", f"must be 'system' or a readable bundle of certificates: {error}")]
        ) from error
    context.minimum_version = _VERSIONS[tls.min_version]
    context.set_alpn_protocols(["http/1.1"])
    if tls.cert is not None:
        try:
            context.load_cert_chain(tls.cert, tls.key, password=_refuse)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                [Fault("tls.cert", f"must be a certificate whose key fits, both readable: {error}")]
            ) from error
    return context


def _refuse() -> str:
    """OpenSSL would ask for a pass phrase on the terminal."""
    raise ssl.SSLError("the key has a pass phrase")
