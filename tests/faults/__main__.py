"""`python -m tests.faults`: let every fault happen once, and write what came of it to `docs/reliability.md`."""

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

What a cache over Redis does when something goes wrong between it and its server. Written by `make faults` (`python -m tests.faults`), which
starts real servers and puts a proxy before them that breaks connections; `tests/faults` holds the same list of faults to the same bounds in
every run of the tests.

Each fault happens under {CALLERS} concurrent callers, who read, write and count, each its own keys; it lasts until they are done. Every call has
{DEADLINE:g} s. Values say whose they are, so that an answer that belongs to another key, and a count that is given twice, are seen. *Answered*
are also the misses; *recovery* is the time from the end of the fault until all callers were served, with a circuit breaker that tries again after
0.2 s. What must hold: no wrong answer, no call longer than {DEADLINE + SLACK:g} s, recovery within {RECOVERY:g} s.

**These are the figures of one run**, on {{machine}}; they say what to expect, not what is promised. How many calls fail depends on how soon the circuit
opens: while it is open a call costs no time, so that there are many of them.

| fault | calls | answered | misses | errors | wrong answers | longest call | recovery |
| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |
"""

TAIL = """
The classes of errors: `CacheConnectionError` (not reached, lost, or not ready: another attempt may succeed), `CacheTimeoutError` (no answer in
time), `CircuitOpen` (left alone after failures, without asking), `Overloaded` (too many wait already), `CacheBackendError` (the server refuses, and
will again), `CacheConfigurationError` (refused for who we are), `WrongType` (what is stored is no counter).
"""


def line(report: Report) -> str:
    """A row of the table."""
    errors = ", ".join(f"{kind.__name__} {count}" for kind, count in report.errors.most_common()) or "none"
    return (
        f"| {report.fault.name} | {report.calls} | {report.answered} | {report.misses} | {errors} | {len(report.wrong)} "
        f"| {report.longest:.2f} s of {DEADLINE:g} s | {report.recovery:.2f} s |"
    )


def holds(report: Report) -> bool:
    """Whether what must hold did."""
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
