"""Behaviour: actors, the turns they take, who supervises them, and the ports that adapters implement."""

from .actor import Actor, Context
from .backend import STORE_REQUESTS, BackendActor
from .breaker import BreakerPolicy
from .cell import Cell
from .guard_policy import GuardPolicy, RetryPolicy
from .lock_manager import LockManager
from .ports import BatchStore, Capabilities, Gauges, InlineStore, LockStore, PipelinedStore, Timer, Timers
from .resilience import Guard
from .supervisor import RestartPolicy, Supervisor

__all__ = [
    "STORE_REQUESTS",
    "Actor",
    "BackendActor",
    "BatchStore",
    "BreakerPolicy",
    "Capabilities",
    "Cell",
    "Context",
    "Gauges",
    "Guard",
    "GuardPolicy",
    "InlineStore",
    "LockManager",
    "LockStore",
    "PipelinedStore",
    "RestartPolicy",
    "RetryPolicy",
    "Supervisor",
    "Timer",
    "Timers",
]
