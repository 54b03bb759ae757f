"""From requests to Redis commands and back: a batch becomes as few commands as keep its order.

Neighbouring reads become one `MGET`, in which equal keys share a place; neighbouring writes become one call of a
script. In a cluster a command is about keys of one slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import hiredis

from cachebus.actors.ports import Capabilities
from cachebus.messages import (
    Add,
    Admit,
    BadMessage,
    CacheError,
    CacheKeyError,
    CapabilityError,
    CompareAndSet,
    Delete,
    Deleted,
    DeleteMany,
    Exists,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    Incremented,
    Invalidated,
    InvalidateTags,
    Present,
    ReleaseLease,
    RenewLease,
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

from .redis_commands import Command, Settle, unlink
from .redis_connection import Argument
from .redis_counters import Counters, settle_head, settle_lease
from .redis_errors import translate
from .redis_leases import Leases, commit_call, lease_call
from .redis_rates import admit_call, limit_name
from .redis_reads import Reads
from .redis_script import Script
from .redis_scripts import INCREMENT, TOUCH
from .redis_tag_scripts import INVALIDATE, PEEK
from .redis_tags import NO_STAMP, TagSpace, new_epoch, pack_tagged, pack_tags, split_tagged
from .redis_values import HEADER, LEASE, LOADED, MISSING, TAGGED, VALUE_MAX, encode, left, milliseconds
from .redis_walk import matching, scan_words
from .redis_writes import Writes

CAPABILITIES = Capabilities(
    patterns=True,
    tags=True,
    compare_and_set=True,
    counters=True,
    leases=True,
    rate_limits=True,
    locks=True,
    max_value_bytes=VALUE_MAX,
)
"""What a Redis server and a cluster can do."""

COMMAND_BYTES = 8 << 20
"""The size at which a writing command takes no more values: a server closes a connection that sends it 1 GiB."""


class Plan:
    """A batch under way. `replies` fills up as `commands` are answered; what is refused outright is there at once.

    Keys that are no valid Unicode show when the commands are packed; a `careful` plan finds them, one by one.
    `slot_of` is the cluster's rule of which keys go together; `None` outside of a cluster. There the counters of `space`
    are out of the scripts' reach, and `stamps` says what was read of them before, by the place of the request.
    """

    def __init__(
        self,
        batch: Sequence[Request[Any]],
        prefix: str,
        default_ttl: float | None,
        space: TagSpace,
        slot_of: Callable[[str], int] | None = None,
        *,
        stamps: Mapping[int, bytes | CacheError] | None = None,
        careful: bool = False,
    ) -> None:
        self.replies: list[Any] = [None] * len(batch)
        self.commands: list[Command] = []
        self._batch = batch
        self._prefix = prefix
        self._default_px = milliseconds(default_ttl)
        self._space = space
        self._slot_of = slot_of
        self._stamps = stamps or {}
        self._careful = careful
        self._build()

    def done(self) -> Sequence[Reply]:
        """The replies, in the order of the requests."""
        return [FoundMany(cast("dict[str, Found]", each)) if type(each) is dict else each for each in self.replies]

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

    # Runs of reads

    def _reads(self, first: int, end: int) -> None:
        groups: dict[int, Reads] = {}
        counters, hint = Counters(self._space), self._space.hint
        hinted, bare = self._space.seen and not self._space.here, len(self._prefix)
        for position in range(first, end):
            request: Any = self._batch[position]
            try:
                if type(request) is Get:
                    wanted = [self._key(request.key)]
                else:
                    wanted = [self._key(key) for key in request.keys]
                    self.replies[position] = {}  # A `FoundMany` when it is done.
            except CacheError as error:
                self.replies[position] = Failed.of(error)
                continue
            for key in wanted:
                group = self._group(key)
                reads = groups.get(group)
                if reads is None:
                    reads = groups[group] = Reads(self.replies, bare, self._space, counters)
                reads.want(position, key)
                if hinted:
                    counters.want(hint(key[bare:]))
        self.commands += (reads.command() for reads in groups.values())
        if (command := counters.command()) is not None:
            self.commands.append(command)

    # Runs of writes

    def _writes(self, first: int, end: int) -> None:
        groups: dict[int, Writes] = {}
        calls: list[Writes | Command] = []
        for position in range(first, end):
            request: Any = self._batch[position]
            try:
                tags, px = request.tags, self._px(request.ttl)
                stamp = self._stamp(position, tags) if tags else NO_STAMP
                many = isinstance(request, SetMany)
                items = request.items if many else {request.key: request.value}
                encoded = [(self._key(key), encode(value)) for key, value in items.items()]
                if isinstance(request, Set) and request.lease is not None:
                    (name, body), groups = encoded[0], {}
                    words, script, make = commit_call(request, name, body, px, stamp, self._space.here)
                    calls.append(self._command(position, words, name, make, script=script, writes=True))
                    continue
                if tags:
                    encoded = [(name, pack_tagged(body, tags, stamp)) for name, body in encoded]
            except CacheError as error:
                self.replies[position] = Failed.of(error)
                continue
            if many:
                self.replies[position] = StoredMany(len(encoded))
            condition = _condition(request)
            for key, body in encoded:
                group = self._group(key)
                writes = groups.get(group)
                if writes is None or writes.size + len(body) > COMMAND_BYTES:
                    writes = groups[group] = Writes(self.replies, self._space)
                    calls.append(writes)
                writes.add(-1 - position if many else position, key, body, px, condition)
                if tags:
                    writes.tagged = True
        self.commands += (call if isinstance(call, Command) else call.command() for call in calls)

    # Keys, times and stamps

    def _key(self, key: str) -> str:
        if self._careful:
            try:
                key.encode()
            except UnicodeEncodeError:
                raise CacheKeyError("a cache key must be valid Unicode", ascii(key)[:60]) from None
        return self._prefix + key

    def _group(self, key: str) -> int:
        return 0 if self._slot_of is None else self._slot_of(key)

    def _px(self, ttl: Ttl) -> str:
        return self._default_px if ttl == "default" else milliseconds(ttl)

    def _stamp(self, at: int, tags: Sequence[str]) -> bytes:
        """The 16 bytes that a request with tags begins with: of the counters as they were, in a cluster, and elsewhere an
        epoch for a sequence that is not there."""
        if not self._space.here:
            stamp = self._stamps.get(at, NO_STAMP)
            if isinstance(stamp, CacheError):
                raise stamp
            return stamp
        return self._space.new_stamp(tags)

    # Single commands

    def _one(self, at: int, request: Request[Any]) -> None:
        match request:
            case Exists(key=key):
                self._exists(at, self._key(key))
            case Touch(key=key, ttl=ttl):
                self.commands.append(self._touch(at, self._key(key), self._px(ttl)))
            case Increment():
                self._increment(at, request)
            case Delete(key=key):
                name = self._key(key)
                self._add(at, ["UNLINK", name], name, lambda reply, _: Deleted(reply))
            case DeleteMany(keys=keys):
                self._delete_many(at, keys)
            case GetOrLease() | RenewLease() | ReleaseLease():
                self.commands.append(self._lease(at, request, b""))
            case InvalidateTags(tags=tags):
                self._invalidate(at, tags)
            case Admit(key=key):
                self._key(key)
                name = limit_name(self._prefix, key)
                words, script, make = admit_call(request, name)
                self.commands.append(self._command(at, words, name, make, script=script, writes=True))
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
    ) -> None:
        self.commands.append(self._command(at, words, key, make, script=script))

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

        return Command(words, key, settle, self._fails(at), script=script, writes=writes)

    def _fails(self, at: int) -> Callable[[CacheError], None]:
        def fail(error: CacheError) -> None:
            self.replies[at] = Failed.of(error)

        return fail

    # What may depend on tags

    def _exists(self, at: int, name: str) -> None:
        def settle(head: Any, now: float) -> Sequence[Command]:
            def put(is_valid: bool) -> None:
                self.replies[at] = _present(head, now) if is_valid else MISSING

            if self._space.here or len(head) <= HEADER.size:
                put(True)
                return ()
            return settle_head(head, put, self._fails(at), None, self._space)

        self.commands.append(Command([1, name], name, settle, self._fails(at), script=PEEK.at(self._space.here)))

    def _touch(self, at: int, name: str, px: str, verdict: bytes = b"") -> Command:
        ttl = int(px) / 1000 if px else None

        def settle(version: Any, now: float) -> Sequence[Command]:
            if type(version) is bytes:
                return settle_head(version, put, self._fails(at), again, self._space, px)
            self.replies[at] = Present(float(version), ttl) if version else MISSING
            return ()

        def put(is_valid: bool) -> None:
            self.replies[at] = MISSING

        def again(verdict: bytes) -> Command:
            return self._touch(at, name, px, verdict)

        return self._judged([1, name, px], name, settle, at, TOUCH.at(self._space.here), verdict)

    def _lease(self, at: int, request: Leases, verdict: bytes) -> Command:
        name = self._key(request.key)
        stamp = self._stamp(at, request.tags) if isinstance(request, GetOrLease) else NO_STAMP
        here = self._space.here
        words, script, make = lease_call(request, name, stamp, None if here else verdict)
        if here:
            return self._command(at, words, name, make, script=script)

        def put(reply: Reply) -> None:
            self.replies[at] = reply

        def settle(reply: Any, now: float) -> Sequence[Command]:
            return settle_lease(
                request,
                reply,
                now,
                make,
                put,
                self._fails(at),
                lambda verdict: self._lease(at, request, verdict),
                self._space,
            )

        return Command(words, name, settle, self._fails(at), script=script)

    def _invalidate(self, at: int, tags: Sequence[str]) -> None:
        pack_tags(tags)  # Refused, if one is no valid Unicode.
        if not tags:
            self.replies[at] = Invalidated()
            return
        self._space.seen = True
        names = [self._space.sequence, *(self._space.counter(tag) for tag in dict.fromkeys(tags))]
        words: list[Argument] = [len(names), *names, new_epoch()]
        self._add(at, words, names[0], lambda reply, now: Invalidated(), script=INVALIDATE)

    def _judged(
        self,
        words: list[Argument],
        key: str,
        settle: Settle,
        at: int,
        script: Script,
        verdict: bytes,
        writes: bool = False,
    ) -> Command:
        """A command whose script is told what is known of the counters, if it cannot look for itself."""
        if not self._space.here:
            words = [*words, verdict]
        ordered = bool(verdict)
        return Command(words, key, settle, self._fails(at), script=script, writes=writes, ordered=ordered)

    def _increment(self, at: int, request: Increment) -> None:
        name = self._key(request.key)
        start = "" if request.initial is None else str(request.initial + request.delta)
        for number in (start, str(request.delta)):
            if number and not -(2**63) <= int(number) < 2**63:
                raise translate(hiredis.ReplyError("OUTOFRANGE"))
        words: list[Argument] = [1, name, str(request.delta), start, self._px(request.ttl)]
        self.commands.append(self._count(at, words, name, b""))

    def _count(self, at: int, words: list[Argument], name: str, verdict: bytes) -> Command:
        def settle(reply: Any, now: float) -> Sequence[Command]:
            if reply is not None and not isinstance(reply, bytes):
                return settle_head(reply[0], None, self._fails(at), again, self._space)
            self.replies[at] = MISSING if reply is None else Incremented(int(reply))
            return ()

        def again(verdict: bytes) -> Command:
            return self._count(at, words, name, verdict)

        return self._judged(words, name, settle, at, INCREMENT.at(self._space.here), verdict, writes=True)

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


_FAMILIES: dict[type[Request[Any]], str] = {
    Get: "read",
    GetMany: "read",
    Set: "write",
    Add: "write",
    CompareAndSet: "write",
    SetMany: "write",
}


def _present(reply: Any, now: float) -> Reply:
    if len(reply) > HEADER.size and reply[HEADER.size] == TAGGED:
        reply = split_tagged(reply)[1]
    if len(reply) <= HEADER.size or reply[HEADER.size] == LEASE:
        return MISSING
    version, expiry = HEADER.unpack_from(reply)
    # Of what is loaded Redis does not say whether it is only kept to be served stale. Of all else it does, and our idea of its
    # clock may be ahead of it.
    if reply[HEADER.size] == LOADED and expiry and expiry * 1e-3 <= now:
        return MISSING
    return Present(version, left(expiry, now) if expiry else None)
