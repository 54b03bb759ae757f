"""Memory per entry and import time, each in a new process, and the cost of an evicting `set` by size of the store."""

from __future__ import annotations

import statistics
import subprocess
import sys
from time import perf_counter

from cachebus import open_sync_cache

from .timing import Figure, announce

BYTES, IMPORT = 270, 0.1
"""Bars: bytes per entry, and seconds for `import cachebus`."""

_FILL = """
import gc, os, sys
def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
{make}
gc.collect()
before = resident()
for number in range({entries}):
    store(f"user:{{number:07d}}", number)
gc.collect()
print((resident() - before) / {entries})
"""

_OURS = """
from cachebus import open_sync_cache
cache = open_sync_cache("memory://?max_entries={entries}")
cache.set("warm", 0)
def store(key, value):
    cache.set(key, value, ttl=3600.0)
"""

_CACHETOOLS = """
import cachetools
cache = cachetools.TTLCache({entries}, 3600.0)
def store(key, value):
    cache[key] = value
"""


def bytes_per_entry(entries: int = 1_000_000) -> dict[str, float]:
    """Return the resident bytes per small entry, with key and value, of cachebus and `cachetools.TTLCache`."""
    return {
        name: float(_python(_FILL.format(make=make.format(entries=entries), entries=entries)))
        for name, make in (("cachebus", _OURS), ("cachetools TTLCache", _CACHETOOLS))
    }


def import_seconds(rounds: int = 9) -> dict[str, float]:
    """Return the median time of `import cachebus` and `import asyncio`, less the start of the interpreter."""
    times: dict[str, list[float]] = {"pass": [], "import asyncio": [], "import cachebus": []}
    for _ in range(rounds):
        for code, seconds in times.items():
            started = perf_counter()
            _python(code)
            seconds.append(perf_counter() - started)
    bare = statistics.median(times["pass"])
    return {code: statistics.median(seconds) - bare for code, seconds in times.items() if code != "pass"}


def evicting_set_seconds(sizes: tuple[int, ...] = (1_000, 100_000, 1_000_000)) -> dict[int, float]:
    """Return the median time of an evicting `set`, for full stores of several sizes."""
    result: dict[int, float] = {}
    for size in sizes:
        cache = open_sync_cache(f"memory://?max_entries={size}")
        for number in range(size):
            cache.set(f"user:{number}", number)
        samples: list[float] = []
        for block in range(40):
            keys = [f"new:{block}:{number}" for number in range(500)]
            started = perf_counter()
            for key in keys:
                cache.set(key, key)
            samples.append((perf_counter() - started) / len(keys))
        result[size] = statistics.median(samples)
        cache.close()
    return result


def figures(entries: int) -> list[Figure]:
    """Return memory, import time and the cost of eviction."""
    announce("bytes per entry")
    sizes = bytes_per_entry(entries)
    ours, theirs = sizes["cachebus"], sizes["cachetools TTLCache"]
    done = [
        Figure(f"bytes per entry, {entries:,} entries with a TTL", f"{ours:.0f}", f"<= {BYTES}", ours <= BYTES),
        Figure(
            "bytes per entry / cachetools TTLCache",
            f"{ours / theirs:.2f}x of {theirs:.0f}",
            "<= 0.9x",
            ours <= 0.9 * theirs,
        ),
    ]
    announce("import")
    for name, seconds in import_seconds().items():
        bar = f"< {IMPORT * 1e3:g} ms" if name == "import cachebus" else ""
        done.append(Figure(name, f"{seconds * 1e3:.0f} ms", bar, not bar or seconds < IMPORT))
    announce("sets that evict")
    for size, seconds in evicting_set_seconds().items():
        done.append(Figure(f"set that evicts, store of {size:,}", f"{seconds * 1e6:.2f} us"))
    return done


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
