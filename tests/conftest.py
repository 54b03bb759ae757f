"""What every test gets: both event loops, a guard against blocking calls, a look-out for secrets, and one hypothesis profile."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from hypothesis import settings

settings.register_profile("house", deadline=None)
# Hypothesis's own "ci" profile: no deadline, the same examples on every run, nothing kept between runs.
settings.load_profile("ci" if os.environ.get("CI") else "house")

# Everything is logged in tests, so that what a log would show of a secret is seen.
logging.getLogger().setLevel(logging.DEBUG)
CANARY = "hunter" + "2"
"""Part of the secrets of tests. Put together, because a traceback shows lines of source."""


def pytest_collection_finish() -> None:
    """Leaves ten thousand tests, which are there to the end, out of every collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """Fails a test that has logged or printed a secret."""
    report = yield
    seen = [name for name, text in report.sections if CANARY in text]
    if seen and report.passed:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} shows a secret in what was {', '.join(seen).lower()}"
    return report


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Runs each async test on both loops; a module about asyncio alone overrides it and returns "asyncio"."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def logging_is_left_as_it_was() -> Iterator[None]:
    """Takes away what a test has done to the root logger: the worker command turns it to the standard error of that test,
    which is closed when the next one logs, and to a level that hides secrets from the look-out."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes a blocking call on the asyncio loop raise ``BlockingError`` if code of cachebus is on the stack.

    Sync tests are left alone, and so is what pytest and the test itself do (reading a golden file, say).
    """
    if "anyio_backend" in request.fixturenames and request.getfixturevalue("anyio_backend_name") == "asyncio":
        with blockbuster_ctx("cachebus", excluded_modules=["cachebus.testing"]):
            yield
    else:
        yield
