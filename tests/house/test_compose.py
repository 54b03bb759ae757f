"""compose.yaml runs three servers, published on localhost only, and a worker. Each has a health check."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from cachebus.__main__ import parser
from cachebus.cli.worker import worker_settings

from .paths import ROOT

PORTS = {"redis": 6379, "memcached": 11211, "nats": 4222}


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    page: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    services: dict[str, dict[str, Any]] = page["services"]
    return services


def test_the_servers_that_cachebus_uses_are_there(services: dict[str, dict[str, Any]]) -> None:
    assert services.keys() == {*PORTS, "worker"}


@pytest.mark.parametrize("name", PORTS)
def test_every_port_is_published_on_this_machine_only(services: dict[str, dict[str, Any]], name: str) -> None:
    ports: list[str] = services[name]["ports"]
    assert f"127.0.0.1:{PORTS[name]}:{PORTS[name]}" in ports
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []
    assert "network_mode" not in services[name]


@pytest.mark.parametrize("name", [*PORTS, "worker"])
def test_every_server_says_when_it_is_ready(services: dict[str, dict[str, Any]], name: str) -> None:
    check = services[name]["healthcheck"]
    assert check["test"][0] in {"CMD", "CMD-SHELL"}
    assert len(check["test"]) > 1
    assert not check.get("disable", False)
    assert {"interval", "timeout", "retries"} <= check.keys()


@pytest.mark.parametrize("name", PORTS)
def test_every_image_is_pinned_to_a_version(services: dict[str, dict[str, Any]], name: str) -> None:
    assert re.fullmatch(rf"{name}:\d+\.\d+\.\d+(-\w+)?", services[name]["image"])


def test_nats_keeps_streams(services: dict[str, dict[str, Any]]) -> None:
    assert {"--jetstream", "-js"} & set(services["nats"]["command"])


def test_the_worker_is_a_command_that_there_is(
    services: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = services["worker"]
    for name, value in worker["environment"].items():
        monkeypatch.setenv(name, value)
    arguments = parser().parse_args(worker["command"])
    settings = worker_settings(arguments)
    assert [(each.name, each.type) for each in settings.backends] == [("primary", "redis"), ("other", "memcached")]
    assert settings.bus is not None
    # The host names are those of the services. The worker starts once they are healthy.
    assert settings.bus.hosts == ("nats:4222",)
    assert worker["depends_on"] == {name: {"condition": "service_healthy"} for name in PORTS}
    assert float(worker["stop_grace_period"].removesuffix("s")) > arguments.grace
    assert "ports" not in worker
    program, *ping = worker["healthcheck"]["test"][1:]
    assert program == "cachebus"
    assert parser().parse_args(ping).command.__name__ == "_ping"


def test_the_image_of_the_worker_runs_as_nobody_in_particular() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    last = lines[max(number for number, line in enumerate(lines) if line.startswith("FROM ")) :]
    (user,) = [line.split()[1] for line in last if line.startswith("USER ")]
    assert int(user) > 0
    assert all(re.match(r"FROM python:\d+\.\d+\.\d+-", line) for line in lines if line.startswith("FROM "))
    (check,) = [line for line in last if line.startswith("HEALTHCHECK ")]
    program, *ping = json.loads(check.partition("CMD ")[2])
    assert program == "cachebus"
    assert parser().parse_args(ping).command.__name__ == "_ping"
    # .dockerignore admits every path that is copied.
    let_through = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    assert copied
    assert all((ROOT / name).exists() and f"!{name}" in let_through for name in copied)
