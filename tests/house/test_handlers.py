"""Exception handlers: none of them swallows a cancellation, a stop or an interruption."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import cachebus
from cachebus.client.background_loop import Hosted

PACKAGE = Path(cachebus.__file__).parent
WIDE = {"BaseException", "CancelledError", "Cancelled", "KeyboardInterrupt", "SystemExit", "get_cancelled_exc_class"}
ALLOWED = {
    "__main__.py": "the command line answers Ctrl-C with its exit code",
    "actors/guard/guard.py": "an exception in the accounting of a batch is raised when the batch is answered",
    "bus/spawn.py": "an exception of the first step is raised by the task that continues it",
    "loading/leased_load.py": "the caller of the load raises the loader's exception; a cancellation is raised at once",
    "loading/group_load.py": "as in loading/leased_load.py",
    "testing/proxy.py": "a proxy ends its own tasks",
}


def _names(node: ast.AST | None) -> set[str]:
    found = set() if node is not None else {"BaseException"}
    for each in ast.walk(node) if node is not None else ():
        found |= {each.id} if isinstance(each, ast.Name) else {each.attr} if isinstance(each, ast.Attribute) else set()
    return found


def swallowing(source: str) -> list[int]:
    """Return the lines of handlers that catch a cancellation and do not end with `raise`."""
    lines: list[int] = []
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.ExceptHandler)
            and _names(node.type) & WIDE
            and not isinstance(node.body[-1], ast.Raise)
        ):
            lines.append(node.lineno)
        if isinstance(node, ast.Call) and _names(node.func) & {"suppress"}:
            lines += [node.lineno for each in node.args if _names(each) & WIDE]
    return lines


def test_whoever_catches_a_cancellation_raises_it_again() -> None:
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := swallowing(path.read_text(encoding="utf-8")))
    }
    assert found.keys() == ALLOWED.keys(), found


@pytest.mark.parametrize(
    ("handler", "lines"),
    [
        ("except BaseException:\n    pass", [3]),
        ("except:\n    return", [3]),
        ("except (OSError, asyncio.CancelledError):\n    log()", [3]),
        ("except BaseException:\n    close()\n    raise", []),
        ("except Exception:\n    pass", []),
    ],
)
def test_a_handler_that_swallows_is_found(handler: str, lines: list[int]) -> None:
    assert swallowing(f"try:\n    call()\n{handler}\n") == lines
    assert swallowing("with contextlib.suppress(asyncio.CancelledError):\n    call()\n") == [1]


class Cancelling:
    """Context manager that is cancelled from within while it is entered."""

    async def __aenter__(self) -> None:
        raise asyncio.CancelledError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> Any:
        return None


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_who_opens_in_the_background_hears_of_a_cancellation_too() -> None:
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(Hosted(Cancelling()).open(), 5)
