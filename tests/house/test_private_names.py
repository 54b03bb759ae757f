"""Private names of other packages are used only in the two compatibility modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachebus.bus import compat
from cachebus.bus.nats.compat import TESTED, check_release
from cachebus.messages import CacheConfigurationError

PACKAGE = Path(compat.__file__).parents[1]
ALLOWED = {"bus/compat.py", "bus/nats/compat.py"}

DOCUMENTED = {"_exit", "_replace", "_asdict", "_current_frames"}
"""Names of the standard library that are public in spite of their underscore."""

TYPES_ONLY = {("cli/common.py", "_SubParsersAction")}
"""Names in string annotations. argparse has no public name for the result of `add_subparsers`."""


def private(name: str) -> bool:
    """Return `True` if a name is private and not a special name of Python."""
    return name.startswith("_") and not name.endswith("__") and name.strip("_") != ""


def names_of_ours(tree: ast.AST) -> set[str]:
    """Return the names that a module defines: functions, classes, variables, attributes, slots and fields."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # Slots and annotations.
    return found


def foreign(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the uses of private names that no module of the package defines, by file and name."""
    trees = {path.relative_to(root).as_posix(): ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}
    ours = set().union(*(names_of_ours(tree) for tree in trees.values()))
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ours:
                yield file, node.attr
            elif isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("cachebus"):
                for each in node.names:
                    if private(each.name):
                        yield file, each.name
            elif isinstance(node, ast.Attribute) and private(node.attr) and isinstance(node.value, ast.Name):
                # The package defines this name too, but here it is on a foreign module.
                imported = {
                    each.asname or each.name
                    for found in ast.walk(tree)
                    if isinstance(found, ast.Import)
                    for each in found.names
                }
                if node.value.id in imported:
                    yield file, node.attr


def test_private_names_of_others_stand_in_the_compatibility_modules_only() -> None:
    found = [
        (file, name)
        for file, name in foreign(PACKAGE)
        if file not in ALLOWED and name not in DOCUMENTED and (file, name) not in TYPES_ONLY
    ]
    assert not found, f"these belong in {' or '.join(sorted(ALLOWED))}: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "from asyncio import _get_running_loop",
        "import asyncio\nasyncio._enter_task(1, 2)",
        "def f(client):\n    return client._pending_queue",
        "import sys\ndef g(): sys._getframe(1)",
        "import sys\n_getframe = 1\ndef g(): sys._getframe(1)",
    ],
)
def test_the_test_finds_them(source: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(source)
    assert list(foreign(tmp_path))


def test_names_of_our_own_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "class A:\n    def __init__(self): self._x = 1\n    def y(self, other): return other._x\n"
    )
    (tmp_path / "b.py").write_text("from cachebus.a import _z\nfrom .a import _w\ndef f(a): return a._x.__class__\n")
    assert not list(foreign(tmp_path))


def test_a_release_of_nats_py_that_was_not_tested_is_refused_with_both_versions() -> None:
    check_release()
    for release in TESTED:
        check_release(f"{release}.99")
    for release in ("1.9.0", "2.9.1", "3.0.0", "none", ""):
        with pytest.raises(CacheConfigurationError, match=f"nats-py {release} is installed, but .* {TESTED[0]}, "):
            check_release(release)
