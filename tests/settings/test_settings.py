from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from cachebus.messages import CacheConfigurationError, CacheError
from cachebus.settings import ActorSettings, MemorySettings, NullSettings, PluginSettings, Settings, load_settings
from cachebus.settings.fields import AtLeastOne, Options

from ..facade.plugins import announce

SECRET = "hunter" + str(2)
KNOWN = ", ".join(Settings.model_fields)

# What is wrong here is wrong on purpose, and the type checkers would say so: everything goes through `Any`.
make: Any = Settings
memory: Any = MemorySettings


@pytest.fixture(autouse=True)
def an_environment_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("CACHEBUS_"):
            monkeypatch.delenv(name)


def refused(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    with pytest.raises(CacheConfigurationError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# Defaults and options


def test_without_any_source_there_is_one_memory_backend() -> None:
    settings = load_settings()
    assert settings.namespace == "default"
    assert settings.timeout == 5.0
    assert settings.backends == (MemorySettings(default=True),)
    assert settings.actors == ActorSettings()
    assert settings == Settings()


def test_the_defaults_are_the_documented_ones() -> None:
    assert MemorySettings().model_dump() == {
        "type": "memory",
        "name": "primary",
        "default": False,
        "default_ttl": None,
        "max_entries": 10_000,
        "max_bytes": None,
        "policy": "s3fifo",
    }
    assert NullSettings().model_dump() == {"type": "null", "name": "primary", "default": False}
    assert ActorSettings().model_dump() == {
        "mailbox_capacity": 10_000,
        "inline_turns": True,
        "max_restarts": 5,
        "restart_window": 30.0,
        "restart_backoff": 0.05,
        "restart_backoff_max": 5.0,
    }


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mailbox_capacity", 1),
        ("inline_turns", False),
        ("max_restarts", 0),
        ("restart_window", 1.5),
        ("restart_backoff", 0.25),
        ("restart_backoff_max", 60.0),
    ],
)
def test_every_option_of_the_actors_is_read(option: str, value: object) -> None:
    assert getattr(load_settings({"actors": {option: value}}).actors, option) == value
    assert load_settings({"actors": {option: value}}) != load_settings()


@pytest.mark.parametrize(("option", "value"), [("namespace", "shop-1_A"), ("timeout", 0.25)])
def test_every_option_at_the_top_is_read(option: str, value: object) -> None:
    assert getattr(load_settings({option: value}), option) == value


def test_settings_cannot_be_changed() -> None:
    settings: Any = load_settings()
    for target, name in [(settings, "timeout"), (settings.actors, "max_restarts"), (settings.backends[0], "name")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, name, 1)
    assert hash(settings) == hash(load_settings())


# Numbers, durations, words


@pytest.mark.parametrize(("given", "seconds"), [(2, 2.0), (0.5, 0.5), (timedelta(milliseconds=250), 0.25)])
def test_a_duration_is_a_number_or_a_timedelta(given: object, seconds: float) -> None:
    settings = make(timeout=given, backends=[memory(default_ttl=given)], actors={"restart_window": given})
    assert settings.timeout == settings.backends[0].default_ttl == settings.actors.restart_window == seconds
    assert type(settings.timeout) is float


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (True, "True"),
        (False, "False"),
        (0, "0"),
        (0.0, "0.0"),
        (-1, "-1"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (10**400, "such a large number"),
        (timedelta(0), "datetime.timedelta(0)"),
        (timedelta(seconds=-1), "datetime.timedelta(days=-1, seconds=86399)"),
        ("60", "'60'"),
        (b"60", "a value of type bytes"),
        ([1], "a value of type list"),
        (1j, "a value of type complex"),
    ],
)
def test_no_other_duration_is_taken(given: object, shown: str) -> None:
    expected = "expected seconds above 0, as a number or a timedelta"
    assert refused(Settings, timeout=given) == f"timeout: {expected}, not {shown}"
    assert refused(memory, default_ttl=given) == f"default_ttl: {expected}, or none, not {shown}"
    for option in ("restart_window", "restart_backoff", "restart_backoff_max"):
        assert refused(Settings, actors={option: given}) == f"actors.{option}: {expected}, not {shown}"


def test_only_a_time_to_live_may_be_none() -> None:
    assert memory(default_ttl=None).default_ttl is None
    assert refused(Settings, timeout=None).endswith("not None")


@pytest.mark.parametrize("given", [0, -1, True, 1.0, "5", "", float("inf"), [1]])
def test_a_bound_is_a_whole_number_above_zero(given: object) -> None:
    for option in ("max_entries", "max_bytes"):
        assert refused(memory, **{option: given}).startswith(f"{option}: expected a whole number, 1 or more, or none, ")
    assert "mailbox_capacity: expected a whole number, 1 or more, not " in refused(
        Settings, actors={"mailbox_capacity": given}
    )


@pytest.mark.parametrize("given", [-1, False, 1.0, "5", None])
def test_a_number_of_restarts_is_not_negative(given: object) -> None:
    assert "max_restarts: expected a whole number, 0 or more, " in refused(Settings, actors={"max_restarts": given})


def test_the_longest_back_off_is_not_shorter_than_the_first() -> None:
    sentence = refused(Settings, actors={"restart_backoff": 10})
    assert sentence == "actors: restart_backoff_max 5 is less than restart_backoff 10"
    assert load_settings(actors={"restart_backoff": 10, "restart_backoff_max": 10}).actors.restart_backoff == 10.0


@pytest.mark.parametrize("given", ["", "two words", "a:b", "a.b", "a*", "ä", "a\n", "x" * 65, 5, None, True])
def test_a_name_is_one_word(given: object) -> None:
    expected = "expected one word of 1 to 64 letters, digits, _ and -, not "
    assert refused(Settings, namespace=given).startswith(f"namespace: {expected}")
    assert refused(Settings, backends=[{"type": "null", "name": given}]).startswith(f"backends[0].name: {expected}")


def test_a_name_may_be_64_characters_long() -> None:
    assert load_settings(namespace="aZ0_-" + "x" * 59).namespace == "aZ0_-" + "x" * 59


@pytest.mark.parametrize("given", [1, 0, "true", "yes", None])
def test_a_switch_is_true_or_false(given: object) -> None:
    assert refused(Settings, actors={"inline_turns": given}).startswith("actors.inline_turns: expected true or false")
    assert refused(memory, default=given).startswith("default: expected true or false")


def test_a_policy_is_one_of_four() -> None:
    for policy in ("s3fifo", "lru", "lfu", "sieve"):
        assert memory(policy=policy).policy == policy
    assert refused(memory, policy="fifo") == "policy: expected 's3fifo', 'lru', 'lfu' or 'sieve', not 'fifo'"


# What nobody knows is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"timout": 5},
            f"timout: unknown option (did you mean 'timeout'?); known options are {KNOWN}",
        ),
        ({"TIMEOUT": 5}, f"TIMEOUT: unknown option; known options are {KNOWN}"),
        ({"_env_file": ".env"}, f"_env_file: unknown option; known options are {KNOWN}"),
        (
            {"actors": {"mailbox": 5}},
            (
                "actors.mailbox: unknown option (did you mean 'mailbox_capacity'?); known options are mailbox_capacity, "
                "inline_turns, max_restarts, restart_window, restart_backoff, restart_backoff_max"
            ),
        ),
        (
            {"backends": ["memory://?name=a", {"type": "memory", "max_entres": 5}]},
            (
                "backends[1].max_entres: unknown option (did you mean 'max_entries'?); known options are name, default, "
                "default_ttl, max_entries, max_bytes, policy"
            ),
        ),
        (
            {"backends": [{"type": "null", "max_entries": 5}]},
            "backends[0].max_entries: unknown option; known options are name, default",
        ),
        (
            {"backends": [{"type": "mongodb"}]},
            "backends[0].type: expected one of 'memory', 'null', 'redis', 'memcached', 'plugin', 'bus', not 'mongodb'",
        ),
        (
            {"backends": [{"name": "a"}]},
            "backends[0]: expected a URL, or options with a type, not a value of type dict",
        ),
        ({"backends": [5]}, "backends[0]: expected named options, not 5"),
        ({"backends": [{"type": "plugin"}]}, "backends[0].url: is required"),
        ({"backends": [{"type": "plugin", "url": 5}]}, "backends[0].url: expected text, not 5"),
        (
            {"backends": [{"type": "plugin", "url": "memory://"}]},
            "backends[0].url: 'memory://' has a built-in scheme: use the URL or its type instead",
        ),
        (
            {"backends": ["memory://?max_entries=0"]},
            "backends[0]: 'memory://?max_entries=0': max_entries: expected a whole number, 1 or more, or none, not '0'",
        ),
        (
            {"backends": "memory://"},
            "backends: expected a list of backends, each a URL or options with a type, not 'memory://'",
        ),
        (
            {"backends": {"type": "memory"}},
            "backends: expected a list of backends, each a URL or options with a type, not a value of type dict",
        ),
        ({"actors": 5}, "actors: expected named options, not 5"),
        ({"actors": None}, "actors: expected named options, not None"),
        ({"actors": {5: 5}}, "actors: expected text as the name of an option: put it in quotes"),
        ({"backends": [{5: 5}]}, "backends[0]: expected text as the name of an option: put it in quotes"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(options: dict[str, Any], sentence: str) -> None:
    assert refused(Settings, **options) == sentence
    assert refused(load_settings, options) == sentence
    assert refused(load_settings, None, **options) == sentence


def test_everything_that_is_wrong_is_named_at_once() -> None:
    options = {"timeout": 0, "actors": {"max_restarts": -1, "x": 1}, "backends": [{"type": "memory", "policy": "mru"}]}
    sentence = refused(load_settings, options)
    for path in ("timeout: ", "; actors.max_restarts: ", "; actors.x: ", "; backends[0].policy: "):
        assert path in f"; {sentence}"


def test_the_error_is_one_of_the_tree_and_travels_as_such() -> None:
    with pytest.raises(CacheError) as caught:
        memory(max_entries=0)
    assert type(caught.value) is CacheConfigurationError
    assert caught.value.wire_fields() == {"detail": str(caught.value)}


# Several backends


def test_a_single_backend_is_the_default_by_itself() -> None:
    settings = load_settings("null://?name=off")
    assert settings.default_backend == NullSettings(name="off", default=True)


def test_several_backends_have_one_that_says_it_is_the_default() -> None:
    settings = load_settings({"backends": ["memory://?name=hot", {"type": "null", "name": "off", "default": True}]})
    assert settings.default_backend == NullSettings(name="off", default=True)
    assert settings.backend("hot") == MemorySettings(name="hot")
    assert (
        refused(settings.backend, "hod") == "unknown backend 'hod' (did you mean 'hot'?); known backends are hot, off"
    )


@pytest.mark.parametrize(
    ("backends", "sentence"),
    [
        ([], "expected at least one backend"),
        (["memory://", "null://"], "the name 'primary' is used twice; give each backend a different name"),
        (["memory://", "null://?name=off"], "one of primary, off must be the default: set default: true on it"),
        (
            ["memory://?default=true", "null://?name=off", "null://?name=on&default=true"],
            "only one backend can be the default, not primary and on",
        ),
    ],
)
def test_backends_that_do_not_fit_together_are_refused(backends: list[str], sentence: str) -> None:
    assert refused(load_settings, backends=backends) == f"backends: {sentence}"


# Sources


def test_keywords_win_over_the_source_that_over_the_environment_that_over_the_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def numbers(*arguments: Any, **overrides: Any) -> tuple[float, int, int, float]:
        settings = load_settings(*arguments, **overrides)
        actors = settings.actors
        return settings.timeout, actors.mailbox_capacity, actors.max_restarts, actors.restart_window

    assert numbers() == (5.0, 10_000, 5, 30.0)
    monkeypatch.setenv("CACHEBUS_TIMEOUT", "1")
    monkeypatch.setenv("CACHEBUS_ACTORS__MAILBOX_CAPACITY", "11")
    monkeypatch.setenv("CACHEBUS_ACTORS__MAX_RESTARTS", "12")
    monkeypatch.setenv("CACHEBUS_ACTORS__RESTART_WINDOW", "13")
    assert numbers() == (1.0, 11, 12, 13.0)
    source = {"timeout": 2, "actors": {"mailbox_capacity": 21, "max_restarts": 22}}
    assert numbers(source) == (2.0, 21, 22, 13.0)
    assert numbers(source, timeout=3, actors={"mailbox_capacity": 31}) == (3.0, 31, 22, 13.0)
    assert numbers(None, timeout=3, actors={"mailbox_capacity": 31}) == (3.0, 31, 12, 13.0)
    assert numbers(load_settings(source), actors={"mailbox_capacity": 31}) == (2.0, 31, 22, 13.0)
    whole = ActorSettings(mailbox_capacity=41)
    assert numbers(source, actors=whole) == (2.0, 41, 5, 30.0)


def test_the_environment_gives_every_kind_of_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEBUS_NAMESPACE", "123")
    monkeypatch.setenv("CACHEBUS_TIMEOUT", "0.5")
    monkeypatch.setenv(
        "CACHEBUS_BACKENDS", '["memory://?max_entries=5", {"type": "null", "name": "n", "default": true}]'
    )
    monkeypatch.setenv("CACHEBUS_ACTORS", '{"max_restarts": 1, "restart_window": 7}')
    monkeypatch.setenv("CACHEBUS_ACTORS__MAX_RESTARTS", "2")
    monkeypatch.setenv("CACHEBUS_ACTORS__INLINE_TURNS", "off")
    settings = load_settings()
    assert settings.namespace == "123"
    assert settings.timeout == 0.5
    assert settings.backends == (MemorySettings(max_entries=5), NullSettings(name="n", default=True))
    assert settings.actors == ActorSettings(max_restarts=2, restart_window=7, inline_turns=False)
    assert Settings() == settings


def test_a_source_replaces_the_backends_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEBUS_BACKENDS", '["memory://?max_entries=5"]')
    monkeypatch.setenv("CACHEBUS_TIMEOUT", "7")
    settings = load_settings("null://")
    assert settings.backends == (NullSettings(default=True),)
    assert settings.timeout == 7.0


def test_a_variable_may_be_written_in_small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("cachebus_timeout", "7")
    assert load_settings().timeout == 7.0


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("CACHEBUS_TIMOUT", "CACHEBUS_TIMEOUT"),
        ("CACHEBUS_ACTORS_MAX_RESTARTS", "CACHEBUS_ACTORS__MAX_RESTARTS"),
        ("CACHEBUS_ACTORS__MAX_RESTART", "CACHEBUS_ACTORS__MAX_RESTARTS"),
        ("CACHEBUS_BACKEND", "CACHEBUS_BACKENDS"),
        ("cachebus_nmespace", "CACHEBUS_NAMESPACE"),
    ],
)
def test_a_mistyped_variable_is_refused(variable: str, nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, SECRET)
    for sentence in (refused(load_settings), refused(Settings, timeout=1)):
        assert sentence.startswith(
            f"environment variable {variable.upper()}: unknown option (did you mean '{nearest}'?); known options are "
            "CACHEBUS_NAMESPACE, CACHEBUS_TIMEOUT, CACHEBUS_ON_ERROR, CACHEBUS_BACKENDS, CACHEBUS_ACTORS, CACHEBUS_ACTORS__MAILBOX_CAPACITY,"
        )
        assert SECRET not in sentence


def test_what_kubernetes_sets_for_a_service_called_cachebus_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    services = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR")
    for name in (*services, "TEST_REDIS_URL", "TEST_MEMCACHED_URL", "TEST_NATS_URL"):
        monkeypatch.setenv(f"CACHEBUS_{name}", "tcp://10.0.0.1:80")
    assert load_settings() == Settings()


@pytest.mark.parametrize("text", ["memory://", "", "[", "{'max_restarts': 5}"])
def test_what_is_not_json_in_a_variable_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("BACKENDS", "ACTORS"):
        with monkeypatch.context() as one:
            one.setenv(f"CACHEBUS_{option}", text)
            assert refused(load_settings).startswith(f"environment variable CACHEBUS_{option}: expected JSON, such as ")


@pytest.mark.parametrize("text", ["", "nan", "inf", "0", "-1", "5s", "true", "1_0", " 5"])
def test_a_malformed_duration_in_a_variable_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEBUS_TIMEOUT", text)
    assert refused(load_settings) == f"timeout: expected seconds above 0, as a number or a timedelta, not {text!r}"


FILES = {
    ".yaml": """
        namespace: shop
        timeout: 0.5
        backends:
          - type: memory
            name: hot
            default: true
            default_ttl: 60
            max_entries: none
            max_bytes: 1_000_000
            policy: lru
          - null://?name=off
        actors:
          inline_turns: false
          max_restarts: 0
        """,
    ".toml": """
        namespace = "shop"
        timeout = 0.5
        backends = [
            { type = "memory", name = "hot", default = true, default_ttl = 60, max_entries = "none",
              max_bytes = 1_000_000, policy = "lru" },
            "null://?name=off",
        ]
        [actors]
        inline_turns = false
        max_restarts = 0
        """.replace("            { type", "{ type").replace("\n              max_bytes", " max_bytes"),
    ".json": """
        {"namespace": "shop", "timeout": 0.5,
         "backends": [{"type": "memory", "name": "hot", "default": true, "default_ttl": 60, "max_entries": null,
                       "max_bytes": 1000000, "policy": "lru"}, "null://?name=off"],
         "actors": {"inline_turns": false, "max_restarts": 0}}
        """,
}
FILES[".yml"] = FILES[".yaml"]
FILES[".YAML"] = FILES[".yaml"]


@pytest.mark.parametrize("suffix", FILES)
def test_every_kind_of_file_says_the_same(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_text(FILES[suffix], encoding="utf-8")
    expected = Settings(
        namespace="shop",
        timeout=0.5,
        backends=(
            MemorySettings(
                name="hot", default=True, default_ttl=60, max_entries=None, max_bytes=1_000_000, policy="lru"
            ),
            NullSettings(name="off"),
        ),
        actors=ActorSettings(inline_turns=False, max_restarts=0),
    )
    assert load_settings(path) == load_settings(str(path)) == expected
    assert load_settings(path, timeout=9).timeout == 9.0


def test_a_path_need_not_be_a_pathlib_path(tmp_path: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(tmp_path / "settings.json")

    (tmp_path / "settings.json").write_text('{"timeout": 7}', encoding="utf-8")
    assert load_settings(Place()).timeout == 7.0


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n", encoding="utf-8")
    assert load_settings(tmp_path / "empty.yaml") == load_settings()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.yaml", "timeout: 5\n  namespace: [", "is not valid YAML: line 2, column 12"),
        ("a.yaml", "timeout: \x07", "is not valid YAML: it contains an unsupported character or value"),
        ("a.yaml", "- timeout", "does not contain named options"),
        ("a.yaml", "5: 5", "expected text as the name of an option: put it in quotes"),
        ("a.yaml", "timout: 5", "timout: unknown option (did you mean 'timeout'?)"),
        ("a.yaml", "timeout: '5'", "timeout: expected seconds above 0, as a number or a timedelta, not '5'"),
        ("a.toml", "timeout = 5\ntimeout = 6", "is not valid TOML: "),
        ("a.toml", "timeout =", "is not valid TOML: "),
        ("a.json", '{"timeout": 5,}', "is not valid JSON: line 1, column "),
        ("a.json", "", "is not valid JSON: line 1, column 1"),
        ("a.json", "[]", "does not contain named options"),
        ("a.json", "null", "does not contain named options"),
        ("a.json", '{"timeout": NaN}', "timeout: expected seconds above 0, as a number or a timedelta, not nan"),
        ("a.ini", "timeout = 5", "expected a settings file with one of the suffixes .yaml .yml .toml .json"),
        ("a.yaml", b"\xff\xfe\xfa", "is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(name: str, content: str | bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sentence in refused(load_settings, path)
    assert sentence in refused(load_settings, str(path))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    sentence = refused(load_settings, tmp_path / "absent.yaml")
    assert sentence == f"{str(tmp_path / 'absent.yaml')!r} cannot be read: {os.strerror(2)}"
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read: " in refused(load_settings, tmp_path / "folder.yaml")


def test_a_string_that_is_neither_a_url_nor_a_file_is_refused() -> None:
    assert refused(load_settings, "memry") == (
        "'memry' is neither a URL (scheme://...) nor a settings file (.yaml .yml .toml .json)"
    )
    assert refused(load_settings, "memory:?max_entries=5").endswith("; did you mean 'memory://'?")


@pytest.mark.parametrize(
    "source", ["memory://?max_entries=5", ["memory://?max_entries=5"], ("memory://?max_entries=5",)]
)
def test_a_url_is_a_source(source: object) -> None:
    settings = load_settings(source, namespace="shop")
    assert settings.backends == (MemorySettings(max_entries=5, default=True),)
    assert settings.namespace == "shop"


def test_several_urls_have_to_wait_for_tiers() -> None:
    assert refused(load_settings, ["memory://", "null://"]) == (
        "expected one URL: tiers of several backends are not supported yet"
    )


@pytest.mark.parametrize("source", [5, b"memory://", [], ["memory"], [5], object(), {"a", "b"}])
def test_nothing_else_is_a_source(source: object) -> None:
    assert refused(load_settings, source).startswith("expected settings as a mapping, a file or a URL, not ")


def test_any_mapping_is_a_source_and_stays_as_it_is() -> None:
    source = {"actors": {"max_restarts": 1}}
    settings = load_settings(MappingProxyType(source), actors={"mailbox_capacity": 7})
    assert settings.actors == ActorSettings(max_restarts=1, mailbox_capacity=7)
    assert source == {"actors": {"max_restarts": 1}}


def test_settings_are_their_own_source() -> None:
    settings = load_settings({"timeout": 2, "actors": {"max_restarts": 1}})
    assert load_settings(settings) is settings
    assert load_settings(settings, timeout=3) == load_settings({"timeout": 3, "actors": {"max_restarts": 1}})


def test_what_is_dumped_can_be_loaded() -> None:
    settings = load_settings({"backends": ["memory://?name=a&default=true", "null://?name=b"], "timeout": 3})
    assert load_settings(settings.model_dump()) == settings
    assert load_settings(yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))) == settings
    assert load_settings(json.loads(settings.model_dump_json())) == settings


# Secrets


def everything_said_by(error: BaseException) -> str:
    said = "".join(traceback.format_exception(error)) + repr(error) + repr(error.args)
    for behind in (error.__context__, error.__cause__):
        said += everything_said_by(behind) if behind is not None else ""
    return said


@pytest.mark.parametrize(
    "source",
    [
        f"mongodb://user:{SECRET}@localhost",
        f"redis://user:{SECRET}@:/%@localhost",
        f"redis://:@{SECRET}/w?r#d@localhost",
        f"memory://user:{SECRET}@localhost",
        f"memory://?password={SECRET}",
        f"memory://?api_token={SECRET}&x={SECRET}@",
        f"user:{SECRET}@localhost",
        f"shelf:/user:{SECRET}@localhost",
        [f"mongodb://user:{SECRET}@localhost"],
        {"password": SECRET},
        {"actors": {"password": SECRET}},
        {"actors": [SECRET]},
        {"timeout": {"password": SECRET}},
        {"timeout": [SECRET]},
        {"namespace": f"mongodb://user:{SECRET}@localhost"},
        {"backends": [f"mongodb://user:{SECRET}@localhost"]},
        {"backends": [{"type": "memory", "password": SECRET}]},
        {"backends": [{"type": "redis", "password": SECRET, "window": 0}]},
        {"backends": [{"password": SECRET}]},
        {"backends": [{"type": "plugin", "url": f"mongodb://user:{SECRET}@localhost"}]},
        {"backends": [{"type": "plugin", "url": "shelf://", "password": SECRET}]},
        {"backends": {"password": SECRET}},
        {f"mongodb://user:{SECRET}@localhost": 5},
        {"actors": {f"mongodb://user:{SECRET}@localhost": 5}},
        {"backends": [{"type": "null", f"mongodb://user:{SECRET}@localhost": 5}]},
        {"password": SECRET, "timeout": 0},
    ],
    ids=lambda source: repr(source).replace(SECRET, "***"),
)
def test_no_error_shows_a_password(source: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch)
    with pytest.raises(CacheConfigurationError) as caught:
        load_settings(source)
    assert SECRET not in everything_said_by(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.yaml", f"password: {SECRET}: x"),
        ("a.yaml", f"password: *{SECRET}"),
        ("a.yaml", f"password: !{SECRET} x"),
        ("a.yaml", f'password: "{SECRET}'),
        ("a.toml", f"password = {SECRET}"),
        ("a.toml", f"{SECRET} = 1\n{SECRET} = 2"),
        ("a.json", f'{{"password": {SECRET}}}'),
        ("a.yaml", f"password: {SECRET}"),
    ],
)
def test_no_broken_file_shows_a_password(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CacheConfigurationError) as caught:
        load_settings(tmp_path / name)
    assert SECRET not in everything_said_by(caught.value)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("CACHEBUS_BACKENDS", f"mongodb://user:{SECRET}@localhost"),
        ("CACHEBUS_BACKENDS", json.dumps([f"mongodb://user:{SECRET}@localhost"])),
        ("CACHEBUS_ACTORS", f'{{"password": "{SECRET}"}}'),
        ("CACHEBUS_ACTORS", SECRET),
        ("CACHEBUS_ACTORS__PASSWORD", SECRET),
        ("CACHEBUS_PASSWORD", SECRET),
    ],
)
def test_no_broken_variable_shows_a_password(variable: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(CacheConfigurationError) as caught:
        load_settings()
    assert SECRET not in everything_said_by(caught.value)


def test_an_error_does_not_show_the_value_of_an_option_with_a_secret_name() -> None:
    class Login(Options):
        password: AtLeastOne = 1
        attempts: AtLeastOne = 1

    login: Any = Login
    assert refused(login, password=SECRET) == "password: expected a whole number, 1 or more, not ***"
    assert refused(login, attempts=SECRET).endswith(f"not {SECRET!r}")


def test_settings_that_hold_a_password_do_not_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch)
    settings = load_settings(f"shelf://user:{SECRET}@localhost")
    backend = settings.default_backend
    assert isinstance(backend, PluginSettings)
    assert backend.url == f"shelf://user:{SECRET}@localhost"
    for shown in (repr(settings), str(settings), repr(backend), str(backend), settings.model_dump_json()):
        assert SECRET not in shown
        assert "shelf://user:***@localhost" in shown
    assert load_settings(settings, timeout=1).default_backend == backend
