"""The examples of `docs/rate-limits.md` run, and print the documented output."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...house.paths import ROOT
from ...house.readme import Block, read_blocks
from ...house.test_readme import run_block

PAGE = ROOT / "docs" / "rate-limits.md"
BLOCKS = [block for block in read_blocks(PAGE.read_text(encoding="utf-8")) if block.language == "python"]


def test_the_page_has_examples_and_says_what_they_print() -> None:
    assert len(BLOCKS) == 2
    assert all(block.expect for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_an_example_runs(block: Block, tmp_path: Path) -> None:
    run_block(block, tmp_path)
