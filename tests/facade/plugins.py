"""A package that registers a store by an entry point, like an installed one."""

from __future__ import annotations

from pathlib import Path

import pytest

MODULE = """
from cachebus.adapters.null import NullStore

class Shelf(NullStore):
    def __init__(self, url, *, namespace, clock):
        super().__init__()
        self.given = (url, namespace, clock)

def not_a_store(url, *, namespace, clock):
    return object()
"""


def announce(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, scheme: str = "shelf", made_by: str = "shelf_of_tests:Shelf"
) -> None:
    """Create a package in `folder`, and add `folder` to the path."""
    (folder / "shelf_of_tests.py").write_text(MODULE, encoding="utf-8")
    about = folder / f"{made_by.replace(':', '_')}_{scheme}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about.stem}\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(f"[cachebus.node.stores]\n{scheme} = {made_by}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
