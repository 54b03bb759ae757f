"""Rate limits in Memcached: the rule of `rates`, written over what was read, under its CAS token.

What is under a limit's name is mostly what this connection has written there last. So it is written over at once, and read
in the same round trip: where nobody else was there meanwhile, one is all it takes. Somebody else costs one more, which has
what it needs to know already.

An item is four decimal numbers: level, Unix time of the server in microseconds, limit, and the microseconds of `per`. It
stands outside of the generations of the namespace, and goes when its level is at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cachebus.messages import Admit, CacheBackendError, CacheError, Failed, Reply, Request

from .memcached_connection import EXISTS, MISS, NOT_STORED, Answer, Talk
from .memcached_entries import server_expiry
from .memcached_errors import BACKEND
from .memcached_session import Commands, Session
from .memcached_values import not_found, store
from .rates import Meter, admit, check_admit, microseconds

TRIES = 100
"""How often a limit is written before others that write it all the time win."""

REMEMBERED = 10_000
"""Limits of which a connection remembers what it saw; then it begins anew, at the cost of a round trip for each."""


class _Draft:
    """A limit of which several requests may want something: what we take to be there, and what is to be."""

    __slots__ = ("before", "meter", "replies", "token")

    def __init__(self, known: tuple[bytes, int] | None) -> None:
        raw, self.token = known or (b"", 0)
        self.before = self.meter = _read(raw)
        self.replies: dict[int, Reply] = {}


class LimitRounds:
    """Carries the requests of a run out, all at once, in rounds of writing and reading."""

    def __init__(self, session: Session, batch: Sequence[Request[Any]], replies: list[Any]) -> None:
        self._session = session
        self._connection = session.connection
        self._batch = batch
        self._replies = replies

    def run(self, first: int, end: int) -> Talk[None]:
        """Carry out the requests from `first` to before `end`."""
        waiting: dict[str, list[int]] = {}
        for position in range(first, end):
            request: Any = self._batch[position]
            try:
                check_admit(request)
                waiting.setdefault(self._session.keys.limit(request.key), []).append(position)
            except CacheError as error:
                self._replies[position] = Failed.of(error)
        for _ in range(TRIES):
            if not waiting:
                return
            waiting = yield from self._round(waiting)
        outrun = CacheBackendError(
            f"others wrote the limit in between, {TRIES} times in a row; nothing was done", BACKEND
        )
        for position in (each for positions in waiting.values() for each in positions):
            self._replies[position] = Failed.of(outrun)

    def _round(self, waiting: dict[str, list[int]]) -> Talk[dict[str, list[int]]]:
        """One try for the requests on these limits; those that have to be tried again."""
        drafts = {name: self._draft(name, positions) for name, positions in waiting.items()}
        commands = Commands()
        for name, draft in drafts.items():
            if draft.meter is not draft.before:
                self._session.writing = True
                commands.add(self._written(name, draft), reads=False)
            commands.add(f"mg {name} v c\r\n".encode(), reads=True)
        answers = iter((yield from self._session.ask(commands, apart=True)))
        self._session.writing = False
        again: dict[str, list[int]] = {}
        for name, draft in drafts.items():
            wrote = next(answers) if draft.meter is not draft.before else None
            seen = next(answers)
            self._remember(name, seen)
            if self._holds(draft, wrote, seen):
                for position, reply in draft.replies.items():
                    self._replies[position] = reply
            elif (trouble := _trouble(wrote, seen)) is not None:
                for position in draft.replies:
                    self._replies[position] = trouble
            else:
                again[name] = waiting[name]
        return again

    def _draft(self, name: str, positions: Sequence[int]) -> _Draft:
        draft = _Draft(self._connection.meters.get(name))
        now = microseconds(self._connection.now())
        for position in positions:
            request: Any = self._batch[position]
            assert isinstance(request, Admit)
            draft.replies[position], meter = admit(request, draft.meter, now)
            draft.meter = meter or draft.meter
        return draft

    def _written(self, name: str, draft: _Draft) -> bytes:
        assert draft.meter is not None
        now = self._connection.now()
        reset = max(getattr(reply, "reset_after", 0.0) for reply in draft.replies.values())
        condition = b" C%d" % draft.token if draft.token else b" ME"
        return store(name, b"%d %d %d %d" % draft.meter, server_expiry(now + reset, now), condition)

    def _remember(self, name: str, seen: Answer) -> None:
        meters = self._connection.meters
        if isinstance(seen, tuple):
            if len(meters) >= REMEMBERED and name not in meters:
                meters.clear()
            meters[name] = seen
        else:
            meters.pop(name, None)

    @staticmethod
    def _holds(draft: _Draft, wrote: Answer | None, seen: Answer) -> bool:
        """Whether what was decided is so: it was written, or what it was decided by is there."""
        if wrote is not None:
            return isinstance(wrote, int) and wrote > 0
        return isinstance(seen, tuple) and seen[1] == draft.token


def _trouble(wrote: Answer | None, seen: Answer) -> Reply | None:
    """What the server has to say against a limit, where it is not that somebody else was faster."""
    for answer in (wrote, seen):
        if answer is not None and not isinstance(answer, tuple) and answer not in (MISS, NOT_STORED, EXISTS):
            return not_found(answer)
    return None


def _read(raw: bytes) -> Meter | None:
    """The meter of an item; what is none of ours is as if there were nothing, and is written over."""
    try:
        level, stamp, limit, per = map(int, raw.split(b" "))
        return Meter(level, stamp, limit, per) if per > 0 else None
    except ValueError:
        return None
