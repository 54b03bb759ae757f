"""Messages as field maps: what the type hints of a message class say about writing it, and about checking what arrives.

A `Plan` is made from a class's hints the first time the class is met, one for each content type. Writing takes the
exact type of a field as the sign that it goes as it is, and converts or refuses the rest. Reading is one pydantic
`TypeAdapter`, built with the first message to be read. It turns a map into the class's arguments, because what pydantic
makes of a dataclass itself takes either only instances (strict) or whatever resembles the hints (lax), and is slower.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from functools import cached_property
from typing import Any

from pydantic import AfterValidator, GetCoreSchemaHandler, TypeAdapter, ValidationError

from cachebus.messages import WIRE_NAMES, Message

from .codec_hints import Way, Ways, expect
from .codec_values import Unfit, ValueForm, name_of_type, type_name

ENVELOPE = ("v", "kind")
"""The fields that every message begins with, and that none may have as its own."""

_MOST_FAULTS = 32  # more are only counted: a list of a million faults would cost more than the body

_annotated: Any = typing.Annotated  # a type made at run time is a value to the type checker


class Plan:
    """How the messages of one class are written and read in one form."""

    def __init__(self, cls: type[Message], plans: Plans) -> None:
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(typing.cast(Any, cls))
        for field in fields:
            if field.name in ENVELOPE:
                raise TypeError(f"{cls.__name__} has a field {field.name!r}, which every message begins with")
        self.cls = cls
        self.kind = cls.WIRE_NAME
        self.names = {field.name for field in fields}
        self._plans = plans
        ways = Ways(plans.values, self._inside)
        self._ways = {field.name: ways.of(hints[field.name]) for field in fields}
        self._required = {
            field.name
            for field in fields
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        self._writes = [(name, way.plain, way.write) for name, way in self._ways.items()]

    def write(self, message: Message, tree: dict[str, Any]) -> dict[str, Any]:
        """`tree`, with the fields of the message added in their order. Raises `Unfit`, naming the field."""
        name = ""
        try:
            for name, plain, convert in self._writes:
                value = getattr(message, name)
                tree[name] = value if type(value) in plain else convert(value)
        except Unfit as unfit:
            problem = str(unfit) if unfit.placed else f"field {name!r} of {self.kind} {unfit}"
        else:
            return tree
        raise Unfit(problem, placed=True)

    def read(self, tree: dict[str, Any]) -> Message:
        """The message. Fields that the class does not have are ignored. Raises `Unfit`, naming the field."""
        try:
            return self.cls(**self._check(tree))
        except ValidationError as error:
            problem = self._explain(error)
        raise Unfit(problem, placed=True)

    def _inside(self, cls: type[Message]) -> Way:
        """The way of a message inside this one: a field map with neither version nor kind."""
        plan = self._plans.of(cls)
        self.names |= plan.names

        def write(message: Message) -> dict[str, Any]:
            expect(message, cls)
            return plan.write(message, {})

        def make(arguments: dict[str, Any]) -> Message:
            return cls(**arguments)

        return Way(frozenset(), write, _annotated[Any, plan, AfterValidator(make)])

    def _explain(self, error: ValidationError) -> str:
        """What is wrong with a field: its name, what it should be and its type. Never what it or a key in it holds."""
        if (count := error.error_count()) > _MOST_FAULTS:
            return f"{self.kind} has {count} faults in its fields"
        faults = error.errors(include_url=False)
        path = self._path(faults[0]["loc"])
        if faults[0]["type"] == "missing":
            return f"field {path!r} of {self.kind} is missing"
        if isinstance(cause := faults[0].get("ctx", {}).get("error"), Unfit):
            return f"field {path!r} of {self.kind} {cause}"
        wanted = {each["msg"].removeprefix("Input should be ") for each in faults if self._path(each["loc"]) == path}
        found = name_of_type(faults[0]["input"])
        return f"field {path!r} of {self.kind} should be {' or '.join(sorted(wanted))}, not this {found}"

    def _path(self, location: tuple[int | str, ...]) -> str:
        return ".".join(str(each) for each in location if each in self.names)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        # The schema of a TypedDict: pydantic takes one as a class only from typing_extensions before Python 3.12.
        fields = {
            name: {
                "type": "typed-dict-field",
                "schema": handler.generate_schema(way.check),
                "required": name in self._required,
            }
            for name, way in self._ways.items()
        }
        return {"type": "typed-dict", "fields": fields, "extra_behavior": "ignore"}

    @cached_property
    def _check(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        adapter: TypeAdapter[dict[str, Any]] = TypeAdapter(_annotated[Any, self])
        return adapter.validator.validate_python


class Plans:
    """The plans of one form, by class and by wire name, made when they are first asked for."""

    def __init__(self, values: ValueForm) -> None:
        self.values = values
        self._by_class: dict[type[Message], Plan] = {}
        self._by_kind: dict[str, Plan] = {}

    def of(self, cls: type[Message]) -> Plan:
        """The plan of a class. Raises `TypeError` for one that no wire name belongs to."""
        if (plan := self._by_class.get(cls)) is None:
            if WIRE_NAMES.get(getattr(cls, "WIRE_NAME", "")) is not cls:
                raise TypeError(f"{type_name(cls)} is not a message with a wire name")
            # Two threads may make the same one; either will do.
            plan = self._by_class[cls] = Plan(cls, self)
        return plan

    def named(self, kind: str) -> Plan | None:
        """The plan of a wire name, if there is a message of that name."""
        if (plan := self._by_kind.get(kind)) is None and (cls := WIRE_NAMES.get(kind)) is not None:
            plan = self._by_kind[kind] = self.of(cls)
        return plan
