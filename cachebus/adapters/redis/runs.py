"""Runs of adjacent reads or writes: one command for each run, and the replies to its requests.

In a Redis Cluster, tag counters and entries are in different slots. A reply that depends on a counter is a
`PendingTagCheck` until the counter is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from cachebus.messages import (
    Add,
    CacheError,
    CompareAndSet,
    Failed,
    Found,
    GetOrLease,
    Missing,
    NotStored,
    Reply,
    Set,
    Stored,
)

from ..common.encoding import unpack_plain
from .commands import Command
from .connection import Argument
from .entry import HEADER, MISSING, TagSpace, TagStamp, read_entry, split_tagged, tag_stamp_of
from .leases import Leases
from .scripts import KEEP, READ
from .write_script import WRITE

COMMAND_BYTES = 8 << 20
"""Bytes of values above which a write starts another command: a server closes a connection that sends it 1 GiB."""


class PendingTagCheck(NamedTuple):
    """Reply at a position that depends on whether stamps hold.

    `decide` takes one boolean for each stamp. It returns the reply, a command to send, or `None` if it has stored the
    reply.
    """

    tag_stamps: Sequence[TagStamp]
    decide: Callable[[Sequence[bool]], Reply | Command | None]
    replies: list[Any]
    at: int


class Counters(Struct, eq=False):
    """Tag counters that commands of a batch need.

    If the store remembers the tags, their counters are read together with the entries, otherwise afterwards. Counters
    may be read before the entries: an invalidation in between is concurrent with the request, so either result is
    correct. With `px`, the counters are kept for an entry that lives that many milliseconds (`""`: no expiry).
    """

    space: TagSpace
    ordered: bool = False
    px: str | None = None
    asked: dict[str, None] = {}
    known: dict[str, bytes | None] = {}
    left: int = 0
    waiting: list[PendingTagCheck] = []
    error: CacheError | None = None

    def want(self, tags: Sequence[str]) -> None:
        """Request the counters of tags together with the entries."""
        self.asked.update(dict.fromkeys(tags))

    def command(self) -> Command | None:
        """Return the command that reads the requested counters, if any."""
        return self._fetch(list(self.asked)) if self.asked else None

    def judge(self, checks: Sequence[PendingTagCheck]) -> list[Command]:
        """Decide the checks whose counters are known, and return the commands to send."""
        if self.left:
            self.waiting += checks
            return []
        if self.error is not None:
            for check in checks:
                check.replies[check.at] = Failed.of(self.error)
            return []
        tags = (tag for check in checks for tag_stamp in check.tag_stamps for tag in tag_stamp.tags)
        if unknown := dict.fromkeys(tag for tag in tags if tag not in self.known):
            self.waiting += checks
            return [self._fetch(list(unknown))]
        commands: list[Command] = []
        for check in checks:
            decided = check.decide([tag_stamp.holds(self.known) for tag_stamp in check.tag_stamps])
            if isinstance(decided, Command):
                commands.append(decided)
            elif decided is not None:
                check.replies[check.at] = decided
        return commands

    def _fetch(self, tags: list[str]) -> Command:
        self.left += 1
        names = [self.space.counter(tag) for tag in tags]

        def settle(reply: Any, now: float) -> Sequence[Command]:
            self.known.update(zip(tags, reply, strict=True))
            return self._answered()

        def fail(error: CacheError) -> None:
            self.error = error
            self._answered()

        def parts() -> list[Command]:
            self.left -= 1
            return [self._fetch([tag]) for tag in tags]

        script = None if self.px is None else KEEP
        words: list[Argument] = ["MGET", *names] if self.px is None else [len(names), *names, self.px]
        more = parts if len(tags) > 1 else None
        return Command(words, names[0], settle, fail, script=script, parts=more, ordered=self.ordered)

    def _answered(self) -> Sequence[Command]:
        self.left -= 1
        if self.left or not self.waiting:
            return ()
        waiting, self.waiting = self.waiting, []
        return self.judge(waiting)


def lease_tag_stamps(request: Leases, reply: Any) -> tuple[TagStamp | None, TagStamp | None]:
    """Return the two stamps on which a lease reply depends, or `None` for each.

    The first is that of the lease or of the value found. If it does not hold, the request is sent again. The second is
    that of the value served stale.
    """
    if not isinstance(request, GetOrLease):
        return (None if isinstance(reply, int) else _declared(*reply)), None
    kind = reply[0]
    if kind == 2:
        return _declared(reply[4], reply[5]), tag_stamp_of(reply[3])
    return (None, tag_stamp_of(reply[1])) if kind else (tag_stamp_of(reply[1]), None)


def _declared(stamp: bytes, tags: bytes) -> TagStamp | None:
    return TagStamp(stamp, tuple(unpack_plain(tags))) if tags else None


class Reads(Struct, eq=False):
    """Command that reads: an `MGET`, or a script that omits entries with invalidated tags (`checked`).

    `prefix` is the length of the namespace's key prefix. `counters` checks tags when the counters are in another slot.
    """

    replies: list[Any]
    prefix: int
    space: TagSpace
    counters: Counters
    checked: bool
    places: dict[str, int] = {}
    """Position of each key in the command and in its reply."""
    wants: list[tuple[int, str]] = []
    """Pairs of a request's position and a key that it reads."""

    def want(self, position: int, key: str) -> None:
        """Read a key for the request at a position."""
        self.places.setdefault(key, len(self.places))
        self.wants.append((position, key))

    def command(self) -> Command:
        """Return the command for the whole run."""
        parts = self._parts if len(self.places) > 1 else None
        script = READ if self.checked else None
        words: list[Argument] = [len(self.places), *self.places] if self.checked else ["MGET", *self.places]
        return Command(words, next(iter(self.places)), self._settle, self._fail, script=script, parts=parts)

    def _parts(self) -> list[Command]:
        alone = {key: replace(self, places={}, wants=[]) for key in self.places}
        for position, key in self.wants:
            alone[key].want(position, key)
        return [each.command() for each in alone.values()]

    def _settle(self, reply: Any, now: float) -> Sequence[Command]:
        checks: list[PendingTagCheck] = []
        for position, key in self.wants:
            # Decoded once for each request, so that callers do not share a list or a dict.
            tag_stamp, answer = read_entry(reply[self.places[key]], now)
            if tag_stamp is not None:
                self.space.learn(key[self.prefix :], tag_stamp.tags)
                if not self.checked:
                    decide = partial(self._decide, position, key, answer)
                    checks.append(PendingTagCheck((tag_stamp,), decide, self.replies, position))
                    continue
            self._put(position, key, answer)
        return self.counters.judge(checks) if checks else ()

    def _decide(self, position: int, key: str, answer: Found | Missing | Failed, holds: Sequence[bool]) -> None:
        self._put(position, key, answer if holds[0] else MISSING)

    def _put(self, position: int, key: str, answer: Found | Missing | Failed) -> None:
        whole = self.replies[position]
        if whole is None:
            self.replies[position] = answer
        elif type(whole) is dict:
            if isinstance(answer, Found):
                whole[key[self.prefix :]] = answer
            elif answer is not MISSING:
                self.replies[position] = answer

    def _fail(self, error: CacheError) -> None:
        for position, _ in self.wants:
            self.replies[position] = Failed.of(error)


def condition_of(request: Any) -> str:
    """Return the condition of a write, in the form that the script expects."""
    if isinstance(request, Set):
        return request.only_if or ""
    if isinstance(request, CompareAndSet):
        return repr(float(request.version))
    return "absent" if isinstance(request, Add) else ""


class Write(Struct, eq=False):
    """Value to write. A negative `position` is `-1 - position` of a `SetMany`, whose reply is already set."""

    position: int
    key: str
    body: bytes
    px: str
    condition: str


class Writes(Struct, eq=False):
    """One call of the write script. `size` is the bytes of its values; `tagged` is true if some have tags."""

    replies: list[Any]
    space: TagSpace
    items: list[Write] = []
    tagged: bool = False
    size: int = 0

    def add(self, item: Write) -> None:
        """Add a value to the call."""
        self.items.append(item)
        self.size += len(item.body)

    def command(self, verdict: bytes = b"") -> Command:
        """Return the command. `verdict` is the result of a tag check, if the script cannot read the counters."""
        items = self.items
        words: list[Argument] = [len(items), *(item.key for item in items)]
        for item in items:
            words += (item.body, item.px, item.condition)
        if verdict or self.tagged:
            words.append(verdict or "t")
        parts = self._parts if len(items) > 1 else None
        script, ordered = WRITE.at(self.space.here), bool(verdict)
        return Command(words, items[0].key, self._settle, self._fail, script, writes=True, parts=parts, ordered=ordered)

    def _parts(self) -> list[Command]:
        """Return one command for each key; writes of the same key keep their order."""
        alone: dict[str, Writes] = {}
        for item in self.items:
            alone.setdefault(item.key, replace(self, items=[])).items.append(item)
        return [each.command() for each in alone.values()]

    def _settle(self, reply: Any, now: float) -> Sequence[Command]:
        checks: list[PendingTagCheck] = []
        for item, version in zip(self.items, reply, strict=True):
            if type(version) is bytes:
                checks += self._tag_checks(item, version)
            elif item.position >= 0:
                self.replies[item.position] = Stored(float(version)) if version > 0 else NotStored(float(-version))
        return Counters(self.space, ordered=True).judge(checks) if checks else ()

    def _tag_checks(self, item: Write, head: bytes) -> Sequence[PendingTagCheck]:
        """Return a check that repeats the write once the tags of the entry that begins with `head` are checked."""
        try:
            tag_stamp, _ = split_tagged(head)
        except CacheError as error:
            self.replies[item.position] = Failed.of(error)
            return ()

        def decide(holds: Sequence[bool]) -> NotStored | Command:
            version = HEADER.unpack_from(head)[0] if holds[0] else 0.0
            if (
                version
                if item.condition == "absent"
                else not version or item.condition not in ("present", repr(version))
            ):
                return NotStored(version)
            return replace(self, items=[item]).command(tag_stamp.verdict(holds[0]))

        return [PendingTagCheck((tag_stamp,), decide, self.replies, item.position)]

    def _fail(self, error: CacheError) -> None:
        for item in self.items:
            self.replies[item.position if item.position >= 0 else -1 - item.position] = Failed.of(error)
