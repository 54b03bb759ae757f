"""Single commands whose answer depends on counters that their script cannot see, because these are in another slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cachebus.messages import CacheError, GetOrLease, NotHeld, RenewLease, Reply

from .forms import unpack_plain
from .redis_commands import Command
from .redis_counters import Counters, Doubt
from .redis_leases import Leases, Parsed
from .redis_tags import Claim, TagSpace, split_tagged
from .redis_values import HEADER, TAGGED

Answer = Callable[[Reply], None]
Put = Callable[[bool], None]
Fail = Callable[[CacheError], None]
Again = Callable[[bytes], Command]
"""Makes the command once more, with what is known of the counters."""


def _claim_of(raw: Any) -> Claim | None:
    """What an entry is valid by, if it has tags. Raises `CacheSerializationError`."""
    tagged = type(raw) is bytes and len(raw) > HEADER.size and raw[HEADER.size] == TAGGED
    return split_tagged(raw)[0] if tagged else None


def _declared(stamp: bytes, tags: bytes) -> Claim | None:
    return Claim(stamp, tuple(unpack_plain(tags))) if tags else None


def settle_lease(
    request: Leases, reply: Any, now: float, make: Parsed, put: Answer, fail: Fail, again: Again, space: TagSpace
) -> Sequence[Command]:
    """Take in the reply to a question about a lease: answer it, or say what has to be sent first."""
    if type(request) is RenewLease:
        return _settle_renewal(reply, now, make, put, fail, space)
    if not isinstance(request, GetOrLease):
        put(make(reply, now))
        return ()
    kind = reply[0]
    # What it is about, whose loss makes the question one to be asked again; and what is served stale.
    about = _declared(reply[4], reply[5]) if kind == 2 else _claim_of(reply[1]) if kind == 0 else None
    stale = _claim_of(reply[3] if kind == 2 else reply[1]) if kind else None
    if about is None and stale is None:
        put(make(reply, now))
        return ()
    claims = [each for each in (about, stale) if each is not None]

    def decide(holds: Sequence[bool]) -> Command | None:
        if about is not None and not holds[0]:
            return again(about.verdict(False))
        if stale is not None and not holds[-1]:
            reply[3 if kind == 2 else 1] = b""
        put(make(reply, now))
        return None

    return Counters(space).judge([Doubt(claims, decide, fail)])


def _settle_renewal(
    reply: Any, now: float, make: Parsed, put: Answer, fail: Fail, space: TagSpace
) -> Sequence[Command]:
    if isinstance(reply, int):
        put(make(reply, now))
        return ()
    claim = Claim(reply[0], tuple(unpack_plain(reply[1])))

    def decide(holds: Sequence[bool]) -> None:
        put(make(1, now) if holds[0] else NotHeld())

    return Counters(space).judge([Doubt((claim,), decide, fail)])


def settle_head(
    head: bytes, put: Put | None, fail: Fail, again: Again | None, space: TagSpace, px: str | None = None
) -> Sequence[Command]:
    """Find out about the entry whose head was the reply: tell `put` that it is valid, or that it is not; or send the command
    once more, if there is one for that. With `px` the counters are kept for so many milliseconds."""
    try:
        claim = _claim_of(head)
    except CacheError as error:
        fail(error)
        return ()
    if claim is None:
        claim = Claim(b"", ())

    def decide(holds: Sequence[bool]) -> Command | None:
        if again is not None and (holds[0] or put is None):
            return again(claim.verdict(holds[0]))
        if put is not None:
            put(holds[0])
        return None

    return Counters(space, ordered=again is not None, px=px).judge([Doubt((claim,), decide, fail)])
