"""Keys of calls: templates such as `"user:{user_id}"`, compiled to a function with the decorated one's parameters."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable
from typing import Any

from cachebus.messages import CacheConfigurationError

_EMPTY = inspect.Parameter.empty


def compile_template(function: Callable[..., Any], template: str, what: str) -> Callable[..., str]:
    """A function that takes the arguments of `function` and fills them into `template`.

    Fields are names of parameters, with attributes and indices as in `str.format` (`{user.id}`, `{args[0]}`). Arguments
    that the caller left out have their defaults, and `f(1)` and `f(user_id=1)` give the same text. Raises
    `CacheConfigurationError` for a field that is no parameter; `what` says what the template is for.
    """
    parameters = inspect.signature(function).parameters
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise CacheConfigurationError(f"{what} {template!r} is not a valid template: {error}") from None
    fields = [field for _, field, _, _ in pieces if field is not None and _first_name(field) not in parameters]
    try:
        if not fields:
            # A dry run, for what else can be wrong: conversions, and fields within format specifications.
            template.format(**dict.fromkeys(parameters, _Anything()))
    except (KeyError, IndexError) as error:
        fields = [str(error.args[0]) if isinstance(error, KeyError) else ""]
    except ValueError as error:
        raise CacheConfigurationError(f"{what} {template!r} is not a valid template: {error}") from None
    if fields:
        raise CacheConfigurationError(
            f"{what} {template!r} has the field {{{fields[0]}}}, but {_name_of(function)}"
            f" takes {', '.join(parameters) or 'no arguments'}"
        )
    # Compiled, because binding arguments through inspect.Signature.bind takes longer than the whole cache hit: the
    # interpreter binds them to a lambda's parameters in no time. Only names of parameters enter the source.
    defaults = {f"_default_{name}": each.default for name, each in parameters.items() if each.default is not _EMPTY}
    arguments = ", ".join(f"{name}={name}" for name in parameters)
    fill = "_fill"
    while fill in parameters:
        fill += "_"
    source = f"lambda {_parameter_list(parameters)}: {fill}({arguments})"
    compiled: Callable[..., str] = eval(source, {**defaults, fill: template.format})  # noqa: S307
    return compiled


class _Anything:
    """Stands for every argument: it has all attributes and items, and takes any format specification."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __getitem__(self, key: object) -> _Anything:
        return self

    def __format__(self, specification: str) -> str:
        return ""


def _first_name(field: str) -> str:
    for position, character in enumerate(field):
        if character in ".[":
            return field[:position]
    return field


def _parameter_list(parameters: Any) -> str:
    """The parameters in Python's own syntax, with their defaults by name."""
    kinds = inspect.Parameter
    out: list[str] = []
    star = False
    previous = None
    for name, each in parameters.items():
        if previous is kinds.POSITIONAL_ONLY and each.kind is not kinds.POSITIONAL_ONLY:
            out.append("/")
        if each.kind is kinds.KEYWORD_ONLY and not star:
            out.append("*")
            star = True
        prefix = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(each.kind, "")
        star = star or prefix == "*"
        out.append(f"{prefix}{name}" + (f"=_default_{name}" if each.default is not _EMPTY else ""))
        previous = each.kind
    if previous is kinds.POSITIONAL_ONLY:
        out.append("/")
    return ", ".join(out)


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
