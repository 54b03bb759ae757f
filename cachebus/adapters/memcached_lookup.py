"""Lookups before updates of keys: what is under each key, the lease that this is or that its value has, what may be served,
and the generations of its tags."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from cachebus.messages import CacheError, Failed, GetOrLease, ReleaseLease, RenewLease, Request, Set

from .memcached_cas_updates import Item
from .memcached_connection import MISS, Answer, Exchange, read
from .memcached_entry import Entry, TagVersions
from .memcached_keys import ALL_TAGS
from .memcached_leases import Held, held_of, servable, stale_in
from .memcached_session import Session
from .memcached_tags import Generations
from .memcached_values import Values, content_of, entry_of


@dataclass(slots=True, eq=False)
class KeyItem(Item):
    """A key. `entry` is what is under it, if it is one of ours (else `error` says so); `held` is the lease that this is, and
    `refresh_held` that of a live value, under a name of its own; `served` may be served, live or stale, and `content` is
    the form and the bytes of its value."""

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
    """What was read in a round. `head` is what names begin with in it, `now` the server's time then, and `generations` are
    those of tags."""

    def __init__(self, session: Session, values: Values, head: str) -> None:
        self.session = session
        self.connection = session.connection
        self.values = values
        self.head = head
        self.now = 0.0
        self.generations = Generations(session)

    def read(self, waiting: list[tuple[int, Request[Any]]], replies: list[Any]) -> Exchange[list[tuple[int, KeyItem]]]:
        """Read the items of requests; a request whose key is not valid is answered. Raises `NamespaceChanged`."""
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
            grants = grants or isinstance(request, GetOrLease) or (isinstance(request, Set) and _of_lease(request))
            keyed.append((position, item))
        if not items:
            return keyed
        commands = [read(self.head + item.tail) for item in items.values()]
        refreshing = [item for item in items.values() if item.refresh]
        commands += [read(self.head + item.refresh) for item in refreshing]
        # That of all tags comes last: a load that stores under a tag which it did not know at the grant must see it after
        # the tag's.
        made = [*tags, ALL_TAGS] if grants else list(tags)
        answers = iter((yield from self.session.ask(commands + self.generations.making(self.head, made))))
        for item in items.values():
            item.answer = next(answers)
        for item in refreshing:
            item.refresh_answer = next(answers)
        self.generations.learn_made(made, list(answers))
        self.now = self.connection.now()
        for item in items.values():
            self.take_apart(item)
        yield from self.generations.read(name for item in items.values() for name in self._names(item))
        for item in items.values():
            yield from self._serve(item, with_content=served)
        return keyed

    def _item(self, request: Any, items: dict[tuple[str, bytes], KeyItem], tags: dict[str, None]) -> KeyItem:
        keys = self.values.keys
        name = keys.tail(request.key)
        tags.update(dict.fromkeys(map(keys.tag, getattr(request, "tags", ()))))
        if (item := items.get(name)) is None:
            item = items[name] = KeyItem(*name)
        if request.refresh if isinstance(request, GetOrLease) else _of_lease(request):
            item.refresh = keys.refresh(request.key)
        return item

    def take_apart(self, item: KeyItem) -> None:
        """Find out what the answers of a key are."""
        try:
            item.entry = entry_of(self.connection, item.kept, item.answer, 0.0)
        except CacheError as error:
            item.error = error
        item.held = held_of(item.entry)
        with contextlib.suppress(CacheError):
            item.refresh_held = held_of(entry_of(self.connection, item.kept, item.refresh_answer, 0.0))
        served = item.entry if item.held is None else stale_in(item.held, item.kept)
        item.served = served if servable(served, self.now) else None

    def _serve(self, item: KeyItem, *, with_content: bool) -> Exchange[None]:
        if item.served is not None and not self.generations.good(item.served.metadata.tags):
            item.served = None
        if with_content and item.served is not None:
            try:
                item.content = yield from content_of(self.session, item.served)
            except CacheError as error:
                if self.connection.lost:
                    raise
                item.error = error
            if item.content is None:
                item.served = None

    def _names(self, item: KeyItem) -> tuple[str, ...]:
        tags: TagVersions = ()
        for held in (item.held, item.refresh_held):
            tags += held.tags if held is not None else ()
        tags += item.served.metadata.tags if item.served is not None else ()
        return self.generations.names(tags)

    def live(self, item: KeyItem) -> Entry | None:
        """Return the live value of a key."""
        served = item.served
        return served if served is not None and item.held is None and served.is_live(self.now) else None

    def current(self, held: Held | None) -> bool:
        """Return whether a lease has neither run out nor been lost to the invalidation of a tag."""
        return held is not None and held.deadline > self.now and self.generations.good(held.tags)


def _of_lease(request: Request[Any]) -> bool:
    """Return whether a request names the lease that it is about."""
    return isinstance(request, RenewLease | ReleaseLease) or (isinstance(request, Set) and request.lease is not None)


def over(answer: Answer) -> bytes:
    """Return the condition that there is nothing, or what was looked at."""
    return b" C%d" % answer[1] if isinstance(answer, tuple) else b" ME"
