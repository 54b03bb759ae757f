"""Lease messages. A lease is the exclusive right, among all processes, to load a key.

The name of a lease is the token of the request, a dot, and a nonce chosen by the store. A request is sent twice if its
reply is late. The delayed first copy may then be carried out after an invalidation has revoked the lease, and grant it
again. Because of the nonce that grant is a different lease, so the original holder cannot store a stale value with it.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from .base import IdempotentRequest, Reply
from .replies import Found

NONCE_LENGTH = 16
"""Length of a nonce, in characters."""

ASKED_MAX = 255 - NONCE_LENGTH - 1
"""Maximum length of a token, in bytes, so that the length of a lease name fits into one byte."""


def new_lease_name(token: str) -> str:
    """Return a unique name for a lease that was requested with `token`."""
    return f"{token}.{os.urandom(NONCE_LENGTH // 2).hex()}"


def asked_as(name: str) -> str:
    """Return the token of the request for the lease with this name."""
    return name[: -NONCE_LENGTH - 1]


class LoadMetadata(msgspec.Struct, frozen=True, gc=False):
    """Metadata of a load, stored with the value.

    `load_time` is the duration of the load in seconds. `stale_for` is how many seconds after its time to live the value
    may be served stale. `etag` is the version of the value at its source.
    """

    load_time: float = 0.0
    stale_for: float = 0.0
    etag: str | None = None


class Stale(Reply, frozen=True, tag="reply.stale"):
    """A value that has expired but may still be served.

    If a load is in progress, `lease` names its lease, which expires in `remaining` seconds. The other fields are as in
    `Loaded`.
    """

    value: Any
    version: float = 0.0
    tags: tuple[str, ...] = ()
    stored_at: float = 0.0
    load_time: float = 0.0
    etag: str | None = None
    lease: str = ""
    remaining: float = 0.0


class LeaseGranted(Reply, frozen=True, tag="reply.lease_granted"):
    """The caller must load the value and store it with `token`, the name of the lease.

    It may serve `stale` until then.
    """

    token: str
    stale: Stale | None = None


class Loading(Reply, frozen=True, gc=False, tag="reply.loading"):
    """Another caller is loading the value under the lease `token`, which expires in `remaining` seconds."""

    token: str
    remaining: float = 0.0


class Renewed(Reply, frozen=True, gc=False, tag="reply.renewed"):
    """The lease or lock is held for `ttl` seconds from now."""

    ttl: float


class Released(Reply, frozen=True, gc=False, tag="reply.released"):
    """The lease or lock was held and is now free."""


class NotHeld(Reply, frozen=True, gc=False, tag="reply.not_held"):
    """The lease or lock no longer exists: it expired, was released, or (a lease) was revoked by an invalidation."""


class GetOrLease(
    IdempotentRequest[Found | Stale | LeaseGranted | Loading], frozen=True, gc=False, tag="lease.get_or_lease"
):
    """Read one key, or request the lease to load it if it has no live value. Counts neither as a hit nor as a miss.

    `token` identifies the request and must be unique. A repeated request is granted the same lease while it is held,
    and a new one after it was lost. The lease ends after `lease_ttl` seconds unless it is renewed. A delete, a clear, a
    plain write of the key, or an invalidation of one of `tags` revokes it.

    If another caller holds the lease, the caller waits up to `wait` seconds for the value, or for the lease if the
    holder releases it. `owner` is a process, or a part of one, that shares its loads internally and never waits for
    itself. With `refresh` a live value is reloaded, unless a reload is already in progress.

    A caller polls a store that supports neither waiting nor notifications. `after` is then the lease that the caller
    waits for: if its loader failed, the reply is the error `LoaderFailed`.
    """

    key: str
    owner: str
    token: str
    lease_ttl: float
    wait: float = 0.0
    tags: tuple[str, ...] = ()
    refresh: bool = False
    after: str = ""


class WatchLease(IdempotentRequest[NotHeld | Loading], frozen=True, gc=False, tag="lease.watch"):
    """Wait up to `wait` seconds until the lease `token`, which another caller holds, has ended.

    The reply is `NotHeld`, `Loading` if the wait timed out, or the error `LoaderFailed` if the loader failed. A store
    that supports waiting with `GetOrLease`, or that has no notifications, replies with `CapabilityError`.
    """

    key: str
    token: str
    wait: float


class RenewLease(IdempotentRequest[Renewed | NotHeld], frozen=True, gc=False, tag="lease.renew"):
    """Extend a lease to `lease_ttl` seconds from now."""

    key: str
    token: str
    lease_ttl: float


class ReleaseLease(IdempotentRequest[Released | NotHeld], frozen=True, tag="lease.release"):
    """Release a lease without storing a value.

    `token` is the name of the lease or, if the reply with its name was lost, the token of the request.

    The waiters get `late`, a value that must not be stored. If `error` names an exception type, they get
    `LoaderFailed`. Otherwise one of them gets the lease.
    """

    key: str
    token: str
    error: str = ""
    late: Found | None = None
