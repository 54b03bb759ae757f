"""Settings of payloads, and the pipeline built from them."""

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
    """Return a validator for keys of `at_least` to `at_most` bytes, given as text, as `base64:...` or as bytes."""
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
            raise CacheConfigurationError(f"expected a key of {sizes} bytes, as text or as base64:...")
        return SecretStr(str(text))

    return read


def key_bytes(secret: SecretStr) -> bytes:
    """Return the decoded bytes of a key."""
    text = secret.get_secret_value()
    if text.startswith("base64:"):
        return base64.b64decode(text.removeprefix("base64:"), validate=True)
    return text.encode()


_key = read_key(KEY_SIZE_MIN)
_EXPECTED_KEYS = f"expected keys of at least {KEY_SIZE_MIN} bytes, as text or as base64:..."


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
    """A master key and its id."""

    id: str
    """1 to 32 letters, digits, `_`, `.` and `-`. Payloads contain it in plain text."""
    key: Annotated[SecretStr, "secret", BeforeValidator(_key)]
    """At least 32 bytes, as text or as `base64:...`."""


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
    """Serialization, compression, signing and encryption of values. Sizes are bytes."""

    serializer: Literal["default", "msgpack", "json", "auto", "arrow", "pickle", "none"] = "default"
    """`default` means `msgpack`, or `none` on a memory backend without keys.

    With `none`, values are stored by reference, and options that change payloads are rejected.
    """
    compression: CompressionName = "none"
    """Compression of new payloads, used only if it makes them smaller. Payloads of every compression can be read."""
    threshold: NotNegative = 1024  # Minimum size for compression.
    level: NotNegative | None = None
    """Compression level: zlib and gzip 1-9, lz4 0-12, zstd 1-19. By default the library's usual level."""
    max_size: AtLeastOne = MAX_SIZE
    """Maximum size of uncompressed content. Larger values are rejected, and larger payloads are not read."""
    checksum: Switch = False
    """Add an xxh3 checksum against corruption. Signatures and seals already include one."""
    signing_keys: Annotated[tuple[SecretStr, ...], "list of secrets", BeforeValidator(_keys)] = ()
    """The first key signs, and all keys verify. Each has at least 32 bytes, as text or as `base64:...`."""
    encryption_keys: Annotated[tuple[EncryptionKey, ...], "secrets by id", BeforeValidator(_keyring)] = ()
    """Master keys by id, such as `{"2024-06": "base64:..."}`, of at least 32 bytes.

    If set, only sealed payloads are written and read.
    """
    encryption_key_id: str | None = None  # Key that seals, by default the first. All keys can open.
    tenant: str = ""
    """Tenant of the payloads.

    They are sealed with a key derived for this tenant, which cannot open those of other tenants.
    """
    types: Annotated[tuple[type[Any] | str, ...], "list of classes", BeforeValidator(_types)] = ()
    """Classes that the serializer `auto` may store, each as `package.module:Class` or as the class."""
    offload_above: MaybeAtLeastOne = 256 * 1024
    """Minimum size of payloads that are encoded and decoded in a worker thread, off the event loop; `None` disables
    this.
    """

    @model_validator(mode="after")
    def _fits_together(self) -> PayloadSettings:
        low, high, _ = LEVELS.get(self.compression, (0, 0, 0))
        asked = [name for name in ("checksum", "signing_keys", "encryption_keys") if getattr(self, name)]
        asked += ["compression"] if self.compression != "none" else []
        makes_no_bytes = f"serializer: none cannot be combined with {' and '.join(asked)}"
        key_id, ids = self.encryption_key_id, [each.id for each in self.encryption_keys]
        level, compressed = self.level, self.compression != "none"
        fits = level is None or not compressed or low <= level <= high
        refuse_wrong(
            (self.serializer == "pickle" and not self.signing_keys, "serializer: pickle requires signing_keys"),
            (self.serializer == "none" and asked, makes_no_bytes),
            (level is not None and not compressed, "level: requires a compression"),
            (not fits, f"level: expected {low} to {high} for {self.compression}"),
            (self.max_size > SIZE_MAX, f"max_size: expected at most {SIZE_MAX}"),
            (key_id not in (None, *ids), "encryption_key_id: expected an id of encryption_keys"),
            (len(set(ids)) < len(ids), "encryption_keys: the same id is used twice"),
            (self.tenant and not ids, "tenant: requires encryption_keys"),
            (self.types and self.serializer != "auto", "types: requires the serializer auto"),
        )
        return self

    @field_serializer("types", when_used="json")
    def _by_name(self, types: tuple[type[Any] | str, ...]) -> list[str]:
        return [each if isinstance(each, str) else f"{each.__module__}:{each.__qualname__}" for each in types]


def build_pipeline(settings: PayloadSettings, *, namespace: str, by_reference: bool) -> PayloadPipeline | None:
    """Build the payload pipeline for settings. Return `None` if values are stored as objects.

    `by_reference` is true if the store can keep objects. Raises `CacheConfigurationError` if a class cannot be imported
    or a library is not installed.
    """
    serializer = settings.serializer
    if serializer == "default":
        protected = settings.signing_keys or settings.encryption_keys
        serializer = "none" if by_reference and not protected else "msgpack"
    if serializer == "none":
        if by_reference:
            return None
        raise CacheConfigurationError("payload.serializer: none requires the memory backend; other stores keep bytes")
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
        raise CacheConfigurationError(f"payload.types: cannot import the class {named!r}")
    return found
