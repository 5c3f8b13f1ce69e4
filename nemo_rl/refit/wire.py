"""What ranks say of themselves, as bytes: a JSON head and a layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl.refit.base import Declaration
from nemo_rl.refit.layout import Layout, TensorTable, meta_of, natural_order


def _pack(head: Mapping[str, Any], layout: Layout) -> bytes:
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + layout.to_bytes()


def _unpack(data: bytes) -> tuple[dict[str, Any], Layout]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), Layout.from_bytes(data[8 + size :])


def pack_table(table: TensorTable) -> bytes:
    """The whole model's tensors; equal tables give equal bytes, in whatever order they were made."""
    rows = [[n, list(table[n].shape), str(table[n].dtype).removeprefix("torch.")] for n in natural_order(table)]
    return json.dumps(rows).encode()


def unpack_table(data: bytes) -> TensorTable:
    """Inverse of `pack_table`, in natural order. Raises ValueError where the bytes are damaged."""
    return {n: meta_of(tuple(s), d) for n, s, d in json.loads(data)}


def pack_source(layout: Layout, unused: Mapping[str, str], problems: Sequence[str]) -> bytes:
    """A trainer's statement: what it holds, what it does not export and why, what must refuse the plan."""
    return _pack({"unused": dict(unused), "problems": list(problems)}, layout)


def unpack_source(data: bytes) -> tuple[Layout, dict[str, str], list[str]]:
    """Inverse of `pack_source`. Raises ValueError where the bytes are damaged."""
    head, layout = _unpack(data)
    return layout, head["unused"], head["problems"]


def pack_declaration(declaration: Declaration) -> bytes:
    """A generator's statement."""
    head = {"misc": dict(declaration.misc), "problems": declaration.problems, "kept": dict(declaration.kept)}
    return _pack(head, declaration.layout)


def unpack_declaration(data: bytes) -> Declaration:
    """Inverse of `pack_declaration`. Raises ValueError where the bytes are damaged."""
    head, layout = _unpack(data)
    return Declaration(layout, head["misc"], tuple(head["problems"]), head["kept"])
