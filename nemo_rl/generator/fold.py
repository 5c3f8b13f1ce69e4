"""Tracing fewer layers: a model that repeats its layers is traced on the first of each kind, and the rest follow.

A fold is a guess about a loader that whoever uses it must check against a whole trace; `nemo_rl.generator.simulated`
does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_rl.refit.layout import TensorTable

_LAYER = re.compile(r"(.*?\blayers\.)(\d+)(\..+)")
_WORTH = 0.7  # a fold that keeps more layers than this share saves too little


@dataclass(frozen=True)
class Fold:
    """The first layers of a model that has more of the same.

    Attributes:
        config: the Hugging Face configuration of the short model.
        table: its tensors.
        copies: fqn of the short model -> fqns of the whole model that are loaded as it is.
    """

    config: Mapping[str, Any]
    table: TensorTable
    copies: Mapping[str, tuple[str, ...]]


def fold(config: Mapping[str, Any], table: TensorTable) -> Fold | None:
    """The shortest front part of the model that has every kind of layer, or None where none is much shorter.

    Layers are of one kind where their tensors have the same names, shapes and dtypes. Layers that the configuration
    does not count (draft heads) are left out: the loader is expected to pass over them. None as well where the table
    lacks a layer.
    """
    total, kinds = config.get("num_hidden_layers"), _kinds(table)
    if not isinstance(total, int) or not set(range(total)) <= set(kinds):
        return None
    kinds = {layer: kind for layer, kind in kinds.items() if layer < total}
    first = {kind: layer for layer, kind in sorted(kinds.items(), reverse=True)}
    stand_in = {layer: first[kind] for layer, kind in kinds.items()}
    kept = max(first.values()) + 1
    if kept > _WORTH * total:
        return None
    short, copies = {}, defaultdict[str, list[str]](list)
    for fqn, meta in table.items():
        source = _source(fqn, stand_in, kept)
        if source is not None:
            copies[source].append(fqn)
        if source == fqn:
            short[fqn] = meta
    return Fold(_cut(config, total, kept), short, {fqn: tuple(found) for fqn, found in copies.items()})


def _kinds(table: TensorTable) -> dict[int, frozenset[tuple[object, ...]]]:
    """Layer -> what its tensors are."""
    kinds: defaultdict[int, set[tuple[object, ...]]] = defaultdict(set)
    for fqn, meta in table.items():
        if match := _LAYER.fullmatch(fqn):
            kinds[int(match[2])].add((match[1], match[3], meta.shape, meta.dtype))
    return {layer: frozenset(kind) for layer, kind in kinds.items()}


def _source(fqn: str, stand_in: Mapping[int, int], kept: int) -> str | None:
    """The tensor of the short model that stands for `fqn`; None for a layer without one."""
    match = _LAYER.fullmatch(fqn)
    if match is None or int(match[2]) < kept:
        return fqn
    layer = stand_in.get(int(match[2]))
    return None if layer is None else f"{match[1]}{layer}{match[3]}"


def _cut(config: Mapping[str, Any], total: int, kept: int) -> dict[str, Any]:
    """The configuration with `kept` layers; what it lists by layer is cut as well."""
    out = {
        key: value[:kept] if isinstance(value, (list, str)) and len(value) == total else value
        for key, value in config.items()
    }
    return {**out, "num_hidden_layers": kept}


@dataclass(frozen=True, eq=False)
class Rows:
    """Boxes of tensors, columnar and sorted: row i is `offsets[i], sizes[i]` of `tensor[i]`, padded as in layouts."""

    tensor: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    @classmethod
    def sorted(cls, tensor: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> Rows:
        order = np.lexsort((*sizes.T[::-1], *offsets.T[::-1], tensor))
        return cls(tensor[order], offsets[order], sizes[order])

    def equals(self, other: Rows) -> bool:
        pairs = ((self.tensor, other.tensor), (self.offsets, other.offsets), (self.sizes, other.sizes))
        return all(np.array_equal(a, b) for a, b in pairs)

    def unfolded(self, copies: tuple[np.ndarray, ...]) -> Rows:
        """Every row once for each tensor of the whole model that it stands for; `copies`: tensor -> those tensors."""
        counts = np.array([len(c) for c in copies], np.int64)
        flat, start = np.concatenate([*copies, np.zeros(0, np.int64)]), np.cumsum(counts) - counts
        times = counts[self.tensor]
        step = np.arange(int(times.sum())) - np.repeat(np.cumsum(times) - times, times)
        tensor = flat[np.repeat(start[self.tensor], times) + step]
        return Rows.sorted(tensor, np.repeat(self.offsets, times, axis=0), np.repeat(self.sizes, times, axis=0))
