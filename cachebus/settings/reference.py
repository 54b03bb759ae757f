"""The page of all settings, made from their classes: `python -m cachebus config reference`."""

from __future__ import annotations

import ast
import enum
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr

from cachebus.bus.nats.options import NatsOptions

from .backends import MemcachedSettings, RedisSettings
from .bus import EventSettings, NatsSettings
from .payload import EncryptionKey, PayloadSettings
from .settings import ActorSettings, MemorySettings, NullSettings, PluginSettings, Settings
from .sources import PREFIX

_INTRODUCTION = """# Configuration

Every setting there is. `python -m cachebus config reference` makes this page, and a test holds it equal.

Settings come from keywords (`open_cache(..., timeout=0.5)`), a mapping, a file (YAML, TOML, JSON), a URL or the environment;
keywords win over the source, that over the environment, that over the profile, that over the defaults. A group is a mapping
of its own (`payload: {compression: zstd}`); in the environment two underscores lead into it (`CACHEBUS_PAYLOAD__COMPRESSION=zstd`),
and a list or a mapping is JSON. Unknown names are refused.

    python -m cachebus config check FILE    # what is wrong, and what production would refuse
    python -m cachebus config show FILE     # what it amounts to, secrets masked
"""

_GROUPS: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("At the top", Settings, ""),
    ("`payload`: how values become bytes", PayloadSettings, "payload"),
    ("A key in `payload.encryption_keys`", EncryptionKey, ""),
    ("`events`", EventSettings, "events"),
    ("`actors`", ActorSettings, "actors"),
    ("`bus`", NatsSettings, "bus"),
    ("A backend of `type: memory`", MemorySettings, ""),
    ("A backend of `type: redis`", RedisSettings, ""),
    ("A backend of `type: memcached`", MemcachedSettings, ""),
    ("A backend of `type: null`", NullSettings, ""),
    ("A backend of `type: plugin`", PluginSettings, ""),
)


def configuration_page() -> str:
    """Return the whole page, in Markdown."""
    return "\n".join([_INTRODUCTION, *(line for group in _GROUPS for line in _section(*group))])


def _documentation(model: type[BaseModel]) -> dict[str, str]:
    """Return the meaning of each field of a model, from its docstring or its comment. Many fields of a bus are those of `NatsOptions`."""
    said: dict[str, str] = {}
    ours: list[Any] = [each for each in reversed(model.__mro__) if each.__module__.startswith("cachebus")]
    for each in (NatsOptions, *ours) if model is NatsSettings else ours:
        source = textwrap.dedent(inspect.getsource(each))
        said.update(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
        (tree,) = ast.parse(source).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in itertools.pairwise(tree.body):
            match field, below:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str() as text)):
                    said[name] = " ".join(text.split())
                case _:
                    pass
    return said


def _section(title: str, model: type[BaseModel], group: str) -> Iterator[str]:
    yield f"## {title}\n"
    if model is not Settings and model.__doc__:
        yield " ".join(inspect.cleandoc(model.__doc__).split("\n\n")[0].split()) + "\n"
    yield "| name | value | default | meaning |"
    yield "| --- | --- | --- | --- |"
    said = _documentation(model)
    hints = typing.get_type_hints(model, include_extras=True)
    for name, field in model.model_fields.items():
        if name == "type":
            continue
        default = "needed" if field.is_required() else _shown(field.default)
        variable = f"`{PREFIX}{f'{group}__{name}' if group else name}`".upper() if group or model is Settings else ""
        meaning = f"{said.get(name, '')} {variable}".strip()
        yield f"| `{name}` | {_value(hints[name])} | {default} | {meaning.replace('|', '&#124;')} |"
    yield ""


def _value(hint: Any) -> str:
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, str):
            return extra
        hint = get_args(hint)[0]
    if inspect.isclass(hint) and issubclass(hint, BaseModel):
        return "options"
    if get_origin(hint) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("none" if each is types.NoneType else _value(each) for each in get_args(hint))
    return "text" if hint is str else "secret" if hint is SecretStr else str(getattr(hint, "__name__", hint))


def _shown(default: Any) -> str:
    if isinstance(default, BaseModel):
        return "see below"
    if isinstance(default, tuple):
        items: Any = default  # pyright: ignore[reportUnknownVariableType]
        if items and isinstance(items[0], BaseModel):
            return "one memory backend"
        return ", ".join(f"`{each}`" for each in items) or "none"
    if isinstance(default, enum.Enum):
        default = default.value
    if default is None or isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int) and re.fullmatch(r"\d{5,}", str(default)):
        return f"{default:,}"
    return f"`{default}`" if default != "" else "empty"
