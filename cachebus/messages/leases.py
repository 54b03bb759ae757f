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
    """How a value came to be, kept with its entry. `load_time` is the seconds that its loader took, `stale_for` the
    seconds after its time to live for which it may be served where nothing fresher is to be had, `etag` its version at
    the source."""

    load_time: float = 0.0
    stale_for: float = 0.0
    etag: str | None = None


class Stale(Reply, frozen=True, tag="reply.stale"):
    """A value whose time to live is over, and that may still be served. `lease` is the token of the load that is under
    way, empty where there is none; `remaining` the seconds that its lease has left. The rest is as in `Loaded`."""

    value: Any
    version: float = 0.0
    tags: tuple[str, ...] = ()
    stored_at: float = 0.0
    load_time: float = 0.0
    etag: str | None = None
    lease: str = ""
    remaining: float = 0.0


class LeaseGranted(Reply, frozen=True, tag="reply.lease_granted"):
    """Whoever asked shall load the value, and store it with `token`, which is the name of this lease and of no other: what
    was asked for, with a nonce of the store's. `stale` is what may be served until then."""

    token: str
    stale: Stale | None = None


class Loading(Reply, frozen=True, gc=False, tag="reply.loading"):
    """Somebody else loads the value, under the lease `token`, which has `remaining` seconds left."""

    token: str
    remaining: float = 0.0


class Renewed(Reply, frozen=True, gc=False, tag="reply.renewed"):
    """The lease is held for `ttl` seconds from now."""

    ttl: float


class Released(Reply, frozen=True, gc=False, tag="reply.released"):
    """The lease was held and is free."""


class NotHeld(Reply, frozen=True, gc=False, tag="reply.not_held"):
    """There is no such lease any more: it ran out, was given back, or was lost to an invalidation."""


class GetOrLease(
    IdempotentRequest[Found | Stale | LeaseGranted | Loading], frozen=True, gc=False, tag="lease.get_or_lease"
):
    """Read one key; where it has no live value, be the one who loads it.

    `token` names the question, and nobody has used it before. The lease is named by it and by a nonce. Asked for twice, the
    same lease is granted twice while it is held, and another one once it was lost. The
    lease is lost after `lease_ttl` seconds unless renewed, and to a delete, a clear, a plain write of the key, or the
    invalidation of one of `tags`. Who is not granted it may wait for up to `wait` seconds: for the value, or for the
    lease if the one who has it gives up. `owner` is a process, or a part of one, that shares loads within itself: it is
    never made to wait for itself. With `refresh` a live value is loaded anew, if nobody does so already.

    Where a store lets nobody wait, and tells nobody of the end of a lease, who waits asks again and again, and says in
    `after` which lease it was told of: if the loader of that one has failed, the reply is the error `LoaderFailed`.

    It counts neither as hit nor as miss.
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
    """Wait for up to `wait` seconds until the lease `token` of a key, which somebody else holds, has ended.

    The reply says no more than that: whoever asked looks what is there now. It is `Loading` when time is up. Where the
    loader has failed, it is the error `LoaderFailed`. A store that lets callers wait with `GetOrLease`, or that hears
    nothing of the end of a lease, refuses it with `CapabilityError`.
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
    """Give a lease back, without a value to store. `token` is its name, or where no answer came, what it was asked for as.

    Those who wait get `late`, a value that is not to be stored; or the error that the loader failed, if `error` is the
    name of what it raised; or else one of them gets the lease.
    """

    key: str
    token: str
    error: str = ""
    late: Found | None = None
