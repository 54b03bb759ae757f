"""compose.yaml gives the three servers, to this machine only, and says when they are ready."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from .paths import ROOT

PORTS = {"redis": 6379, "memcached": 11211, "nats": 4222}


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    page: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    services: dict[str, dict[str, Any]] = page["services"]
    return services


def test_the_servers_that_cachebus_uses_are_there(services: dict[str, dict[str, Any]]) -> None:
    assert services.keys() == PORTS.keys()


@pytest.mark.parametrize("name", PORTS)
def test_every_port_is_published_on_this_machine_only(services: dict[str, dict[str, Any]], name: str) -> None:
    ports: list[str] = services[name]["ports"]
    assert f"127.0.0.1:{PORTS[name]}:{PORTS[name]}" in ports
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []
    assert "network_mode" not in services[name]


@pytest.mark.parametrize("name", PORTS)
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
