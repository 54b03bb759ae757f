"""Settings from the environment, from profiles, and from YAML, TOML and JSON files."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cachebus.messages import CacheConfigurationError

from .fields import unknown_option
from .urls import Text, is_url, known_schemes, parse_bus_url, redact_url

PREFIX = "CACHEBUS_"
"""Prefix of the environment variables of cachebus."""

PROFILES: Mapping[str, dict[str, Any]] = {
    "dev": {"environment": "development", "debug": True},
    "production": {"environment": "production", "payload": {"compression": "zstd", "checksum": True}},
    "test": {"environment": "test", "timeout": 30.0},
}
"""Presets by name. They take precedence only over the defaults."""

FORMATS = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML", ".json": "JSON"}
"""Formats of settings files by suffix."""


# Variables that Kubernetes sets in every container for a service named "cachebus", and those of `cachebus.testing`.
_OTHERS = re.compile(r"SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?|TEST_\w+_URL")


def with_sources(fields: Mapping[str, FieldInfo], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return unvalidated settings. Keywords take precedence over the environment, and the environment over the profile.

    Raises `CacheConfigurationError` for an unknown environment variable.
    """
    given = _merged(_read_environment(fields), keywords)
    return _merged(PROFILES.get(str(given.get("profile")), {}), given)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings. Values of `above` take precedence; nested mappings and the URL of a bus are merged."""
    both = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) or isinstance(above[name], dict):
            under, over = _mapping(name, below[name]), _mapping(name, above[name])
            if under is not None and over is not None:
                both[name] = _merged(under, over)
    return both


def _mapping(name: str, value: Any) -> dict[str, Any] | None:
    """Return the options of a group, given as a mapping or as the URL of a bus. Return `None` for other values."""
    if name == "bus" and isinstance(value, str):
        return dict(parse_bus_url(value))
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _read_environment(fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    variables = {f"{PREFIX}{'__'.join(path)}".upper(): (path, kind) for path, kind in _variables(fields)}
    given = {name.upper(): text for name, text in os.environ.items() if name.upper().startswith(PREFIX)}
    for name in sorted(given.keys() - variables.keys()):
        if not _OTHERS.fullmatch(name.removeprefix(PREFIX)):
            raise CacheConfigurationError(f"environment variable {name}: {unknown_option(name, list(variables))}")
    values: dict[str, Any] = {}
    for name, ((group, *option), kind) in variables.items():
        if name not in given:
            continue
        value = _decoded(name, kind, given[name])
        if not option:
            values[group] = value
        else:
            values = _merged(values, {group: {option[0]: value}})
    return values


def _variables(fields: Mapping[str, FieldInfo]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and type of all settings that have an environment variable, each group before its options."""
    for name, field in fields.items():
        yield (name,), field.annotation
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from (((name, inner), option.annotation) for inner, option in part.model_fields.items())


def _decoded(name: str, kind: Any, text: str) -> Any:
    """Return the value of an environment variable. Lists and options are parsed from JSON, or may be a URL."""
    group = name.removeprefix(PREFIX).lower()
    if not _is_json(kind) or (group in ("bus", "locks") and is_url(text)):
        return Text(text)
    try:
        return _as_text(json.loads(text))
    except (ValueError, RecursionError):
        example = '["memory://?max_entries=100"]' if group == "backends" else '{"max_restarts": 3}'
    raise CacheConfigurationError(f"environment variable {name}: expected JSON, such as {example}")


def _is_json(kind: Any) -> bool:
    if isinstance(kind, type):
        return issubclass(kind, BaseModel)
    return get_origin(kind) is tuple or any(map(_is_json, get_args(kind)))


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_text(each) for name, each in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return Text(value) if isinstance(value, str) else value


def read_file(source: str | Path) -> dict[str, Any]:
    """Read the unvalidated options of a file. Blocks. Raises `CacheConfigurationError`."""
    path = Path(source)
    shown = repr(redact_url(str(source)))
    suffixes = " ".join(FORMATS)
    name = FORMATS.get(path.suffix.lower())
    if name is None and not (isinstance(source, Path) or path.is_file()):
        scheme = re.split(r"[:?]", str(source))[0]
        hint = f"; did you mean '{scheme}://'?" if scheme in known_schemes() else ""
        raise CacheConfigurationError(f"{shown} is neither a URL (scheme://...) nor a settings file ({suffixes}){hint}")
    if name is None:
        raise CacheConfigurationError(f"{shown}: expected a settings file with one of the suffixes {suffixes}")
    try:
        values = _parse(name, path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values  # pyright: ignore[reportUnknownVariableType]
        problem = "does not contain named options"
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ValueError as error:
        problem = f"is not valid {name}: {error}"
    raise CacheConfigurationError(f"{shown} {problem}")


def _parse(name: str, text: str) -> Any:
    """Parse a text. The `ValueError` for invalid text names only the position, because the content may be secret."""
    import yaml

    try:
        if name == "YAML":
            return yaml.safe_load(text) or {}
        return tomllib.loads(text) if name == "TOML" else json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}"
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at ([^()]*)\)$", str(error))
        problem = place[1] if place else "at an unknown position"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "at an unknown position"
    except (yaml.YAMLError, ValueError):
        problem = "it contains an unsupported character or value"
    raise ValueError(problem)
