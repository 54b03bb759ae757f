"""Every public method of a cache has an example in its docstring, and the example runs."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import pytest

import cachebus
from cachebus import Cache, SyncCache, open_cache

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])]

INSIDE = {"attach", "detach", "client", "payloads", "finish_get", "scan_page", "cached"}
"""Names of `Cache` that have no example: they serve the facades, or are shown in `docs/guide.md`."""

NAMES: dict[str, Any] = {name: getattr(cachebus, name) for name in cachebus.__all__}
"""What an example may use. Read here, because the settings are imported when they are first used."""

_EXAMPLE = re.compile(r"^Example:\n    ```python\n(.*?)^    ```$", re.MULTILINE | re.DOTALL)


def examples(cls: type[Any]) -> dict[str, str]:
    """The example of each public method of a class; empty if there is none."""
    found: dict[str, str] = {}
    for name, member in vars(cls).items():
        if name.startswith("_") or name in INSIDE or not callable(member):
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


@pytest.mark.parametrize("name", sorted(examples(Cache)))
async def test_a_method_has_an_example_that_runs(name: str) -> None:
    example = examples(Cache)[name]
    assert example, f"Cache.{name} has no example"
    await run(example)


async def test_every_method_of_the_synchronous_cache_is_one_of_these() -> None:
    methods = {name for name, member in vars(SyncCache).items() if not name.startswith("_") and callable(member)}
    assert methods - set(examples(Cache)) <= {"begin", "cached"}


async def test_an_example_that_fails_is_found() -> None:
    with pytest.raises(AssertionError):
        await run('assert await cache.get("a") == 1\n')
