"""Writes the golden files that are missing, and touches no other: `python -m tests.golden.write`, then commit them."""

from __future__ import annotations

from cachebus.bus.codec.messages import encode

from ..payload.pipelines import EXAMPLE
from . import payloads
from .examples import FOLDER, KINDS, SUFFIXES, example


def write() -> list[str]:
    """The names of the files that were missing and now are there."""
    FOLDER.mkdir(exist_ok=True)
    written: list[str] = []
    for kind, cls in KINDS.items():
        for content_type, suffix in SUFFIXES.items():
            file = FOLDER / f"{kind}{suffix}"
            if not file.exists():
                file.write_bytes(encode(example(cls), content_type))
                written.append(file.name)
    payloads.FOLDER.mkdir(exist_ok=True)
    for name in payloads.golden_names():
        file = payloads.FOLDER / f"{name}.bin"
        if not file.exists():
            file.write_bytes(payloads.golden_pipeline(name).encode("golden", EXAMPLE))
            written.append(file.name)
    payloads.ERRORS.mkdir(exist_ok=True)
    for name in payloads.golden_names():
        file = payloads.ERRORS / f"{name}.bin"
        if not file.exists():
            file.write_bytes(payloads.golden_pipeline(name).encode("golden", payloads.ERROR))
            written.append(file.name)
    return written


if __name__ == "__main__":
    for name in write():
        print(f"wrote {name}")
