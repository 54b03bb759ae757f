"""Fixtures: a bus and a supervisor for each test, with inline turns on and off."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from cachebus.actors import Supervisor
from cachebus.bus import Address, LocalBus

from .samples import Desk

CLERK = Address("test.clerk")


@pytest.fixture(params=[True, False], ids=["inline", "mailbox"])
def inline_turns(request: pytest.FixtureRequest) -> bool:
    """Return `True` if plain turns may run on the caller's stack. The results must be the same."""
    return bool(request.param)


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
async def bus() -> AsyncIterator[LocalBus]:
    bus = LocalBus("test")
    yield bus
    bus.close()


@pytest.fixture
async def supervisor(bus: LocalBus, inline_turns: bool) -> AsyncIterator[Supervisor]:
    async with Supervisor(bus, inline_turns=inline_turns, capacity=200, seed=1) as supervisor:
        yield supervisor
