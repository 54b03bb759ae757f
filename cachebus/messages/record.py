"""Frozen dataclasses that cost little to import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast, dataclass_transform

from .late_init import write_init_late

R = TypeVar("R", bound="Record")


class Record:
    """A frozen, slotted dataclass made by `@record`. It has here, once for all, what `dataclass` compiles anew for each
    class: comparing, hashing and showing its fields."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record) or type(self) is not type(other):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        shown = (f"{each.name}={getattr(self, each.name)!r}" for each in fields(cast("Any", self)) if each.repr)
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, each.name) for each in fields(cast("Any", self)))


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(*, kw_only: bool = False) -> Callable[[type[R]], type[R]]:
    """`@dataclass(frozen=True, slots=True)` for a `Record`, with its constructor written when it is needed."""

    def make(cls: type[R]) -> type[R]:
        made = dataclass(frozen=True, slots=True, kw_only=kw_only, init=False, eq=False, repr=False)(cls)
        write_init_late(made)
        return made

    return make
