"""Public methods and functions have an example in their docstrings, and the example runs."""

from __future__ import annotations

import inspect
import re
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest

import cachebus
from cachebus import Cache, LoadResult, Subscription, SyncCache, escape_pattern, open_cache, open_sync_cache
from cachebus.facade.locks import Lock
from cachebus.facade.rate_limiter import AsyncRateLimiter

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])]

INSIDE = {"attach", "detach", "client", "payloads", "finish_get", "scan_page", "cached", "offer", "resolved"}
"""Names without an example: they serve other modules, or `docs/guide.md` shows them."""

NAMES: dict[str, Any] = {name: getattr(cachebus, name) for name in cachebus.__all__}
"""What an example may use. Read here, because the settings are imported when they are first used."""

_EXAMPLE = re.compile(r"^Example:\n    ```python\n(.*?)^    ```$", re.MULTILINE | re.DOTALL)


def examples(cls: object) -> dict[str, str]:
    """The example of each public method of a class; empty if there is none."""
    found: dict[str, str] = {}
    for name, member in vars(cls).items():
        if name.startswith("_") or name in INSIDE or not (callable(member) or isinstance(member, classmethod)):
            continue
        match = _EXAMPLE.search(inspect.getdoc(member) or "")
        found[name] = textwrap.dedent(match[1]) if match else ""
    return found


async def run(example: str) -> None:
    """Run an example with a new cache."""
    names = dict(NAMES)
    source = f"async def example(cache):\n{textwrap.indent(example, '    ')}"
    exec(compile(source, "<example>", "exec"), names)
    async with open_cache("memory://") as cache:
        await names["example"](cache)


METHODS = {
    f"{cls.__name__}.{name}": example
    for cls in (Cache, Lock, AsyncRateLimiter, Subscription, LoadResult)
    for name, example in examples(cls).items()
}
FUNCTIONS = {
    function.__name__: examples(SimpleNamespace(function=function)).get("function", "")
    for function in (open_cache, escape_pattern)
}


@pytest.mark.parametrize("name", [*METHODS, *FUNCTIONS])
async def test_each_has_an_example_that_runs(name: str) -> None:
    example = (METHODS | FUNCTIONS)[name]
    assert example, f"{name} has no example"
    await run(example)


def test_the_example_of_the_synchronous_cache_runs_without_an_event_loop(anyio_backend: str) -> None:
    example = examples(SimpleNamespace(function=open_sync_cache))["function"]
    assert "with open_sync_cache" in example
    exec(compile(example, "<example>", "exec"), dict(NAMES))


async def test_every_method_of_the_synchronous_cache_is_one_of_these() -> None:
    methods = {name for name, member in vars(SyncCache).items() if not name.startswith("_") and callable(member)}
    assert methods - set(examples(Cache)) <= {"begin", "cached"}


async def test_an_example_that_fails_is_found() -> None:
    with pytest.raises(AssertionError):
        await run('assert await cache.get("a") == 1\n')
