"""The payload pipeline: a value becomes bytes once, by serializer, compression, signature or checksum, and seal."""

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
    """Values to pickle, protocol 5, and back, for signed payloads only: unpickling runs what the bytes say."""

    name = "pickle"

    def dumps(self, value: Any) -> bytes:
        """Return the bytes of a value. Raises `CacheSerializationError` that names the type, whatever its own code raised."""
        try:
            return pickle.dumps(value, protocol=5)
        except Exception as error:
            raise CacheSerializationError(
                f"the serializer 'pickle' cannot write a {type_name(type_of(value))}: {type(error).__name__}"
            ) from None

    def loads(self, data: bytes | memoryview, *, trusted: bool = False) -> Any:
        """Return the value of bytes whose signature was verified. Raises whatever unpickling raises."""
        if not trusted:
            raise ValueError("a pickle is read only if its signature was verified")
        return pickle.loads(data)  # noqa: S301  # signed by one of our keys, for this key of this namespace


_Serializer: TypeAlias = MsgpackSerializer | JsonSerializer | ArrowSerializer | PickleSerializer
_SERIALIZERS: dict[str, Callable[[], _Serializer]] = {
    each.name: each for each in (MsgpackSerializer, JsonSerializer, AutoSerializer, ArrowSerializer, PickleSerializer)
}


@dataclass(slots=True)
class PayloadStatistics:
    """Counts of a pipeline since it was made. Sizes are bytes."""

    written: int = 0
    read: int = 0
    rejected: int = 0
    compressed: int = 0
    raw_bytes: int = 0
    """Size of the content that compression was tried on."""
    packed_bytes: int = 0
    """What compression left of that."""

    def as_dict(self) -> dict[str, float]:
        """Return the counts by name. `ratio` is the size before over the size after compression, 1.0 before the first."""
        ratio = self.raw_bytes / self.packed_bytes if self.packed_bytes else 1.0
        return {**asdict(self), "ratio": ratio, "bytes_saved": self.raw_bytes - self.packed_bytes}


class PayloadPipeline:
    """Values to payloads and back, for the keys of one namespace. Usable from any thread.

    Content of more than `max_size` bytes is refused with `CacheCapacityError`, and a payload that would unpack to more is
    rejected before it is unpacked. Content is compressed from `threshold` bytes, if it gets smaller. With a `signer` or a
    `sealer`, only payloads that it signed or sealed are read. `checksum` guards against corruption, not against people.

    Raises `CacheConfigurationError` for pickle without a signer, and for a library that is not installed.
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
            raise CacheConfigurationError(f"there is no serializer {serializer!r} that makes bytes")
        if serializer == "pickle" and signer is None:
            raise CacheConfigurationError("the serializer 'pickle' needs signing keys: unpickling runs what it reads")
        if not 0 < max_size <= SIZE_MAX:
            raise CacheConfigurationError(f"max_size is 1 to {SIZE_MAX:,} bytes, not {max_size:,}")
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
        # The header of payloads that a pipeline without protection takes as they are; empty with protection.
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
        """Seal with `key` under `key_id` from now on, or sign with `key` if there is no id. Payloads of older keys are still read.

        Usable from any thread, with calls under way. Raises `CacheConfigurationError` for a key of less than 32 bytes, and
        if there is nothing to rotate.
        """
        if key_id is not None and self.sealer is not None:
            self.sealer.rotate(key_id, key)
        elif key_id is None and self.signer is not None:
            self.signer.rotate(key)
        else:
            raise CacheConfigurationError(
                "an encryption key has an id, a signing key has none, and these payloads are not sealed or signed so"
            )

    def encode(self, key: str, value: Any) -> bytes:
        """Return the payload of a value. Raises `CacheSerializationError` and `CacheCapacityError`."""
        if type(value) is CachedError:
            return self.protect(key, value.content, error=True)
        content = self.serialize(value)
        if self._plain and self._compressor is None:
            self.statistics.written += 1
            return self._plain + content
        return self.protect(key, content)

    def serialize(self, value: Any) -> bytes:
        """Return the content of a value, as the serializer writes it: the first step of `encode`."""
        content = self._serializer.dumps(value)
        if len(content) > self._max_size:
            raise CacheCapacityError("the value is too large for a payload", len(content), self._max_size)
        return content

    def protect(self, key: str, content: bytes, *, error: bool = False) -> bytes:
        """Return the payload of content: the other steps of `encode`. `error` marks the record of an exception."""
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
        """Return the value of a payload. Raises `CacheSerializationError` whose `reason` says why it is rejected."""
        plain = self._plain
        if (
            plain
            and type(payload) is bytes
            and payload[:HEADER_SIZE] == plain
            and (size := len(payload)) <= self._max_size
        ):
            try:
                # A view costs as much as a copy of 16 KB.
                value = self._loads(payload[HEADER_SIZE:] if size < 16_384 else memoryview(payload)[HEADER_SIZE:])
                self.statistics.read += 1
                return value
            except Exception:  # Raised below, with the reason.
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
            raise CacheSerializationError("what is stored is no payload, or one of another version", "format")
        header = payload[:HEADER_SIZE]
        if header[1] not in (self._code, ERROR_CODE):
            raise CacheSerializationError("another serializer wrote the payload", "serializer")
        if header[3] != self._protection:
            raise CacheSerializationError("the payload is not protected as the settings demand", "protection")
        content: Any = memoryview(payload)[HEADER_SIZE:]
        if self._protection:
            content = self._verified(key, header, content)
        if header[2] != _PLAIN:
            content = self._unpacked(header[2], content)
        if len(content) > self._max_size:
            raise CacheSerializationError(f"the payload holds more than {self._max_size:,} bytes", "capacity")
        if payload[1] == ERROR_CODE:
            return CachedError(bytes(content))
        try:
            return self._serializer.loads(content, trusted=bool(self.signer or self.sealer))
        except Exception:
            # The error is not kept: it may show what the bytes hold.
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
                problem = "the payload was sealed with another key or for another place, or was changed"
                raise CacheSerializationError(problem, "seal")
            rest = memoryview(opened)
        if self.signer is not None:
            signature, rest = bytes(rest[:SIGNATURE_SIZE]), rest[SIGNATURE_SIZE:]
            if not self.signer.verify(signature, bound, header, rest):
                problem = "the payload was not signed with one of our keys for this place"
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
                self._compressors[code] = None  # Its library is not installed here.
        compressor = self._compressors[code]
        if compressor is None or len(content) < SIZE.size:
            raise CacheSerializationError("the payload's compression is not known here", "compression")
        size: int = SIZE.unpack_from(content)[0]
        if not 0 < size <= self._max_size:
            raise CacheSerializationError(f"the payload would unpack to {size:,} bytes", "capacity")
        try:
            return compressor.unpack(memoryview(content)[SIZE.size :], size)
        except ValueError:
            problem = "the payload does not unpack to what it claims"
        raise CacheSerializationError(problem, "compression")
