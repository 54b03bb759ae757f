"""Leases in Memcached: who loads a key stands under the key itself, so that whatever removes or writes it, or gives the
namespace another generation, takes the lease away.

In the place of a missing value, or of one whose time is up, stands an entry of the form `l`, whose expiry has always been
over, so that to everybody else there is no value. It holds, as msgpack:

    token       of the lease: what was asked for, a dot and a nonce
    deadline    of the lease: Unix time of the server in seconds
    version     of the live value that is loaded anew; 0 in the place of a value
    all tags    the generation that all tags had when the lease was granted
    marks       the tags that were known then, with their generations
    stale       the entry whose time is up, as it was, with its version; empty without one
    failed      the name of the last lease here whose loader has failed, and the name of the error; empty without one

A lease whose loader has failed is left for `TOLD_FOR` seconds, with the deadline 0, for those to find who wait for it: nothing
else tells them.

A live value that is loaded anew stays where it is. Its lease is an item of its own, with the version of that value in it.

The deadline is by the server's clock, as each client knows it. Nothing depends on that but the number of loads: a value
is stored over the very item that was looked at, by its CAS token, so that a lease that somebody else has taken over, too
soon or not, stores nothing.
"""

from __future__ import annotations

from cachebus.messages import Stale

from .forms import unpack_plain
from .memcached_entries import Entry, any_entry, kept_until, pack_entry
from .memcached_notes import Marks, marks_of, pack_marked

LEASE = b"l"[0]
_OVER = 1.0
"""An expiry that is over for everybody, whatever their clocks say."""
TOLD_FOR = 5.0
"""Seconds for which a loader's failure is told: many times as long as who waits pauses between two questions."""


class Held:
    """A lease as it stands in the server. `ended` says that its loader has failed, and that nobody has it."""

    __slots__ = ("all_tags", "deadline", "failed", "marks", "stale", "token", "version")

    def __init__(
        self,
        token: str,
        deadline: float,
        version: float,
        all_tags: bytes,
        marks: Marks,
        stale: bytes = b"",
        failed: tuple[str, str] = ("", ""),
    ) -> None:
        self.token = token
        self.deadline = deadline
        self.version = version
        self.all_tags = all_tags
        self.marks = marks
        self.stale = stale
        self.failed = failed

    @property
    def ended(self) -> bool:
        return not self.deadline

    def until(self, deadline: float) -> Held:
        """The same lease with another deadline."""
        return Held(self.token, deadline, self.version, self.all_tags, self.marks, self.stale, self.failed)

    def with_stale(self, stale: bytes) -> Held:
        """The same lease over another stale entry."""
        return Held(self.token, self.deadline, self.version, self.all_tags, self.marks, stale, self.failed)

    def with_error(self, error: str) -> Held:
        """The same lease, ended by what its loader has raised."""
        return Held(self.token, 0.0, self.version, self.all_tags, self.marks, self.stale, (self.token, error))

    def pack(self, kept: bytes) -> bytes:
        """The bytes of its item."""
        marks = [list(mark) for mark in self.marks]
        body = pack_marked(
            [self.token, self.deadline, self.version, self.all_tags, marks, self.stale, list(self.failed)]
        )
        return pack_entry(b"l" + body, kept, _OVER, 0.0)


def held_of(entry: Entry | None) -> Held | None:
    """The lease that an entry holds; `None` if it is none."""
    if entry is None or entry.form != LEASE:
        return None
    try:
        token, deadline, version, all_tags, marks, stale, (name, error) = unpack_plain(bytes(entry.body))
        return Held(token, deadline, version, all_tags, marks_of(marks), stale, (name, error))
    except (ValueError, TypeError):
        return None  # Damaged, and so nobody's.


def stale_in(held: Held, kept: bytes) -> Entry | None:
    """The stale entry in a lease."""
    return any_entry(held.stale, 0, kept, 0.0) if held.stale else None


def kept_as(entry: Entry, kept: bytes) -> bytes:
    """An entry as it stands in a lease, and is put back."""
    form = bytes((entry.form,)) + entry.body
    return pack_entry(form, kept, entry.expiry, entry.stored_at, entry.version, entry.notes)


def servable(entry: Entry | None, now: float) -> bool:
    """Whether the value of an entry may be served, live or stale, as far as its time goes."""
    if entry is None or entry.form == LEASE:
        return False
    return not entry.expiry or kept_until(entry.expiry, entry.notes) > now


def is_live(entry: Entry, now: float) -> bool:
    """Whether its time to live is not over."""
    return not entry.expiry or entry.expiry > now


def stale_of(entry: Entry, value: object, lease: str, remaining: float) -> Stale:
    """The reply that says what may be served stale."""
    notes = entry.notes
    metadata = notes.metadata
    load_time, etag = (0.0, None) if metadata is None else (metadata.load_time, metadata.etag)
    return Stale(value, entry.version, notes.tags, entry.stored_at, load_time, etag, lease, remaining)
