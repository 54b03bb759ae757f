"""Profiles: sets of settings by name, above the defaults and below whatever else is said."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

PROFILES: Mapping[str, dict[str, Any]] = {
    "dev": {"environment": "development", "debug": True},
    "production": {"environment": "production", "payload": {"compression": "zstd", "checksum": True}},
    "test": {"environment": "test", "timeout": 30.0},
}


class Profile(PydanticBaseSettingsSource):
    """The settings of the profile that a better source has named."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not used: `__call__` gives all values at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        name = self.current_state.get("profile")
        return copy.deepcopy(PROFILES.get(str(name), {}))
