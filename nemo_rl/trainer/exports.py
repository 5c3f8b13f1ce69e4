"""Other forms in which a trainer gives its weights out: stacked experts, scales of a KV cache, adapters alone.

Each takes a simulated trainer and returns another, in which ranks hold the same in the names and shapes of the form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from nemo_rl.refit.layout import TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region
from nemo_rl.trainer.families import calibrated
from nemo_rl.trainer.simulated import Rows, SimulatedTrainer

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_ADAPTED = "base_model.model."


def stacked_experts(trainer: SimulatedTrainer, *, transposed: bool = False) -> SimulatedTrainer:
    """Gated experts as two tensors of a layer: `experts.gate_up_proj` `[E, 2 I, H]`, `experts.down_proj` `[E, H, I]`.

    Args:
        transposed: with the last two dims exchanged, as some checkpoints have them.
    """
    parts = {fqn: match for fqn in trainer.table if (match := _EXPERT.fullmatch(fqn))}
    counts: dict[str, int] = {}
    for match in parts.values():
        counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    table = {fqn: meta for fqn, meta in trainer.table.items() if fqn not in parts}
    for fqn, match in parts.items():
        rows, columns = trainer.table[fqn].shape
        name, rows = _stacked_name(match), rows * (1 if match[3] == "down_proj" else 2)
        size = (columns, rows) if transposed else (rows, columns)
        table[name] = TensorMeta((counts[match[1]], *size), trainer.table[fqn].dtype)

    def renamed(fqn: str, region: Region) -> Iterator[tuple[str, Region]]:
        match = parts.get(fqn)
        if match is None:
            yield fqn, region
            return
        first = trainer.table[fqn].shape[0] if match[3] == "up_proj" else 0
        (row, column), sizes = region.offsets, region.sizes
        offsets = (first + row, column)
        if transposed:
            offsets, sizes = offsets[::-1], sizes[::-1]
        yield _stacked_name(match), Region((int(match[2]), *offsets), (1, *sizes))

    return _retold(trainer, table, renamed)


def _stacked_name(match: re.Match[str]) -> str:
    return f"{match[1]}.{'down_proj' if match[3] == 'down_proj' else 'gate_up_proj'}"


def with_cache_scales(
    trainer: SimulatedTrainer, kinds: Sequence[str] = "kvq", *, module: str = "self_attn", size: tuple[int, ...] = (1,)
) -> SimulatedTrainer:
    """With the scales of an FP8 KV cache, which every rank holds that holds some attention of the layer.

    A trainer that has scales, because its model's configuration names a `kv_cache_scheme`, is returned as it is.

    Args:
        kinds: `k` for keys, `v` for values, `q` for queries.
        module: part of a layer whose `k_scale` and so on they are.
        size: of a scale, which is one float32 number.
    """
    if any(calibrated(fqn) for fqn in trainer.table):
        return trainer
    attention = re.compile(r"(.+)\.self_attn\..+")
    layers = natural_order({m[1] for fqn in trainer.table if (m := attention.fullmatch(fqn))})
    names = {layer: [f"{layer}.{module}.{kind}_scale" for kind in kinds] for layer in layers}
    scales = {name: TensorMeta(size, torch.float32) for layer in layers for name in names[layer]}

    def with_scales(fqn: str, region: Region) -> Iterator[tuple[str, Region]]:
        yield fqn, region
        match = attention.fullmatch(fqn)
        if match is not None:
            yield from ((name, Region.whole(size)) for name in names[match[1]])

    return _retold(trainer, trainer.table | scales, with_scales)


def adapters_alone(
    trainer: SimulatedTrainer, rank: int, targets: Iterable[str], dtype: torch.dtype | None = None
) -> SimulatedTrainer:
    """LoRA adapters of the projections named `targets`, as PEFT names them; the base is frozen and stays.

    `lora_A` `[rank, inputs]` is split as the base's columns are and `lora_B` `[outputs, rank]` as its rows are: of a
    column-parallel layer the one is whole on each rank, of a row-parallel layer the other.

    Args:
        dtype: of the adapters; None for that of their base.

    Raises:
        ValueError: no tensor of the model is such a projection.
    """
    wanted = tuple(f".{target}.weight" for target in targets)
    adapted = [fqn for fqn in trainer.table if fqn.endswith(wanted)]
    if not adapted:
        raise ValueError(f"no projection of the model is named {' or '.join(wanted)}")
    table: TensorTable = {}
    for fqn in adapted:
        meta, module = trainer.table[fqn], _ADAPTED + fqn.removesuffix(".weight")
        table[f"{module}.lora_A.weight"] = TensorMeta((rank, meta.shape[1]), dtype or meta.dtype)
        table[f"{module}.lora_B.weight"] = TensorMeta((meta.shape[0], rank), dtype or meta.dtype)

    def of_adapter(fqn: str, region: Region) -> Iterator[tuple[str, Region]]:
        if fqn.endswith(wanted):
            module = _ADAPTED + fqn.removesuffix(".weight")
            yield f"{module}.lora_A.weight", Region((0, region.offsets[1]), (rank, region.sizes[1]))
            yield f"{module}.lora_B.weight", Region((region.offsets[0], 0), (region.sizes[0], rank))

    frozen = dict.fromkeys(trainer.table, "frozen: adapters alone are trained")
    return replace(_retold(trainer, table, of_adapter), unused={**trainer.unused, **frozen})


def _retold(
    trainer: SimulatedTrainer, table: TensorTable, tell: Callable[[str, Region], Iterable[tuple[str, Region]]]
) -> SimulatedTrainer:
    """Every row told by `tell`, each box once a rank; replicas go on sharing theirs."""
    made: dict[int, Rows] = {}
    for rows in trainer.rows:
        if id(rows) not in made:
            made[id(rows)] = tuple(dict.fromkeys(told for row in rows for told in tell(*row)))
    ordered = {fqn: table[fqn] for fqn in natural_order(table)}
    return SimulatedTrainer(ordered, tuple(made[id(rows)] for rows in trainer.rows), trainer.unused)
