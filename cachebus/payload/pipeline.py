"""The payload pipeline: serialization, compression, checksum or signature, and seal."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from cachebus.messages import CacheCapacityError, CacheConfigurationError, CacheSerializationError

from .cached_errors import CachedError
from .format import (
    CHECKSUMMED,
    COMPRESSION_CODES,
    ERROR_CODE,
    HEADER_SIZE,
    SEALED,
    SERIALIZER_CODES,
    SIGNED,
    SIZE,
    SIZE_MAX,
    VERSION,
    CompressionName,
    Compressor,
    SerializerName,
    binding,
    load,
    make_compressor,
)
from .sealing import SIGNATURE_SIZE, Sealer, Signer
from .serializers.arrow import ArrowSerializer
from .serializers.auto import AutoSerializer
from .serializers.json import JsonSerializer
from .serializers.msgpack import MsgpackSerializer
from .serializers.scalars import type_name, type_of

MAX_SIZE = 64 * 2**20
_CHECKSUM_SIZE = 8
_PLAIN = COMPRESSION_CODES["none"]
_COMPRESSIONS: dict[int, Any] = {code: name for name, code in COMPRESSION_CODES.items()}


class PickleSerializer:
    """Serializer for pickle protocol 5. It reads only signed payloads, because unpickling can run arbitrary code."""

    name = "pickle"

    def dumps(self, value: Any) -> bytes:
        """Serialize a value. If it cannot be pickled, raises `CacheSerializationError`, which names its type."""
        try:
            return pickle.dumps(value, protocol=5)
        except Exception as error:
            raise CacheSerializationError(
                f"the serializer 'pickle' cannot serialize a {type_name(type_of(value))}: {type(error).__name__}"
            ) from None

    def loads(self, data: bytes | memoryview, *, trusted: bool = False) -> Any:
        """Deserialize bytes whose signature was verified. Errors of unpickling propagate."""
        if not trusted:
            raise ValueError("a pickle is read only if its signature was verified")
        return pickle.loads(data)  # noqa: S301  # signed with one of the configured keys, for this namespace and key


_Serializer: TypeAlias = MsgpackSerializer | JsonSerializer | ArrowSerializer | PickleSerializer
_SERIALIZERS: dict[str, Callable[[], _Serializer]] = {
    each.name: each for each in (MsgpackSerializer, JsonSerializer, AutoSerializer, ArrowSerializer, PickleSerializer)
}


@dataclass(slots=True)
class PayloadStatistics:
    """Counters of a pipeline since its creation. Sizes are bytes."""

    written: int = 0
    read: int = 0
    rejected: int = 0
    compressed: int = 0
    raw_bytes: int = 0
    """Size, before compression, of the content for which compression was tried."""
    packed_bytes: int = 0
    """Size of that content after compression, or before it if compression did not help."""

    def as_dict(self) -> dict[str, float]:
        """Return the counters by name.

        `ratio` is the size before compression divided by the size after it, or 1.0 if nothing was compressed yet.
        """
        ratio = self.raw_bytes / self.packed_bytes if self.packed_bytes else 1.0
        return {**asdict(self), "ratio": ratio, "bytes_saved": self.raw_bytes - self.packed_bytes}


class PayloadPipeline:
    """Converter between values and payloads for the keys of one namespace. Thread-safe.

    Content of more than `max_size` bytes raises `CacheCapacityError`. A payload that would decompress to more is
    rejected before decompression. Content of at least `threshold` bytes is compressed if that makes it smaller. With a
    `signer` or a `sealer`, only payloads that it signed or sealed are read. `checksum` protects against corruption, not
    against attackers.

    Raises `CacheConfigurationError` for pickle without a signer, or if a library is not installed.
    """

    def __init__(
        self,
        serializer: SerializerName = "msgpack",
        *,
        namespace: str = "default",
        compression: CompressionName = "none",
        threshold: int = 1024,
        level: int | None = None,
        max_size: int = MAX_SIZE,
        checksum: bool = False,
        signer: Signer | None = None,
        sealer: Sealer | None = None,
        types: Sequence[type[Any]] = (),
    ) -> None:
        if serializer not in _SERIALIZERS:
            raise CacheConfigurationError(f"unknown serializer {serializer!r}")
        if serializer == "pickle" and signer is None:
            raise CacheConfigurationError(
                "the serializer 'pickle' requires signing keys: unpickling can run arbitrary code"
            )
        if not 0 < max_size <= SIZE_MAX:
            raise CacheConfigurationError(f"expected a max_size of 1 to {SIZE_MAX:,} bytes, not {max_size:,}")
        self._serializer: _Serializer = AutoSerializer(types) if serializer == "auto" else _SERIALIZERS[serializer]()
        self._loads = self._serializer.loads
        self._compressor = make_compressor(compression, level)
        self._compressors: dict[int, Compressor | None] = {}
        self._threshold = threshold
        self._max_size = max_size
        self.signer = signer
        self.sealer = sealer
        self._checksum = load("xxhash", "the checksum").xxh3_64 if checksum and not (signer or sealer) else None
        protection = (CHECKSUMMED if self._checksum else 0) | (SIGNED if signer else 0) | (SEALED if sealer else 0)
        self._protection = protection
        self._code = SERIALIZER_CODES[self._serializer.name]
        self._header = bytes((VERSION, self._code, _PLAIN, protection))
        # Header of payloads that need no processing. Empty if payloads are protected.
        self._plain = b"" if protection else self._header
        self._bound = binding(sealer.tenant if sealer else "", namespace)
        self._namespace = namespace
        self.statistics = PayloadStatistics()

    def __repr__(self) -> str:
        return f"<PayloadPipeline {self._serializer.name} for {self._namespace!r}>"

    @property
    def serializer(self) -> str:
        """Name of the serializer."""
        return self._serializer.name

    @property
    def sealed(self) -> bool:
        """True if payloads are sealed."""
        return self.sealer is not None

    def rotate_key(self, key: bytes, key_id: str | None = None) -> None:
        """Use `key` for new payloads: for seals if `key_id` is given, otherwise for signatures.

        Payloads made with older keys can still be read. Thread-safe, also during calls. Raises
        `CacheConfigurationError` if the key has fewer than 32 bytes, or if payloads are not sealed or signed.
        """
        if key_id is not None and self.sealer is not None:
            self.sealer.rotate(key_id, key)
        elif key_id is None and self.signer is not None:
            self.signer.rotate(key)
        else:
            raise CacheConfigurationError(
                "rotating an encryption key requires sealed payloads and a key_id;"
                " rotating a signing key requires signed payloads and no key_id"
            )

    def encode(self, key: str, value: Any) -> bytes:
        """Encode a value as a payload. Raises `CacheSerializationError` and `CacheCapacityError`."""
        if type(value) is CachedError:
            return self.protect(key, value.content, error=True)
        content = self.serialize(value)
        if self._plain and self._compressor is None:
            self.statistics.written += 1
            return self._plain + content
        return self.protect(key, content)

    def serialize(self, value: Any) -> bytes:
        """Serialize a value to content, the first step of `encode`."""
        content = self._serializer.dumps(value)
        if len(content) > self._max_size:
            raise CacheCapacityError("the value is too large for a payload", len(content), self._max_size)
        return content

    def protect(self, key: str, content: bytes, *, error: bool = False) -> bytes:
        """Compress and protect content, the remaining steps of `encode`. `error` marks a cached exception."""
        statistics = self.statistics
        statistics.written += 1
        header = bytes((VERSION, ERROR_CODE, _PLAIN, self._protection)) if error else self._header
        if self._compressor is not None and len(content) >= self._threshold:
            packed = SIZE.pack(len(content)) + self._compressor.pack(content)
            statistics.raw_bytes += len(content)
            statistics.packed_bytes += min(len(packed), len(content))
            if len(packed) < len(content):
                statistics.compressed += 1
                content, header = packed, bytes((VERSION, header[1], self._compressor.code, self._protection))
        if not self._protection:
            return header + content
        if self._checksum is not None:
            return b"".join((header, self._digest(header, content), content))
        bound = self._bound + binding(key)
        if self.signer is not None:
            content = self.signer.sign(bound, header, content) + content
        if self.sealer is not None:
            return self.sealer.seal(content, header, bound)
        return header + content

    def decode(self, key: str, payload: object) -> Any:
        """Decode a payload. Raises `CacheSerializationError`, whose `reason` says why the payload is rejected."""
        plain = self._plain
        if (
            plain
            and type(payload) is bytes
            and payload[:HEADER_SIZE] == plain
            and (size := len(payload)) <= self._max_size
        ):
            try:
                # Creating a view costs as much as copying 16 KB.
                value = self._loads(payload[HEADER_SIZE:] if size < 16_384 else memoryview(payload)[HEADER_SIZE:])
                self.statistics.read += 1
                return value
            except Exception:  # The slow path below raises it with a reason.
                pass
        try:
            value = self._value(key, payload)
        except CacheSerializationError:
            self.statistics.rejected += 1
            raise
        self.statistics.read += 1
        return value

    def _value(self, key: str, payload: object) -> Any:
        if type(payload) is not bytes or len(payload) < HEADER_SIZE or payload[0] != VERSION:
            raise CacheSerializationError("the stored value is not a payload, or has another version", "format")
        header = payload[:HEADER_SIZE]
        if header[1] not in (self._code, ERROR_CODE):
            raise CacheSerializationError("the payload was written by another serializer", "serializer")
        if header[3] != self._protection:
            raise CacheSerializationError("the payload's protection differs from the settings", "protection")
        content: Any = memoryview(payload)[HEADER_SIZE:]
        if self._protection:
            content = self._verified(key, header, content)
        if header[2] != _PLAIN:
            content = self._unpacked(header[2], content)
        if len(content) > self._max_size:
            raise CacheSerializationError(f"the payload has more than {self._max_size:,} bytes", "capacity")
        if payload[1] == ERROR_CODE:
            return CachedError(bytes(content))
        try:
            return self._serializer.loads(content, trusted=bool(self.signer or self.sealer))
        except Exception:
            # The original error is not chained, because it may show parts of the value.
            problem = f"the serializer {self._serializer.name!r} cannot read the payload"
        raise CacheSerializationError(problem, "content")

    def _verified(self, key: str, header: bytes, rest: memoryview) -> memoryview:
        if self._checksum is not None:
            content = rest[_CHECKSUM_SIZE:]
            if len(rest) < _CHECKSUM_SIZE or self._digest(header, content) != bytes(rest[:_CHECKSUM_SIZE]):
                raise CacheSerializationError("the payload is damaged", "checksum")
            return content
        bound = self._bound + binding(key)
        if self.sealer is not None:
            opened = self.sealer.open(rest, header, bound)
            if opened is None:
                problem = "the payload was modified, or sealed with another key or for another cache key"
                raise CacheSerializationError(problem, "seal")
            rest = memoryview(opened)
        if self.signer is not None:
            signature, rest = bytes(rest[:SIGNATURE_SIZE]), rest[SIGNATURE_SIZE:]
            if not self.signer.verify(signature, bound, header, rest):
                problem = "the payload was not signed with a configured key for this cache key"
                raise CacheSerializationError(problem, "signature")
        return rest

    def _digest(self, header: bytes, content: bytes | memoryview) -> bytes:
        checksum: Any = self._checksum
        digest = checksum(header)
        digest.update(content)
        made: bytes = digest.digest()
        return made

    def _unpacked(self, code: int, content: bytes | memoryview) -> bytes:
        if code not in self._compressors:
            try:
                self._compressors[code] = make_compressor(_COMPRESSIONS.get(code, "none"))
            except CacheConfigurationError:
                self._compressors[code] = None  # The library is not installed.
        compressor = self._compressors[code]
        if compressor is None or len(content) < SIZE.size:
            raise CacheSerializationError("the payload's compression is unknown or not installed", "compression")
        size: int = SIZE.unpack_from(content)[0]
        if not 0 < size <= self._max_size:
            raise CacheSerializationError(f"the payload would decompress to {size:,} bytes", "capacity")
        try:
            return compressor.unpack(memoryview(content)[SIZE.size :], size)
        except ValueError:
            problem = "the payload does not decompress to its declared size"
        raise CacheSerializationError(problem, "compression")
