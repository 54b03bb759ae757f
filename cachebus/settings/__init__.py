"""Settings: their classes, and where they are read from."""

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
