"""What goes wrong at a Memcached server, in the words of our own error tree."""

from __future__ import annotations

import ssl

from cachebus.messages import CacheBackendError, CacheConfigurationError, CacheConnectionError, CacheError

BACKEND = "memcached"

# Transient is what another attempt may mend: a `CacheConnectionError`. The rest is not worth a second try.
#
#   what the server says or does                       what it becomes                  the connection
#   SERVER_ERROR out of memory storing object          CacheBackendError                stays
#   SERVER_ERROR object too large for cache            CacheBackendError                stays
#   CLIENT_ERROR cannot increment or decrement ...     CacheBackendError                stays
#   any other SERVER_ERROR                             CacheBackendError                is dropped
#   any other CLIENT_ERROR, ERROR                      CacheBackendError                is dropped
#   ERROR Too many open connections                    CacheConnectionError             is dropped
#   anything that is no answer to what was asked       CacheConnectionError             is dropped
#   end of file, reset, refused, no route, no name     CacheConnectionError             is dropped
#   silence for longer than `timeout`                  CacheConnectionError             is dropped
#   a certificate that is not good                     CacheConfigurationError          is dropped
#
# A dropped connection is never read from again, so that what arrives late is no other command's answer.
_STAYS: dict[bytes, str] = {
    b"SERVER_ERROR out of memory storing object": "the server's memory is full and it evicts nothing",
    b"SERVER_ERROR object too large for cache": "the entry is larger than the server's items may be",
    b"CLIENT_ERROR cannot increment or decrement non-numeric value": "the counter is no number",
}


class ProtocolError(Exception):
    """Raised when a server sends what is no answer to the commands in flight."""


def parse_error(line: bytes) -> CacheError:
    """Return our error for a line that refuses one command and leaves the connection usable.

    Raises our error for a line after which it is not, and `ProtocolError` for a line that reports no error.
    """
    if (reason := _STAYS.get(line)) is not None:
        return CacheBackendError(reason, BACKEND)
    if line.startswith(b"ERROR Too many open connections"):
        raise CacheConnectionError("the server has too many open connections", BACKEND)
    if line.startswith((b"SERVER_ERROR", b"CLIENT_ERROR", b"ERROR")):
        # Only its first words: what follows may be our own data.
        raise CacheBackendError(f"the server answered: {_printable(line[:80])}", BACKEND)
    raise ProtocolError(_printable(line[:40]))


def unreachable(error: BaseException, server: str, timeout: float) -> CacheError:
    """Return our error for a connection that could not be made."""
    if isinstance(error, CacheError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        # Permanent: no retry turns a certificate into a good one.
        return CacheConfigurationError(f"memcached: {server}: the certificate is not good: {error.verify_message}")
    why = "does not answer as a Memcached does"  # What else reading its answers raises.
    if isinstance(error, TimeoutError):
        why = f"did not take the connection within {timeout:g} s"
    elif isinstance(error, ssl.SSLError):
        why = f"cannot be reached over TLS: {error.reason}"
    elif isinstance(error, OSError):
        why = f"cannot be reached: {error.strerror or type(error).__name__}"
    return CacheConnectionError(f"{server} {why}", BACKEND)


def lost(error: BaseException, server: str, timeout: float) -> CacheError:
    """Return our error for a connection that was there and is gone."""
    if isinstance(error, CacheError):
        return error
    if isinstance(error, TimeoutError):
        why = f"no answer within {timeout:g} s"
    elif isinstance(error, ProtocolError):
        why = f"what it sent is no answer: {error}"
    elif isinstance(error, OSError):
        why = error.strerror or type(error).__name__
    else:
        why = "it was closed"
    return CacheConnectionError(f"the connection to {server} was lost: {why}", BACKEND)


def in_doubt(error: CacheError) -> CacheError:
    """Return the error of a write that was sent on a connection before it was lost."""
    return CacheConnectionError(f"{error.detail}; whether the request was done is not known", BACKEND)


def _printable(raw: bytes) -> str:
    return raw.decode("ascii", "replace").encode("ascii", "backslashreplace").decode()
