"""Constructors of dataclasses that are written when they are first needed."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import fields, make_dataclass
from typing import Any


class LateInit:
    """Stands in a dataclass made with `init=False` for its `__init__`, and is replaced by it at the first look.

    `dataclass` compiles an `__init__` as source text, which is four fifths of what it does, and a process makes objects of
    few of our hundred classes. Whoever looks, be it the call of the class, `inspect.signature` or `help`, gets the
    constructor that `dataclass` writes. Two threads at once write the same one.
    """

    __slots__ = ("_cls",)

    def __init__(self, cls: type[Any]) -> None:
        self._cls = cls

    def __get__(self, instance: object, owner: type[Any]) -> Callable[..., None]:
        cls: Any = self._cls
        # Copies, because a dataclass writes into the fields that it is given.
        twin = make_dataclass(
            cls.__name__,
            [(each.name, each.type, copy(each)) for each in fields(cls)],
            # Asked for by name only: the constructor calls that of the object.
            namespace={"__post_init__": None} if hasattr(cls, "__post_init__") else {},
            eq=False,
            repr=False,
            match_args=False,
            frozen=cls.__dataclass_params__.frozen,
        )
        made: Callable[..., None] = vars(twin)["__init__"]
        made.__qualname__ = f"{cls.__qualname__}.__init__"
        made.__module__ = cls.__module__
        cls.__init__ = made
        # Bound to whoever asked, as an ordinary function would be.
        bound: Callable[..., None] = made.__get__(instance, owner)
        return bound


def write_init_late(cls: Any) -> None:
    """Give a dataclass that was made with `init=False` its constructor, later."""
    cls.__init__ = LateInit(cls)
