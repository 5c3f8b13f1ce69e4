"""A small picture as a PNG in a data URI, for cells that are too many for one SVG element each."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np


def encode(pixels: np.ndarray) -> bytes:
    """PNG bytes of RGBA `pixels`, uint8 of shape (height, width, 4)."""
    height, width, channels = pixels.shape
    if channels != 4 or pixels.dtype != np.uint8:
        raise ValueError(f"RGBA bytes are needed, got {pixels.dtype} of shape {pixels.shape}")
    lines = np.zeros((height, 1 + 4 * width), np.uint8)  # each line starts with its filter type, 0
    lines[:, 1:] = pixels.reshape(height, 4 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def data_uri(pixels: np.ndarray) -> str:
    """`data:image/png;base64,...`"""
    return "data:image/png;base64," + base64.b64encode(encode(pixels)).decode()
