"""Translation of Redis errors into `CacheError`."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping

import hiredis

from cachebus.messages import (
    CacheBackendError,
    CacheClosed,
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    WrongType,
)

BACKEND = "redis"

# A retry may help with these: they become `CacheConnectionError`. The other errors are permanent.
NOT_READY: Mapping[str, str] = {
    "LOADING": "the server is still loading its data set",
    "BUSY": "the server is busy running a script",
    "TRYAGAIN": "the cluster is moving these keys",
    "CLUSTERDOWN": "the cluster is down",
    "MASTERDOWN": "the replica has lost its master",
    "READONLY": "the server is a read-only replica",
    "NOREPLICAS": "the server has too few replicas and rejects writes",
    "UNBLOCKED": "the server changed its role",
}
REFUSED: Mapping[str, str] = {
    "OOM": "the server's memory is full and its policy evicts nothing",
    "MISCONF": "the server cannot save to disk and rejects writes",
    "EXECABORT": "the server rejected the transaction",
}
FORBIDDEN: Mapping[str, str] = {
    "WRONGPASS": "the server rejected the user or the password",
    "NOAUTH": "the server requires a password",
    "NOPERM": "the user lacks a required permission",
    "NOPROTO": "the server does not support RESP3; Redis 6 or newer is required",
    "DENIED": "the server runs in protected mode and rejects other hosts",
    # The cluster store follows these redirections.
    **dict.fromkeys(("MOVED", "ASK", "CROSSSLOT"), "the server belongs to a cluster; use a redis+cluster:// URL"),
}
UNFIT: Mapping[str, str] = {
    "WRONGTYPE": "the key holds a Redis value that is not a cache entry",
    "NOTCOUNTER": "increment needs an int under the key",
    "OUTOFRANGE": "increment would exceed the range of a signed 64-bit integer; the value is unchanged",
}
STALE_ROLE = frozenset({"READONLY", "MASTERDOWN", "UNBLOCKED"})
"""Error codes that mean that the connection leads to the wrong server."""


def code_of(reply: hiredis.ReplyError) -> str:
    """Return the error code of a reply: its first word."""
    return str(reply).partition(" ")[0].removesuffix(":")


def translate(reply: hiredis.ReplyError) -> CacheError:
    """Return the `CacheError` for an error reply."""
    code = code_of(reply)
    if code in UNFIT:
        return WrongType(UNFIT[code])
    if code in NOT_READY:
        return CacheConnectionError(f"{NOT_READY[code]} ({code})", BACKEND)
    if code in FORBIDDEN:
        return CacheConfigurationError(f"redis: {FORBIDDEN[code]} ({code})")
    if code in REFUSED:
        return CacheBackendError(f"{REFUSED[code]} ({code})", BACKEND)
    # The arguments, which follow "with args", may contain user data.
    return CacheBackendError(f"the server answered: {str(reply).partition(', with args')[0][:200]}", BACKEND)


def translate_handshake_error(reply: hiredis.ReplyError, server: str) -> CacheError:
    """Return the `CacheError` for an error reply during the handshake.

    The message shows only the code: an old server echoes the unknown command, which includes the password.
    """
    code = code_of(reply)
    if code in NOT_READY:
        return CacheConnectionError(f"{server}: {NOT_READY[code]} ({code})", BACKEND)
    if code == "ERR" and "max number of clients" in str(reply):
        return CacheConnectionError(f"{server}: the server has too many clients (maxclients)", BACKEND)
    if code == "ERR" and "DB index" in str(reply):
        return CacheConfigurationError(f"redis: {server}: the database does not exist")
    reason = FORBIDDEN.get(code, "the server rejected the handshake; Redis 6 or newer is required")
    return CacheConfigurationError(f"redis: {server}: {reason} ({code})")


def unreachable(error: BaseException, server: str, timeout: float) -> CacheError:
    """Return the `CacheError` for a failed connection attempt."""
    if isinstance(error, CacheError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        # Permanent: a retry does not make a certificate valid.
        return CacheConfigurationError(f"redis: {server}: the certificate is not valid: {error.verify_message}")
    if isinstance(error, asyncio.TimeoutError):
        return CacheConnectionError(f"{server} did not accept the connection within {timeout:g} s", BACKEND)
    if isinstance(error, ssl.SSLError):
        return CacheConnectionError(f"{server} cannot be reached over TLS: {error.reason}", BACKEND)
    if isinstance(error, OSError):
        return CacheConnectionError(f"{server} cannot be reached: {error.strerror or type(error).__name__}", BACKEND)
    return CacheConnectionError(f"{server} cannot be reached: {type(error).__name__}", BACKEND)


def lost(server: str, why: str) -> CacheConnectionError:
    """Return the error for a lost connection."""
    return CacheConnectionError(f"the connection to {server} was lost: {why}", BACKEND)


def closed() -> CacheClosed:
    """Return the error for a request to a closed store."""
    return CacheClosed("the connection to redis was closed")


def moving(how: str = "TRYAGAIN") -> CacheConnectionError:
    """Return the error for a command whose keys are being moved between servers of a cluster."""
    return CacheConnectionError(f"the cluster is moving these keys ({how})", BACKEND)


def overtaken() -> CacheError:
    """Return the error for a rejected write that cannot be resent, because a newer request has changed its key."""
    # Not transient: a retry would be just as late.
    return CacheBackendError(
        "the server had forgotten a script (NOSCRIPT); this write was skipped because a newer one was done", BACKEND
    )
