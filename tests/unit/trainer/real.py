"""What real Megatron models say that they hold, any rank of any layout, played by one process without peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_rl.refit.region import Region
from nemo_rl.trainer import gpt
from nemo_rl.trainer.cpu import megatron_on_cpu
from nemo_rl.trainer.layout import MegatronSource
from nemo_rl.trainer.model import Parallel
from nemo_rl.trainer.shape import ModelShape
from tests.unit.trainer.hybrid import build_hybrid


@contextmanager
def playing(rank: int, shape: ModelShape, parallel: Parallel) -> Iterator[None]:
    """This process is `rank`; its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    try:
        with megatron_on_cpu():
            gpt.init_parallel(parallel, shape.is_moe, timedelta(seconds=60), 1)
            yield
    finally:
        gpt.close_parallel()


def real_rows(
    rank: int, meet: str, cases: list[tuple[ModelShape, Parallel]], dtype: torch.dtype
) -> list[list[list[tuple[str, Region]]]]:
    """In a child: for each case and each rank, the rows that MegatronSource derives from the built model."""
    return [
        [_rows_of(played, shape, parallel, dtype) for played in range(parallel.world_size)] for shape, parallel in cases
    ]


def storage_less_rows(
    rank: int, meet: str, shape: ModelShape, parallel: Parallel, played: list[int]
) -> dict[int, list[tuple[str, Region]]]:
    """In a child: the rows of some ranks of a model of any size, built without storage, in bfloat16."""
    meta, out = torch.device("meta"), {}
    for at in played:
        with playing(at, shape, parallel):
            config = gpt.transformer_config(shape, parallel, torch.bfloat16)
            config.perform_initialization = False
            with meta, mock.patch.object(torch.cuda, "current_device", lambda: meta):
                chunks = gpt.build_chunks(config, shape, parallel)
            out[at] = [(h.fqn, h.region) for h in MegatronSource(chunks, shape, torch.bfloat16).holdings()]
    return out


def _rows_of(rank: int, shape: ModelShape, parallel: Parallel, dtype: torch.dtype) -> list[tuple[str, Region]]:
    with playing(rank, shape, parallel):
        chunks = _build(shape, parallel, dtype)
        source = MegatronSource(chunks, shape, dtype)
        _check_that_moved_storage_is_found(source, chunks)
        return [(h.fqn, h.region) for h in source.holdings()]


def _check_that_moved_storage_is_found(source: MegatronSource, chunks: list[torch.nn.Module]) -> None:
    """Holdings are the same objects while storage stays, and views of what the model has, wherever that is."""
    before = source.holdings()
    assert source.holdings() == before

    def follows() -> bool:
        after = source.holdings()
        old, new = ({h.view.untyped_storage().data_ptr() for h in held} for held in (before, after))
        return [(h.fqn, h.region) for h in after] == [(h.fqn, h.region) for h in before] and old.isdisjoint(new)

    for tensor in (t for chunk in chunks for t in (*chunk.parameters(), *chunk.buffers())):
        tensor.data = tensor.data.clone()
    assert follows(), "other storage"
    before = source.holdings()
    for chunk in chunks:
        chunk.load_state_dict(_copied(chunk.state_dict()), assign=True)
    assert follows(), "other tensors"


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Tied tensors stay tied."""
    made: dict[int, torch.Tensor] = {}
    return {
        name: made.setdefault(t.data_ptr(), t.clone()) if isinstance(t, torch.Tensor) else t
        for name, t in state.items()
    }


def _build(shape: ModelShape, parallel: Parallel, dtype: torch.dtype) -> list[torch.nn.Module]:
    if shape.hybrid is not None:
        return [build_hybrid(shape, parallel, dtype)]
    return list(gpt.build_chunks(gpt.transformer_config(shape, parallel, dtype), shape, parallel))
