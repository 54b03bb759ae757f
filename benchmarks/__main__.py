"""`python -m benchmarks`: every benchmark beside its peers in one run, as ratios. Exits 1 if a bar is missed."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

from . import footprint, hit_ratio, limits, loading, locks, memcached, memory, nats, payload, redis
from .timing import Row

console = Console(width=120)
PARTS = ["memory", "redis", "memcached", "nats", "payload", "loading", "locks", "limits", "footprint", "hit-ratio"]


def show(rows: list[Row]) -> bool:
    """Print the rows; says whether every bar was reached."""
    table = Table("work", "ours", "peer", "its time", "ratio", "bar", title="time of one operation, median of rounds")
    good = True
    for row in rows:
        bars = {bar.peer: bar.at_most for bar in row.bars}
        for number, peer in enumerate(row.peers):
            ratio, bar = row.ratio(peer), bars.get(peer.name)
            verdict = "" if bar is None else f"<= {bar:g} {'ok' if ratio <= bar else 'MISSED'}"
            good = good and (bar is None or ratio <= bar)
            first = (row.title, f"{row.ours.seconds * 1e6:.2f} us") if not number else ("", "")
            table.add_row(*first, peer.name, f"{peer.seconds * 1e6:.2f} us", f"{ratio:.2f}x", verdict)
        table.add_section()
    console.print(table)
    return good


def show_figures(figures: list[payload.Figure]) -> bool:
    """Print numbers that have bars of their own; says whether every bar was reached."""
    table = Table("what", "figure", "bar", title="payloads")
    for each in figures:
        table.add_row(each.title, each.said, each.bar if each.good else f"{each.bar} MISSED")
    console.print(table)
    return all(each.good for each in figures)


def show_footprint(entries: int) -> bool:
    """Print memory, import time and the cost of eviction; says whether every bar was reached."""
    sizes = footprint.bytes_per_entry(entries)
    imports = footprint.import_seconds()
    ratio = sizes["cachebus"] / sizes["cachetools TTLCache"]
    ours = imports["import cachebus"]
    table = Table("what", "figure", "bar", title="footprint")
    for name, size in sizes.items():
        table.add_row(f"bytes per entry, {entries:,} entries with a TTL: {name}", f"{size:.0f}", "")
    table.add_row("... ours over cachetools", f"{ratio:.2f}x", f"<= 1 {'ok' if ratio <= 1 else 'MISSED'}")
    for name, seconds in imports.items():
        table.add_row(name, f"{seconds * 1e3:.0f} ms", f"< 150 ms {'ok' if seconds < 0.15 else 'MISSED'}")
    for size, seconds in footprint.evicting_set_seconds().items():
        table.add_row(f"set that evicts, store of {size:,}", f"{seconds * 1e6:.2f} us", "O(1)")
    console.print(table)
    return ratio <= 1 and ours < 0.15


def show_hit_ratios(folder: Path | None) -> bool:
    """Print the hit ratios of the policies; says whether the default reaches its bar everywhere."""
    table = hit_ratio.measure(folder)
    hit_ratio.show(table)
    good, lines = hit_ratio.verdict(table)
    console.print("\n".join(lines), highlight=False)
    return good


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000, help="entries of the memory benchmark")
    # An empty list is a choice, because argparse checks the default of "*" against them.
    said = f"{', '.join(PARTS)}; all if none is named"
    parser.add_argument("what", nargs="*", choices=[*PARTS, []], metavar="PART", help=said)
    options = parser.parse_args()
    what = options.what or PARTS
    console.print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    traces = os.environ.get("CACHEBUS_TRACES")
    parts: dict[str, Callable[[], bool]] = {
        "memory": lambda: show(memory.rows()),
        "redis": lambda: show(redis.rows()),
        "memcached": lambda: show(memcached.rows()),
        "nats": lambda: show(nats.rows()),
        "payload": lambda: show(payload.rows()) & show_figures(payload.figures()),
        "loading": loading.main,
        "locks": lambda: show(locks.rows()),
        "limits": lambda: show(limits.rows()),
        "footprint": lambda: show_footprint(options.entries),
        "hit-ratio": lambda: show_hit_ratios(Path(traces) if traces else None),
    }
    good, began = True, perf_counter()
    for part in (name for name in PARTS if name in what):
        console.rule(part)
        started = perf_counter()
        good &= parts[part]()
        now = perf_counter()
        console.print(f"{part}: {now - started:.0f} s, {now - began:.0f} s in all")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
