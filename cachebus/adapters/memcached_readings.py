"""Reading what an entry does not say by itself: whether its tags still have their generations, and what is in its chunks."""

from __future__ import annotations

from collections.abc import Callable

from cachebus.messages import CacheError, Failed, Found, Missing

from .forms import decode_form
from .memcached_chunks import chunk_tails, whole
from .memcached_connection import Talk
from .memcached_entries import CHUNKED, MISSING, Entry, found_of
from .memcached_session import Commands, Session, first_error
from .memcached_tags import Generations, TagMemory


class Readings:
    """Entries that say too little, on behalf of those who asked for them, until `finish` has found out."""

    def __init__(self, session: Session, generations: Generations, memory: TagMemory) -> None:
        self._session = session
        self._generations = generations
        self._memory = memory
        self._begun: list[tuple[str, Entry, Callable[[Entry | None], None] | None, Callable[..., None]]] = []

    def __bool__(self) -> bool:
        return bool(self._begun)

    def value(self, key: str, entry: Entry, settle: Callable[[Found | Missing | Failed], None]) -> None:
        """Tell the value of an entry."""
        self._begun.append((key, entry, None, settle))

    def entry(self, key: str, entry: Entry, settle: Callable[[Entry | None], None]) -> None:
        """Tell whether an entry is good: itself, or `None`."""
        self._begun.append((key, entry, settle, settle))

    def finish(self) -> Talk[None]:
        """Find out what is missing, and tell everybody. Raises `Moved`."""
        names = [self._generations.names(entry.notes.marks) for _, entry, _, _ in self._begun]
        yield from self._generations.read(name for each in names for name in each)
        for (key, entry, entry_wanted, settle), its in zip(self._begun, names, strict=True):
            if its:
                self._memory.note(key, its)
            good = self._generations.good(entry.notes.marks)
            if entry_wanted is not None:
                settle(entry if good else None)
            else:
                settle((yield from self._value(entry)) if good else MISSING)

    def _value(self, entry: Entry) -> Talk[Found | Missing | Failed]:
        try:
            content = yield from content_of(self._session, entry)
            if content is None:
                return MISSING
            return found_of(entry, decode_form(*content), self._session.connection.now())
        except CacheError as error:
            if self._session.connection.lost:
                raise
            return Failed.of(error)


def content_of(session: Session, entry: Entry) -> Talk[tuple[int, bytes | memoryview] | None]:
    """The form and the bytes of an entry's value; `None` where a chunk is missing. Raises `CacheError` and `Moved`."""
    if entry.form != CHUNKED:
        return entry.form, entry.body
    if not (tails := chunk_tails(entry.body)):
        return None
    head = yield from session.head()
    commands = Commands()
    for name in tails:
        commands.add(f"mg {head}{name} v c\r\n".encode(), reads=True)
    answers = yield from session.ask(commands)
    if (error := first_error(answers)) is not None:
        raise error
    return whole(entry.body, answers)
