"""Scans over the keys of a namespace: pattern matching, and deletion one page at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from cachebus.actors.ports import OnReplies, Progress
from cachebus.messages import CacheConnectionError, CacheError, Deleted, DeleteMany, Failed, Reply, Request

from ..common.glob import compile_glob, widen
from .connection import Argument, RedisConnection
from .errors import BACKEND

PAGE = 500  # Number of keys that a server examines for one page.


def scan_words(prefix: str, pattern: str, cursor: str | bytes) -> list[Argument]:
    """Return the `SCAN` command for a page.

    The page may include keys of the namespace that do not match: in Redis, `?` and sets match bytes instead of
    characters. Filter it with `matching`.
    """
    literal = "".join(f"\\{each}" if each in "*?[]\\^-" else each for each in prefix)
    return ["SCAN", cursor, "MATCH", literal + widen(pattern), "COUNT", PAGE]


def matching(names: Sequence[bytes], prefix: str, pattern: str) -> list[str]:
    """Return the keys among the scanned names that match the pattern, without the prefix and without duplicates."""
    matches = compile_glob(pattern).fullmatch
    found: dict[str, None] = {}
    for name in names:
        try:
            key = name.decode()[len(prefix) :]
        except UnicodeDecodeError:
            continue  # Not a key of cachebus.
        if key and matches(key):
            found[key] = None
    return list(found)


class ScanRunner:
    """Background runner of batches with scanning requests, because each takes many round trips.

    `scan` executes a request of one of the `kinds`, and `execute` any other request of the batch.
    """

    def __init__(
        self,
        kinds: frozenset[type[Request[Any]]],
        scan: Callable[[Any], Awaitable[Reply]],
        execute: Callable[[Sequence[Request[Any]]], Awaitable[Sequence[Reply]]],
    ) -> None:
        self._kinds = kinds
        self._scan = scan
        self._execute = execute
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> None:
        """Start to execute a batch."""
        task = asyncio.create_task(self._run(batch, on_replies))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def remove(self, connection: RedisConnection, prefix: str, pattern: str) -> int:
        """Delete the keys on one server that match a pattern, and return their number.

        An entry written during the scan may or may not be deleted.
        """
        removed, cursor = 0, b"0"
        while True:
            cursor, names = await connection.call(*scan_words(prefix, pattern, cursor))
            if keys := matching(names, prefix, pattern):
                # Sent like any other request. In a cluster it follows keys that have moved since they were listed.
                (reply,) = await self._execute([DeleteMany(tuple(keys))])
                if isinstance(reply, Failed):
                    raise reply.error()
                removed += reply.count if isinstance(reply, Deleted) else 0
            if cursor == b"0":
                return removed

    async def finish(self) -> None:
        """Wait until every scan has finished."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def cancel(self) -> None:
        """Cancel every scan."""
        for task in self._tasks:
            task.cancel()

    async def _run(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> None:
        replies: list[Reply] = []
        try:
            for request in batch:
                try:
                    if type(request) in self._kinds:
                        replies.append(await self._scan(request))
                    else:
                        replies += await self._execute([request])
                except CacheError as error:
                    replies.append(Failed.of(error))
        except asyncio.CancelledError:
            on_replies([Failed.of(CacheConnectionError("the store was closed", BACKEND))] * len(batch))
            raise
        on_replies(replies)


async def submitted(
    submit: Callable[[Sequence[Request[Any]], OnReplies], Awaitable[Progress]], batch: Sequence[Request[Any]]
) -> Sequence[Reply]:
    """Submit a batch, wait for its replies and return them."""
    future: asyncio.Future[Sequence[Reply]] = asyncio.get_running_loop().create_future()

    def on_replies(replies: Sequence[Reply]) -> None:
        if not future.done():
            future.set_result(replies)

    await submit(batch, on_replies)
    return await future
