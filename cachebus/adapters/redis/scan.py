"""Walks over the keys of a namespace: which keys a pattern means, and removing them a page at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from cachebus.actors.ports import OnReplies, Progress
from cachebus.messages import CacheConnectionError, CacheError, Deleted, DeleteMany, Failed, Reply, Request

from ..common.glob import compile_glob, widen
from .connection import Argument, RedisConnection
from .errors import BACKEND

PAGE = 500  # The keys that a server looks at for one page.


def scan_words(prefix: str, pattern: str, cursor: str | bytes) -> list[Argument]:
    """The command that asks for a page: our keys that match, and perhaps more of ours. The server's `?` and sets are about
    bytes, and ours about characters, so the last word is `matching`'s."""
    literal = "".join(f"\\{each}" if each in "*?[]\\^-" else each for each in prefix)
    return ["SCAN", cursor, "MATCH", literal + widen(pattern), "COUNT", PAGE]


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


class Walks:
    """Batches with requests of some `kinds` that are under way beside everything else, because each takes many round trips.
    `walk` carries one of these out, `execute` any other request of such a batch."""

    def __init__(
        self,
        kinds: frozenset[type[Request[Any]]],
        walk: Callable[[Any], Awaitable[Reply]],
        execute: Callable[[Sequence[Request[Any]]], Awaitable[Sequence[Reply]]],
    ) -> None:
        self._kinds = kinds
        self._walk = walk
        self._execute = execute
        self._under_way: set[asyncio.Task[None]] = set()

    def start(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> None:
        """Carry out a batch."""
        task = asyncio.create_task(self._run(batch, on_replies))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def remove(self, connection: RedisConnection, prefix: str, pattern: str) -> int:
        """Remove every key of the namespace that a server lists and a pattern matches, and say how many. What is stored
        meanwhile may go or stay."""
        removed, cursor = 0, b"0"
        while True:
            cursor, names = await connection.call(*scan_words(prefix, pattern, cursor))
            if keys := matching(names, prefix, pattern):
                # By the way of every other request, which in a cluster follows keys that have moved since they were listed.
                (reply,) = await self._execute([DeleteMany(tuple(keys))])
                if isinstance(reply, Failed):
                    raise reply.error()
                removed += reply.count if isinstance(reply, Deleted) else 0
            if cursor == b"0":
                return removed

    async def finish(self) -> None:
        """Wait until no walk is under way."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def cancel(self) -> None:
        """Break off every walk."""
        for task in self._under_way:
            task.cancel()

    async def _run(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> None:
        replies: list[Reply] = []
        try:
            for request in batch:
                try:
                    if type(request) in self._kinds:
                        replies.append(await self._walk(request))
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
    """The replies to a batch that is handed to `submit`."""
    future: asyncio.Future[Sequence[Reply]] = asyncio.get_running_loop().create_future()

    def on_replies(replies: Sequence[Reply]) -> None:
        if not future.done():
            future.set_result(replies)

    await submit(batch, on_replies)
    return await future
