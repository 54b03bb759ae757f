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
        # Bound to whoever asked, as an ordinary function would be.
        bound: Callable[..., None] = self.write().__get__(instance, owner)
        return bound

    def write(self) -> Callable[..., None]:
        """Put the constructor in this place."""
        cls: Any = self._cls
        # A docstring, because else one is made of the signature, which takes as long as a third of the rest.
        namespace: dict[str, Any] = {"__doc__": cls.__doc__}
        if hasattr(cls, "__post_init__"):
            namespace["__post_init__"] = None  # Asked for by name only: the constructor calls that of the object.
        # Copies, because a dataclass writes into the fields that it is given.
        twin = make_dataclass(
            cls.__name__,
            [(each.name, each.type, copy(each)) for each in fields(cls)],
            namespace=namespace,
            eq=False,
            repr=False,
            match_args=False,
            frozen=cls.__dataclass_params__.frozen,
        )
        made: Callable[..., None] = vars(twin)["__init__"]
        made.__qualname__ = f"{cls.__qualname__}.__init__"
        made.__module__ = cls.__module__
        cls.__init__ = made
        return made


def write_init_late(cls: Any) -> None:
    """Give a dataclass that was made with `init=False` its constructor, later."""
    cls.__init__ = LateInit(cls)


def write_init_now(*classes: type[Any]) -> None:
    """Write the constructors of these that have not been needed yet, before somebody has to wait for that."""
    for cls in classes:
        if isinstance(late := vars(cls).get("__init__"), LateInit):
            late.write()
