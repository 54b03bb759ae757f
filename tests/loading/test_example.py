"""`examples/invalidate_during_load.py`: cachebus never returns a stale value after an invalidation during a load."""

from __future__ import annotations

import subprocess
import sys

from cachebus.testing.servers import Server, redis_server

from ..house.paths import ROOT

__all__ = ["redis_server"]

EXAMPLE = ROOT / "examples" / "invalidate_during_load.py"


def run(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nothing_that_was_invalidated_during_its_load_is_read(redis_server: Server) -> None:
    head, ours, *others = run(redis_server.url)
    assert head.split() == ["delete", "tag", "clear", "another", "process"]
    assert ours.split() == ["cachebus", "2", "2", "2", "2"]
    assert [line.split()[0] for line in others] == ["cashews", "aiocache", "dogpile.cache"]


def test_without_a_redis_the_example_plays_what_needs_none() -> None:
    head, ours, *_ = run()
    assert head.split() == ["delete", "tag", "clear"]
    assert ours.split() == ["cachebus", "2", "2", "2"]
