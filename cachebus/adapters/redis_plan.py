"""From requests to Redis commands and back: a batch becomes as few commands as keep its order.

Neighbouring reads become one `MGET`, in which equal keys share a place; neighbouring writes become one call of a
script. In a cluster a command is about keys of one slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import hiredis

from cachebus.messages import (
    Add,
    Admit,
    BadMessage,
    CacheError,
    CacheKeyError,
    CapabilityError,
    CompareAndSet,
    Counted,
    Delete,
    Deleted,
    DeleteMany,
    Exists,
    Failed,
    FoundMany,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    Present,
    Release,
    Renew,
    Reply,
    Request,
    Scan,
    Scanned,
    Set,
    SetMany,
    StoredMany,
    Touch,
    Ttl,
)

from .redis_commands import Command, Gets, Reads, Writes, unlink
from .redis_connection import Argument
from .redis_errors import translate
from .redis_leases import commit_call, lease_call
from .redis_rates import admit_call, limit_name
from .redis_scripts import INCREMENT, TOUCH, Script
from .redis_values import HEADER, LEASE, LOADED, MISSING, encode, left
from .redis_walk import matching, scan_words

_PX_MAX = 10**15  # 31,000 years; Redis refuses what overflows when it adds the time of day.
COMMAND_BYTES = 8 << 20
"""The size at which a writing command takes no more values: a server closes a connection that sends it 1 GiB."""


class Plan:
    """A batch under way. `replies` fills up as `commands` are answered; what is refused outright is there at once.

    Keys that are no valid Unicode show when the commands are packed; a `careful` plan finds them, one by one.
    `slot_of` is the cluster's rule of which keys go together; `None` outside of a cluster.
    """

    def __init__(
        self,
        batch: Sequence[Request[Any]],
        prefix: str,
        default_ttl: float | None,
        slot_of: Callable[[str], int] | None = None,
        *,
        careful: bool = False,
    ) -> None:
        self.replies: list[Any] = [None] * len(batch)
        self.commands: list[Command] = []
        self._batch = batch
        self._prefix = prefix
        self._default_px = _milliseconds(default_ttl)
        self._slot_of = slot_of
        self._careful = careful
        self._build()

    def done(self) -> Sequence[Reply]:
        """The replies, in the order of the requests."""
        return self.replies

    def packed(self) -> bytes:
        """The commands as bytes. Raises `UnicodeEncodeError` for a key that is no valid Unicode."""
        commands = self.commands
        return commands[0].packed() if len(commands) == 1 else b"".join([each.packed() for each in commands])

    def _build(self) -> None:
        batch, at, end = self._batch, 0, len(self._batch)
        while at < end:
            family = _FAMILIES.get(type(batch[at]))
            first = at
            at += 1
            if family is None:
                try:
                    self._one(first, batch[first])
                except CacheError as error:
                    self.replies[first] = Failed.of(error)
                continue
            while at < end and _FAMILIES.get(type(batch[at])) == family:
                at += 1
            (self._reads if family == "read" else self._writes)(first, at)

    def _key(self, key: str) -> str:
        if self._careful:
            try:
                key.encode()
            except UnicodeEncodeError:
                raise CacheKeyError("a cache key must be valid Unicode", ascii(key)[:60]) from None
        return self._prefix + key

    def _group(self, key: str) -> int:
        return 0 if self._slot_of is None else self._slot_of(key)

    # Runs of reads

    def _reads(self, first: int, end: int) -> None:
        if self._slot_of is None and not self._careful and self._only_gets(first, end):
            return
        groups: dict[int, Reads] = {}
        for position in range(first, end):
            request: Any = self._batch[position]
            try:
                if type(request) is Get:
                    wanted = [self._key(request.key)]
                else:
                    wanted = [self._key(key) for key in request.keys]
                    self.replies[position] = FoundMany({})
            except CacheError as error:
                self.replies[position] = Failed.of(error)
                continue
            for key in wanted:
                group = self._group(key)
                reads = groups.get(group)
                if reads is None:
                    reads = groups[group] = Reads(self.replies, len(self._prefix))
                reads.want(position, key)
        self.commands += (reads.command() for reads in groups.values())

    def _only_gets(self, first: int, end: int) -> bool:
        """The commonest run in its simplest form, which takes a third of the time; `False` if it is not that."""
        prefix, batch = self._prefix, self._batch
        keys: dict[str, int] = {}
        places: list[int] = []
        for position in range(first, end):
            request = batch[position]
            if type(request) is not Get:
                return False
            places.append(keys.setdefault(prefix + request.key, len(keys)))
        gets = Gets(self.replies, first, keys, places)
        self.commands.append(gets.command())
        return True

    # Runs of writes

    def _writes(self, first: int, end: int) -> None:
        groups: dict[int, Writes] = {}
        calls: list[Writes | Command] = []
        for position in range(first, end):
            request: Any = self._batch[position]
            try:
                if request.tags:
                    raise CapabilityError(store="redis", capability="tags")
                many = isinstance(request, SetMany)
                items = request.items if many else {request.key: request.value}
                encoded = [(self._key(key), encode(value)) for key, value in items.items()]
                if isinstance(request, Set) and request.lease is not None:
                    (name, body), groups = encoded[0], {}
                    words, script, make = commit_call(request, name, body, self._px(request.ttl))
                    calls.append(self._command(position, words, name, make, script=script, writes=True))
                    continue
            except CacheError as error:
                self.replies[position] = Failed.of(error)
                continue
            if many:
                self.replies[position] = StoredMany(len(encoded))
            px, condition = self._px(request.ttl), _condition(request)
            for key, body in encoded:
                group = self._group(key)
                writes = groups.get(group)
                if writes is None or writes.size + len(body) > COMMAND_BYTES:
                    writes = groups[group] = Writes(self.replies)
                    calls.append(writes)
                writes.add(-1 - position if many else position, key, body, px, condition)
        self.commands += (call if isinstance(call, Command) else call.command() for call in calls)

    def _px(self, ttl: Ttl) -> str:
        return self._default_px if ttl == "default" else _milliseconds(ttl)

    # Single commands

    def _one(self, at: int, request: Request[Any]) -> None:
        match request:
            case Exists(key=key):
                name = self._key(key)
                self._add(at, ["GETRANGE", name, 0, HEADER.size], name, _present)
            case Touch(key=key, ttl=ttl):
                name, px = self._key(key), self._px(ttl)
                self._add(at, [1, name, px], name, _touched(px), script=TOUCH)
            case Increment():
                self._increment(at, request)
            case Delete(key=key):
                name = self._key(key)
                self._add(at, ["UNLINK", name], name, lambda reply, _: Deleted(reply))
            case DeleteMany(keys=keys):
                self._delete_many(at, keys)
            case GetOrLease() | Renew() | Release():
                name = self._key(request.key)
                words, script, make = lease_call(request, name)
                self._add(at, words, name, make, script=script)
            case Admit(key=key):
                self._key(key)
                name = limit_name(self._prefix, key)
                words, script, make = admit_call(request, name)
                self._add(at, words, name, make, script=script, writes=True)
            case Scan(pattern=pattern, cursor=cursor):
                self._scan(at, pattern, cursor)
            case _:
                raise CapabilityError(store="redis", capability=type(request).__name__)

    def _add(
        self,
        at: int,
        words: list[Argument],
        key: str,
        make: Callable[[Any, float], Reply],
        *,
        script: Script | None = None,
        writes: bool = False,
    ) -> None:
        self.commands.append(self._command(at, words, key, make, script=script, writes=writes))

    def _command(
        self,
        at: int,
        words: list[Argument],
        key: str,
        make: Callable[[Any, float], Reply],
        *,
        script: Script | None = None,
        writes: bool = False,
    ) -> Command:
        def settle(reply: Any, now: float) -> None:
            self.replies[at] = make(reply, now)

        def fail(error: CacheError) -> None:
            self.replies[at] = Failed.of(error)

        return Command(words, key, settle, fail, script=script, writes=writes)

    def _increment(self, at: int, request: Increment) -> None:
        name = self._key(request.key)
        start = "" if request.initial is None else str(request.initial + request.delta)
        for number in (start, str(request.delta)):
            if number and not -(2**63) <= int(number) < 2**63:
                raise translate(hiredis.ReplyError("OUTOFRANGE"))
        words: list[Argument] = [1, name, str(request.delta), start, self._px(request.ttl)]
        self._add(
            at,
            words,
            name,
            lambda reply, _: MISSING if reply is None else Counted(int(reply)),
            script=INCREMENT,
            writes=True,
        )

    def _delete_many(self, at: int, keys: Sequence[str]) -> None:
        groups: dict[int, dict[str, None]] = {}
        for key in keys:
            name = self._key(key)
            groups.setdefault(self._group(name), {})[name] = None
        self.replies[at] = Deleted(0)

        def settle(reply: Any, now: float) -> None:
            so_far = self.replies[at]
            if isinstance(so_far, Deleted):
                self.replies[at] = Deleted(so_far.count + reply)

        def fail(error: CacheError) -> None:
            self.replies[at] = Failed.of(error)

        for names in groups.values():
            self.commands.append(unlink(list(names), settle, fail))

    def _scan(self, at: int, pattern: str, cursor: str) -> None:
        if self._slot_of is not None or (cursor and not (cursor.isascii() and cursor.isdigit())):
            raise BadMessage(f"the cursor {cursor[:40]!r} is none that a scan gave")
        prefix = self._prefix

        def page(reply: Any, now: float) -> Reply:
            following, names = reply
            return Scanned(tuple(matching(names, prefix, pattern)), "" if following == b"0" else following.decode())

        self._add(at, scan_words(prefix, pattern, cursor or "0"), "", page)


def _condition(request: Any) -> str:
    if isinstance(request, Set):
        return request.only_if or ""
    if isinstance(request, Add):
        return "absent"
    if isinstance(request, CompareAndSet):
        return repr(float(request.version))
    return ""


def _milliseconds(ttl: float | None) -> str:
    return "" if ttl is None else str(min(math.ceil(ttl * 1000), _PX_MAX))


def _present(reply: Any, now: float) -> Reply:
    if len(reply) <= HEADER.size or reply[HEADER.size] == LEASE:
        return MISSING
    version, expiry = HEADER.unpack_from(reply)
    # Of what is loaded Redis does not say whether it is only kept to be served stale. Of all else it does, and our idea of its
    # clock may be ahead of it.
    if reply[HEADER.size] == LOADED and expiry and expiry * 1e-3 <= now:
        return MISSING
    return Present(version, left(expiry, now) if expiry else None)


def _touched(px: str) -> Callable[[Any, float], Reply]:
    ttl = int(px) / 1000 if px else None
    return lambda version, _: Present(float(version), ttl) if version else MISSING


_FAMILIES: dict[type[Request[Any]], str] = {
    Get: "read",
    GetMany: "read",
    Set: "write",
    Add: "write",
    CompareAndSet: "write",
    SetMany: "write",
}
