"""TLS for connections to stores."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from cachebus.messages import CacheConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files: trusted authorities (by default those of the system), client certificate and key."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def context(self, store: str) -> ssl.SSLContext:
        """Return a context that verifies certificates and host names. Reads the files, so it blocks.

        Raises `CacheConfigurationError`, which names the store and the files.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, password=_no_passphrase)
        except (OSError, ValueError) as error:  # SSLError is an OSError.
            names = ", ".join(each for each in (self.ca, self.certificate, self.key) if each)
            reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or type(error).__name__
            raise CacheConfigurationError(f"{store}: cannot use the TLS files {names}: {reason}") from None
        return context


def _no_passphrase() -> str:
    # Without a password callback, OpenSSL prompts on the terminal.
    raise ValueError("the key is encrypted")
