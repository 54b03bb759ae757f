"""Readers of the cache traces for the hit ratios. The traces are not in the repository.

* LIRS (Jiang and Zhang, 2002): one block number per line.
* cache2k's web12: big-endian 32-bit keys.
* AdaptSize: time, id and size per line. The size is ignored, so every object counts as one.
"""

from __future__ import annotations

import gzip
import lzma
import struct
from pathlib import Path

NAMES = (
    "lirs_multi1",
    "lirs_multi2",
    "lirs_sprite",
    "lirs_loop",
    "lirs_2_pools",
    "lirs_scan",
    "c2k_web12",
    "adaptsize",
)


def read(folder: Path, name: str) -> list[str]:
    """Return the keys of one trace in the order of its requests.

    Raises `FileNotFoundError` if the folder does not contain it.
    """
    path = next(iter(sorted(folder.glob(f"{name}*.trace.*"))), None)
    if path is None:
        raise FileNotFoundError(f"no trace {name!r} in {folder}")
    data = (gzip.open if path.suffix == ".gz" else lzma.open)(path, "rb").read()
    if name.startswith("c2k"):
        return [str(key) for (key,) in struct.iter_unpack(">i", data[: len(data) // 4 * 4])]
    column = 1 if name.startswith("adaptsize") else 0
    lines = (line.split() for line in data.splitlines())
    return [fields[column].decode() for fields in lines if fields and fields[0] != b"*"]
