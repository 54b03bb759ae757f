"""The AsyncAPI document: valid to the AsyncAPI project's own parser, complete, and true of what is on the wire."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from cachebus.__main__ import main
from cachebus.bus.address import Subjects
from cachebus.bus.codec.messages import JSON, decode, encode
from cachebus.bus.nats.asyncapi import document
from cachebus.messages import Event, Request

from ..golden.examples import KINDS
from ..golden.examples import example as golden_example
from ..javascript import HERE, packages, tool

WHOLE = document("1.2.3")


def test_the_projects_own_parser_finds_nothing_wrong() -> None:
    folder = packages(HERE / "package.json")
    done = subprocess.run(
        [tool("node"), str(HERE / "validate.js"), str(folder)],
        input=json.dumps(WHOLE),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    # Severity 0 is an error and 1 a warning; 2 tells that there is a newer version of the specification.
    assert [each for each in told["diagnostics"] if each["severity"] < 2] == []
    assert told["version"] == "3.0.0"
    assert told["operations"] == len(WHOLE["operations"])
    assert told["channels"] == len(WHOLE["channels"])


def test_every_message_is_in_it() -> None:
    assert {each["name"] for each in WHOLE["components"]["messages"].values()} == set(KINDS)
    asked = {cls.__name__ for cls in KINDS.values() if issubclass(cls, Request)}
    told = {cls.__name__ for cls in KINDS.values() if issubclass(cls, Event)}
    operations: dict[str, Any] = WHOLE["operations"]
    received = {
        each["messages"][0]["$ref"].rpartition("/")[2] for each in operations.values() if each["action"] == "receive"
    }
    sent = {each["messages"][0]["$ref"].rpartition("/")[2] for each in operations.values() if each["action"] == "send"}
    assert (received, sent) == (asked, told)
    get = operations["backendGet"]
    assert [each["$ref"].rpartition("/")[2] for each in get["reply"]["messages"]] == ["Found", "Missing", "Failed"]
    assert get["bindings"]["nats"]["queue"] == "q"


def test_its_subjects_are_those_of_the_bus() -> None:
    subjects = Subjects("shop")
    channels: dict[str, Any] = WHOLE["channels"]
    place = {"namespace": "shop", "backend": "primary", "address": "backend.primary"}
    for cls in KINDS.values():
        if issubclass(cls, Event):
            (address,) = [
                each["address"]
                for each in channels.values()
                if each["address"] and list(each["messages"]) == [cls.__name__]
            ]
            assert address.format(**place) == subjects.event(cls, "primary")
    for name in ("backendRequests", "actorRequests"):
        assert channels[name]["address"].format(**place) == subjects.request("backend.primary")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_on_the_wire_is_what_its_schema_says(kind: str) -> None:
    cls = KINDS[kind]
    said = WHOLE["components"]["messages"][cls.__name__]
    schema = {**said["payload"], "components": WHOLE["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    (example,) = said["examples"]
    validator.validate(example["payload"])
    assert type(decode(json.dumps(example["payload"]).encode(), JSON)) is cls
    body = json.loads(encode(golden_example(cls), JSON))
    validator.validate(body)
    # And not of anything else.
    assert not validator.is_valid({**body, "kind": "other"})
    for name in WHOLE["components"]["schemas"][cls.__name__]["required"]:
        assert not validator.is_valid({key: value for key, value in body.items() if key != name})


def test_the_command_prints_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["asyncapi", "--json"]) == 0
    as_json = json.loads(capsys.readouterr().out)
    assert main(["asyncapi", "--yaml"]) == 0
    as_yaml = capsys.readouterr().out
    assert yaml.safe_load(as_yaml) == as_json
    assert main(["asyncapi"]) == 0
    assert capsys.readouterr().out == as_yaml
    as_json["info"]["version"] = "1.2.3"
    assert as_json == json.loads(json.dumps(WHOLE))
