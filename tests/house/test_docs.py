"""The code blocks of the pages in `docs/` run, and their links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .paths import ROOT
from .readme import SHELLS, Block, command_faults, commands, read_blocks
from .test_readme import promises, run_block

PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = (
    "api.md",
    "backends.md",
    "guide.md",
    "loading.md",
    "locks.md",
    "nats.md",
    "payloads.md",
    "rate-limits.md",
    "tags.md",
    "workers.md",
)
"""Pages whose Python blocks run unchanged. The blocks of the other pages are excerpts."""


def blocks(*languages: str) -> Iterator[tuple[str, Block]]:
    for page in PAGES:
        for block in read_blocks(page.read_text(encoding="utf-8")):
            if block.language in languages:
                yield page.name, block


def link_faults(page: Path) -> list[str]:
    """Return the relative links of a page whose file or heading does not exist."""
    faults: list[str] = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            faults.append(f"{page.name}: no {target}")
        elif anchor and anchor not in anchors(file):
            faults.append(f"{page.name}: no heading {target}")
    return faults


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "block"), [each for each in blocks("python") if each[0] in RUN], ids=str)
def test_each_python_block_runs(page: str, block: Block, tmp_path: Path) -> None:
    run_block(block, tmp_path)


@pytest.mark.parametrize(("page", "block"), list(blocks(*SHELLS)), ids=str)
def test_each_command_names_what_is_there(page: str, block: Block) -> None:
    assert [fault for command in commands(block) for fault in command_faults(command, promises())] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *PAGES], ids=lambda page: page.name)
def test_each_link_leads_somewhere(page: Path) -> None:
    assert link_faults(page) == []


@pytest.mark.timeout(400)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "caches" / "index.html").read_text(encoding="utf-8")
    assert 'id="cachebus.Cache.get_or_load"' in page


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading, here\n[a](#a-heading-here) [b](#other) [c](missing.md) [d](https://x.example/#y)\n")
    assert link_faults(page) == ["page.md: no heading #other", "page.md: no missing.md"]
