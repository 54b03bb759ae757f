"""From requests to Redis commands and back: a batch becomes as few commands as keep its order.

Neighbouring reads become one `MGET`, in which equal keys share a place; neighbouring writes become one call of a
script. In a cluster a command is about keys of one slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from cachebus.messages import (
    Add,
    CacheError,
    CompareAndSet,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    Reply,
    Request,
    Set,
    SetMany,
    StoredMany,
)

from .redis_commands import Command
from .redis_counters import Counters
from .redis_leases import commit_call
from .redis_reads import Gets, Reads
from .redis_singles import Singles
from .redis_tags import NO_STAMP, TagSpace, pack_tagged
from .redis_values import encode
from .redis_writes import Writes

COMMAND_BYTES = 8 << 20
"""The size at which a writing command takes no more values: a server closes a connection that sends it 1 GiB."""


class Plan(Singles):
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
        super().__init__(len(batch), prefix, default_ttl, space, slot_of, stamps, careful)
        self._batch = batch
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
        if self._slot_of is None and not self._careful and self._only_gets(first, end):
            return
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
        gets = Gets(self.replies, first, keys, places, self._space)
        self.commands.append(gets.command())
        return True

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
