"""The memory's locks: what is remembered of those that were lost."""

from __future__ import annotations

import pytest

from cachebus.adapters.memory.locks import LockTable
from cachebus.messages import AcquireLock, LockGranted, NotHeld, Released, ReleaseLock

from ...clock import ManualClock


def had(table: LockTable, name: str, ticket: str) -> ReleaseLock:
    """What gives back a lock that was had just now."""
    granted = table.decide(AcquireLock(name, "me", ticket, 1.0))
    assert isinstance(granted, LockGranted)
    return ReleaseLock(name, ticket, "me", granted.token)


@pytest.mark.parametrize("names", [1, 2, 3])
def test_what_is_remembered_of_lost_locks_is_bounded_and_the_rest_is_taken_for_lost(names: int) -> None:
    clock = ManualClock()
    table = LockTable(clock=clock, max_locks=2)
    before = had(table, "before", "t")
    assert table.decide(before) == Released()
    assert table.decide(before) == Released()
    lost: list[ReleaseLock] = []
    for number in range(6):
        lost.append(had(table, f"n{number % names}", f"t{number}"))
        clock.advance(2.0)
        table.sweep()
    assert len(table._lost) <= 2
    assert [table.decide(each) for each in lost] == [NotHeld()] * 6
    assert table.decide(before) == (Released() if names <= 2 else NotHeld())
    after = had(table, "n0", "after")
    assert table.decide(after) == Released()
    assert table.decide(after) == Released()
