"""From requests to Memcached commands and back: a batch for one server becomes as few round trips as keep its order.

Neighbours that need not look before they leap go in one piece: reads (equal keys share a place), plain writes and
removals. The rest is read first and written under the CAS token that was read, as often as others come in between, up
to a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cachebus.messages import (
    Add,
    CacheBackendError,
    CacheCapacityError,
    CacheError,
    CapabilityError,
    CompareAndSet,
    Counted,
    Delete,
    Deleted,
    DeleteMany,
    Exists,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Missing,
    NotStored,
    Present,
    Reply,
    Request,
    Set,
    SetMany,
    Stored,
    StoredMany,
    Touch,
    Ttl,
    WrongType,
)

from .forms import INT, encode_form
from .memcached_connection import EXISTS, MISS, NOT_STORED, Answer, Connection, Talk
from .memcached_entries import (
    HEADER,
    MISSING,
    Entry,
    expiry_of,
    found_or_fail,
    pack_entry,
    read_entry,
    server_expiry,
)
from .memcached_errors import BACKEND, in_doubt
from .memcached_keys import Keys
from .memcached_session import Commands, Moved, Session

TRIES = 100
"""How often a value is read and written back before others that write it all the time win."""

GETS_PART = 100

Settle = Callable[[Answer], None]


class Plan:
    """A batch for one server, on its way."""

    def __init__(
        self, connection: Connection, keys: Keys, default_ttl: float | None, batch: Sequence[Request[Any]]
    ) -> None:
        self.replies: list[Any] = [None] * len(batch)
        self._batch = batch
        self._connection = connection
        self._session = Session(connection, keys)
        self._tail = keys.tail
        self._default_ttl = default_ttl

    def run(self) -> Talk[list[Reply]]:
        """Carry the batch out. What goes wrong is in the replies."""
        batch, at, end = self._batch, 0, len(self._batch)
        first, looks = 0, True
        try:
            while at < end:
                first, looks = at, _looks_first(batch[at])
                while at < end and _looks_first(batch[at]) == looks:
                    at += 1
                self._session.sent = False
                yield from (self._carefully if looks else self._directly)(first, at)
        except CacheError as error:
            if not looks:
                self.replies[first:at] = [None] * (at - first)  # Drafts, of which the answers are not known.
            self._give_up(error, at)
        return self.replies

    def _give_up(self, error: CacheError, end: int) -> None:
        """What has no reply yet gets the error. What lies before `end` may have been sent."""
        for at, request in enumerate(self._batch):
            if self.replies[at] is None:
                doubtful = at < end and self._session.sent and not request.IDEMPOTENT and error.transient
                self.replies[at] = Failed.of(in_doubt(error) if doubtful else error)

    # What needs no look

    def _directly(self, first: int, end: int) -> Talk[None]:
        while True:
            try:
                if not (yield from self._only_gets(first, end)):
                    yield from self._mixed(first, end)
                return
            except Moved:
                self.replies[first:end] = [None] * (end - first)

    def _only_gets(self, first: int, end: int) -> Talk[bool]:
        """The commonest run in its simplest form; `False` if it is not that."""
        places: list[int] = []
        slots: dict[str, int] = {}
        for position in range(first, end):
            request = self._batch[position]
            if type(request) is not Get:
                return False
            places.append(slots.setdefault(request.key, len(slots)))
        head, tail = (yield from self._session.head()), self._tail
        try:
            tails = [tail(key) for key in slots]
        except CacheError:
            return False
        lines = [f"mg {head}{name} v c\r\n" for name, _ in tails]
        commands = Commands()
        for at in range(0, len(lines), GETS_PART):
            piece = lines[at : at + GETS_PART]
            commands.add("".join(piece).encode(), reads=True, count=len(piece))
        answers = yield from self._session.ask(commands)
        epoch, now = self._connection.epoch, self._connection.now()
        for position, place in enumerate(places, first):
            answer = answers[place]
            if type(answer) is tuple:
                # Taken apart for each, so that no two callers share a list or a dict.
                self.replies[position] = found_or_fail(answer[0], answer[1], tails[place][1], epoch, now)
            else:
                self.replies[position] = MISSING if answer == MISS else _failed(answer)
        return True

    def _mixed(self, first: int, end: int) -> Talk[None]:
        commands = Commands()
        settles: list[list[Settle]] = []
        reads: dict[str, list[Settle]] = {}
        head = yield from self._session.head()

        def read(key: str, make: Callable[[bytes, Answer], None]) -> None:
            name, kept = self._tail(key)
            wanted = reads.get(name)
            if wanted is None:
                wanted = reads[name] = []
                settles.append(wanted)
                commands.add(f"mg {head}{name} v c\r\n".encode(), reads=True)
            wanted.append(lambda answer: make(kept, answer))

        def write(data: bytes, settle: Settle, *, reads_too: bool = False) -> None:
            reads.clear()
            settles.append([settle])
            commands.add(data, reads=reads_too)

        for position in range(first, end):
            request: Any = self._batch[position]
            try:
                match request:
                    case Get(key=key):
                        read(key, self._got(position))
                    case Exists(key=key):
                        read(key, self._existing(position))
                    case GetMany(keys=keys):
                        for key in keys:
                            self._tail(key)
                        self.replies[position] = FoundMany({})
                        for key in dict.fromkeys(keys):
                            read(key, self._got(position, key))
                    case Set() | SetMany():
                        self._sets(position, request, head, write)
                    case Delete(key=key):
                        self.replies[position] = Deleted(0)
                        self._delete(position, [key], head, read, write)
                    case DeleteMany(keys=keys):
                        self.replies[position] = Deleted(0)
                        self._delete(position, list(dict.fromkeys(keys)), head, read, write)
                    case _:
                        raise CapabilityError(store=BACKEND, capability=type(request).__name__)
            except CacheError as error:
                self.replies[position] = Failed.of(error)
        if settles:
            for answer, wanted in zip((yield from self._session.ask(commands)), settles, strict=True):
                for settle in wanted:
                    settle(answer)

    def _got(self, position: int, key: str | None = None) -> Callable[[bytes, Answer], None]:
        def settle(kept: bytes, answer: Answer) -> None:
            reply: Any = _failed(answer)
            if type(answer) is tuple:
                connection = self._connection
                reply = found_or_fail(answer[0], answer[1], kept, connection.epoch, connection.now())
            whole = self.replies[position]
            if key is None:
                self.replies[position] = reply
            elif type(whole) is FoundMany:
                if type(reply) is Found:
                    whole.entries[key] = reply
                elif type(reply) is Failed:
                    self.replies[position] = reply

        return settle

    def _existing(self, position: int) -> Callable[[bytes, Answer], None]:
        def settle(kept: bytes, answer: Answer) -> None:
            try:
                entry = self._entry(kept, answer)
                self.replies[position] = MISSING if entry is None else entry.present(self._connection.now())
            except CacheError as error:
                self.replies[position] = Failed.of(error)

        return settle

    def _entry(self, kept: bytes, answer: Answer) -> Entry | None:
        """The live entry that an answer holds. Raises `CacheError`."""
        if isinstance(answer, CacheError):
            raise answer
        if not isinstance(answer, tuple):
            return None
        return read_entry(answer[0], answer[1], kept, self._connection.epoch, self._connection.now())

    def _sets(self, position: int, request: Set | SetMany, head: str, write: Callable[..., None]) -> None:
        if request.tags:
            raise CapabilityError(store=BACKEND, capability="tags")
        many = isinstance(request, SetMany)
        items = request.items if isinstance(request, SetMany) else {request.key: request.value}
        now = self._connection.now()
        expiry = expiry_of(self._ttl(request.ttl), now)
        packed = [
            (name, self._pack(encode_form(value), kept, expiry, now))
            for (name, kept), value in ((self._tail(key), value) for key, value in items.items())
        ]
        if many:
            self.replies[position] = StoredMany(len(items))

        def settle(answer: Answer) -> None:
            if isinstance(answer, int) and answer > 0:
                if not many:
                    self.replies[position] = Stored(self._connection.epoch + answer)
            else:
                self.replies[position] = _failed(answer)

        seconds = server_expiry(expiry, now)
        for name, entry in packed:
            write(_ms(head + name, entry, seconds), settle)

    def _delete(
        self,
        position: int,
        keys: list[str],
        head: str,
        read: Callable[[str, Callable[[bytes, Answer], None]], None],
        write: Callable[..., None],
    ) -> None:
        for key in keys:
            self._tail(key)

        def settle(kept: bytes, answer: Answer) -> None:
            try:
                entry = self._entry(kept, answer)
            except CacheError as error:
                if isinstance(answer, CacheError):
                    self.replies[position] = Failed.of(error)
                    return
                entry = None  # Not ours, and gone all the same.
            whole = self.replies[position]
            if entry is not None and isinstance(whole, Deleted):
                self.replies[position] = Deleted(whole.count + 1)

        def gone(answer: Answer) -> None:
            if isinstance(answer, CacheError):
                self.replies[position] = Failed.of(answer)

        for key in keys:
            # Looked at before it is removed, because Memcached still has what has expired for its readers.
            read(key, settle)
            write(f"md {head}{self._tail(key)[0]}\r\n".encode(), gone)

    # What looks first

    def _carefully(self, first: int, end: int) -> Talk[None]:
        """Read, decide, write under the token that was read; whose token was another's meanwhile does it again."""
        waiting = list(range(first, end))
        for _ in range(TRIES):
            try:
                waiting = yield from self._round(waiting)
            except Moved:
                continue
            if not waiting:
                return
        error = CacheBackendError(f"others wrote the key in between, {TRIES} times in a row; nothing was done", BACKEND)
        for position in waiting:
            self.replies[position] = Failed.of(error)

    def _round(self, waiting: list[int]) -> Talk[list[int]]:
        """One try for the requests at these positions; those that have to be tried again."""
        session, batch = self._session, self._batch
        states: dict[tuple[str, bytes], _State] = {}
        commands = Commands()
        head = yield from session.head()
        keyed: list[tuple[int, _State]] = []
        for position in waiting:
            request: Any = batch[position]
            try:
                name, kept = self._tail(request.key)
            except CacheError as error:
                self.replies[position] = Failed.of(error)
                continue
            state = states.get((name, kept))
            if state is None:
                state = states[name, kept] = _State(name, kept)
                commands.add(f"mg {head}{name} v c\r\n".encode(), reads=True)
            keyed.append((position, state))
        if not states:
            return []
        for state, answer in zip(states.values(), (yield from session.ask(commands)), strict=True):
            state.answer = answer
        again: list[int] = []
        for position, state in keyed:
            # One new version a round: two writes of one key are two versions. Counts have none of their own.
            counting = state.number is not None and type(batch[position]) is Increment
            if state.closed or (state.drafts and not counting):
                state.closed = True
                again.append(position)
                continue
            try:
                self._decide(position, batch[position], state)
            except CacheError as error:
                self.replies[position] = Failed.of(error)
        writing = [state for state in states.values() if state.entry is not None]
        if not writing:
            return again
        commands = Commands()
        for state in writing:
            assert state.entry is not None
            commands.add(_ms(head + state.name, state.entry, state.seconds, state.condition()), reads=False)
        try:
            answers = yield from session.ask(commands)
        except Moved:
            return sorted(again + [position for state in writing for position in state.drafts])
        for state, answer in zip(writing, answers, strict=True):
            if isinstance(answer, int) and answer > 0:
                for position, reply in state.drafts.items():
                    self.replies[position] = reply or Stored(self._connection.epoch + answer)
            elif answer in (MISS, NOT_STORED, EXISTS):
                again += state.drafts
            else:
                for position in state.drafts:
                    self.replies[position] = _failed(answer)
        return sorted(again)

    def _decide(self, position: int, request: Request[Any], state: _State) -> None:
        """Say what becomes of a request, or what is to be written for it."""
        now = self._connection.now()
        entry = self._entry(state.kept, state.answer) if state.entry is None else None
        match request:
            case Set() | Add() | CompareAndSet():
                if request.tags:
                    raise CapabilityError(store=BACKEND, capability="tags")
                version = 0.0 if entry is None else entry.version
                if isinstance(request, CompareAndSet):
                    fits = entry is not None and version == request.version
                else:
                    fits = (entry is None) == (isinstance(request, Add) or request.only_if == "absent")
                form = encode_form(request.value)
                expiry = expiry_of(self._ttl(request.ttl), now)
                packed = self._pack(form, state.kept, expiry, now)
                if not fits:
                    self.replies[position] = NotStored(version)
                    return
                state.write(position, packed, server_expiry(expiry, now), None)
            case Touch():
                if entry is None:
                    self.replies[position] = MISSING
                    return
                expiry = expiry_of(self._ttl(request.ttl), now)
                form = bytes((entry.form,)) + entry.body
                packed = pack_entry(form, state.kept, expiry, entry.stored_at, entry.version)
                reply = Present(entry.version, expiry - now if expiry else None)
                state.write(position, packed, server_expiry(expiry, now), reply)
            case Increment():
                self._count(position, request, state, entry, now)
            case _:
                raise CapabilityError(store=BACKEND, capability=type(request).__name__)

    def _count(self, position: int, request: Increment, state: _State, entry: Entry | None, now: float) -> None:
        if state.number is not None:
            number, expiry = state.number + request.delta, state.expiry
        elif entry is None:
            if request.initial is None:
                self.replies[position] = MISSING
                return
            number, expiry = request.initial + request.delta, expiry_of(self._ttl(request.ttl), now)
        else:
            if entry.form != INT:
                raise WrongType("increment needs an int under the key")
            try:
                number = int(bytes(entry.body)) + request.delta
            except ValueError:
                raise WrongType("increment needs an int under the key") from None
            expiry = entry.expiry
        if not -(2**63) <= number < 2**63:
            raise WrongType("increment leaves the range of a signed 64-bit integer; the value is unchanged")
        state.number, state.expiry = number, expiry
        packed = self._pack(b"I%d" % number, state.kept, expiry, now)
        state.write(position, packed, server_expiry(expiry, now), Counted(number))

    # Common parts

    def _ttl(self, ttl: Ttl) -> float | None:
        return self._default_ttl if ttl == "default" else ttl

    def _pack(self, form: bytes, kept: bytes, expiry: float, now: float) -> bytes:
        """The entry of a value. Raises `CacheCapacityError` for what no item holds."""
        limit = self._connection.entry_max - HEADER.size - len(kept)
        if len(form) - 1 > limit:
            raise CacheCapacityError("the value is too large for Memcached", len(form) - 1, limit)
        return pack_entry(form, kept, expiry, now)


class _State:
    """A key of which several requests may want something: what is under it, and what is to be."""

    __slots__ = ("answer", "closed", "drafts", "entry", "expiry", "kept", "name", "number", "seconds")

    def __init__(self, name: str, kept: bytes) -> None:
        self.name = name
        self.kept = kept
        self.answer: Answer = MISS
        self.closed = False
        self.entry: bytes | None = None
        self.seconds = 0
        self.number: int | None = None
        self.expiry = 0.0
        self.drafts: dict[int, Reply | None] = {}

    def write(self, position: int, entry: bytes, seconds: int, reply: Reply | None) -> None:
        """Write this, and give the reply if it is written; `None` is `Stored`, at the version that it gets."""
        self.drafts[position] = reply
        self.entry = entry
        self.seconds = seconds

    def condition(self) -> bytes:
        """What must still be so for the write: there is nothing, or what was read."""
        return b" C%d" % self.answer[1] if isinstance(self.answer, tuple) else b" ME"


def _looks_first(request: Request[Any]) -> bool:
    kind = type(request)
    return kind in _CAREFUL or (kind is Set and request.only_if is not None)  # type: ignore[attr-defined]


_CAREFUL = frozenset[type[Request[Any]]]({Add, CompareAndSet, Touch, Increment})


def _ms(name: str, entry: bytes, seconds: int, condition: bytes = b"") -> bytes:
    return b"".join((f"ms {name} {len(entry)} T{seconds} c".encode(), condition, b"\r\n", entry, b"\r\n"))


def _failed(answer: Answer) -> Missing | Failed:
    if isinstance(answer, CacheError):
        return Failed.of(answer)
    if answer in (MISS, NOT_STORED, EXISTS):
        return MISSING
    return Failed.of(CacheBackendError("the server gave an answer to something else", BACKEND))
