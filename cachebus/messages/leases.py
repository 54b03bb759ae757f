"""Leases: the right of one caller among all processes to load a key, and the replies to the others meanwhile.

The name of a lease is the token of its question, a dot, and a nonce of the store's own. A question may be sent twice, if no
answer came in time, and the first copy may be carried out when all is over: late enough to grant again what an invalidation
has taken away. The nonce makes that another lease, under which no caller loads, so that the holder of the first stores
nothing with it.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from .base import IdempotentRequest, Reply
from .replies import Found

NONCE_LENGTH = 16
"""Characters of a nonce."""

ASKED_MAX = 255 - NONCE_LENGTH - 1
"""The most bytes of a token. So the length of a name fits into a byte."""


def new_lease_name(token: str) -> str:
    """Return a name for a lease that was asked for with `token`, unlike any other."""
    return f"{token}.{os.urandom(NONCE_LENGTH // 2).hex()}"


def asked_as(name: str) -> str:
    """Return the token with which the lease of this name was asked for."""
    return name[: -NONCE_LENGTH - 1]


class LoadMetadata(msgspec.Struct, frozen=True, gc=False):
    """Metadata of a load, stored with the value. `load_time` is the seconds that the loader took, `stale_for` the seconds after
    its time to live for which the value may be served stale, `etag` its version at the source."""

    load_time: float = 0.0
    stale_for: float = 0.0
    etag: str | None = None


class Stale(Reply, frozen=True, tag="reply.stale"):
    """A value whose time to live is over, and that may still be served. `lease` names the lease of the load under way, if there
    is one; `remaining` is the seconds that it has left. The rest is as in `Loaded`."""

    value: Any
    version: float = 0.0
    tags: tuple[str, ...] = ()
    stored_at: float = 0.0
    load_time: float = 0.0
    etag: str | None = None
    lease: str = ""
    remaining: float = 0.0


class LeaseGranted(Reply, frozen=True, tag="reply.lease_granted"):
    """The caller is to load the value, and to store it with `token`, the name of this lease. `stale` may be served until then."""

    token: str
    stale: Stale | None = None


class Loading(Reply, frozen=True, gc=False, tag="reply.loading"):
    """Another caller loads the value, under the lease `token`, which has `remaining` seconds left."""

    token: str
    remaining: float = 0.0


class Renewed(Reply, frozen=True, gc=False, tag="reply.renewed"):
    """The lease is held for `ttl` seconds from now."""

    ttl: float


class Released(Reply, frozen=True, gc=False, tag="reply.released"):
    """The lease was held and is free."""


class NotHeld(Reply, frozen=True, gc=False, tag="reply.not_held"):
    """There is no such lease any more: it ran out, was released, or was lost to an invalidation."""


class GetOrLease(
    IdempotentRequest[Found | Stale | LeaseGranted | Loading], frozen=True, gc=False, tag="lease.get_or_lease"
):
    """Read one key; if it has no live value, ask for the right to load it. It counts neither as hit nor as miss.

    `token` names the question, and is used once: asked twice, the same lease is granted twice while it is held, and another
    one once it was lost. The lease is lost after `lease_ttl` seconds unless renewed, and to a delete, a clear, a plain write of
    the key, or the invalidation of one of `tags`. A caller that is not granted it may wait for up to `wait` seconds: for the
    value, or for the lease if its holder gives up. `owner` is a process, or a part of one, that shares loads within itself: it
    never waits for itself. With `refresh` a live value is reloaded, unless that is under way.

    A store that neither lets callers wait nor notifies of the end of a lease is asked again and again. `after` is the lease that
    the caller waits for: if the loader of that one has failed, the reply is the error `LoaderFailed`.
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
    """Wait for up to `wait` seconds until the lease `token` of a key, which another caller holds, has ended.

    The reply is `NotHeld`, or `Loading` when time is up, or the error `LoaderFailed` if the loader has failed. A store that lets
    callers wait with `GetOrLease`, or has no notifications, refuses it with `CapabilityError`.
    """

    key: str
    token: str
    wait: float


class RenewLease(IdempotentRequest[Renewed | NotHeld], frozen=True, gc=False, tag="lease.renew"):
    """Hold a lease for `lease_ttl` seconds from now."""

    key: str
    token: str
    lease_ttl: float


class ReleaseLease(IdempotentRequest[Released | NotHeld], frozen=True, tag="lease.release"):
    """Release a lease, without a value to store. `token` is its name, or, if no answer came, the token of the question.

    The waiters get `late`, a value that is not to be stored; or `LoaderFailed`, if `error` names the type of an exception; or else
    one of them gets the lease.
    """

    key: str
    token: str
    error: str = ""
    late: Found | None = None
