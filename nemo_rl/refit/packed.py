"""Named arrays and a JSON head as bytes: equal values give equal bytes, and damaged bytes are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def pack(head: Any, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Length of the description, the description (JSON), the arrays' memory in order."""
    return b"".join(packed_parts(head, arrays))


def packed_parts(head: Any, arrays: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """`pack` part by part; arrays that are contiguous are not copied."""
    shapes = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    text = json.dumps({"head": head, "arrays": shapes}).encode()
    yield len(text).to_bytes(8, "little")
    yield text
    for array in arrays.values():
        if array.size:
            yield np.ascontiguousarray(array).data.cast("B")


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
            size = np.dtype(dtype).itemsize * math.prod(shape)
            arrays[name] = np.frombuffer(data[start : start + size], dtype).reshape(shape).copy()
            start += size
        if start != len(data):
            raise ValueError(f"{len(data)} bytes where {start} are described")
        return described["head"], arrays
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{len(data)} bytes do not decode: {error}") from error
