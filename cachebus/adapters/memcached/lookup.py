"""Reading a key before it is updated: its entry, its lease, a stale value, and the generations of its tags.

The lease of a key is stored under the key itself. So writing or removing the key, or clearing the namespace, revokes
it.

If the value is missing or expired, the lease is an entry with type tag `l`. Its expiry is always in the past, so
readers find no value. It contains, as MessagePack:

    token       token of the lease: the requested name, a dot and a nonce
    deadline    end of the lease: Unix time of the server in seconds
    version     version of the live value that is being refreshed; 0 if there is no live value
    all tags    the generation of all tags when the lease was granted
    tags        the tags that were known at that time, with their generations
    stale       the expired entry, unchanged, with its version; empty if there is none
    failed      the name of the last lease whose loader failed, and the name of the error; empty if there is none

If the loader fails, its lease remains for `FAILURE_SHOWN` seconds with the deadline 0, so that waiters see the
failure. If a live value is being refreshed, it stays in place, and its lease is a separate item with the version of
that value.

The deadline is relative to the server's clock, as each client estimates it. Only the number of loads depends on it. A
value replaces exactly the item that was read, by its CAS token, so the holder of a lost lease stores nothing.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import msgspec

from cachebus.messages import CacheError, Failed, GetOrLease, ReleaseLease, RenewLease, Request, Set

from .cas_updates import Item
from .connection import MISS, Answer, Exchange, read
from .entry import Entry, Instant, TagVersions, kept_until, pack, pack_entry, read_entry, unpack
from .keys import ALL_TAGS
from .session import Generations, Session
from .values import content_of, entry_of

LEASE = b"l"[0]
_OVER = 1.0
"""An expiry that is in the past for every reader, regardless of its clock."""
FAILURE_SHOWN = 5.0
"""Seconds for which the failure of a loader remains visible: many times the polling interval of a waiter."""


class Held(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A lease as it is stored in the server."""

    token: str
    deadline: Instant
    version: Instant
    all_tags: bytes
    tags: TagVersions
    stale: bytes
    failed: tuple[str, str]

    @property
    def ended(self) -> bool:
        """True if the loader has failed, so the lease is free."""
        return not self.deadline

    def item(self, kept: bytes, stale: bytes) -> bytes:
        """Return the bytes of the lease's item, with the given stale entry."""
        return pack_entry(b"l" + pack(msgspec.structs.replace(self, stale=stale)), kept, _OVER, 0.0)


def held_of(entry: Entry | None) -> Held | None:
    """Return the lease that an entry holds, or `None` if it is not a lease or is damaged."""
    try:
        return unpack(entry.body, Held) if entry is not None and entry.form == LEASE else None
    except ValueError:
        return None


@dataclass(slots=True, eq=False)
class KeyItem(Item):
    """The state of a key.

    * `entry` is the stored entry, or `error` is set if the item was not written by this package.
    * `held` is the lease in the place of a value, `refresh_held` the lease of a live value.
    * `served` is the entry that may be served, live or stale; `content` is the type tag and the bytes of its value.
    """

    tail: str
    kept: bytes
    refresh: str = ""
    answer: Answer = MISS
    refresh_answer: Answer = MISS
    entry: Entry | None = None
    error: CacheError | None = None
    held: Held | None = None
    refresh_held: Held | None = None
    served: Entry | None = None
    content: Any = None


class Lookup:
    """The items read in one round. `head` is the prefix of item names, `now` the server's time."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.head = ""
        self.now = 0.0
        self.generations = Generations(session)
        self._connection = session.connection
        self._keys = session.keys

    def read(self, waiting: list[tuple[int, Request[Any]]], replies: list[Any]) -> Exchange[list[tuple[int, KeyItem]]]:
        """Read the items of requests. If a key is not valid, its request gets a reply. Raises `NamespaceChanged`."""
        self.head = yield from self.session.head()
        items: dict[tuple[str, bytes], KeyItem] = {}
        keyed: list[tuple[int, KeyItem]] = []
        tags: dict[str, None] = {}
        served = grants = False
        for position, request in waiting:
            try:
                item = self._item(request, items, tags)
            except CacheError as error:
                replies[position] = Failed.of(error)
                continue
            served = served or isinstance(request, GetOrLease)
            grants = grants or isinstance(request, GetOrLease) or (isinstance(request, Set) and names_lease(request))
            keyed.append((position, item))
        if not items:
            return keyed
        refreshing = [item for item in items.values() if item.refresh]
        names = [*(item.tail for item in items.values()), *(item.refresh for item in refreshing)]
        # The generation of all tags is read last. A load that stores a value with a tag that was not known at the
        # grant must read it after the generation of that tag.
        made = [*tags, ALL_TAGS] if grants else list(tags)
        commands = [read(self.head + name) for name in names] + self.generations.making(self.head, made)
        answers = iter((yield from self.session.ask(commands)))
        for item in items.values():
            item.answer = next(answers)
        for item in refreshing:
            item.refresh_answer = next(answers)
        self.generations.learn_made(made, list(answers))
        self.now = self._connection.now()
        for item in items.values():
            self.take_apart(item)
        yield from self.generations.read(name for item in items.values() for name in self._names(item))
        for item in items.values():
            yield from self._serve(item, with_content=served)
        return keyed

    def _item(self, request: Any, items: dict[tuple[str, bytes], KeyItem], tags: dict[str, None]) -> KeyItem:
        name = self._keys.tail(request.key)
        tags.update(dict.fromkeys(map(self._keys.tag, getattr(request, "tags", ()))))
        item = items.setdefault(name, KeyItem(*name))
        if request.refresh if isinstance(request, GetOrLease) else names_lease(request):
            item.refresh = self._keys.refresh(request.key)
        return item

    def take_apart(self, item: KeyItem) -> None:
        """Decode the answers of a key."""
        served: Entry | None = None
        try:
            served = item.entry = entry_of(self._connection, item.kept, item.answer, 0.0)
        except CacheError as error:
            item.error = error
        item.held = held_of(item.entry)
        with contextlib.suppress(CacheError):
            item.refresh_held = held_of(entry_of(self._connection, item.kept, item.refresh_answer, 0.0))
        if item.held is not None:
            served = None
            with contextlib.suppress(CacheError):  # Damaged, so there is no stale value.
                served = read_entry(item.held.stale, 0, item.kept, 0.0) if item.held.stale else None
        over = served is None or served.form == LEASE or 0 < kept_until(served.expiry, served.metadata) <= self.now
        item.served = None if over else served

    def _serve(self, item: KeyItem, *, with_content: bool) -> Exchange[None]:
        if item.served is not None and not self.generations.good(item.served.metadata.tags):
            item.served = None
        if with_content and item.served is not None:
            try:
                item.content = yield from content_of(self.session, item.served)
            except CacheError as error:
                if self._connection.lost:
                    raise
                item.error = error
            if item.content is None:
                item.served = None

    def _names(self, item: KeyItem) -> tuple[str, ...]:
        holders = [item.held, item.refresh_held, item.served.metadata if item.served is not None else None]
        return self.generations.names(tag for each in holders if each is not None for tag in each.tags)

    def live(self, item: KeyItem) -> Entry | None:
        """Return the entry of a key's live value, or `None`."""
        served = item.served
        if served is None or item.held is not None or 0 < served.expiry <= self.now:
            return None
        return served

    def current(self, held: Held | None) -> bool:
        """True if a lease has neither expired nor been revoked by the invalidation of a tag."""
        return held is not None and held.deadline > self.now and self.generations.good(held.tags)


def names_lease(request: Request[Any]) -> bool:
    """True if a request contains the name of a lease."""
    return isinstance(request, RenewLease | ReleaseLease) or (isinstance(request, Set) and request.lease is not None)
