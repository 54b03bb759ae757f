"""Behaviour: actors, the turns they take, who supervises them, and the ports that adapters implement."""

from .actor import Actor, Handlers
from .alarm import Alarm
from .backend import STORE_REQUESTS, BackendActor
from .cell import Cell
from .context import Context
from .ports import BatchStore, Capabilities, Gauges, InlineStore, PipelinedStore, Store
from .supervisor import RestartPolicy, Supervisor

__all__ = [
    "STORE_REQUESTS",
    "Actor",
    "Alarm",
    "BackendActor",
    "BatchStore",
    "Capabilities",
    "Cell",
    "Context",
    "Gauges",
    "Handlers",
    "InlineStore",
    "PipelinedStore",
    "RestartPolicy",
    "Store",
    "Supervisor",
]
