"""A cached analysis of Python's standard library, without a server.

Many concurrent tasks request the analysis of a few hundred modules, some far more often than others. Parsing with
`ast` is slow. The cache holds a fraction of the results, so there are hits, misses and evictions. A subscriber prints
a sample of the events.

    python examples/demo.py [--seconds 8] [--entries 120] [--tasks 64]
"""

from __future__ import annotations

import argparse
import ast
import itertools
import random
import statistics
import sysconfig
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cachebus import Cache, Subscription, open_cache
from cachebus.messages import CacheEvicted, CacheHit, CacheMiss

SHOWN_PER_KIND_AND_SECOND = 1.5

# CPython's parser shares its recursion depth between threads, which may raise SystemError.
_PARSER = threading.Lock()


@dataclass(frozen=True)
class Analysis:
    """Metrics of a module."""

    lines: int
    functions: int
    classes: int
    imports: int
    deepest_nesting: int
    most_branches: int


def analyse(path: str) -> Analysis:
    """Parse and measure a module, which takes from a few milliseconds to a second."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    with _PARSER:
        tree = ast.parse(text)
    kinds: Counter[type[ast.AST]] = Counter()
    deepest = 0
    pending: list[tuple[ast.AST, int]] = [(tree, 0)]
    while pending:
        node, depth = pending.pop()
        kinds[type(node)] += 1
        deepest = max(deepest, depth)
        pending.extend((child, depth + 1) for child in ast.iter_child_nodes(node))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    branches = [sum(isinstance(each, (ast.If, ast.For, ast.While, ast.Try)) for each in ast.walk(f)) for f in functions]
    return Analysis(
        lines=text.count("\n"),
        functions=len(functions),
        classes=kinds[ast.ClassDef],
        imports=kinds[ast.Import] + kinds[ast.ImportFrom],
        deepest_nesting=deepest,
        most_branches=max(branches, default=0),
    )


def timed(path: str) -> tuple[Analysis, float]:
    """Return an analysis and its processor time in seconds, which each call would take without a cache."""
    started = time.thread_time()
    return analyse(path), time.thread_time() - started


def modules() -> list[str]:
    """Return the paths of the standard library's modules, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    return sorted(str(path) for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


class Popularity:
    """Zipf-like choice of modules: the n-th in a shuffled order is requested in proportion to 1/n."""

    def __init__(self, paths: list[str], seed: int = 1) -> None:
        self._chance = random.Random(seed)
        self._paths = self._chance.sample(paths, len(paths))
        self._weights = list(itertools.accumulate(1 / rank for rank in range(1, len(paths) + 1)))

    def next(self) -> str:
        """Return the path of the next module to request."""
        return self._chance.choices(self._paths, cum_weights=self._weights)[0]


class Run:
    """Counters and latencies of the run."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.loads = 0
        self.load_seconds: dict[str, float] = {}
        self.uncached_seconds = 0.0
        self.shown: Counter[str] = Counter()

    def table(self, removals: dict[str, int], hit_rate: float, seconds: float, dropped: int) -> Table:
        """Return the table of results."""
        cuts = statistics.quantiles(self.latencies, n=100)
        table = Table("what", "figure", title="the standard library, analysed through cachebus")
        table.add_row("requests", f"{len(self.latencies):,}")
        table.add_row("analyses run (misses)", f"{self.loads:,}")
        table.add_row("hit rate", f"{hit_rate:.1%}")
        for cause, count in removals.items():
            table.add_row(f"removed: {cause}", f"{count:,}")
        table.add_row("time with the cache", f"{seconds:.1f} s")
        table.add_row("processor time without it", f"{self.uncached_seconds:,.1f} s")
        table.add_row("speed-up", f"{self.uncached_seconds / seconds:,.0f}x")
        table.add_row("p50 / p99 of a request", f"{cuts[49] * 1e3:.3f} ms / {cuts[98] * 1e3:.1f} ms")
        table.add_row("events shown / dropped by the subscriber", f"{sum(self.shown.values())} / {dropped}")
        return table


async def show_events(events: Subscription, console: Console, run: Run, started: float) -> None:
    """Print a sample of the received events."""
    async for event in events:
        kind = type(event).__name__
        if run.shown[kind] <= (time.perf_counter() - started) * SHOWN_PER_KIND_AND_SECOND:
            run.shown[kind] += 1
            module = Path(getattr(event, "key", "")).stem
            colour = {"CacheHit": "green", "CacheMiss": "yellow"}.get(kind, "red")
            console.print(f"[{colour}]{kind:<13}[/] {module:<24} seq {event.seq:<8} {event.origin}", highlight=False)


async def work(cache: Cache, run: Run, popularity: Popularity, tasks: int, seconds: float, progress: Progress) -> None:
    """Request modules from many tasks until the time is up."""

    @cache.cached(key="analysis:{path}", ttl=300, tags=["stdlib"])
    async def analysis(path: str) -> Analysis:
        run.loads += 1
        result, run.load_seconds[path] = await anyio.to_thread.run_sync(timed, path, limiter=threads)
        return result

    threads = anyio.CapacityLimiter(4)
    bar = progress.add_task("running", total=seconds, requests=0, loads=0)
    began = time.perf_counter()

    async def ask() -> None:
        while (elapsed := time.perf_counter() - began) < seconds:
            path = popularity.next()
            started = time.perf_counter()
            await analysis(path)
            run.latencies.append(time.perf_counter() - started)
            run.uncached_seconds += run.load_seconds.get(path, 0.0)
            if len(run.latencies) % 50 == 0:
                progress.update(bar, completed=elapsed, requests=len(run.latencies), loads=run.loads)
                await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        for _ in range(tasks):
            group.start_soon(ask)
    progress.update(bar, completed=seconds, requests=len(run.latencies), loads=run.loads)


async def main(seconds: float, entries: int, tasks: int) -> None:
    """Run the demonstration."""
    console = Console()
    paths = modules()
    console.print(f"{len(paths)} modules, a cache of {entries} entries, {tasks} tasks, {seconds:g} seconds")
    run, started = Run(), time.perf_counter()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[requests]:,} requests, {task.fields[loads]:,} analyses"),
        TimeElapsedColumn(),
        console=console,
    )
    async with open_cache(f"memory://?max_entries={entries}") as cache:
        with (
            cache.events(CacheHit, CacheMiss, CacheEvicted, capacity=10_000, local=True) as events,
            Live(progress, console=console),
        ):
            async with anyio.create_task_group() as group:
                group.start_soon(show_events, events, console, run, started)
                await work(cache, run, Popularity(paths), tasks, seconds, progress)
                events.close()
        figures = await cache.statistics()
        removals = {cause: count for cause, count in figures.removals.items() if count}
        console.print()
        console.print(run.table(removals, figures.hit_rate, seconds, events.dropped))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of the run")
    parser.add_argument("--entries", type=int, default=120, help="maximum number of cache entries")
    parser.add_argument("--tasks", type=int, default=64, help="number of concurrent tasks")
    options = parser.parse_args()
    anyio.run(main, options.seconds, options.entries, options.tasks)
