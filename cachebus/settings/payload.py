"""The options of payloads, and the pipeline that they describe."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, SecretStr, field_serializer, model_validator

from cachebus.messages import CacheConfigurationError
from cachebus.payload.format import LEVELS, SIZE_MAX, CompressionName
from cachebus.payload.pipeline import MAX_SIZE, PayloadPipeline
from cachebus.payload.sealing import KEY_SIZE_MIN, Sealer, Signer

from .fields import AtLeastOne, MaybeAtLeastOne, NotNegative, Options, Switch, refuse_wrong


def read_key(at_least: int, at_most: int | None = None) -> Callable[[object], SecretStr]:
    """Return the validator of a key of so many bytes, given as text, as `base64:` and base64, or as bytes."""
    sizes = f"{at_least} to {at_most}" if at_most else f"at least {at_least}"

    def read(value: object) -> SecretStr:
        if isinstance(value, bytes):
            value = f"base64:{base64.b64encode(value).decode()}"
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        size = 0
        if isinstance(text, str):
            with contextlib.suppress(binascii.Error):
                size = len(key_bytes(SecretStr(text)))
        if not at_least <= size <= (at_most or size):
            raise CacheConfigurationError(f"expected a key of {sizes} bytes, as text or as base64: and base64")
        return SecretStr(str(text))

    return read


def key_bytes(secret: SecretStr) -> bytes:
    """Return the bytes of a key in the settings."""
    text = secret.get_secret_value()
    if text.startswith("base64:"):
        return base64.b64decode(text.removeprefix("base64:"), validate=True)
    return text.encode()


_key = read_key(KEY_SIZE_MIN)
_EXPECTED_KEYS = f"expected keys of at least {KEY_SIZE_MIN} bytes, as text or as base64: and base64"


def _from_json(value: object, expected: str) -> Any:
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if value is None:
        raise CacheConfigurationError(expected)
    return value


def _several(value: object, expected: str) -> Sequence[Any]:
    given = _from_json(value, expected)
    return cast("Sequence[Any]", given if isinstance(given, list | tuple) else [given])


def _keys(value: object) -> tuple[SecretStr, ...]:
    return tuple(map(_key, _several(value, _EXPECTED_KEYS)))


class EncryptionKey(Options):
    """A master key, and the name that payloads call it by."""

    id: str
    """1 to 32 letters, digits, `_`, `.` and `-`. Payloads show it."""
    key: Annotated[SecretStr, "secret", BeforeValidator(_key)]
    """At least 32 bytes, as text or as `base64:` and base64."""


def _keyring(value: object) -> tuple[Any, ...]:
    given = _from_json(value, "expected keys by their ids")
    if isinstance(given, Mapping):
        by_id = cast("dict[Any, Any]", given)
        return tuple(EncryptionKey(id=key_id, key=key) for key_id, key in by_id.items())
    if not isinstance(given, list | tuple):
        raise CacheConfigurationError("expected keys by their ids")
    return tuple(cast("Sequence[Any]", given))


def _types(value: object) -> tuple[Any, ...]:
    several = _several(value, "expected classes")
    if all(isinstance(each, type) or (isinstance(each, str) and ":" in each) for each in several):
        return tuple(str(each) if isinstance(each, str) else each for each in several)
    raise CacheConfigurationError("expected classes, each as package.module:Class")


class PayloadSettings(Options):
    """How values become bytes. Sizes are bytes."""

    serializer: Literal["default", "msgpack", "json", "auto", "arrow", "pickle", "none"] = "default"
    """`default` is `msgpack`, or `none` on a memory backend without keys: values by reference, and nothing else here counts."""
    compression: CompressionName = "none"
    """The compression of content that gets smaller. Payloads of every compression are read."""
    threshold: NotNegative = 1024  # Content of fewer bytes is not compressed.
    level: NotNegative | None = None
    """How hard to compress: zlib and gzip 1-9, lz4 0-12, zstd 1-19; left out, the usual level."""
    max_size: AtLeastOne = MAX_SIZE
    """Content of more bytes is refused, and a payload that would unpack to more is not read."""
    checksum: Switch = False
    """Whether payloads have an xxh3 checksum against corruption. Signatures and seals are one already."""
    signing_keys: Annotated[tuple[SecretStr, ...], "list of secrets", BeforeValidator(_keys)] = ()
    """The first one signs, all of them verify. At least 32 bytes each, as text or as `base64:` and base64."""
    encryption_keys: Annotated[tuple[EncryptionKey, ...], "secrets by id", BeforeValidator(_keyring)] = ()
    """Master keys by id, `{"2024-06": "base64:..."}`, each as a signing key. With any, only sealed payloads are written and read."""
    encryption_key_id: str | None = None  # The key that seals; left out, the first one. All of them open.
    tenant: str = ""
    """The tenant of the payloads. They are sealed with a key derived for it, which opens those of no other tenant."""
    types: Annotated[tuple[type[Any] | str, ...], "list of classes", BeforeValidator(_types)] = ()
    """The classes that the serializer `auto` may carry, each as `package.module:Class`, or the class itself."""
    offload_above: MaybeAtLeastOne = 256 * 1024
    """Payloads of so many bytes or more are packed and unpacked in a worker thread on an event loop; `None` is never."""

    @model_validator(mode="after")
    def _fits_together(self) -> PayloadSettings:
        low, high, _ = LEVELS.get(self.compression, (0, 0, 0))
        asked = [name for name in ("checksum", "signing_keys", "encryption_keys") if getattr(self, name)]
        asked += ["compression"] if self.compression != "none" else []
        makes_no_bytes = f"serializer: none makes no bytes, which {' and '.join(asked)} ask for"
        key_id, ids = self.encryption_key_id, [each.id for each in self.encryption_keys]
        level, compressed = self.level, self.compression != "none"
        fits = level is None or not compressed or low <= level <= high
        refuse_wrong(
            (self.serializer == "pickle" and not self.signing_keys, "serializer: pickle needs signing_keys"),
            (self.serializer == "none" and asked, makes_no_bytes),
            (level is not None and not compressed, "level: there is no compression"),
            (not fits, f"level: {self.compression} has {low} to {high}"),
            (self.max_size > SIZE_MAX, f"max_size: at most {SIZE_MAX}"),
            (key_id not in (None, *ids), "encryption_key_id: there is no such key in encryption_keys"),
            (len(set(ids)) < len(ids), "encryption_keys: an id is taken twice"),
            (self.tenant and not ids, "tenant: only sealed payloads have one; give encryption_keys"),
            (self.types and self.serializer != "auto", "types: only the serializer auto carries them"),
        )
        return self

    @field_serializer("types", when_used="json")
    def _by_name(self, types: tuple[type[Any] | str, ...]) -> list[str]:
        return [each if isinstance(each, str) else f"{each.__module__}:{each.__qualname__}" for each in types]


def build_pipeline(settings: PayloadSettings, *, namespace: str, by_reference: bool) -> PayloadPipeline | None:
    """Make the pipeline of settings; `None` if values stay objects. `by_reference` says that the store can hold objects.

    Raises `CacheConfigurationError` for a class that cannot be imported, and a library that is not installed.
    """
    serializer = settings.serializer
    if serializer == "default":
        protected = settings.signing_keys or settings.encryption_keys
        serializer = "none" if by_reference and not protected else "msgpack"
    if serializer == "none":
        if by_reference:
            return None
        raise CacheConfigurationError("payload.serializer: none is for the memory backend; other stores need bytes")
    signing = [key_bytes(each) for each in settings.signing_keys]
    sealing = {each.id: key_bytes(each.key) for each in settings.encryption_keys}
    return PayloadPipeline(
        serializer,
        namespace=namespace,
        **settings.pick("compression", "threshold", "level", "max_size", "checksum"),
        signer=Signer(signing) if signing else None,
        sealer=Sealer(sealing, key_id=settings.encryption_key_id, tenant=settings.tenant) if sealing else None,
        types=[_imported(each) for each in settings.types],
    )


def _imported(named: type[Any] | str) -> type[Any]:
    if isinstance(named, type):
        return named
    try:
        found = resolve_name(named)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not isinstance(found, type):
        raise CacheConfigurationError(f"payload.types: there is no class {named!r}")
    return found
