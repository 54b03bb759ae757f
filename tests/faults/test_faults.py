"""Every fault ends as it should: in time, with the right error, and without anybody's help."""

from __future__ import annotations

import os

import pytest

from .faults import FAULTS
from .scene import DEADLINE, RECOVERY, SLACK, Fault, play

BESIDE_OTHERS = 2.0 if "PYTEST_XDIST_WORKER" in os.environ else 0.0
"""Seconds for which the other test processes may keep ours from the processor. `make faults`, alone, holds the bound itself."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_a_fault_hurts_nobody_for_longer_than_it_lasts(fault: Fault) -> None:
    report = await play(fault)
    assert report.wrong == []
    assert set(report.errors) <= fault.errors
    assert report.calls == report.answered + report.errors.total()
    assert report.longest <= DEADLINE + SLACK + BESIDE_OTHERS
    assert report.recovery <= RECOVERY + BESIDE_OTHERS
    # The fault was one: a list of faults that never happen proves nothing.
    assert any(fault.says in each for each in report.told or {""})
    assert fault.silent or report.errors or report.longest > 0.2
