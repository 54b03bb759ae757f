"""Translation of Memcached errors and connection errors into this package's errors."""

from __future__ import annotations

import ssl

from cachebus.messages import CacheBackendError, CacheConfigurationError, CacheConnectionError, CacheError

BACKEND = "memcached"

# Only `CacheConnectionError` is transient: another attempt may succeed. The other errors are not worth a retry.
#
#   answer or fault of the server                      error                            connection
#   SERVER_ERROR out of memory storing object          CacheBackendError                kept
#   SERVER_ERROR object too large for cache            CacheBackendError                kept
#   CLIENT_ERROR cannot increment or decrement ...     CacheBackendError                kept
#   any other SERVER_ERROR                             CacheBackendError                dropped
#   any other CLIENT_ERROR, ERROR                      CacheBackendError                dropped
#   ERROR Too many open connections                    CacheConnectionError             dropped
#   an answer that does not fit the command            CacheConnectionError             dropped
#   end of file, reset, refused, no route, no name     CacheConnectionError             dropped
#   no answer for longer than `timeout`                CacheConnectionError             dropped
#   an invalid certificate                             CacheConfigurationError          dropped
#
# A dropped connection is never read again, so a late answer cannot be mistaken for that of another command.
_RECOVERABLE: dict[bytes, str] = {
    b"SERVER_ERROR out of memory storing object": "the server is out of memory and does not evict",
    b"SERVER_ERROR object too large for cache": "the entry is larger than the server's item size limit",
    b"CLIENT_ERROR cannot increment or decrement non-numeric value": "the counter is not a number",
}


class ProtocolError(Exception):
    """Raised when a server's answer does not fit the commands in flight."""


def parse_error(line: bytes) -> CacheError:
    """Return the error for a line that rejects one command and leaves the connection usable.

    Raises the error if the connection must be dropped, and `ProtocolError` if the line does not report an error.
    """
    if (reason := _RECOVERABLE.get(line)) is not None:
        return CacheBackendError(reason, BACKEND)
    if line.startswith(b"ERROR Too many open connections"):
        raise CacheConnectionError("the server has too many open connections", BACKEND)
    if line.startswith((b"SERVER_ERROR", b"CLIENT_ERROR", b"ERROR")):
        # Only the first words, because the rest may contain user data.
        raise CacheBackendError(f"the server answered: {_printable(line[:80])}", BACKEND)
    raise ProtocolError(_printable(line[:40]))


def unreachable(error: BaseException, server: str, timeout: float) -> CacheError:
    """Return the error for a connection that could not be opened."""
    if isinstance(error, CacheError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        # Permanent: a retry does not make the certificate valid.
        return CacheConfigurationError(f"memcached: {server}: the certificate is invalid: {error.verify_message}")
    why = "does not answer like a Memcached server"  # A ValueError while parsing its answers.
    if isinstance(error, TimeoutError):
        why = f"did not accept the connection within {timeout:g} s"
    elif isinstance(error, ssl.SSLError):
        why = f"cannot be reached over TLS: {error.reason}"
    elif isinstance(error, OSError):
        why = f"cannot be reached: {error.strerror or type(error).__name__}"
    return CacheConnectionError(f"{server} {why}", BACKEND)


def lost(error: BaseException, server: str, timeout: float) -> CacheError:
    """Return the error for a connection that was lost."""
    if isinstance(error, CacheError):
        return error
    if isinstance(error, TimeoutError):
        why = f"no answer within {timeout:g} s"
    elif isinstance(error, ProtocolError):
        why = f"unexpected answer: {error}"
    elif isinstance(error, OSError):
        why = error.strerror or type(error).__name__
    else:
        why = "it was closed"
    return CacheConnectionError(f"the connection to {server} was lost: {why}", BACKEND)


def in_doubt(error: CacheError) -> CacheError:
    """Return the error for a write that was sent before the connection was lost."""
    return CacheConnectionError(f"{error.detail}; whether the request was done is not known", BACKEND)


def _printable(raw: bytes) -> str:
    return raw.decode("ascii", "replace").encode("ascii", "backslashreplace").decode()
