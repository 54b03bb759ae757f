"""Actors, their supervisor, and the ports that adapters implement."""

from .backend.actor import STORE_REQUESTS, BackendActor
from .guard.circuit_breaker import BreakerPolicy
from .guard.guard import Guard
from .guard.policy import GuardPolicy, RetryPolicy
from .locks.manager import LockManager
from .ports import BatchStore, Capabilities, Gauges, InlineStore, LockStore, PipelinedStore, Timer, Timers
from .runtime.actor import Actor, Context
from .runtime.cell import Cell
from .runtime.supervisor import RestartPolicy, Supervisor

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
