"""Tags of a memory store. A tag is invalidated in O(1) by recording a version."""

from __future__ import annotations

from collections.abc import Iterable

from .eviction import Entry


class TagTable:
    """Version of the last invalidation of each tag that an entry has.

    An entry is valid if it is newer than the last invalidation of each of its tags. A tag without entries is removed.
    """

    def __init__(self) -> None:
        # Maps a tag to [number of entries with the tag, version of its last invalidation].
        self._tags: dict[str, list[float]] = {}

    def clear(self) -> None:
        self._tags.clear()

    def attach(self, tags: tuple[str, ...]) -> None:
        """Count one more entry with `tags`."""
        for tag in tags:
            self._tags.setdefault(tag, [0, 0])[0] += 1

    def detach(self, tags: tuple[str, ...]) -> None:
        """Count one entry fewer with `tags`."""
        for tag in tags:
            record = self._tags[tag]
            record[0] -= 1
            if not record[0]:
                del self._tags[tag]

    def rebuild(self, entries: Iterable[Entry]) -> None:
        """Recount the tags of `entries`. Recorded invalidations are kept."""
        counted: dict[str, list[float]] = {}
        for entry in entries:
            for tag in entry.tags:
                counted.setdefault(tag, [0, self._tags.get(tag, (0, 0))[1]])[0] += 1
        self._tags = counted

    def invalidate(self, tag: str, version: float) -> None:
        """Invalidate every entry with `tag` that is not newer than `version`."""
        if (record := self._tags.get(tag)) is not None:
            record[1] = version

    def valid(self, entry: Entry) -> bool:
        """Return true if no tag of the entry was invalidated since it was written."""
        tags, version = self._tags, entry.version
        for tag in entry.tags:  # noqa: SIM110 (A generator costs as much as the rest of a read.)
            if tags[tag][1] >= version:
                return False
        return True
