"""Translation of a batch of requests into as few Redis commands as possible, in the same order.

Adjacent reads become one `MGET`, in which equal keys are sent once. Adjacent writes become one script call. In a
cluster, all keys of a command are in one slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeAlias, cast

import hiredis

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
    NotHeld,
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

from .commands import Command, Fail, ScriptCall, Settle, failing
from .connection import Argument
from .entry import (
    MISSING,
    NO_STAMP,
    TagSpace,
    encode,
    milliseconds,
    new_epoch,
    pack_tagged,
    pack_tags,
    read_head,
    split_tagged,
    tag_stamp_of,
)
from .errors import translate
from .leases import Leases, commit_call, lease_call
from .rate_limits import admit_call
from .runs import COMMAND_BYTES, Counters, PendingTagCheck, Reads, Write, Writes, condition_of, lease_tag_stamps
from .scan import matching, scan_words
from .scripts import INCREMENT, INVALIDATE, PEEK, TOUCH, Script

Make: TypeAlias = "Callable[[Any, float], Reply | list[Command]]"
"""Converts the reply of a command, at a server time in seconds, into the reply to its request or follow-up commands."""


class Plan:
    """Commands for a batch, and its replies so far.

    `replies` is filled as `commands` are answered; a request that is not valid has its reply at once. `group` maps a
    key to the number of a group, and a command has keys of one group only. In a cluster, scripts cannot read the
    counters of `space`; `stamps` holds the values read before, by position in the batch. `checked` overrides whether
    reads omit entries with invalidated tags. `call` turns requests into scripts for stores other than a cache.
    """

    def __init__(
        self,
        batch: Sequence[Request[Any]],
        prefix: str,
        default_ttl: float | None,
        space: TagSpace,
        group: Callable[[str], int] = lambda name: 0,
        *,
        stamps: Mapping[int, bytes | CacheError] | None = None,
        checked: bool | None = None,
        call: Callable[[Request[Any]], ScriptCall] | None = None,
    ) -> None:
        self.replies: list[Any] = [None] * len(batch)
        self.commands: list[Command] = []
        self._batch = batch
        self._prefix = prefix
        self._default_px = milliseconds(default_ttl)
        self._space = space
        self._group = group
        self._stamps = stamps or {}
        self._checked = space.here and space.seen if checked is None else checked
        self._call = call
        families = [_FAMILIES.get(type(request)) for request in batch]
        for family, run in groupby(enumerate(families), itemgetter(1)):
            positions = [position for position, _ in run]
            if family == "read":
                self._reads(positions)
            elif family == "write":
                self._writes(positions)
            else:
                for position in positions:
                    try:
                        self.commands += self._single(position, batch[position])
                    except CacheError as error:
                        self.replies[position] = Failed.of(error)

    def done(self) -> Sequence[Reply]:
        """Return the replies, in the order of the requests."""
        return [FoundMany(cast("dict[str, Found]", each)) if type(each) is dict else each for each in self.replies]

    # Runs

    def _reads(self, positions: Sequence[int]) -> None:
        groups: dict[int, Reads] = {}
        counters, hints = Counters(self._space), self._space.hints
        hinted, bare = self._space.seen and not self._space.here, len(self._prefix)
        for position in positions:
            request: Any = self._batch[position]
            try:
                if type(request) is Get:
                    wanted = [self._key(request.key)]
                else:
                    wanted = [self._key(key) for key in request.keys]
                    self.replies[position] = {}  # Becomes a `FoundMany` in `done`.
            except CacheError as error:
                self.replies[position] = Failed.of(error)
                continue
            for key in wanted:
                group = self._group(key)
                reads = groups.get(group)
                if reads is None:
                    reads = groups[group] = Reads(self.replies, bare, self._space, counters, self._checked)
                reads.want(position, key)
                if hinted:
                    counters.want(hints.get(key[bare:], ()))
        self.commands += (reads.command() for reads in groups.values())
        if (command := counters.command()) is not None:
            self.commands.append(command)

    def _writes(self, positions: Sequence[int]) -> None:
        groups: dict[int, Writes] = {}
        calls: list[Writes | Command] = []
        for position in positions:
            request: Any = self._batch[position]
            try:
                tags, px = request.tags, self._px(request.ttl)
                stamp = self._stamp(position, tags) if tags else NO_STAMP
                many = isinstance(request, SetMany)
                items = request.items if many else {request.key: request.value}
                encoded = [(self._key(key), encode(value)) for key, value in items.items()]
                if isinstance(request, Set) and request.lease is not None:
                    (name, body), groups = encoded[0], {}
                    call = commit_call(request, name, body, px, stamp, self._space.here)
                    calls.append(self._command(position, *call, writes=True))
                    continue
                if tags:
                    encoded = [(name, pack_tagged(body, tags, stamp)) for name, body in encoded]
            except CacheError as error:
                self.replies[position] = Failed.of(error)
                continue
            if many:
                self.replies[position] = StoredMany(len(encoded))
            condition = condition_of(request)
            for key, body in encoded:
                group = self._group(key)
                writes = groups.get(group)
                if writes is None or writes.size + len(body) > COMMAND_BYTES:
                    writes = groups[group] = Writes(self.replies, self._space)
                    calls.append(writes)
                writes.add(Write(-1 - position if many else position, key, body, px, condition))
                writes.tagged = writes.tagged or bool(tags)
        self.commands += (each if isinstance(each, Command) else each.command() for each in calls)

    # Keys, times and stamps

    def _key(self, key: str) -> str:
        if not key.isascii():
            try:
                key.encode()
            except UnicodeEncodeError:
                raise CacheKeyError("a cache key must be valid Unicode", ascii(key)[:60]) from None
        return self._prefix + key

    def _px(self, ttl: Ttl) -> str:
        return self._default_px if ttl == "default" else milliseconds(ttl)

    def _stamp(self, at: int, tags: Sequence[str]) -> bytes:
        """Return the 16 bytes about tags that a request sends.

        In a cluster, this is the stamp read before; otherwise, the epoch to use if the sequence is missing.
        """
        if self._space.here:
            return self._space.new_stamp(tags)
        stamp = self._stamps.get(at, NO_STAMP)
        if isinstance(stamp, CacheError):
            raise stamp
        return stamp

    # Requests with a command of their own

    def _single(self, at: int, request: Request[Any]) -> Sequence[Command]:
        if self._call is not None:
            return [self._command(at, *self._call(request))]
        match request:
            case Exists(key=key):
                return [self._exists(at, self._key(key))]
            case Touch(key=key, ttl=ttl):
                return [self._touch(at, self._key(key), self._px(ttl))]
            case Increment():
                return [self._increment(at, request)]
            case Delete(key=key):
                name = self._key(key)
                return [self._command(at, ["UNLINK", name], name, lambda reply, _: Deleted(reply))]
            case DeleteMany(keys=keys):
                return self._delete_many(at, keys)
            case GetOrLease() | RenewLease() | ReleaseLease():
                return [self._lease(at, request)]
            case InvalidateTags(tags=tags):
                return self._invalidate(at, tags)
            case Admit(key=key):
                self._key(key)
                return [self._command(at, *admit_call(request, self._prefix), writes=True)]
            case Scan(pattern=pattern, cursor=cursor):
                return [self._scan(at, pattern, cursor)]
            case _:
                raise CapabilityError(store="redis", capability=type(request).__name__)

    def _command(
        self, at: int, words: list[Argument], key: str, make: Make, script: Script | None = None, **more: Any
    ) -> Command:
        def settle(reply: Any, now: float) -> Sequence[Command]:
            made = make(reply, now)
            if isinstance(made, list):
                return made
            self.replies[at] = made
            return ()

        return Command(words, key, settle, failing(self.replies, at), script, **more)

    def _delete_many(self, at: int, keys: Sequence[str]) -> Sequence[Command]:
        groups: dict[int, dict[str, None]] = {}
        for key in keys:
            name = self._key(key)
            groups.setdefault(self._group(name), {})[name] = None
        self.replies[at] = Deleted(0)

        def settle(reply: Any, now: float) -> None:
            so_far = self.replies[at]
            if isinstance(so_far, Deleted):
                self.replies[at] = Deleted(so_far.count + reply)

        return [_unlink(list(names), settle, failing(self.replies, at)) for names in groups.values()]

    def _invalidate(self, at: int, tags: Sequence[str]) -> Sequence[Command]:
        pack_tags(tags)  # Raises if a tag is not valid Unicode.
        if not tags:
            self.replies[at] = Invalidated()
            return ()
        self._space.seen = True
        names = [self._space.sequence, *(self._space.counter(tag) for tag in dict.fromkeys(tags))]
        words: list[Argument] = [len(names), *names, new_epoch()]
        return [self._command(at, words, names[0], lambda reply, now: Invalidated(), INVALIDATE)]

    def _scan(self, at: int, pattern: str, cursor: str) -> Command:
        if cursor and not (cursor.isascii() and cursor.isdigit()):
            raise BadMessage(f"the cursor must come from a previous scan, not {cursor[:40]!r}")
        prefix = self._prefix

        def page(reply: Any, now: float) -> Reply:
            following, names = reply
            return Scanned(tuple(matching(names, prefix, pattern)), "" if following == b"0" else following.decode())

        return self._command(at, scan_words(prefix, pattern, cursor or "0"), "", page)

    # Requests that may depend on tags. In a cluster, scripts cannot read the counters

    def _exists(self, at: int, name: str) -> Command:
        here = self._space.here

        def make(head: Any, now: float) -> Reply | list[Command]:
            tag_stamp = None if here else tag_stamp_of(head)
            if tag_stamp is None:
                return read_head(head, now)

            def decide(holds: Sequence[bool]) -> Reply:
                return read_head(head, now) if holds[0] else MISSING

            return Counters(self._space).judge([PendingTagCheck([tag_stamp], decide, self.replies, at)])

        return self._command(at, [1, name], name, make, PEEK.at(here))

    def _touch(self, at: int, name: str, px: str) -> Command:
        def read(version: Any) -> Reply | bytes:
            if type(version) is bytes:
                return version
            return Present(float(version), int(px) / 1000 if px else None) if version else MISSING

        return self._tagged(at, [1, name, px], name, TOUCH.at(self._space.here), read, px=px)

    def _increment(self, at: int, request: Increment) -> Command:
        start = "" if request.initial is None else str(request.initial + request.delta)
        for number in (start, str(request.delta)):
            if number and not -(2**63) <= int(number) < 2**63:
                raise translate(hiredis.ReplyError("OUTOFRANGE"))

        def read(reply: Any) -> Reply | bytes:
            if isinstance(reply, list):
                return cast("bytes", reply[0])
            return MISSING if reply is None else Incremented(int(reply))

        name = self._key(request.key)
        words: list[Argument] = [1, name, str(request.delta), start, self._px(request.ttl)]
        return self._tagged(at, words, name, INCREMENT.at(self._space.here), read, writes=True)

    def _tagged(
        self,
        at: int,
        words: list[Argument],
        key: str,
        script: Script,
        read: Callable[[Any], Reply | bytes],
        *,
        verdict: bytes = b"",
        px: str | None = None,
        writes: bool = False,
    ) -> Command:
        """Build a command whose reply `read` converts into a reply, or into the head of an entry with tags.

        In the second case the command is sent again with a verdict on the tags. A touch, which has a `px`, is sent
        again only if the entry is valid.
        """

        def make(reply: Any, now: float) -> Reply | list[Command]:
            head = read(reply)
            if not isinstance(head, bytes):
                return head
            tag_stamp, _ = split_tagged(head)

            def decide(holds: Sequence[bool]) -> Reply | Command:
                if px is not None and not holds[0]:
                    return MISSING
                known = tag_stamp.verdict(holds[0])
                return self._tagged(at, words, key, script, read, verdict=known, px=px, writes=writes)

            return Counters(self._space, ordered=True, px=px).judge(
                [PendingTagCheck([tag_stamp], decide, self.replies, at)]
            )

        sent = words if self._space.here else [*words, verdict]
        return self._command(at, sent, key, make, script, writes=writes, ordered=bool(verdict))

    def _lease(self, at: int, request: Leases, verdict: bytes = b"") -> Command:
        name, here = self._key(request.key), self._space.here
        stamp = self._stamp(at, request.tags) if isinstance(request, GetOrLease) else NO_STAMP
        words, name, read, script = lease_call(request, name, stamp, None if here else verdict)

        def make(reply: Any, now: float) -> list[Command]:
            about, stale = lease_tag_stamps(request, reply)

            def decide(holds: Sequence[bool]) -> Reply | Command:
                if about is not None and not holds[0]:
                    again = isinstance(request, GetOrLease)
                    return self._lease(at, request, about.verdict(False)) if again else NotHeld()
                if stale is not None and not holds[-1]:
                    reply[3 if reply[0] == 2 else 1] = b""
                return read(reply, now)

            tag_stamps = [tag_stamp for tag_stamp in (about, stale) if tag_stamp is not None]
            return Counters(self._space).judge([PendingTagCheck(tag_stamps, decide, self.replies, at)])

        return self._command(at, words, name, read if here else make, script)


_FAMILIES: dict[type[Request[Any]], str] = {
    **dict.fromkeys((Get, GetMany), "read"),
    **dict.fromkeys((Set, Add, CompareAndSet, SetMany), "write"),
}


def _unlink(names: Sequence[str], settle: Settle, fail: Fail) -> Command:
    def parts() -> list[Command]:
        return [_unlink([name], settle, fail) for name in names]

    return Command(["UNLINK", *names], names[0], settle, fail, parts=parts if len(names) > 1 else None)
