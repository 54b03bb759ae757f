"""Timing side by side: contenders take turns, round after round, so that a busy moment of the machine meets them all."""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any


@dataclass
class Contender:
    """Something to time: `work(n)` does `n` operations, as a plain or a coroutine function."""

    name: str
    work: Callable[[int], Any]
    rounds: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median time of one operation."""
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Bar:
    """How much of a peer's time we may take."""

    peer: str
    at_most: float


@dataclass
class Row:
    """Ours beside its peers."""

    title: str
    ours: Contender
    peers: Sequence[Contender]
    bars: Sequence[Bar] = ()

    def ratio(self, peer: Contender) -> float:
        """Our time over the peer's: the median over the rounds of what stood side by side."""
        return statistics.median(a / b for a, b in zip(self.ours.rounds, peer.rounds, strict=True))


def measure(row: Row, operations: int = 20_000, rounds: int = 15) -> Row:
    """Time every contender of a row in every round."""
    _announce(row)
    contenders = [row.ours, *row.peers]
    for each in contenders:
        _time(each, operations)  # warm
        each.rounds.clear()
    for number in range(rounds):
        for each in contenders[number % len(contenders) :] + contenders[: number % len(contenders)]:
            _time(each, operations)
    return row


def _announce(row: Row) -> None:
    # Beside the tables, so that whoever waits sees that something goes on, and how far it is.
    print(f"  {row.title}", file=sys.stderr, flush=True)


def _time(contender: Contender, operations: int) -> None:
    gc.collect()
    gc.disable()
    started = perf_counter()
    contender.work(operations)
    contender.rounds.append((perf_counter() - started) / operations)
    gc.enable()


async def measure_async(row: Row, operations: int = 20_000, rounds: int = 15) -> Row:
    """As `measure`, for coroutine functions, all in the running loop."""
    _announce(row)
    contenders = [row.ours, *row.peers]
    for each in contenders:
        await each.work(operations)
    for number in range(rounds):
        for each in contenders[number % len(contenders) :] + contenders[: number % len(contenders)]:
            gc.collect()
            gc.disable()
            started = perf_counter()
            await each.work(operations)
            each.rounds.append((perf_counter() - started) / operations)
            gc.enable()
            await asyncio.sleep(0)
    return row


def calls(function: Callable[[str], Any], keys: Sequence[str]) -> Callable[[int], None]:
    """Work that calls `function` with one key after another."""

    def work(operations: int) -> None:
        for key in keys[:operations]:
            function(key)

    return work


def awaits(function: Callable[[str], Awaitable[Any]], keys: Sequence[str]) -> Callable[[int], Awaitable[None]]:
    """Work that awaits `function` with one key after another."""

    async def work(operations: int) -> None:
        for key in keys[:operations]:
            await function(key)

    return work
