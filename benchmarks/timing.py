"""Timing side by side: contenders take turns, round after round, so that a busy moment of the machine meets them all."""

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
"""`processor` is the processor time of the thread. It is right where nothing waits, and it hardly sees other processes."""


@dataclass
class Contender:
    """Something to time: `work(n)` does `n` operations, as a plain or a coroutine function."""

    name: str
    work: Callable[[int], Any]
    times: dict[Clock, list[float]] = field(default_factory=lambda: {"wall": [], "processor": []})
    """Seconds of one operation, round by round."""

    def seconds(self, clock: Clock) -> float:
        """Median time of one operation."""
        return statistics.median(self.times[clock])

    def forget(self) -> None:
        """Forget all rounds."""
        for rounds in self.times.values():
            rounds.clear()


@dataclass(frozen=True)
class Bar:
    """A bound beside a peer: a share of its time at most, or a multiple of its rate at least."""

    peer: str
    at_most: float | None = None
    at_least: float | None = None

    def figure(self, ratio: float) -> float:
        """What is compared: the share of the peer's time, or the multiple of its rate."""
        return ratio if self.at_least is None else 1 / ratio

    def reached(self, ratio: float) -> bool:
        """Whether our time over the peer's is good enough."""
        if self.at_least is not None:
            return self.figure(ratio) >= self.at_least
        return self.at_most is None or ratio <= self.at_most

    def __str__(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}x rate"
        return "" if self.at_most is None else f"<= {self.at_most:g}x time"


@dataclass
class Row:
    """Ours beside its peers."""

    title: str
    ours: Contender
    peers: Sequence[Contender]
    bars: Sequence[Bar] = ()
    clock: Clock = "wall"

    def ratio(self, peer: Contender) -> float:
        """Our time over the peer's: the median over the rounds of what stood side by side."""
        pairs = zip(self.ours.times[self.clock], peer.times[self.clock], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    def bar(self, peer: Contender) -> Bar:
        """The bar beside this peer; one without a bound if there is none."""
        return next((bar for bar in self.bars if bar.peer == peer.name), Bar(peer.name))


@dataclass(frozen=True)
class Figure:
    """A number of its own, and the bar for it."""

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
    """As `measure`, for coroutine functions, all in the running loop."""
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
    """Show how far the run is. Goes to the standard error, beside the tables."""
    if title:
        print(f"  {title}", file=sys.stderr, flush=True)


def _turned(contenders: list[Contender], number: int) -> list[Contender]:
    """Let each begin as often as the others."""
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


def shared(
    callers: int, operation: Callable[[str], Awaitable[Any]], keys: Sequence[str]
) -> Callable[[int], Awaitable[None]]:
    """Work that `callers` tasks share, each waiting for one reply before it sends the next request."""

    async def work(operations: int) -> None:
        async def caller(number: int) -> None:
            share = operations // callers
            first = number * 37 % (len(keys) - share)
            for key in keys[first : first + share]:
                await operation(key)

        await asyncio.gather(*(caller(number) for number in range(callers)))

    return work
