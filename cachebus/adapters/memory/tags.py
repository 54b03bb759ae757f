"""Tags of a store in this process: invalidation in O(1), by version."""

from __future__ import annotations

from collections.abc import Iterable

from .eviction import Entry


class TagTable:
    """When each tag was last invalidated, for as long as an entry carries it.

    An entry is valid while it is newer than the last invalidation of each of its tags. A tag without entries is forgotten.
    """

    def __init__(self) -> None:
        # tag -> [entries that carry it, version at which it was last invalidated]
        self._tags: dict[str, list[float]] = {}

    def clear(self) -> None:
        self._tags.clear()

    def attach(self, tags: tuple[str, ...]) -> None:
        """Note that one more entry carries `tags`."""
        for tag in tags:
            self._tags.setdefault(tag, [0, 0])[0] += 1

    def detach(self, tags: tuple[str, ...]) -> None:
        """Note that one entry fewer carries `tags`."""
        for tag in tags:
            record = self._tags[tag]
            record[0] -= 1
            if not record[0]:
                del self._tags[tag]

    def rebuild(self, entries: Iterable[Entry]) -> None:
        """Count again which tags `entries` carry. What is known of invalidations stays."""
        counted: dict[str, list[float]] = {}
        for entry in entries:
            for tag in entry.tags:
                counted.setdefault(tag, [0, self._tags.get(tag, (0, 0))[1]])[0] += 1
        self._tags = counted

    def invalidate(self, tag: str, version: float) -> None:
        """Make every entry that carries `tag` and is not newer than `version` invalid."""
        if (record := self._tags.get(tag)) is not None:
            record[1] = version

    def valid(self, entry: Entry) -> bool:
        """Whether none of the entry's tags was invalidated since it was written."""
        tags, version = self._tags, entry.version
        for tag in entry.tags:  # noqa: SIM110 (a generator costs as much as the rest of a read)
            if tags[tag][1] >= version:
                return False
        return True
