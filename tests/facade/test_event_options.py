"""The options of events: valid and refused values."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cachebus.messages import CacheConfigurationError
from cachebus.settings import Settings, load_settings

SECRET = "hunter2-" * 4


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        ({"keys": "redacted"}, "events.keys: expected 'plain', 'hash' or 'none'"),
        ({"hash_key": SECRET}, "hash_key: is allowed only with keys: hash, not with keys: plain"),
        ({"keys": "hash", "hash_key": "short"}, "expected a key of 32 to 64 bytes"),
        ({"keys": "hash", "hash_key": SECRET * 3}, "expected a key of 32 to 64 bytes"),
        ({"sample": {"cache_hits": 0.5}}, "unknown kind of event 'cache_hits'"),
        ({"sample": {"cache_hit": 1.5}}, "the share of 'cache_hit' must be a number from 0 to 1, not 1.5"),
        ({"sample": {"cache_hit": True}}, "expected rates from 0 to 1"),
        ({"sample": 0.5}, "expected rates from 0 to 1"),
        ({"sample": {"cache_*": 0.5}}, "cache_cleared cannot be sampled"),
        ({"sample": {"tags_invalidated": 0}}, "tags_invalidated cannot be sampled"),
    ],
)
def test_what_does_not_fit_is_named(events: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CacheConfigurationError) as caught:
        load_settings(events=events)
    assert sentence in str(caught.value)
    assert SECRET not in str(caught.value) + repr(caught.value)


def test_a_sample_is_taken_from_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(events={"sample": {"cache_hit": 0.01, "actor_*": 1}})
    assert dict(settings.events.sample) == {"cache_hit": 0.01, "actor_*": 1.0}
    assert load_settings(json.loads(settings.model_dump_json())) == settings
    assert load_settings(settings.model_dump()) == settings
    monkeypatch.setenv("CACHEBUS_EVENTS__SAMPLE", '{"cache_hit": 0.01, "actor_*": 1}')
    assert Settings() == settings


def test_the_secret_of_hashes_is_shown_nowhere() -> None:
    settings = load_settings(events={"keys": "hash", "hash_key": SECRET})
    assert SECRET not in repr(settings) + settings.model_dump_json() + repr(settings.events.policy)
    assert settings.events.policy.key("k") != load_settings(events={"keys": "hash"}).events.policy.key("k")
