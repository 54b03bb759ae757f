"""Comparative timing.

Contenders alternate, round after round, so that a busy moment of the machine affects all of them.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter, thread_time
from typing import Any, Literal

Clock = Literal["wall", "processor"]
"""`processor` is the processor time of the thread. Use it if nothing waits; other processes hardly affect it."""


@dataclass
class Contender:
    """Code to time: `work(n)` does `n` operations, as a plain or a coroutine function."""

    name: str
    work: Callable[[int], Any]
    times: dict[Clock, list[float]] = field(default_factory=lambda: {"wall": [], "processor": []})
    """Seconds per operation, for each round."""

    def seconds(self, clock: Clock) -> float:
        """Return the median time of one operation."""
        return statistics.median(self.times[clock])

    def forget(self) -> None:
        """Clear the times of all rounds."""
        for rounds in self.times.values():
            rounds.clear()


@dataclass(frozen=True)
class Bar:
    """Bound relative to a peer: at most a share of its time, or at least a multiple of its rate."""

    peer: str
    at_most: float | None = None
    at_least: float | None = None

    def figure(self, ratio: float) -> float:
        """Return the value to compare: the share of the peer's time, or the multiple of its rate."""
        return ratio if self.at_least is None else 1 / ratio

    def reached(self, ratio: float) -> bool:
        """Return `True` if a ratio of our time to the peer's meets the bound."""
        if self.at_least is not None:
            return self.figure(ratio) >= self.at_least
        return self.at_most is None or ratio <= self.at_most

    def __str__(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}x rate"
        return "" if self.at_most is None else f"<= {self.at_most:g}x time"


@dataclass
class Row:
    """Comparison of cachebus with its peers."""

    title: str
    ours: Contender
    peers: Sequence[Contender]
    bars: Sequence[Bar] = ()
    clock: Clock = "wall"

    def ratio(self, peer: Contender) -> float:
        """Return our time over the peer's: the median of the ratios of all rounds."""
        pairs = zip(self.ours.times[self.clock], peer.times[self.clock], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    def bar(self, peer: Contender) -> Bar:
        """Return the bar for this peer, or a bar without a bound."""
        return next((bar for bar in self.bars if bar.peer == peer.name), Bar(peer.name))


@dataclass(frozen=True)
class Figure:
    """Figure without a peer, and its bar."""

    title: str
    said: str
    bar: str = ""
    good: bool = True


def measure(row: Row, operations: int = 20_000, rounds: int = 15) -> Row:
    """Time every contender of a row in every round."""
    announce(row.title)
    for each in (contenders := [row.ours, *row.peers]):
        each.work(operations)  # warm
        each.forget()
    for number in range(rounds):
        for each in _turned(contenders, number):
            with _timed(each, operations):
                each.work(operations)
    return row


async def measure_async(row: Row, operations: int = 20_000, rounds: int = 15) -> Row:
    """Time coroutine functions like `measure`, in the running loop."""
    announce(row.title)
    for each in (contenders := [row.ours, *row.peers]):
        await each.work(operations)
        each.forget()
    for number in range(rounds):
        for each in _turned(contenders, number):
            with _timed(each, operations):
                await each.work(operations)
            await asyncio.sleep(0)
    return row


def announce(title: str) -> None:
    """Print progress to standard error."""
    if title:
        print(f"  {title}", file=sys.stderr, flush=True)


def _turned(contenders: list[Contender], number: int) -> list[Contender]:
    """Rotate the contenders, so that each begins equally often."""
    first = number % len(contenders)
    return contenders[first:] + contenders[:first]


@contextmanager
def _timed(contender: Contender, operations: int) -> Generator[None]:
    gc.collect()
    gc.disable()
    wall, processor = perf_counter(), thread_time()
    try:
        yield
    finally:
        contender.times["processor"].append((thread_time() - processor) / operations)
        contender.times["wall"].append((perf_counter() - wall) / operations)
        gc.enable()


def calls(function: Callable[[str], Any], keys: Sequence[str]) -> Callable[[int], None]:
    """Return work that calls `function` with one key after another."""

    def work(operations: int) -> None:
        for key in keys[:operations]:
            function(key)

    return work


def awaits(function: Callable[[str], Awaitable[Any]], keys: Sequence[str]) -> Callable[[int], Awaitable[None]]:
    """Return work that awaits `function` with one key after another."""

    async def work(operations: int) -> None:
        for key in keys[:operations]:
            await function(key)

    return work


def shared(
    callers: int, operation: Callable[[str], Awaitable[Any]], keys: Sequence[str]
) -> Callable[[int], Awaitable[None]]:
    """Return work shared by `callers` tasks. Each waits for a reply before it sends its next request."""

    async def work(operations: int) -> None:
        async def caller(number: int) -> None:
            share = operations // callers
            first = number * 37 % (len(keys) - share)
            for key in keys[first : first + share]:
                await operation(key)

        await asyncio.gather(*(caller(number) for number in range(callers)))

    return work
