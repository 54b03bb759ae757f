"""The first load of a process: what it needs is there before its callers wait for it."""

from __future__ import annotations

import subprocess
import sys

from cachebus.testing.servers import run_redis
from tests.house.paths import ROOT

SCRIPT = """
import asyncio, sys
from cachebus import open_cache
from cachebus.messages.late_init import LateInit

written = []
write = LateInit.write

def noted(self):
    written.append(self._cls.__name__)
    return write(self)

async def main(url):
    async with open_cache(url, namespace="first") as cache, open_cache(url, namespace="first") as other:
        LateInit.write = noted
        load = lambda: asyncio.sleep(0.05, "value")
        callers = (each.get_or_load("key", load, ttl=60) for each in (cache, other) * 10)
        assert await asyncio.gather(*callers) == ["value"] * 20
        print(*sorted(set(written)))

asyncio.run(main(sys.argv[1]))
"""


def test_no_constructor_is_written_while_the_callers_of_a_cold_key_wait() -> None:
    with run_redis() as server:
        command = [sys.executable, "-c", SCRIPT, server.url]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout == "\n"
