"""How late what is promised may come in a test: others work beside it, on machines of which some are slow."""

from __future__ import annotations


def within(seconds: float) -> float:
    """The most seconds that what takes so long at most may take here.

    A third as fast, and a second in which our process is given nothing. What is waited for without a promise needs no such
    bound: a wait ends when it comes, so its limit is 30 s. `make faults`, alone, holds promises as they are.
    """
    return 3 * seconds + 1.0
