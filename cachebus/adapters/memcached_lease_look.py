"""Looking at what is under keys, for requests about leases: the lease, what may be served, and the generations of its tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cachebus.messages import CacheError, Failed, GetOrLease, Reply, Request, Set

from .memcached_connection import MISS, Answer, Talk
from .memcached_entries import Entry, any_entry
from .memcached_keys import ALL_TAGS
from .memcached_leases import Held, held_of, is_live, servable, stale_in
from .memcached_notes import Marks
from .memcached_readings import content_of
from .memcached_session import Commands, Session
from .memcached_tags import Generations
from .memcached_values import Values


class Draft:
    """What is to be written for a request, the last command deciding whether it was, and the reply if so; `None` is `Stored`,
    if `marks` are good even then."""

    __slots__ = ("commands", "marks", "position", "reply")

    def __init__(self, position: int, commands: list[bytes], reply: Reply | None, marks: Marks = ()) -> None:
        self.position = position
        self.commands = commands
        self.reply = reply
        self.marks = marks


class State:
    """A key: what is under it, the lease that this is, and that of its live value; and what may be served."""

    __slots__ = (
        "anew",
        "anew_answer",
        "anew_held",
        "answer",
        "content",
        "draft",
        "entry",
        "held",
        "kept",
        "served",
        "tail",
    )

    def __init__(self, tail: str, kept: bytes) -> None:
        self.tail = tail
        self.kept = kept
        self.anew = ""
        self.answer: Answer = MISS
        self.anew_answer: Answer = MISS
        self.entry: Entry | None = None
        self.held: Held | None = None
        self.anew_held: Held | None = None
        self.served: Entry | None = None
        self.content: Any = None
        self.draft: Draft | None = None


class Looking:
    """The first half of a round. `_head` is what names begin with in it, `_now` the server's time then, and `_generations` what
    was read of the tags."""

    def __init__(self, session: Session, values: Values, batch: Sequence[Request[Any]], replies: list[Any]) -> None:
        self._session = session
        self._connection = session.connection
        self._values = values
        self._batch = batch
        self._replies = replies
        self._generations = Generations(session)
        self._now = 0.0
        self._head = ""

    def _look(self, waiting: list[int]) -> Talk[list[tuple[int, State]]]:
        states: dict[tuple[str, bytes], State] = {}
        keyed: list[tuple[int, State]] = []
        names: dict[str, None] = {}
        keys = self._values.keys
        served = grants = False
        for position in waiting:
            request: Any = self._batch[position]
            try:
                name = keys.tail(request.key)
                names.update(dict.fromkeys(map(keys.tag, getattr(request, "tags", ()))))
            except CacheError as error:
                self._replies[position] = Failed.of(error)
                continue
            state = states.setdefault(name, State(*name))
            asks = isinstance(request, GetOrLease)
            served, grants = served or asks, grants or asks or isinstance(request, Set)
            if not asks or request.refresh:
                state.anew = keys.anew(request.key)
            keyed.append((position, state))
        commands = Commands()
        wanted: list[tuple[State, str]] = []
        for state in states.values():
            for slot, tail in (("answer", state.tail), ("anew_answer", state.anew)):
                if tail:
                    wanted.append((state, slot))
                    commands.add(f"mg {self._head}{tail} v c\r\n".encode(), reads=True)
        # That of all tags comes last: who stores under a tag that was not known at the grant must see it after the tag's.
        made = [*names, ALL_TAGS] if grants else list(names)
        generations = self._generations = Generations(self._session)
        generations.make(commands, self._head, made)
        answers = (yield from self._session.ask(commands)) if states else []
        generations.learn_made(made, answers[len(wanted) :])
        self._now = self._connection.now()
        for (state, slot), answer in zip(wanted, answers, strict=False):
            setattr(state, slot, answer)
        for state in states.values():
            self._take_apart(state)
        yield from generations.read(name for state in states.values() for name in self._names(state))
        for state in states.values():
            if state.served is not None and not generations.good(state.served.notes.marks):
                state.served = None
            if served and state.served is not None:
                state.content = yield from content_of(self._session, state.served)
                if state.content is None:
                    state.served = None
        return keyed

    def _take_apart(self, state: State) -> None:
        state.entry = self._entry(state.answer, state.kept)
        state.held = held_of(state.entry)
        state.anew_held = held_of(self._entry(state.anew_answer, state.kept))
        served = state.entry if state.held is None else stale_in(state.held, state.kept)
        state.served = served if servable(served, self._now) else None

    def _entry(self, answer: Answer, kept: bytes) -> Entry | None:
        if not isinstance(answer, tuple):
            return None
        try:
            return any_entry(answer[0], answer[1], kept, self._connection.epoch)
        except CacheError:
            return None  # Not ours, and so in nobody's way.

    def _names(self, state: State) -> tuple[str, ...]:
        marks: Marks = ()
        for held in (state.held, state.anew_held):
            marks += held.marks if held is not None else ()
        marks += state.served.notes.marks if state.served is not None else ()
        return self._generations.names(marks)

    def _live(self, state: State) -> Entry | None:
        served = state.served
        return served if served is not None and state.held is None and is_live(served, self._now) else None

    def _current(self, held: Held | None) -> bool:
        """Whether a lease has neither run out nor been lost to the invalidation of a tag."""
        return held is not None and held.deadline > self._now and self._generations.good(held.marks)
