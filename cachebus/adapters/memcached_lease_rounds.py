"""Requests about leases: what is under the key is looked at, and written over only if it still stands there.

Decision 27 has the interleavings that the order of the commands here is about.
"""

from __future__ import annotations

from typing import Any

from cachebus.messages import (
    BadMessage,
    CacheError,
    Failed,
    GetOrLease,
    LeaseGranted,
    LoaderFailed,
    Loading,
    NotHeld,
    NotStored,
    Released,
    ReleaseLease,
    Renewed,
    RenewLease,
    Reply,
    Request,
    Set,
    Stale,
    Stored,
)
from cachebus.messages.lease_names import asked_as, new_lease_name

from .forms import decode_form, encode_form
from .lease_checks import check_lease
from .memcached_connection import EXISTS, MISS, NOT_STORED, Answer, Talk
from .memcached_entries import Entry, found_of, kept_until, server_expiry
from .memcached_keys import ALL_TAGS
from .memcached_lease_look import Draft, Looking, State
from .memcached_leases import TOLD_FOR, Held, kept_as, stale_of
from .memcached_notes import NO_NOTES, Notes
from .memcached_rounds import in_rounds
from .memcached_session import Commands, Moved, first_error
from .memcached_tags import Generations
from .memcached_values import not_found, store


def leases(request: Request[Any]) -> bool:
    """Whether a request is about a lease."""
    return type(request) in _ABOUT or (isinstance(request, Set) and request.lease is not None)


_ABOUT = frozenset[type[Request[Any]]]({GetOrLease, RenewLease, ReleaseLease})


class LeaseRounds(Looking):
    """Carries such requests out, all of a run at once, in rounds of looking and writing."""

    def run(self, first: int, end: int) -> Talk[None]:
        """Carry out the requests from `first` to before `end`."""
        yield from in_rounds(self._round, list(range(first, end)), self._replies)

    def _round(self, waiting: list[int]) -> Talk[list[int]]:
        """One try for the requests at these positions; those that have to be tried again."""
        self._head = yield from self._session.head()
        keyed = yield from self._look(waiting)
        again: list[int] = []
        for position, state in keyed:
            if state.draft is not None:
                again.append(position)
                continue
            try:
                self._decide(position, self._batch[position], state)
            except CacheError as error:
                self._replies[position] = Failed.of(error)
        drafts = [state.draft for _, state in keyed if state.draft is not None]
        if drafts:
            again += yield from self._write(list(dict.fromkeys(drafts)))
        return sorted(again)

    # Deciding

    def _decide(self, position: int, request: Request[Any], state: State) -> None:
        """Say what becomes of a request, or what is to be written for it. Raises `CacheError`."""
        for answer in (state.answer, state.anew_answer):
            if isinstance(answer, CacheError):
                raise answer
        match request:
            case GetOrLease():
                self._lease(position, request, state)
            case Set():
                self._commit(position, request, state)
            case RenewLease():
                self._renew(position, request, state)
            case ReleaseLease():
                self._release(position, request, state)
            case _:
                raise BadMessage(f"{type(request).__name__} is not about leases")

    def _lease(self, position: int, request: GetOrLease, state: State) -> None:
        check_lease(request)
        now = self._now
        live = self._live(state)
        if live is not None and not request.refresh:
            self._replies[position] = self._found(live, state)
            return
        held = state.anew_held if live is not None else state.held
        if live is not None and held is not None and held.version != live.version:
            held = None
        stale = self._stale(state, "", 0.0) if live is None else None
        failed = ("", "") if held is None else held.failed
        if request.after and failed[0] == request.after:
            raise LoaderFailed(error=failed[1])
        good = held is not None and not held.ended and self._generations.good(held.marks)
        if held is not None and good and asked_as(held.token) == request.token:
            # Asked for twice, it is granted twice, on the terms of the first time: the load may have begun by then.
            self._replies[position] = LeaseGranted(held.token, stale)
            if held.deadline > now:
                return
            held = held.until(now + request.lease_ttl)
        elif held is not None and self._current(held):
            if live is not None:
                self._replies[position] = self._found(live, state)
            else:
                remaining = held.deadline - now
                self._replies[position] = self._stale(state, held.token, remaining) or Loading(held.token, remaining)
            return
        else:
            version = 0.0 if live is None else live.version
            marks = self._generations.present(request.tags)
            all_tags = self._generations.seen(ALL_TAGS)
            name = new_lease_name(request.token)
            held = Held(name, now + request.lease_ttl, version, all_tags, marks, failed=failed)
        self._place(position, state, held, LeaseGranted(held.token, stale), anew=live is not None)

    def _commit(self, position: int, request: Set, state: State) -> None:
        if request.only_if is not None:
            raise BadMessage("a value that is stored under a lease has no other condition")
        held = self._held(request.lease or "", state)
        if held is None or held.deadline <= self._now:
            live = self._live(state)
            self._replies[position] = NotStored(0.0 if live is None else live.version, "lease_lost")
            return
        known = dict(held.marks)
        late = [tag for tag in request.tags if tag not in known]
        moved = late and (not held.all_tags or self._generations.seen(ALL_TAGS) != held.all_tags)
        if moved or not self._generations.good(held.marks):
            self._end(position, state, NotStored(0.0, "lease_lost"), anew=held is state.anew_held)
            return
        known |= dict(self._generations.present(late))
        marks = tuple([(tag, known[tag]) for tag in dict.fromkeys(request.tags)])
        expiry = self._values.expiry(request.ttl, self._now)
        notes = NO_NOTES
        if marks or request.metadata is not None:
            notes = Notes(marks, request.metadata, self._values.lifetime(request.ttl))
        packed = self._values.pack(encode_form(request.value), state.kept, expiry, self._connection, notes)
        # Over the lease, or over the value that is loaded anew, if it is still the one that was looked at.
        commands = packed.commands(self._head, state.tail, _over(state.answer))
        state.draft = Draft(position, commands, None, marks)

    def _renew(self, position: int, request: RenewLease, state: State) -> None:
        check_lease(request)
        held = self._held(request.token, state)
        if held is None or not self._current(held):
            self._replies[position] = NotHeld()
            return
        anew = held is state.anew_held
        self._place(position, state, held.until(self._now + request.lease_ttl), Renewed(request.lease_ttl), anew=anew)

    def _release(self, position: int, request: ReleaseLease, state: State) -> None:
        token = request.token
        # It may be what the lease was asked for as, by somebody who was not told its name.
        for each in (state.held, state.anew_held):
            if each is not None and asked_as(each.token) == request.token:
                token = each.token
        held = self._held(token, state)
        if held is None or held.ended:
            self._replies[position] = NotHeld()
        elif request.error and held is state.held and self._current(held):
            self._place(position, state, held.with_error(request.error), Released(), anew=False)
        else:
            self._end(position, state, Released() if self._current(held) else NotHeld(), anew=held is state.anew_held)

    def _held(self, token: str, state: State) -> Held | None:
        """The lease of that name, in the place of a value or beside one."""
        if state.held is not None and state.held.token == token:
            return state.held
        held, entry = state.anew_held, state.entry
        if held is not None and held.token == token and entry is not None and state.held is None:
            return held if held.version == entry.version else None
        return None

    # What is said and written

    def _found(self, live: Entry, state: State) -> Reply:
        return found_of(live, decode_form(*state.content), self._now)

    def _stale(self, state: State, lease: str, remaining: float) -> Stale | None:
        if state.served is None:
            return None
        try:
            return stale_of(state.served, decode_form(*state.content), lease, remaining)
        except CacheError:
            return None  # Damaged, and so nothing to serve.

    def _place(self, position: int, state: State, held: Held, reply: Reply, *, anew: bool) -> None:
        """Write a lease: in the place of the key's value with what is stale, or beside it."""
        keep, tail, answer = held.deadline or self._now + TOLD_FOR, state.tail, state.answer
        if anew:
            tail, answer = state.anew, state.anew_answer
        elif (served := state.served) is None:
            held = held.with_stale(b"")
        else:
            held = held.with_stale(kept_as(served, state.kept))
            keep = max(keep, kept_until(served.expiry, served.notes))
        item = held.pack(state.kept)
        if len(item) > self._connection.entry_max:
            # No room for both: the stale value goes.
            item = held.with_stale(b"").pack(state.kept)
        command = store(self._head + tail, item, server_expiry(keep, self._now), _over(answer))
        state.draft = Draft(position, [command], reply)

    def _end(self, position: int, state: State, reply: Reply, *, anew: bool) -> None:
        """Remove a lease, and put back what is stale."""
        tail, answer = (state.anew, state.anew_answer) if anew else (state.tail, state.answer)
        served = None if anew else state.served
        if served is not None:
            seconds = server_expiry(kept_until(served.expiry, served.notes), self._now)
            command = store(self._head + tail, kept_as(served, state.kept), seconds, _over(answer))
        else:
            command = f"md {self._head}{tail}{_over(answer).decode()}\r\n".encode()
        state.draft = Draft(position, [command], reply)

    def _write(self, drafts: list[Draft]) -> Talk[list[int]]:
        """Write what was decided; the positions of requests that somebody came before."""
        commands = Commands()
        for draft in drafts:
            for command in draft.commands:
                commands.add(command, reads=False)
        # Read once more when all is stored: who joined a load until then relies on it.
        after = Generations(self._session)
        names = list(dict.fromkeys(name for draft in drafts for name in after.names(draft.marks)))
        after.ask(commands, self._head, names)
        self._session.writing = True
        try:
            answers = yield from self._session.ask(commands)
        except Moved:
            return [draft.position for draft in drafts]
        self._session.writing = False
        after.learn(names, answers[len(answers) - len(names) :])
        again: list[int] = []
        at = 0
        for draft in drafts:
            mine, at = answers[at : at + len(draft.commands)], at + len(draft.commands)
            answer = first_error(mine) or mine[-1]
            if isinstance(answer, int) and answer >= 0:
                stored = Stored(self._connection.epoch + answer)
                good = after.good(draft.marks)
                self._replies[draft.position] = draft.reply or (stored if good else NotStored(0.0, "lease_lost"))
            elif answer in (MISS, NOT_STORED, EXISTS):
                again.append(draft.position)
            else:
                self._replies[draft.position] = not_found(answer)
        return again


def _over(answer: Answer) -> bytes:
    """The condition that there is nothing, or what was looked at."""
    return b" C%d" % answer[1] if isinstance(answer, tuple) else b" ME"
