"""What ranks say of themselves, as bytes: a JSON head and a layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from nemo_rl.refit.base import Declaration
from nemo_rl.refit.layout import Layout, TensorMeta, TensorTable


def _pack(head: Mapping[str, Any], layout: Layout) -> bytes:
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + layout.to_bytes()


def _unpack(data: bytes) -> tuple[dict[str, Any], Layout]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), Layout.from_bytes(data[8 + size :])


def pack_source(table: TensorTable, layout: Layout, unused: Mapping[str, str]) -> bytes:
    """A trainer's statement: the whole model's tensors, what it holds, what it does not export and why."""
    rows = [[n, list(m.shape), str(m.dtype).removeprefix("torch.")] for n, m in table.items()]
    return _pack({"table": rows, "unused": dict(unused)}, layout)


def unpack_source(data: bytes) -> tuple[TensorTable, Layout, dict[str, str]]:
    """Inverse of `pack_source`. Raises ValueError where the bytes are damaged."""
    head, layout = _unpack(data)
    return {n: TensorMeta(tuple(s), getattr(torch, d)) for n, s, d in head["table"]}, layout, head["unused"]


def pack_declaration(declaration: Declaration) -> bytes:
    """A generator's statement."""
    return _pack({"misc": dict(declaration.misc), "problems": declaration.problems}, declaration.layout)


def unpack_declaration(data: bytes) -> Declaration:
    """Inverse of `pack_declaration`. Raises ValueError where the bytes are damaged."""
    head, layout = _unpack(data)
    return Declaration(layout, head["misc"], tuple(head["problems"]))
