"""Hit ratios of every eviction policy against LRU, theine (W-TinyLFU) and Belady's optimum, and a verdict.

    python -m benchmarks.hit_ratio [--traces DIR] [--markdown FILE] [--plot FILE.svg]

The synthetic workloads are made from a seed, with 10,000 keys and with 50,000. Capacities are 1, 5 and 10 % of the
unique keys of a workload. The bar has two parts: the default's mean is at least theine's, and no cell is more than 3
points below the better of LRU and theine. Exits 1 if it is missed. theine hashes with Python's salt: set
PYTHONHASHSEED to repeat figures.
"""

from __future__ import annotations

import argparse
import heapq
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import theine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cachebus.adapters.memory.eviction import POLICIES, VISITS_MAX, Entry, make_policy

from . import traces

DEFAULT = "s3fifo"
SHARES = (1, 5, 10)
TOLERANCE = 3.0

Table = dict[tuple[str, int], dict[str, float]]


def zipf(rng: Any, keys: int, skew: float, count: int) -> Any:
    """Return `count` ranks below `keys`, drawn from a bounded Zipf distribution."""
    mass = np.cumsum(1 / np.arange(1, keys + 1) ** skew)
    return np.searchsorted(mass / mass[-1], rng.random(count)).clip(0, keys - 1)


def synthetic(keys: int, count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the synthetic workloads: the name and the keys in the order of the requests."""
    rng = np.random.default_rng(seed)

    def named(name: str, ranks: Any) -> tuple[str, list[str]]:
        return f"{name}, {keys // 1000}k keys", [str(rank) for rank in ranks.tolist()]

    for skew in (0.7, 0.99, 1.2):
        yield named(f"zipf {skew}", rng.permutation(keys)[zipf(rng, keys, skew, count)])

    hot, parts = zipf(rng, keys, 0.99, count), []
    for start in range(0, count, 4_000):  # Every fourth thousand is a scan of keys that return much later.
        cold = keys + (start // 4) % (3 * keys) + np.arange(1_000)
        parts += [hot[start : start + 3_000], cold]
    yield named("zipf 0.99 with scans", np.concatenate(parts)[:count])

    hot = zipf(rng, keys, 0.99, count)
    parts = [rng.permutation(keys)[hot[start : start + 20_000]] for start in range(0, count, 20_000)]
    yield named("zipf 0.99, redrawn every 20k", np.concatenate(parts))

    names, parts = rng.permutation(keys), []
    for start in range(0, count, 2_000):
        moved = rng.choice(keys, keys // 100, replace=False)
        names[moved] = names[rng.permutation(moved)]
        parts.append(names[hot[start : start + 2_000]])
    yield named("zipf 0.99, 1 % swaps every 2k", np.concatenate(parts))

    length = keys // 5
    yield named("loop", np.tile(np.arange(length), count // length))


def workloads(folder: Path | None) -> Iterator[tuple[str, list[str]]]:
    """Yield every workload of the bar. The traces are included only if their folder is given."""
    yield from synthetic(10_000, 200_000, seed=1)
    yield from synthetic(50_000, 600_000, seed=5)
    if folder is not None:
        for name in traces.NAMES:
            yield name, traces.read(folder, name)


def ours(name: str, requests: list[str], capacity: int) -> int:
    """Return the hits of one of our policies, driven as by the memory store."""
    policy = make_policy(name, capacity)
    on_hit = policy.on_hit
    store: dict[str, Entry] = {}
    hits = 0
    for key in requests:
        entry = store.get(key)
        if entry is None:
            if len(store) >= capacity:
                del store[policy.evict().key]
            entry = store[key] = Entry(key, None, 0)
            policy.admit(entry)
            continue
        hits += 1
        if on_hit is not None:
            on_hit(entry)
        elif entry.visits < VISITS_MAX:
            entry.visits += 1
    return hits


def theines(requests: list[str], capacity: int) -> int:
    """Return the hits of theine's W-TinyLFU."""
    cache: Any = theine.Cache(capacity, nolock=True)
    hits = 0
    for key in requests:
        if cache.get(key)[1]:
            hits += 1
        else:
            cache.set(key, key)
    cache.close()
    return hits


def optimum(requests: list[str], capacity: int) -> int:
    """Return the hits of Belady's MIN, which knows the future (IBM Systems Journal 5, 1966).

    It admits every key, as our policies do.
    """
    following = [0] * len(requests)
    seen: dict[str, int] = {}
    for index in range(len(requests) - 1, -1, -1):
        following[index] = seen.get(requests[index], len(requests))
        seen[requests[index]] = index
    store: dict[str, int] = {}
    queue: list[tuple[int, str]] = []
    hits = 0
    for index, key in enumerate(requests):
        if key in store:
            hits += 1
        elif len(store) >= capacity:
            while True:
                when, furthest = heapq.heappop(queue)
                if store.get(furthest) == -when:
                    del store[furthest]
                    break
        store[key] = following[index]
        heapq.heappush(queue, (-following[index], key))
    return hits


def contenders() -> dict[str, Callable[[list[str], int], int]]:
    """Return every column by name."""
    columns: dict[str, Callable[[list[str], int], int]] = {
        name: (lambda requests, capacity, name=name: ours(name, requests, capacity)) for name in sorted(POLICIES)
    }
    return {**columns, "theine": theines, "optimum": optimum}


def measure(folder: Path | None) -> Table:
    """Return the hit ratios in per cent, by workload and capacity."""
    table: Table = {}
    for name, requests in workloads(folder):
        unique = len(set(requests))
        for share in SHARES:
            capacity = max(1, unique * share // 100)
            table[name, share] = {
                column: 100 * run(requests, capacity) / len(requests) for column, run in contenders().items()
            }
        print(f"done: {name}", file=sys.stderr, flush=True)
    return table


def gap(row: dict[str, float]) -> float:
    """Return the default's distance to the better of LRU and theine in points; positive is better."""
    return row[DEFAULT] - max(row["lru"], row["theine"])


def rows(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the table as text: the head, then a row for each cell of the bar and one for the means."""
    columns = list(next(iter(table.values())))
    head = ["workload", "size", *columns, "gap"]
    body = [
        [name, f"{share} %", *(f"{row[column]:.1f}" for column in columns), f"{gap(row):+.1f}"]
        for (name, share), row in table.items()
    ]
    means = [f"{sum(row[column] for row in table.values()) / len(table):.2f}" for column in columns]
    return head, [*body, ["mean", "", *means, ""]]


def verdict(table: Table) -> tuple[bool, list[str]]:
    """Return `True` if the bar is reached, and the lines of the verdict: overall and by kind of workload."""
    good, lines = True, []
    for title, kind in (("all", ""), ("10k keys", ", 10k"), ("50k keys", ", 50k"), ("traces", None)):
        part = [(key, row) for key, row in table.items() if ("keys" not in key[0] if kind is None else kind in key[0])]
        if not part:
            continue
        mine, other = (sum(row[column] for _, row in part) / len(part) for column in (DEFAULT, "theine"))
        (worst, size), lowest = min(((key, gap(row)) for key, row in part), key=lambda cell: cell[1])
        below = [f"{name} at {share} %" for (name, share), row in part if gap(row) < -TOLERANCE]
        good = good and mine >= other and not below
        lines.append(
            f"{title}: mean {mine:.2f} against theine's {other:.2f}; worst gap {lowest:+.1f} ({worst} at {size} %); "
            f"{'bar reached' if mine >= other and not below else 'BAR MISSED: ' + ('; '.join(below) or 'mean')}"
        )
    return good, lines


def markdown(table: Table) -> str:
    """Return the table and the verdict as Markdown."""
    head, body = rows(table)
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + [""] + [f"* {v}" for v in verdict(table)[1]])


def plot(table: Table, path: Path) -> None:
    """Write one small chart per workload: hit ratio over capacity."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "cachebus"
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for name, _ in table))
    figure, axes = plt.subplots(-(-len(names) // 4), 4, figsize=(14, 2.5 * -(-len(names) // 4)), squeeze=False)
    styles = {DEFAULT: ("C3", 2.2, "-"), "lru": ("C0", 1, "-"), "theine": ("C2", 1, "-"), "optimum": ("0.6", 1, "--")}
    for axis, name in zip(axes.flat, names, strict=False):
        for column, (colour, width, dashes) in styles.items():
            axis.plot(SHARES, [table[name, s][column] for s in SHARES], dashes, color=colour, lw=width, label=column)
        axis.set_title(name, fontsize=8)
        axis.set_xticks(SHARES)
        axis.set_ylim(bottom=0)
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=7)
    figure.supxlabel("capacity, % of the unique keys")
    figure.supylabel("hit ratio, %")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def show(table: Table) -> None:
    """Print the table, with rich if it is installed."""
    head, body = rows(table)
    try:
        from rich.console import Console
        from rich.table import Table as Grid
    except ImportError:
        for line in [head, *body]:
            print("  ".join(f"{cell:>7}" if column else f"{cell:36}" for column, cell in enumerate(line)))
        return
    grid = Grid(*head, title="hit ratio, %")
    for line in body:
        grid.add_row(*line)
    Console(width=140).print(grid)


def main() -> int:
    """Measure, print the table, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=os.environ.get("CACHEBUS_TRACES"), metavar="DIR")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args()
    table = measure(Path(options.traces) if options.traces else None)
    show(table)
    good, lines = verdict(table)
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text(markdown(table) + "\n", encoding="utf-8")
    if options.plot:
        plot(table, options.plot)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
