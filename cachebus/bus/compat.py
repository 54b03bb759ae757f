"""The private names of the standard library that this package uses, in one place. Those of nats-py are in `bus/nats/compat.py`.

`running_loop` is `asyncio.get_running_loop` without the exception, and what asyncio's own `Future` calls. `enter_task` and
`leave_task` are documented for the authors of event loops: a task whose first step is taken early is current during it.
`calling_frame` is how `inspect` and `logging` find who calls them.
"""

from __future__ import annotations

import sys

from cachebus.messages import CacheConfigurationError

TESTED = ("3.11", "3.12", "3.13")  # The tests have run with these. Others may do, if they have the names.

try:
    from asyncio import _enter_task as enter_task
    from asyncio import _get_running_loop as running_loop
    from asyncio import _leave_task as leave_task
    from sys import _getframe as calling_frame  # pyright: ignore[reportPrivateUsage]
except ImportError as missing:
    raise CacheConfigurationError(
        f"Python {sys.version.split()[0]} has no {missing.name}; cachebus was tested with {', '.join(TESTED)}"
    ) from None

__all__ = ["TESTED", "calling_frame", "enter_task", "leave_task", "running_loop"]
