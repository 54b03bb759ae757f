"""Settings classes, and functions that load them from files, URLs and the environment."""

from .settings import (
    ActorSettings,
    BackendSettings,
    MemorySettings,
    NullSettings,
    PluginSettings,
    Settings,
    backend_from_url,
    load_settings,
)

__all__ = [
    "ActorSettings",
    "BackendSettings",
    "MemorySettings",
    "NullSettings",
    "PluginSettings",
    "Settings",
    "backend_from_url",
    "load_settings",
]
