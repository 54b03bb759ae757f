"""Run every fault once and write the results to `docs/reliability.md`: `python -m tests.faults`."""

from __future__ import annotations

import argparse
import asyncio
import platform
import sys
from pathlib import Path

from cachebus.testing.servers import find_binary

from ..house.paths import ROOT
from .faults import FAULTS
from .scene import CALLERS, DEADLINE, RECOVERY, SLACK, Report, play

PAGE = ROOT / "docs" / "reliability.md"

HEAD = f"""# Reliability

This page shows what callers of a cache over Redis see while something is wrong between the cache
and its server. `make faults` (`python -m tests.faults`) writes it: it starts real servers behind
a proxy that breaks connections. `tests/faults` checks the same faults against the same bounds in
every test run.

During each fault, {CALLERS} concurrent callers read, write and count, each with its own keys. The
fault lasts until they are done. Every call has a time budget of {DEADLINE:g} s. Each value names its
key, so the test detects a reply to another key, and a count that is returned twice.

These bounds must hold: no wrong answer, no call longer than {DEADLINE + SLACK:g} s, recovery within {RECOVERY:g} s.

* *Answered* includes misses.
* *Recovery* is the time from the end of the fault until all callers are served. The circuit breaker
  tries again after 0.2 s.

**The figures are those of one run**, on {{machine}}. They are examples, not
guarantees. The number of failed calls depends on how soon the circuit opens. While it is open, a
call fails at once, so callers make many calls.

| fault | calls | answered | misses | errors | wrong answers | longest call | recovery |
| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |
"""

TAIL = """
| error | meaning |
| --- | --- |
| `CacheConnectionError` | not reached, lost, or not ready; another attempt may succeed |
| `CacheTimeoutError` | no reply in time |
| `CircuitOpen` | rejected after repeated failures, without asking the server |
| `Overloaded` | too many requests are waiting |
| `CacheBackendError` | refused by the server; another attempt will not succeed |
| `CacheConfigurationError` | the credentials were rejected |
| `WrongType` | the stored value is not a counter |
"""


def line(report: Report) -> str:
    """Return a row of the table."""
    errors = ", ".join(f"{kind.__name__} {count}" for kind, count in report.errors.most_common()) or "none"
    return (
        f"| {report.fault.name} | {report.calls} | {report.answered} | {report.misses} | {errors} | {len(report.wrong)} "
        f"| {report.longest:.2f} s of {DEADLINE:g} s | {report.recovery:.2f} s |"
    )


def holds(report: Report) -> bool:
    """Return whether a report is within the bounds."""
    return not report.wrong and report.longest <= DEADLINE + SLACK and report.recovery <= RECOVERY


def main() -> int:
    """Write the page. The exit code is 1 if a bound was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--calls", type=int, default=100, help="calls of each caller during a fault")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file to write")
    options = parser.parse_args()
    if find_binary("redis-server") is None:
        print("this needs redis-server: apt-get install redis-server, or brew install redis", file=sys.stderr)
        return 1
    rows: list[str] = []
    good = True
    for fault in FAULTS:
        report = asyncio.run(play(fault, options.calls))
        rows.append(line(report))
        good = good and holds(report)
        print(rows[-1] + ("" if holds(report) else "  MISSED"), flush=True)
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    options.page.write_text(HEAD.replace("{machine}", machine) + "\n".join(rows) + "\n" + TAIL, encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
