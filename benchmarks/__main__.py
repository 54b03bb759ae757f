"""`python -m benchmarks`: run every benchmark against its peers and print ratios. Exits 1 if a bar is missed."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

from . import (
    events,
    footprint,
    hit_ratio,
    limits,
    loading,
    locks,
    memcached,
    memory,
    messages,
    nats,
    path,
    payload,
    redis,
)
from .timing import Figure, Row

console = Console(width=140)


def show_rows(rows: Sequence[Row]) -> list[Figure]:
    """Print the rows, and return those with a bar as figures."""
    table = Table(
        "work", "ours", "peer", "its time", "ratio", "rate", "bar", title="time of one operation, median of rounds"
    )
    barred: list[Figure] = []
    for row in rows:
        for number, peer in enumerate(row.peers):
            ratio, bar = row.ratio(peer), row.bar(peer)
            said = f"{bar.figure(ratio):.2f}x"
            if str(bar):
                figure = Figure(f"{row.title} / {peer.name}", said, str(bar), bar.reached(ratio))
                barred.append(figure)
            ours, theirs = row.ours.seconds(row.clock), peer.seconds(row.clock)
            first = (row.title, f"{ours * 1e6:.2f} us") if not number else ("", "")
            verdict = verdict_of(barred[-1]) if str(bar) else ""
            table.add_row(*first, peer.name, f"{theirs * 1e6:.2f} us", f"{ratio:.2f}x", f"{1 / ratio:.2f}x", verdict)
        table.add_section()
    console.print(table)
    return barred


def show_figures(title: str, figures: Sequence[Figure]) -> list[Figure]:
    """Print the figures, and return those with a bar."""
    table = Table("work", "figure", "bar", title=title)
    for each in figures:
        table.add_row(each.title, each.said, verdict_of(each) if each.bar else "")
    console.print(table)
    return [each for each in figures if each.bar]


def show_hit_ratios() -> list[Figure]:
    """Print the hit ratios of the policies, and return the bar of the default policy."""
    folder = os.environ.get("CACHEBUS_TRACES")
    table = hit_ratio.measure(Path(folder) if folder else None)
    hit_ratio.show(table)
    good, lines = hit_ratio.verdict(table)
    console.print("\n".join(lines), highlight=False)
    return [Figure("hit ratio of the default policy", "see above", "as the best peers", good)]


def verdict_of(figure: Figure) -> str:
    """Return the text of the bar, followed by `reached` or `MISSED`."""
    return f"{figure.bar} {'reached' if figure.good else 'MISSED'}"


def as_markdown(figures: Sequence[Figure]) -> str:
    """Return the Markdown table of all bars in `docs/benchmarks.md`."""
    lines = ["| work | figure | bar | |", "| --- | ---: | ---: | --- |"]
    lines += [
        f"| {each.title} | {each.said} | {each.bar} | {'reached' if each.good else '**missed**'} |" for each in figures
    ]
    return "\n".join(lines) + "\n"


PARTS: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
    "path": lambda _: show_figures("calls of our own functions", path.figures()),
    "messages": lambda _: show_figures("messages", messages.figures()),
    "memory": lambda _: show_rows(memory.rows()),
    "redis": lambda _: show_rows(redis.rows()),
    "memcached": lambda _: show_rows(memcached.rows()),
    "nats": lambda _: show_rows(nats.rows()),
    "events": lambda _: show_figures("events", events.figures()),
    "payload": lambda _: show_rows(payload.rows()) + show_figures("payloads", payload.figures()),
    "loading": lambda _: show_rows(loading.rows()) + show_figures("loading", loading.figures()),
    "locks": lambda _: show_rows(locks.rows()),
    "limits": lambda _: show_rows(limits.rows()),
    "footprint": lambda options: show_figures("footprint", footprint.figures(options.entries)),
    "hit-ratio": lambda _: show_hit_ratios(),
}


def main() -> int:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000, help="entries of the footprint benchmark")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table of bars to a file as Markdown")
    # argparse checks the default of "*" against the choices, so the empty list is one of them.
    said = f"{', '.join(PARTS)}; default: all"
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=said)
    options = parser.parse_args()
    console.print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    barred: list[Figure] = []
    began = perf_counter()
    for name in (each for each in PARTS if each in (options.parts or PARTS)):
        console.rule(name)
        started = perf_counter()
        # Freeze the large heap of the peers' modules, because every round begins with a collection.
        gc.collect()
        gc.freeze()
        barred += PARTS[name](options)
        now = perf_counter()
        console.print(f"{name}: {now - started:.0f} s, {now - began:.0f} s in all")
    console.rule("bars")
    show_figures("all bars", barred)
    missed = sum(not each.good for each in barred)
    console.print(f"{len(barred) - missed} reached, {missed} missed")
    if options.markdown is not None:
        options.markdown.write_text(as_markdown(barred), encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
