"""Settings of payloads: their sources, the checks in production, and redaction of secrets."""

from __future__ import annotations

import json
import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml

from cachebus import CacheConfigurationError
from cachebus.__main__ import main
from cachebus.settings import Settings as CheckedSettings
from cachebus.settings import load_settings
from cachebus.settings.payload import build_pipeline, key_bytes
from cachebus.settings.reference import configuration_page

# Strings and numbers as in files and the environment, not of the fields' types.
Settings: Any = CheckedSettings
ROOT = Path(__file__).parents[2]
CANARY = "canary-" * 6
KEYS: dict[str, Any] = {"signing_keys": [CANARY], "encryption_keys": {"k1": CANARY}, "tenant": "shop"}


@pytest.fixture(autouse=True)
def an_environment_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROFILE", "ENVIRONMENT", "PAYLOAD__SIGNING_KEYS", "PAYLOAD__ENCRYPTION_KEYS", "PAYLOAD__SERIALIZER"):
        monkeypatch.delenv(f"CACHEBUS_{name}", raising=False)


def refused(**options: Any) -> str:
    with pytest.raises(CacheConfigurationError) as error:
        Settings(**options)
    return str(error.value)


def test_the_page_is_what_the_settings_say() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == configuration_page(), "python -m cachebus config reference > docs/configuration.md"


def test_every_setting_says_what_it_means() -> None:
    rows = [line for line in configuration_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if re.search(r"\| (`CACHEBUS_\w+`)? ?\|$", row)] == []


def test_keys_come_from_keywords_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache.yaml"
    file.write_text(yaml.safe_dump({"payload": KEYS}))
    from_file = load_settings(str(file))
    monkeypatch.setenv("CACHEBUS_PAYLOAD__SIGNING_KEYS", json.dumps([CANARY]))
    monkeypatch.setenv("CACHEBUS_PAYLOAD__ENCRYPTION_KEYS", json.dumps({"k1": CANARY}))
    monkeypatch.setenv("CACHEBUS_PAYLOAD__TENANT", "shop")
    from_environment = load_settings()
    assert from_environment == from_file == Settings(payload=KEYS)
    assert key_bytes(from_file.payload.encryption_keys[0].key) == CANARY.encode()
    given = Settings(payload={"signing_keys": [bytes(range(32))]}).payload
    assert key_bytes(given.signing_keys[0]) == bytes(range(32))


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        ({"serializer": "pickle"}, "payload: serializer: pickle requires signing_keys"),
        ({"signing_keys": ["x" * 31]}, "payload.signing_keys: expected a key of at least 32 bytes"),
        ({"signing_keys": ["base64:AAAA"]}, "payload.signing_keys: expected a key of at least 32 bytes"),
        ({"encryption_keys": {"k": "short"}}, "at least 32 bytes"),
        (
            {"encryption_keys": {"k": CANARY}, "encryption_key_id": "l"},
            "payload: encryption_key_id: expected an id of encryption_keys",
        ),
        ({"serializer": "none", "checksum": True}, "payload: serializer: none cannot be combined with checksum"),
        ({"level": 3}, "payload: level: requires a compression"),
        ({"compression": "zlib", "level": 10}, "payload: level: expected 1 to 9 for zlib"),
        ({"compression": "brotli"}, "payload.compression: expected 'none', 'zlib', 'gzip', 'lz4' or 'zstd'"),
        ({"tenant": "shop"}, "payload: tenant: requires encryption_keys"),
        ({"types": ["a:B"]}, "payload: types: requires the serializer auto"),
        ({"max_size": 2**32}, "payload: max_size: expected at most 4294967295"),
    ],
)
def test_what_does_not_fit_is_named(payload: dict[str, Any], sentence: str) -> None:
    assert sentence in refused(payload=payload)


INSECURE: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "debug": ({"debug": True}, "debug: ", {"debug": False}),
    "plain keys in events": (
        {"payload": KEYS},
        "events.keys: events contain plain keys while payloads are sealed; set keys: hash or keys: none",
        {"payload": KEYS, "events": {"keys": "none"}},
    ),
    "hashed keys without a secret": (
        {"payload": KEYS, "events": {"keys": "hash"}},
        "events.hash_key: without a secret, keys can be guessed from their hashes while payloads are sealed; set hash_key",
        {"payload": KEYS, "events": {"keys": "hash", "hash_key": "h" * 32}},
    ),
    "an unbounded memory backend": (
        {"backends": ["memory://?max_entries=none"]},
        "backends[0].max_entries: the memory backend has no limit; set max_entries or max_bytes",
        {"backends": ["memory://?max_entries=none&max_bytes=1000"]},
    ),
    "plain Redis": (
        {"backends": ["redis://10.1.2.3"]},
        "backends[0].tls: connections to 10.1.2.3 are not encrypted; use rediss://",
        {"backends": ["rediss://10.1.2.3"]},
    ),
    "plain Redis by name": (
        {"backends": ["redis://localhost.example.com"]},
        "backends[0].tls: connections to localhost.example.com are not encrypted",
        {"backends": ["redis://localhost.example.com?allow_insecure=true"]},
    ),
    "plain sentinels": (
        {"backends": ["redis+sentinel://127.0.0.1,cache-2/service"]},
        "backends[0].tls: connections to cache-2 are not encrypted;",
        {"backends": ["redis+sentinel://127.0.0.1,[::1]:7,localhost/service"]},
    ),
    "plain Memcached": (
        {"backends": ["memcached://10.1.2.3"]},
        "backends[0].tls: connections to 10.1.2.3 are not encrypted; set tls: true",
        {"backends": ["memcached://10.1.2.3?allow_insecure=true"]},
    ),
    "plain NATS": (
        {"bus": "nats://10.1.2.3"},
        "bus.tls: connections to 10.1.2.3 are not encrypted; use tls://",
        {"bus": "tls://10.1.2.3"},
    ),
    "plain NATS by name": (
        {"bus": "nats://bus.example.com"},
        "bus.tls: connections to bus.example.com are not encrypted",
        {"bus": "nats://bus.example.com?allow_insecure=true"},
    ),
    "short keys": (
        {"payload": {"signing_keys": ["short"]}},
        "at least 32 bytes",
        {"payload": {"signing_keys": [CANARY]}},
    ),
    "unsigned pickle": (
        {"payload": {"serializer": "pickle"}},
        "pickle requires signing_keys",
        {"payload": {"serializer": "pickle", "signing_keys": [CANARY]}},
    ),
}


@pytest.mark.parametrize("name", INSECURE)
def test_production_refuses_what_is_insecure_and_names_the_remedy(name: str) -> None:
    insecure, sentence, remedied = INSECURE[name]
    assert sentence in refused(environment="production", **insecure)
    assert Settings(environment="production", **remedied).environment == "production"
    if name not in ("short keys", "unsigned pickle"):  # These are always refused.
        assert Settings(environment="development", **insecure)


def test_all_that_is_insecure_is_said_at_once() -> None:
    said = refused(environment="production", debug=True, backends=["redis://far"])
    assert "debug: " in said
    assert "backends[0].tls: " in said


@pytest.mark.parametrize("profile", ["dev", "production", "test"])
def test_a_profile_is_above_the_defaults_and_below_all_else(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, made = Settings(), Settings(profile=profile)
    assert (made.debug, made.environment, made.timeout, made.payload.compression, made.payload.checksum) == {
        "dev": (True, "development", plain.timeout, "none", False),
        "production": (False, "production", plain.timeout, "zstd", True),
        "test": (False, "test", 30.0, "none", False),
    }[profile]
    assert Settings(profile=profile, environment="test", payload={"compression": "lz4"}).payload.compression == "lz4"
    monkeypatch.setenv("CACHEBUS_PROFILE", profile)
    monkeypatch.setenv("CACHEBUS_TIMEOUT", "7")
    assert Settings().environment == made.environment
    assert Settings().timeout == 7


def test_the_profile_for_production_is_fit_for_production() -> None:
    assert "backends[0].tls" in refused(profile="production", backends=["redis://far"])


class TestTheCommandLine:
    def file(self, folder: Path, **options: Any) -> str:
        path = folder / "cache.yaml"
        path.write_text(yaml.safe_dump(options))
        return str(path)

    def test_check_refuses_an_insecure_production_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = self.file(tmp_path, environment="production", debug=True, backends=["redis://:hunter2@far"])
        assert main(["config", "check", file]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "debug: writes keys to the log" in said.err
        assert "backends[0].tls: connections to far are not encrypted" in said.err
        assert "hunter2" not in said.err

    def test_check_says_what_production_would_refuse(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["config", "check", self.file(tmp_path, debug=True), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["valid"] is True
        assert len(told["insecure"]) == 1
        assert told["insecure"][0].startswith("debug: ")

    def test_show_masks_secrets(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["config", "show", self.file(tmp_path, payload=KEYS)]) == 0
        said = capsys.readouterr().out
        assert yaml.safe_load(said)["payload"]["encryption_keys"][0]["id"] == "k1"
        assert "canary" not in said

    def test_reference_is_the_page(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["config", "reference"]) == 0
        assert capsys.readouterr().out == configuration_page()


def test_secrets_are_in_no_repr_no_error_and_no_traceback() -> None:
    settings = Settings(payload=KEYS)
    pipeline = build_pipeline(settings.payload, namespace="n", by_reference=True)
    shown = [
        repr(settings),
        str(settings),
        settings.model_dump_json(),
        repr(pipeline),
        repr(settings.payload.encryption_keys),
    ]
    for wrong in (
        {"payload": {**KEYS, "level": 3}},
        {"payload": {**KEYS, "serializer": 5}},
        {"payload": {**KEYS, "nonsense": 1}},
        {"payload": {"signing_keys": [CANARY, CANARY[:20]]}},
        {"payload": {"encryption_keys": {"k1": CANARY[:20]}}},
        {"payload": {"encryption_keys": {"k1": [CANARY]}}},
        {"payload": {"encryption_keys": [{"id": "k1", "key": CANARY, "more": CANARY}]}},
        {"payload": {"encryption_keys": CANARY}},
        {"payload": {"signing_keys": f'["{CANARY}'}},
        {"payload": {**KEYS, "encryption_key_id": CANARY}},
        {"environment": "production", "payload": KEYS, "debug": True},
    ):
        try:
            Settings(**wrong)
        except CacheConfigurationError as error:
            shown += [repr(error), "".join(traceback.format_exception(error))]
        else:
            raise AssertionError(f"taken: {[*wrong]}")
    assert not [text for text in shown if "canary" in text]
