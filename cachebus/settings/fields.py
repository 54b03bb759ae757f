"""Types and base classes of settings, and the error messages for invalid values."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from cachebus.messages import CacheConfigurationError

from .urls import Text, did_you_mean, redact_url

T = TypeVar("T")
Path: TypeAlias = tuple[str | int, ...]
Problem: TypeAlias = tuple[Path, str]
"""Path of an option, and the error message for it."""

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_FLOAT = re.compile(r"-?[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?")
_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SWITCHES = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_SECRET = re.compile(r"(?i)pass|pwd|secret|token|key|credential|auth")
_SHOWN = 80
_EXPECTED = {
    "string_type": "expected text",
    "union_tag_not_found": "expected a URL, or options with a type",
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "expected named options"),
}
"""Messages by the type of pydantic's error."""

# A validator raises ValueError with the expected values, such as "expected seconds above 0"; `refusal` appends the
# actual value. A rule with a complete message raises CacheConfigurationError. The configuration page shows the string
# in an `Annotated` as the type of the option.


def _number(value: object) -> int | float:
    """Return a number, parsed from text if the value comes from a URL or the environment.

    Return NaN, which every range check rejects, for other values.
    """
    if isinstance(value, Text):
        if _INTEGER.fullmatch(value):
            return int(value)
        if _FLOAT.fullmatch(value):
            return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _seconds(value: object) -> float:
    seconds = _number(value.total_seconds() if isinstance(value, timedelta) else value)
    if 0 < seconds <= sys.float_info.max:
        return float(seconds)
    raise ValueError("expected seconds above 0, as a number or a timedelta")


def _share(value: object) -> float:
    if 0 <= (share := _number(value)) <= 1:
        return float(share)
    raise ValueError("expected a number from 0 to 1")


def _integer(least: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        number = _number(value)
        if isinstance(number, int) and number >= least:
            return number
        raise ValueError(f"expected a whole number, {least} or more")

    return read


def optional(read: Callable[[object], Any]) -> Callable[[object], Any]:
    """Return a validator that also accepts `None` and the text `none`: TOML, URLs and the environment have no null."""

    def read_or_none(value: object) -> Any:
        if value is None or (isinstance(value, str) and value == "none"):
            return None
        try:
            return read(value)
        except ValueError as error:
            expected = f"{error}, or none"
        raise ValueError(expected)

    return read_or_none


def texts(value: object, expected: str) -> tuple[str, ...]:
    """Return a tuple of strings from a list or a comma-separated string. Raises `ValueError(expected)`."""
    parts = value.split(",") if isinstance(value, str) else value
    given = cast("Sequence[Any]", parts) if isinstance(parts, list | tuple) else [None]
    if not all(isinstance(each, str) for each in given):
        raise ValueError(expected)
    return tuple(map(str, given))


def named(value: T) -> T:
    """Return `value`. Raises `CacheConfigurationError` for a mapping with keys that are not strings."""
    options: Any = value
    if isinstance(options, Mapping) and not all(isinstance(name, str) for name in cast("Iterable[Any]", options)):
        raise CacheConfigurationError("expected text as the name of an option: put it in quotes")
    return value


def word(value: object) -> str:
    """Validate a word and return it. Raises `ValueError`."""
    if isinstance(value, str) and _WORD.fullmatch(value):
        return str(value)
    raise ValueError("expected one word of 1 to 64 letters, digits, _ and -")


def _switch(value: object) -> bool:
    if isinstance(value, Text):
        value = _SWITCHES.get(value.lower(), value)
    if isinstance(value, bool):
        return value
    raise ValueError("expected true or false")


Seconds = Annotated[float, "seconds, above 0", BeforeValidator(_seconds)]
MaybeSeconds = Annotated[float | None, "seconds, above 0; or none", BeforeValidator(optional(_seconds))]
AtLeastOne = Annotated[int, "whole number, 1 or more", BeforeValidator(_integer(1))]
MaybeAtLeastOne = Annotated[int | None, "whole number, 1 or more; or none", BeforeValidator(optional(_integer(1)))]
NotNegative = Annotated[int, "whole number, 0 or more", BeforeValidator(_integer(0))]
Share = Annotated[float, "number from 0 to 1", BeforeValidator(_share)]
Word = Annotated[str, "one word", BeforeValidator(word)]
Switch = Annotated[bool, "true or false", BeforeValidator(_switch)]


class Options(BaseModel):
    """Base class of a frozen group of options. It rejects unknown options.

    Raises `CacheConfigurationError` instead of pydantic's `ValidationError`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
            return
        except ValidationError as error:
            refused = refusal(error, type(self))
        # Raised outside the `except` block, so that the context does not keep pydantic's error with all values.
        raise refused

    def pick(self, *names: str) -> dict[str, Any]:
        """Return the named options as keyword arguments."""
        return {name: getattr(self, name) for name in names}


class BackendOptions(Options):
    """Options of every backend.

    `by_reference` is true if the store can keep objects, so that values need no serializer.
    """

    by_reference: ClassVar[bool] = False

    type: Any = None
    name: Word = "primary"  # Name of the backend in calls and events.
    default: Switch = False  # Use this backend for calls that name none. A single backend is always the default.


def refuse_wrong(*rules: tuple[object, str]) -> None:
    """Raise `CacheConfigurationError` with the message of the first rule whose condition is true."""
    for wrong, sentence in rules:
        if wrong:
            raise CacheConfigurationError(sentence)


def refusal(error: ValidationError, model: type[BaseModel]) -> CacheConfigurationError:
    """Return an error that describes all problems that pydantic found in a model, without secrets.

    Its `args` are the individual `Problem`s. The error of the enclosing model extends their paths.
    """
    found: list[Problem] = []
    for each in error.errors(include_url=False):
        path: Path = tuple(redact_url(part) if isinstance(part, str) else part for part in each["loc"])
        # pydantic includes the tag of a discriminated union in the path: backends, 0, memory.
        if len(path) > 2 and path[0] == "backends":
            path = path[:2] + path[3:]
        context = each.get("ctx", {})
        inner = context.get("error")
        if isinstance(inner, CacheConfigurationError) and isinstance(inner.args[0], tuple):
            found.extend((path + deeper, text) for deeper, text in inner.args)
        elif isinstance(inner, CacheConfigurationError):
            found.append((path, str(inner)))
        elif each["type"] == "extra_forbidden":
            known = [name for name in model.model_fields if name != "type"]
            found.append((path, unknown_option(str(each["loc"][-1]), known)))
        elif each["type"] == "union_tag_invalid":
            tags = context["expected_tags"]
            found.append(((*path, "type"), f"expected one of {tags}, not {shown(context['tag'], path)}"))
        elif each["type"] == "missing":
            found.append((path, "is required"))
        else:
            message = each["msg"]
            other = f"expected {context['expected']}" if "expected" in context else message[:1].lower() + message[1:]
            expected = str(inner) if inner else _EXPECTED.get(each["type"], other)
            found.append((path, f"{expected}, not {shown(each['input'], path)}"))
    return problems_error(found)


def problems_error(found: Iterable[Problem]) -> CacheConfigurationError:
    """Return an error that describes several problems. Its `args` are the individual problems."""
    problems = tuple(found)
    refused = CacheConfigurationError("; ".join(sentence(path, text) for path, text in problems))
    refused.args = problems
    return refused


def unknown_option(name: str, known: list[str]) -> str:
    """Return the message for an unknown option, with the nearest known name and all known names."""
    return f"unknown option{did_you_mean(name, known)}; known options are {', '.join(known)}"


def shown(value: object, path: Path = ()) -> str:
    """Return a value for an error message, shortened and without possible secrets."""
    if any(_SECRET.search(str(part)) for part in path):
        return "***"
    if isinstance(value, str):
        text = redact_url(value)
        return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    if value is None or isinstance(value, bool | int | float | timedelta):
        return repr(value) if not isinstance(value, int) or abs(value) < 10**_SHOWN else "such a large number"
    return f"a value of type {type(value).__name__}"


def sentence(path: Path, text: str) -> str:
    """Return a message prefixed with the path of its option: `backends[0].name: ...`."""
    where = ""
    for part in path:
        if isinstance(part, str) and part.isidentifier():
            where += f".{part}" if where else part
        else:
            where += f"[{part!r}]"
    return f"{where}: {text}" if where else text
