"""Walks over the keys of a namespace: which keys a pattern means, and removing them a page at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from .glob import compile_glob, widen
from .redis_connection import Argument, RedisConnection

PAGE = 500
"""The keys that a server looks at for one page."""


def scan_words(prefix: str, pattern: str, cursor: str | bytes) -> list[Argument]:
    """The command that asks for a page."""
    return ["SCAN", cursor, "MATCH", server_glob(prefix, pattern), "COUNT", PAGE]


Remove = Callable[[Sequence[str]], Awaitable[int]]
"""Removes keys of the namespace, and says how many there were."""


async def remove_matching(connection: RedisConnection, prefix: str, pattern: str, remove: Remove | None = None) -> int:
    """Remove every key of the namespace that a pattern matches, and say how many. What is stored meanwhile may go
    or stay. `remove` does it where the server that lists the keys is not always the one that has them."""
    removed = 0
    cursor = b"0"
    while True:
        cursor, names = await connection.call(*scan_words(prefix, pattern, cursor))
        if keys := matching(names, prefix, pattern):
            if remove is None:
                removed += await connection.call("UNLINK", *(prefix + key for key in keys))
            else:
                removed += await remove(keys)
        if cursor == b"0":
            return removed


def matching(names: Sequence[bytes], prefix: str, pattern: str) -> list[str]:
    """The keys of the namespace, among the names that a scan has listed, that a pattern matches; each once."""
    matches = compile_glob(pattern).fullmatch
    found: dict[str, None] = {}
    for name in names:
        try:
            key = name.decode()[len(prefix) :]
        except UnicodeDecodeError:
            continue  # Not written by us.
        if key and matches(key):
            found[key] = None
    return list(found)


def server_glob(prefix: str, pattern: str) -> str:
    """What the server is to look for: our keys that match, and perhaps more of ours. Its `?` and sets are about bytes,
    and ours about characters, so the last word is `matching`'s."""
    literal = "".join(f"\\{each}" if each in "*?[]\\^-" else each for each in prefix)
    return literal + widen(pattern)
