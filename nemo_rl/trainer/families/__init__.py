"""Model families: which box of which Hugging Face tensor a box of a Megatron tensor is.

Pure geometry; one rule serves refits, loading and exporting. A rule is asked with the global key and global shape that
Megatron's `sharded_state_dict` gives. A key that it does not know is refused by name, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch

from nemo_rl.refit.layout import TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region
from nemo_rl.trainer.families.base import EMBEDDING, HEAD, Box, Family, Shape, Weight
from nemo_rl.trainer.families.deepseek import DEEPSEEK
from nemo_rl.trainer.families.nemotron import NEMOTRON
from nemo_rl.trainer.families.qwen import QWEN
from nemo_rl.trainer.shape import ModelShape, UnsupportedModel, architecture_of

__all__ = ["EMBEDDING", "FAMILIES", "HEAD", "Box", "Family", "Shape", "Weight"]
__all__ += [
    "boxes",
    "calibrated",
    "dtype_of",
    "droppable",
    "family_of",
    "parts",
    "required",
    "scale_of",
    "scale_region",
    "table",
    "untrained",
    "weights",
]

FAMILIES: Mapping[str, Family] = {
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "NemotronHForCausalLM": NEMOTRON,
    "Qwen2ForCausalLM": QWEN,
    "Qwen2MoeForCausalLM": QWEN,
    "Qwen3ForCausalLM": QWEN,
    "Qwen3MoeForCausalLM": QWEN,
}
"""Hugging Face architecture -> its rules."""


def family_of(hf_config: Any) -> Family:
    """The family of a configuration. Raises UnsupportedModel naming the architecture and those that are known."""
    name = architecture_of(hf_config)
    if name not in FAMILIES:
        raise UnsupportedModel([f"architecture {name} has no family rule; known are {', '.join(sorted(FAMILIES))}"])
    return FAMILIES[name]


def table(shape: ModelShape, dtype: torch.dtype) -> TensorTable:
    """Every Hugging Face tensor of the model, in `dtype` but for those that stay in float32 and those that are FP8."""
    tensors = _tensors(shape)
    metas = {fqn: TensorMeta(size, dtype_of(shape, fqn, dtype)) for fqn, size in tensors.items()}
    if shape.fp8 is not None:
        quantized = [fqn for fqn in tensors if shape.fp8.covers(fqn)]
        metas |= {scale_of(f): TensorMeta(shape.fp8.blocks(tensors[f]), torch.float32) for f in quantized}
    return {fqn: metas[fqn] for fqn in natural_order(metas)}


def dtype_of(shape: ModelShape, fqn: str, dtype: torch.dtype) -> torch.dtype:
    """What `fqn` of a model in `dtype` is held in."""
    if shape.fp8 is not None and shape.fp8.covers(fqn):
        return torch.float8_e4m3fn
    return torch.float32 if FAMILIES[shape.architecture].float32(fqn) else dtype


def scale_of(fqn: str) -> str:
    """Name of the scales of FP8 weight `fqn`; a weight is its FP8 values times its scales."""
    return f"{fqn}_scale_inv"


def scale_region(shape: ModelShape, fqn: str, part: Region) -> Region:
    """Where the scales of a part of FP8 weight `fqn` lie in `scale_of(fqn)`.

    Raises:
        ValueError: the part cuts a block, whose scale then is not its own.
    """
    assert shape.fp8 is not None
    blocks, size = (shape.fp8.rows, shape.fp8.columns), _tensors(shape)[fqn]
    whole = zip(part.offsets, part.ends, blocks, size, strict=True)
    if any(start % block or (end % block and end != last) for start, end, block, last in whole):
        raise ValueError(
            f"{fqn}: a rank holds {part} of {size}, which cuts blocks of {blocks} that share a scale; lower the "
            f"parallel size that splits it"
        )
    first = tuple(start // block for start, block in zip(part.offsets, blocks, strict=True))
    return Region(first, tuple(-(-end // b) - f for end, b, f in zip(part.ends, blocks, first, strict=True)))


def calibrated(fqn: str) -> bool:
    """Whether the trainer makes the tensor from what it sees, so that no checkpoint need hold it."""
    return fqn.endswith(("self_attn.k_scale", "self_attn.v_scale", "self_attn.q_scale"))


def required(shape: ModelShape, dtype: torch.dtype) -> TensorTable:
    """The tensors that a checkpoint must hold for training to start from it."""
    return {fqn: meta for fqn, meta in table(shape, dtype).items() if not calibrated(fqn)}


def droppable(shape: ModelShape) -> frozenset[str]:
    """Names that a checkpoint of the model may hold beside those of `table`."""
    return FAMILIES[shape.architecture].droppable(shape)


def untrained(shape: ModelShape) -> list[str]:
    """What ranks can hold of the model but the trainer does not run, each with a remedy."""
    quantized = ["FP8 weights are not trained; use the unquantized checkpoint"] if shape.fp8 is not None else []
    return quantized + FAMILIES[shape.architecture].untrained(shape)


def weights(shape: ModelShape, padded_vocabulary: int) -> Iterator[Weight]:
    """Every tensor of Megatron's sharded state of the whole model."""
    return FAMILIES[shape.architecture].weights(shape, padded_vocabulary)


@lru_cache(maxsize=8)
def _tensors(shape: ModelShape) -> Mapping[str, Shape]:
    return FAMILIES[shape.architecture].tensors(shape)


def boxes(shape: ModelShape, key: str, size: Shape) -> list[Box]:
    """The correspondences of Megatron tensor `key` of global shape `size`.

    Elements that no box covers are vocabulary padding.

    Raises:
        ValueError: the key is unknown, or its size does not fit the model; both are named.
    """
    found = FAMILIES[shape.architecture].rule(shape, key, size)
    if found is None:
        raise ValueError(
            f"Megatron tensor {key} {size} is unknown to the rule of {shape.architecture}; extend the rule"
        )
    tensors = _tensors(shape)
    whole = {fqn: sum(b.region.volume for b in found if b.fqn == fqn) for fqn in {b.fqn for b in found}}
    partial = {b.fqn for b in found if b.partial}
    wrong = [f for f, n in whole.items() if f not in tensors]
    wrong += [f for f, n in whole.items() if f in tensors and f not in partial and n != math.prod(tensors[f])]
    wrong += [b.fqn for b in found if b.fqn in tensors and not b.region.fits(tensors[b.fqn])]
    covered = sum(whole.values()) == math.prod(size) or key in _PADDED
    if wrong or not covered or not all(b.source.fits(size) for b in found):
        expected = {fqn: tensors.get(fqn) for fqn in whole}
        raise ValueError(
            f"Megatron tensor {key} of shape {size} does not hold {expected} of {shape.architecture}; check the config"
        )
    return found


_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def parts(found: list[Box], mine: Region) -> Iterator[tuple[str, Region, Region]]:
    """What the part `mine` of a Megatron tensor holds: (fqn, region of it, where that lies in the Megatron tensor)."""
    for box in found:
        common = box.source.intersect(mine)
        if common is not None:
            yield box.fqn, box.to_hf(common), common
