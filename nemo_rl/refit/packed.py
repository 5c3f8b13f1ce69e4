"""Named arrays and a JSON head as bytes: equal values give equal bytes, and damaged bytes are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def pack(head: Any, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Length of the description, the description (JSON), the arrays' memory in order."""
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    shapes = [[name, array.dtype.str, list(array.shape)] for name, array in plain.items()]
    text = json.dumps({"head": head, "arrays": shapes}).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in plain.values())])


def unpack(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """Inverse of `pack`.

    Raises:
        ValueError: the bytes are truncated, too many or not what `pack` writes.
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        described = json.loads(data[8:start])
        arrays = {}
        for name, dtype, shape in described["arrays"]:
            size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(data[start : start + size], dtype).reshape(shape).copy()
            start += size
        if start != len(data):
            raise ValueError(f"{len(data)} bytes where {start} are described")
        return described["head"], arrays
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{len(data)} bytes do not decode: {error}") from error
