"""Where settings come from besides keywords and URLs: the environment, and YAML, TOML and JSON files."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_settings import EnvSettingsSource, SettingsError

from cachebus.messages import CacheConfigurationError

from .options import unknown_option
from .urls import Text, is_url, known_schemes, redact_url

PREFIX = "CACHEBUS_"
"""How the name of every environment variable of cachebus begins."""


class Environment(EnvSettingsSource):
    """The environment as a source of settings. It refuses variables that nobody knows, which pydantic-settings
    overlooks (its issue 985)."""

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
        # Anew, because pydantic-settings' error has one that holds the value as its cause.
        raise CacheConfigurationError(str(cause) if isinstance(cause, CacheConfigurationError) else "unreadable")

    def variables(self) -> list[str]:
        """The names of every variable that is read."""
        names: list[str] = []
        for name, field in self.settings_cls.model_fields.items():
            names.append(f"{PREFIX}{name}".upper())
            for part in (field.annotation, *get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    names.extend(f"{PREFIX}{name}__{inner}".upper() for inner in part.model_fields)
        return names

    def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:
        """What a variable holds that is more than one word. It is written as JSON, but for a URL."""
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


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
    except (yaml.YAMLError, ValueError):
        problem = "a character or a value that it cannot hold"
    raise ValueError(problem)


def _toml(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at ([^()]*)\)$", str(error))
    raise ValueError(place[1] if place else "somewhere")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}"
    raise ValueError(problem)


READERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    ".yaml": ("YAML", _yaml),
    ".yml": ("YAML", _yaml),
    ".toml": ("TOML", _toml),
    ".json": ("JSON", _json),
}
"""The suffixes of files that can be read. A reader's `ValueError` says where it stopped, and nothing of what stood
there, which may be a password."""


def read_file(source: str | Path) -> dict[str, Any]:
    """The options that a file holds, not yet checked. Blocks. Raises `CacheConfigurationError`."""
    path = Path(source)
    shown = repr(redact_url(str(source)))
    suffixes = " ".join(READERS)
    if path.suffix.lower() not in READERS and not (isinstance(source, Path) or path.is_file()):
        scheme = re.split(r"[:?]", str(source))[0]
        hint = f"; did you mean '{scheme}://'?" if scheme in known_schemes() else ""
        raise CacheConfigurationError(
            f"{shown} is neither a URL (scheme://...) nor a file of settings ({suffixes}){hint}"
        )
    if path.suffix.lower() not in READERS:
        raise CacheConfigurationError(f"{shown}: settings are read from {suffixes} files")
    name, reader = READERS[path.suffix.lower()]
    try:
        values = reader(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            problem = "does not hold named options"
        else:
            return values  # pyright: ignore[reportUnknownVariableType]
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ValueError as error:
        problem = f"is not valid {name}: {error}"
    raise CacheConfigurationError(f"{shown} {problem}")
