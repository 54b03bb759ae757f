"""The sources of settings besides keywords and URLs: the environment, profiles, and YAML, TOML and JSON files."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, PydanticBaseSettingsSource, SettingsError

from cachebus.messages import CacheConfigurationError

from .options import unknown_option
from .urls import Text, is_url, known_schemes, redact_url

PREFIX = "CACHEBUS_"
"""The beginning of the name of every environment variable of cachebus."""

PROFILES: Mapping[str, dict[str, Any]] = {
    "dev": {"environment": "development", "debug": True},
    "production": {"environment": "production", "payload": {"compression": "zstd", "checksum": True}},
    "test": {"environment": "test", "timeout": 30.0},
}
"""Sets of settings by name. They win over the defaults and over nothing else."""

FORMATS = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".json": "JSON"}
"""The suffixes of files that can be read."""


class Profile(PydanticBaseSettingsSource):
    """The settings of the profile that a better source has named."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not used: `__call__` gives all values at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        return copy.deepcopy(PROFILES.get(str(self.current_state.get("profile")), {}))


class Environment(EnvSettingsSource):
    """The environment as a source of settings. It refuses unknown variables, which pydantic-settings overlooks (its issue 985)."""

    # What Kubernetes sets in every container for a service that is called "cachebus".
    _SERVICE = re.compile(r"SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?")

    def __call__(self) -> dict[str, Any]:
        known = self.variables()
        for name in sorted(map(str.upper, self.env_vars)):
            rest = name.removeprefix(PREFIX)
            if rest != name and name not in known and not self._SERVICE.fullmatch(rest):
                raise CacheConfigurationError(f"environment variable {name}: {unknown_option(name, known)}")
        try:
            return {name: _as_text(value) for name, value in super().__call__().items()}
        except SettingsError as error:
            cause = error.__cause__
        # A new error, because the cause of pydantic-settings' own one holds the value.
        raise CacheConfigurationError(str(cause) if isinstance(cause, CacheConfigurationError) else "unreadable")

    def variables(self) -> list[str]:
        """Return the names of all variables that are read."""
        names: list[str] = []
        for name, field in self.settings_cls.model_fields.items():
            names.append(f"{PREFIX}{name}".upper())
            for part in (field.annotation, *get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    names.extend(f"{PREFIX}{name}__{inner}".upper() for inner in part.model_fields)
        return names

    def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:
        """Return the value of a variable that holds a list or options: JSON, or a URL."""
        if field_name in ("bus", "locks") and isinstance(value, str) and is_url(value):
            return value
        try:
            return json.loads(value)
        except ValueError:
            example = '["memory://?max_entries=100"]' if field_name == "backends" else '{"max_restarts": 3}'
        raise CacheConfigurationError(
            f"environment variable {PREFIX}{field_name.upper()}: expected JSON, such as {example}"
        )


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_text(each) for name, each in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return Text(value) if isinstance(value, str) else value


def read_file(source: str | Path) -> dict[str, Any]:
    """Return the options that a file holds, not yet checked. Blocks. Raises `CacheConfigurationError`."""
    path = Path(source)
    shown = repr(redact_url(str(source)))
    suffixes = " ".join(FORMATS)
    name = FORMATS.get(path.suffix.lower())
    if name is None and not (isinstance(source, Path) or path.is_file()):
        scheme = re.split(r"[:?]", str(source))[0]
        hint = f"; did you mean '{scheme}://'?" if scheme in known_schemes() else ""
        raise CacheConfigurationError(
            f"{shown} is neither a URL (scheme://...) nor a file of settings ({suffixes}){hint}"
        )
    if name is None:
        raise CacheConfigurationError(f"{shown}: settings are read from {suffixes} files")
    try:
        values = _parse(name, path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values  # pyright: ignore[reportUnknownVariableType]
        problem = "does not hold named options"
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ValueError as error:
        problem = f"is not valid {name}: {error}"
    raise CacheConfigurationError(f"{shown} {problem}")


def _parse(name: str, text: str) -> Any:
    """Return what a text says. The `ValueError` for a wrong one names the place, and nothing that stands there: it may be secret."""
    import yaml

    try:
        if name == "YAML":
            return yaml.safe_load(text) or {}
        return tomllib.loads(text) if name == "TOML" else json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}"
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at ([^()]*)\)$", str(error))
        problem = place[1] if place else "somewhere"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
    except (yaml.YAMLError, ValueError):
        problem = "a character or a value that it cannot hold"
    raise ValueError(problem)
