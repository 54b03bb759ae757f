"""The private names of the standard library that this package uses. Those of nats-py are in `bus/nats/compat.py`.

* `running_loop` is `asyncio.get_running_loop` without the exception. asyncio's own `Future` calls it.
* `enter_task` and `leave_task` are documented for authors of event loops. They make a task current while its first step
  runs early.
* `calling_frame` returns the caller's frame, as in `inspect` and `logging`.
"""

from __future__ import annotations

import sys

from cachebus.messages import CacheConfigurationError

TESTED = ("3.11", "3.12", "3.13")  # Versions that the tests have run with. Others may work, if they have these names.

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
