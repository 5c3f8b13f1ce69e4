"""What a Megatron rank holds, as boxes of Hugging Face tensors: Megatron's own statement joined with a family rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from nemo_rl.refit.layout import Holding, TensorTable
from nemo_rl.refit.region import Region
from nemo_rl.trainer import families
from nemo_rl.trainer.cpu import megatron_on_cpu
from nemo_rl.trainer.places import Places
from nemo_rl.trainer.shape import ModelShape


class MegatronSource:
    """The trainer's side of a refit; see `nemo_rl.refit.base.Source`.

    Make it when Megatron's DDP and optimizer exist: both may move parameters into buffers of their own. From then on
    they update parameters in place, so that holdings stay valid over optimizer steps; where parameters or buffers were
    replaced or given other storage, such as on their way to the CPU and back, Megatron is asked again. A router's bias,
    which its mixed-precision wrapper rounds, is brought back to float32 by asking for its state.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], shape: ModelShape, dtype: torch.dtype) -> None:
        """
        Args:
            chunks: this rank's GPTModels, unwrapped; one for each chunk of a virtual pipeline.
            dtype: of its weights, but for those that the family keeps in float32.

        Raises:
            ValueError: a tensor of the model is unknown to the family rule, or is in another dtype; all by name.
        """
        self._chunks, self._shape, self._dtype = tuple(chunks), shape, dtype
        self._table = families.table(shape, dtype)
        self._find()

    def _find(self) -> None:
        self._holdings, self._unused = _derive(self._chunks, self._shape, self._dtype)
        self._places = Places(self._chunks)

    def table(self) -> TensorTable:
        """Every Hugging Face tensor of the whole model, held by this rank or not."""
        return dict(self._table)

    def holdings(self) -> tuple[Holding, ...]:
        """Live views of this rank's weights, replicas included; they alias the storage that the optimizer updates."""
        if self._places.moved:
            self._find()
        return self._holdings

    def unused(self) -> Mapping[str, str]:
        """Megatron's entries that hold something but are no weights."""
        return dict(self._unused)


def _derive(
    chunks: Sequence[torch.nn.Module], shape: ModelShape, dtype: torch.dtype
) -> tuple[tuple[Holding, ...], dict[str, str]]:
    holdings: dict[tuple[str, Region], Holding] = {}
    unused: dict[str, str] = {}
    problems: list[str] = []
    for key, shard in (found for chunk in chunks for found in _shards(chunk)):
        if isinstance(shard, ShardedObject):
            if shard.data is not None:
                unused[key] = "Megatron's extra state, which is no weight"
            continue
        try:
            for holding in _held(shard, shape, dtype):
                # A tied output layer on the first stage is the embedding again.
                holdings.setdefault((holding.fqn, holding.region), holding)
        except ValueError as error:
            problems.append(str(error))
    problems += _not_live(chunks, holdings.values())
    if problems:
        raise ValueError("trainer layout refused: " + "; ".join(problems))
    return tuple(holdings.values()), unused


def _shards(model: torch.nn.Module) -> Iterator[tuple[str, ShardedTensor | ShardedObject]]:
    """Every entry of Megatron's sharded state, with gate and up of `linear_fc1` apart."""
    metadata = {
        # One global tensor per layer and per expert instead of an extra axis over all of them.
        "non_homogeneous_layers": True,
        "singleton_local_shards": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    with megatron_on_cpu():
        state: dict[str, Any] = model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for value in state.values():
            parts = value.build() if isinstance(value, ShardedTensorFactory) else value
            for part in parts if isinstance(parts, list) else [parts]:
                yield part.key, part


def _held(shard: ShardedTensor, shape: ModelShape, dtype: torch.dtype) -> Iterator[Holding]:
    data = shard.data
    if shard.prepend_axis_num or data is None or tuple(data.shape) != tuple(shard.local_shape):
        raise ValueError(f"{shard.key}: Megatron describes it in a form with extra axes; a plain shard is needed")
    mine = Region(tuple(map(int, shard.global_offset)), tuple(map(int, shard.local_shape)))
    boxes = families.boxes(shape, shard.key, tuple(map(int, shard.global_shape)))
    for fqn, region, common in families.parts(boxes, mine):
        wanted = families.dtype_of(shape, fqn, dtype)
        if data.dtype != wanted:
            raise ValueError(f"{shard.key}: is {data.dtype}, but {fqn} is declared {wanted}")
        yield Holding(fqn, region, data.detach()[common.slices_in(mine)])


def _not_live(chunks: Sequence[torch.nn.Module], holdings: Any) -> list[str]:
    """Views whose storage is no parameter's or buffer's: copies, which the optimizer would never update."""
    live = {t.untyped_storage().data_ptr() for chunk in chunks for t in (*chunk.parameters(), *chunk.buffers())}
    return [
        f"{h.fqn} {h.region}: Megatron gave a copy, not its parameter; it would never change"
        for h in holdings
        if h.view.untyped_storage().data_ptr() not in live
    ]
