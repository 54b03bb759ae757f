"""Every interleaving of a load with an invalidation, command by command, over a real Memcached."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from msgspec.structs import replace

from cachebus.adapters.memcached import key_updates as memcached_key_updates
from cachebus.adapters.memcached import planner as memcached_planner
from cachebus.adapters.memcached import session as memcached_session
from cachebus.adapters.memcached.cas_updates import Draft
from cachebus.adapters.memcached.key_updates import KeyUpdates
from cachebus.adapters.memcached.keys import ALL_TAGS
from cachebus.adapters.memcached.lookup import Lookup
from cachebus.adapters.memcached.session import Generations, Session
from cachebus.messages import Clear, Delete, Found, Get, GetOrLease, InvalidateTags, LeaseGranted, Loading, Set, Stored
from cachebus.testing.servers import Server

from .real_server_interleaving import Client, Steps, count, interleave, moments

TTL = 60.0


class Case:
    """Source with one value, a process that loads it, and another that changes and invalidates it.

    With `declared`, the tag is known at the beginning. With `joins`, another caller requests the key as soon as it is
    invalidated.
    """

    def __init__(self, clients: list[Client], number: int, how: str, declared: bool, joins: bool) -> None:
        self.loader, self.writer, self.reader = clients
        self.key, self.tag, self.asked = f"k{number}", f"tag{number}", f"token{number}"
        self.token = ""
        self.how = how
        self.declared = (self.tag,) if declared else ()
        self.truth = 1
        self.loaded = 0
        self.joins = joins
        self.joined_reply: Any = None

    def load(self) -> Steps:
        granted = yield from self.loader.steps(GetOrLease(self.key, "p1", self.asked, TTL, tags=self.declared))
        if not isinstance(granted, LeaseGranted):
            return None
        self.token = granted.token
        yield
        self.loaded = self.truth
        yield
        tags = (self.tag,) if self.how == "tag" else ()
        return (yield from self.loader.steps(Set(self.key, self.loaded, TTL, tags, lease=self.token)))

    def change(self) -> Steps:
        steps = self.writer.steps(
            {"tag": InvalidateTags((self.tag,)), "delete": Delete(self.key), "clear": Clear()}[self.how]
        )
        self.truth = 2
        next(steps)  # It changes the source before its first command.
        yield from steps
        if self.joins:
            # Another caller in the loader's process requests the key now.
            self.joined_reply = self.reader.do(GetOrLease(self.key, "p1", f"another{self.asked}", TTL))

    def check(self, stored: Any) -> None:
        self.reader.forget_tags()
        found = self.reader.do(Get(self.key))
        assert not isinstance(found, Found) or found.value == 2, "an invalidated value was read"
        assert not isinstance(self.joined_reply, Found) or self.joined_reply.value == 2, "an invalidated value was read"
        if isinstance(self.joined_reply, Loading) and self.joined_reply.token == self.token:
            # It waits for that load, and gets its value if it was stored or if all its tags were known before.
            given = isinstance(stored, Stored) or self.declared
            assert not given or self.loaded == 2, "an invalidated value was given to who joined"


CASES = [("tag", False, 1), ("tag", True, 3), ("delete", True, 3), ("clear", True, 1)]
"""Cases with their stride. Cases with very many interleavings play only every n-th."""


@pytest.fixture
def clients(memcached_server: Server) -> Iterator[list[Client]]:
    namespace = f"i{uuid4().hex}"
    made = [Client(memcached_server, namespace) for _ in range(3)]
    yield made
    for each in made:
        each.close()


def explore(clients: list[Client], how: str, declared: bool, stride: int) -> int:
    """Play every `stride`-th interleaving, and return the number of interleavings."""
    clients[1].do(Set("warm", 1))
    warm = Case(clients, 0, how, declared, False)
    ways = moments(count(warm.load) + 1, count(warm.change) + 1)
    number = 0
    for number, when in enumerate(itertools.islice(ways, 0, None, stride), 1):
        case = Case(clients, number, how, declared, number % 2 > 0)
        if number % 3:
            # The common case: the tag exists already.
            clients[1].do(Set("other", 1, tags=(case.tag,)))
        stored, _ = interleave(case.load(), case.change(), when)
        case.check(stored)
    return number


@pytest.mark.parametrize(("how", "declared", "stride"), CASES)
def test_no_interleaving_lets_an_invalidated_value_be_read(
    clients: list[Client], how: str, declared: bool, stride: int
) -> None:
    assert explore(clients, how, declared, stride) > (20 if how == "clear" else 500)


# Planted bugs, each of which the interleavings must find.


def late_tags_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    held = KeyUpdates._held

    def careless(self: Any, token: str, item: Any) -> Any:
        found = held(self, token, item)
        return found and replace(found, all_tags=self._generations.seen(ALL_TAGS))

    patch.setattr(KeyUpdates, "_held", careless)


def nothing_is_looked_at_after_storing(patch: pytest.MonkeyPatch) -> None:
    make = Draft.__init__
    patch.setattr(
        Draft, "__init__", lambda self, commands, reply, tags=(), kind=None: make(self, commands, reply, kind=kind)
    )


def all_tags_are_made_anew_last(patch: pytest.MonkeyPatch) -> None:
    def careless(session: Session, tags: Any) -> Any:
        head = yield from session.head()
        names = (*map(session.keys.tag, tags), ALL_TAGS)
        yield from session.ask([memcached_session._storing(head + name, b" MR") for name in names])

    patch.setattr(memcached_planner, "invalidate", careless)


def all_tags_are_read_first(patch: pytest.MonkeyPatch) -> None:
    make, learn = Generations.making, Generations.learn_made

    def reversed_make(self: Any, head: str, names: Any) -> Any:
        return make(self, head, names[::-1])

    def reversed_learn(self: Any, names: Any, answers: Any) -> None:
        learn(self, names[::-1], answers)

    patch.setattr(Generations, "making", reversed_make)
    patch.setattr(Generations, "learn_made", reversed_learn)


def a_lease_whose_tags_have_changed_is_joined(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lookup, "current", lambda self, held: held is not None and held.deadline > self.now)


def values_are_stored_over_anything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memcached_key_updates, "over", lambda answer: b"")


def generations_are_those_of_the_end(patch: pytest.MonkeyPatch) -> None:
    held = KeyUpdates._held

    def careless(self: Any, token: str, item: Any) -> Any:
        found = held(self, token, item)
        return found and replace(found, tags=self._generations.current(tag for tag, _ in found.tags))

    patch.setattr(KeyUpdates, "_held", careless)


PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], str, bool]] = [
    (late_tags_are_not_looked_at, "tag", False),
    (nothing_is_looked_at_after_storing, "tag", False),
    (all_tags_are_made_anew_last, "tag", False),
    (all_tags_are_read_first, "tag", False),
    (a_lease_whose_tags_have_changed_is_joined, "tag", True),
    (values_are_stored_over_anything, "delete", True),
    (generations_are_those_of_the_end, "tag", True),
]


@pytest.mark.parametrize(("plant", "how", "declared"), PLANTED, ids=lambda each: getattr(each, "__name__", ""))
def test_a_planted_bug_is_found(
    clients: list[Client], monkeypatch: pytest.MonkeyPatch, plant: Callable[[Any], None], how: str, declared: bool
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="an invalidated value was"):
        explore(clients, how, declared, 5)
