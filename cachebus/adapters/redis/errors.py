"""What goes wrong at a Redis server, in the words of our own error tree."""

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

# Transient is what another attempt may mend: a `CacheConnectionError`. The rest is not worth a second try.
NOT_READY: Mapping[str, str] = {
    "LOADING": "the server is still reading its data set",
    "BUSY": "the server is busy with a script",
    "TRYAGAIN": "the cluster is moving these keys",
    "CLUSTERDOWN": "the cluster is down",
    "MASTERDOWN": "the replica has lost its master",
    "READONLY": "the server is a read-only replica",
    "NOREPLICAS": "the server misses replicas and takes no writes",
    "UNBLOCKED": "the server changed its role",
}
REFUSED: Mapping[str, str] = {
    "OOM": "the server's memory is full and it evicts nothing",
    "MISCONF": "the server cannot save to disk and takes no writes",
    "EXECABORT": "the server refused the transaction",
}
FORBIDDEN: Mapping[str, str] = {
    "WRONGPASS": "the server refuses the user or the password",
    "NOAUTH": "the server asks for a password",
    "NOPERM": "the user may not do this",
    "NOPROTO": "the server does not speak RESP3; Redis 6 or newer is needed",
    "DENIED": "the server runs in protected mode and refuses other hosts",
    # The store of a cluster follows these itself.
    **dict.fromkeys(
        ("MOVED", "ASK", "CROSSSLOT"), "the server is one of a cluster: its URL begins with redis+cluster://"
    ),
}
UNFIT: Mapping[str, str] = {
    "WRONGTYPE": "the key holds a Redis type that is no cached value",
    "NOTCOUNTER": "increment needs an int under the key",
    "OUTOFRANGE": "increment leaves the range of a signed 64-bit integer; the value is unchanged",
}
STALE_ROLE = frozenset({"READONLY", "MASTERDOWN", "UNBLOCKED"})
"""Codes after which the connection leads to the wrong server."""


def code_of(reply: hiredis.ReplyError) -> str:
    """The first word of an error reply."""
    return str(reply).partition(" ")[0].removesuffix(":")


def translate(reply: hiredis.ReplyError) -> CacheError:
    """Our error for an error reply."""
    code = code_of(reply)
    if code in UNFIT:
        return WrongType(UNFIT[code])
    if code in NOT_READY:
        return CacheConnectionError(f"{NOT_READY[code]} ({code})", BACKEND)
    if code in FORBIDDEN:
        return CacheConfigurationError(f"redis: {FORBIDDEN[code]} ({code})")
    if code in REFUSED:
        return CacheBackendError(f"{REFUSED[code]} ({code})", BACKEND)
    # What follows "with args" are the arguments themselves.
    return CacheBackendError(f"the server answered: {str(reply).partition(', with args')[0][:200]}", BACKEND)


def translate_greeting(reply: hiredis.ReplyError, server: str) -> CacheError:
    """Our error for an error reply while the connection is made. Shows only its code: an old server repeats the
    command that it does not know, which has the password in it."""
    code = code_of(reply)
    if code in NOT_READY:
        return CacheConnectionError(f"{server}: {NOT_READY[code]} ({code})", BACKEND)
    if code == "ERR" and "max number of clients" in str(reply):
        return CacheConnectionError(f"{server}: the server has too many clients", BACKEND)
    if code == "ERR" and "DB index" in str(reply):
        return CacheConfigurationError(f"redis: {server} has no such database")
    reason = FORBIDDEN.get(code, "the server refuses to begin; Redis 6 or newer is needed")
    return CacheConfigurationError(f"redis: {server}: {reason} ({code})")


def unreachable(error: BaseException, server: str, timeout: float) -> CacheError:
    """Our error for a connection that could not be made."""
    if isinstance(error, CacheError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        # Permanent: no retry turns a certificate into a good one.
        return CacheConfigurationError(f"redis: {server}: the certificate is not good: {error.verify_message}")
    if isinstance(error, asyncio.TimeoutError):
        return CacheConnectionError(f"{server} did not take the connection within {timeout:g} s", BACKEND)
    if isinstance(error, ssl.SSLError):
        return CacheConnectionError(f"{server} cannot be reached over TLS: {error.reason}", BACKEND)
    if isinstance(error, OSError):
        return CacheConnectionError(f"{server} cannot be reached: {error.strerror or type(error).__name__}", BACKEND)
    return CacheConnectionError(f"{server} cannot be reached: {type(error).__name__}", BACKEND)


def lost(server: str, why: str) -> CacheConnectionError:
    """The error of a connection that was there and is gone."""
    return CacheConnectionError(f"the connection to {server} was lost: {why}", BACKEND)


def closed() -> CacheClosed:
    """The error of what is asked of a store that is closed."""
    return CacheClosed("the connection to redis was closed")


def moving(how: str = "TRYAGAIN") -> CacheConnectionError:
    """The error of a command that did not find its keys in one place of a cluster."""
    return CacheConnectionError(f"the cluster is moving these keys ({how})", BACKEND)


def overtaken() -> CacheError:
    """The error of a write that was refused, and may not be sent again because something newer has been done to its key."""
    # Not transient: another attempt would be as late.
    return CacheBackendError(
        "the server had forgotten a script (NOSCRIPT); a newer request about the key was done, this was not", BACKEND
    )
