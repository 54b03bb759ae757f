from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachebus.messages import CacheConfigurationError
from cachebus.settings import MemorySettings, NullSettings, PluginSettings, backend_from_url
from cachebus.settings.urls import BUILT_IN, Text, is_url, known_schemes, parse_url, redact_url

from ..facade.plugins import announce


def test_every_option_of_a_memory_url_is_read() -> None:
    url = "memory://?name=hot&default=true&default_ttl=0.5&max_entries=100&max_bytes=2000&policy=lru"
    assert backend_from_url(url) == MemorySettings(
        name="hot", default=True, default_ttl=0.5, max_entries=100, max_bytes=2000, policy="lru"
    )


def test_a_memory_url_without_options_gives_the_defaults() -> None:
    assert backend_from_url("memory://") == backend_from_url("memory://?") == MemorySettings()


def test_every_option_of_a_null_url_is_read() -> None:
    assert backend_from_url("null://?name=off&default=yes") == NullSettings(name="off", default=True)


def test_none_in_a_url_takes_a_bound_away() -> None:
    found = backend_from_url("memory://?max_entries=none&default_ttl=none&max_bytes=none")
    assert found == MemorySettings(max_entries=None, default_ttl=None, max_bytes=None)


def test_a_name_may_be_none() -> None:
    assert backend_from_url("memory://?name=none").name == "none"


def test_a_scheme_is_read_in_either_case() -> None:
    assert backend_from_url("MEMORY://?max_entries=5") == MemorySettings(max_entries=5)


def test_escapes_are_undone() -> None:
    assert parse_url("null://?name=a%5Fb") == ("null", {"name": "a_b"})


def test_options_of_a_url_are_marked_as_text() -> None:
    assert isinstance(parse_url("memory://?max_entries=5")[1]["max_entries"], Text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("60", 60.0), ("0.5", 0.5), (".5", 0.5), ("1e3", 1000.0), ("1e-3", 0.001), ("2E2", 200.0)]
)
def test_numbers_of_a_url_are_read(text: str, seconds: float) -> None:
    assert backend_from_url(f"memory://?default_ttl={text}") == MemorySettings(default_ttl=seconds)


@pytest.mark.parametrize(
    "text", ["1_000", "%201", "0x10", "1,5", "ten", "", "1e3", "5.0", "0", "-5", "true", "%D9%A3", "++1"]
)
def test_a_malformed_count_is_refused(text: str) -> None:
    with pytest.raises(CacheConfigurationError, match=r"max_entries: expected a whole number, 1 or more, or none, not"):
        backend_from_url(f"memory://?max_entries={text}")


def test_a_very_long_number_is_refused_and_shortened() -> None:
    with pytest.raises(CacheConfigurationError, match=r"whole number, 1 or more, or none, not '9{80}\.\.\.'$"):
        MemorySettings(max_entries=Text("9" * 5000))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "0", "-1", "0.0", "1_0", "1s", "true", "%2B1"])
def test_a_malformed_duration_is_refused(text: str) -> None:
    with pytest.raises(CacheConfigurationError, match=r"default_ttl: expected seconds above 0, .* or none, not"):
        backend_from_url(f"memory://?default_ttl={text}")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("memroy://", "unknown scheme 'memroy' (did you mean 'memory'?); known schemes are memory, null"),
        ("memory://localhost", "the URL of a memory store has no host or path"),
        ("memory:///path", "has no host or path; write memory://?option=value"),
        ("null://localhost:80?name=a", "the URL of a null store has no host or path"),
        ("memory://#top", "a cache URL cannot have a fragment"),
        ("memory://?max_entries=5#top", "a cache URL cannot have a fragment"),
        ("memory://?max_entries=5&max_entries=6", "the option 'max_entries' is given twice"),
        ("memory://?max_entries=5&max_entries=5", "the option 'max_entries' is given twice"),
        (
            "memory://?max_entres=5",
            "max_entres: unknown option (did you mean 'max_entries'?); known options are name, default,",
        ),
        ("null://?max_entries=5", "max_entries: unknown option; known options are name, default"),
        ("memory://?max_entries", "option 1 is not of the form name=value"),
        ("memory://?=5", "option 1 is not of the form name=value"),
        ("memory://?max_entries=5&", "option 2 is not of the form name=value"),
        ("memory://?type=null", "'type' is not an option of a URL"),
        ("memory://?policy=lfru", "policy: expected 's3fifo', 'lru', 'lfu' or 'sieve', not 'lfru'"),
        ("memory://?name=two%20words", "name: expected one word of 1 to 64 letters, digits, _ and -, not 'two words'"),
        ("memory://?default=maybe", "default: expected true or false, not 'maybe'"),
        ("memory://?name=a\nb", "contains a space or a control character"),
        ("memory://?name=a b", "contains a space or a control character"),
        ("memory:", "is not a URL: expected scheme://..."),
    ],
)
def test_what_a_url_cannot_say_is_refused_and_explained(url: str, sentence: str) -> None:
    with pytest.raises(CacheConfigurationError) as caught:
        backend_from_url(url)
    assert str(caught.value).startswith(repr(url))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("scheme", ["valkey", "mongodb", "bus", "file", "http"])
def test_a_scheme_without_a_store_is_unknown(scheme: str) -> None:
    with pytest.raises(CacheConfigurationError, match=rf"unknown scheme '{scheme}'.*known schemes are memory, null"):
        parse_url(f"{scheme}://localhost:1/2?a=b")


def test_the_scheme_of_an_installed_package_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "shelf" not in known_schemes()
    announce(tmp_path, monkeypatch)
    assert known_schemes() == (*BUILT_IN, "shelf")
    with pytest.raises(
        CacheConfigurationError, match=r"did you mean 'shelf'\?\); known schemes are memory, null, .*, shelf"
    ):
        parse_url("shelve://")


def test_the_url_of_a_plugin_is_left_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch)
    url = "shelf://user:secret@somewhere:80/path?name=x&name=y#fragment"
    found = backend_from_url(url)
    assert found == PluginSettings(url=url)
    assert isinstance(found, PluginSettings)
    assert found.url == url
    assert found.name == "primary"


def test_a_package_cannot_take_a_built_in_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, scheme="memory")
    assert known_schemes() == BUILT_IN
    assert backend_from_url("memory://") == MemorySettings()


@pytest.mark.parametrize("text", ["memory://", "redis+tls://h", "A1.b-c://"])
def test_a_scheme_and_two_slashes_make_a_url(text: str) -> None:
    assert is_url(text)


@pytest.mark.parametrize(
    "text", ["", "memory", "memory:", "memory:/x", "1x://", "://", "settings.yaml", "a b://", " memory://"]
)
def test_anything_else_is_no_url(text: str) -> None:
    assert not is_url(text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://?max_entries=100", "memory://?max_entries=100"),
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://user:pw@localhost:6379/0", "redis://user:***@localhost:6379/0"),
        ("redis://:pw@localhost", "redis://:***@localhost"),
        ("nats://token@localhost", "nats://***@localhost"),
        ("redis://user:p@s:s/w?r#d%@localhost", "redis://user:***@localhost"),
        ("redis://h?password=pw&db=1", "redis://h?password=***&db=1"),
        ("redis://h?db=1&Auth_Token=pw", "redis://h?db=1&Auth_Token=***"),
        ("redis://h?ssl_key=pw;db=1", "redis://h?ssl_key=***;db=1"),
        ("redis:/user:pw@localhost", "redis:***@localhost"),
        ("user:pw@localhost", "user:***@localhost"),
        ("settings.yaml", "settings.yaml"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redact_url(url) == shown


AWKWARD = st.text(st.sampled_from("@:/?#%&=;[] \\'\"\n") | st.characters(codec="utf-8"), max_size=20)


@given(before=AWKWARD, after=AWKWARD, tail=st.sampled_from(["", "/0", "/0?db=1", ":6379/0"]))
def test_no_password_is_so_awkward_that_it_is_shown(before: str, after: str, tail: str) -> None:
    url = f"redis://user:{before}hunter2{after}@localhost{tail}"
    assert "hunter2" not in redact_url(url)
    said = ""
    try:
        parse_url(url)
    except CacheConfigurationError as error:
        said = repr(error) + str(error)
    assert "hunter2" not in said
