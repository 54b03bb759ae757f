"""The wait-for graph of loads: loaders that would wait for each other forever get an error instead."""

from __future__ import annotations

import os
import threading
from contextvars import ContextVar

from msgspec import Struct, field

from cachebus.messages import CacheError


class GraphNode(Struct, eq=False):
    """A load, as the graph sees it. A node that is `resolved` waits for nothing."""

    resolved: bool = False
    waits_for: dict[GraphNode, int] = field(default_factory=dict)


CURRENT_LOADS: ContextVar[tuple[GraphNode, ...]] = ContextVar("loads", default=())
"""The loads on whose behalf the current task or thread works, outermost first."""


class _Guard:
    """The lock of the graph. The child of a fork gets a new one, because no thread of the child would release the old one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self.lock = threading.Lock()


_guard = _Guard()


def add_edge(loads: tuple[GraphNode, ...], awaited: GraphNode) -> GraphNode | None:
    """Note that the innermost of the unresolved `loads` waits for `awaited`, and return that load.

    Raises `CacheError` if the wait would never end.
    """
    chain = [each for each in loads if not each.resolved]
    if not chain:
        return None
    waiting = chain[-1]
    with _guard.lock:
        if awaited in chain:
            raise CacheError("a loader asks for the very key that it is loading, and would wait for itself")
        if _reaches(awaited, waiting):
            raise CacheError("a loader asks for a key whose loader waits for it: they would wait for ever")
        waiting.waits_for[awaited] = waiting.waits_for.get(awaited, 0) + 1
    return waiting


def remove_edge(waiting: GraphNode, awaited: GraphNode) -> None:
    """Take back what `add_edge` noted."""
    with _guard.lock:
        left = waiting.waits_for.get(awaited, 0) - 1
        if left > 0:
            waiting.waits_for[awaited] = left
        else:
            waiting.waits_for.pop(awaited, None)


def _reaches(start: GraphNode, goal: GraphNode) -> bool:
    visited: set[GraphNode] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        if node is goal:
            return True
        if node not in visited and not node.resolved:
            visited.add(node)
            pending.extend(node.waits_for)
    return False
