"""vLLM's own weight transfer over NCCL, as the variant `vllm`: packed broadcast of whole tensors from trainer 0.

Its engine class and its trainer's function run between the benchmark's processes, with a landing that takes the
parts of its rank out of whole tensors where a model's `load_weights` would stand. What a live engine adds around it
(reloading layer by layer, processing of weights) is left out. Written for vllm 0.25.
"""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_rl.refit.base import RefitReport
from scripts.bench.model import BenchLanding
from scripts.bench.rows import Said
from scripts.bench.whole import Gathered

if TYPE_CHECKING:
    from scripts.bench.rank import Held, Meeting, Rank


def run(rank: Rank, held: Held, variant: str, meeting: Meeting, opened: ExitStack) -> Said:
    """All ranks call it; what is to be closed goes into `opened`. Raises ImportError where vLLM is not installed."""
    if rank.device.type != "cuda":
        raise ValueError("vLLM's weight transfer over NCCL moves CUDA tensors only")
    before, started = rank.free_memory(give_back=True), time.monotonic()
    port = meeting.say("port", free_port())[0]
    end = _trainer(rank, held, meeting, port) if held.source is not None else _generator(rank, held, port)
    opened.callback(end.close)
    ready_s = time.monotonic() - started
    reports, wrong, peak = rank.refits(held, variant, meeting, partial(_refit, end))
    return Said.of(reports, wrong, ready_s, peak, before - rank.free_memory(), {})


def _refit(end: Any, version: int) -> RefitReport:
    started = time.monotonic()
    num_bytes = end.move()
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    return RefitReport(version, "vllm", False, seconds, {"transfer": seconds}, num_bytes, 0, end.staging_bytes)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _trainer(rank: Rank, held: Held, meeting: Meeting, port: int) -> _Trainer:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    gathered = Gathered(held, dist.PrefixStore("gather", meeting.store), rank.rank, rank.device)
    group = None
    if rank.rank == 0:
        size = 1 + len(held.world.generators)
        group = NCCLWeightTransferEngine.trainer_init(
            {"master_address": "127.0.0.1", "master_port": port, "world_size": size}
        )
    return _Trainer(gathered, group)


class _Trainer:
    """Trainer 0 sends; the others give it what they hold."""

    def __init__(self, gathered: Gathered, group: Any) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES as size
        from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_NUM_BUFFERS as num

        self._gathered, self._group = gathered, group
        self.staging_bytes = size * num if group is not None else 0

    def move(self) -> int:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine

        if self._group is None:
            return sum(1 for _ in self._gathered.tensors())
        sent = 0

        def counted() -> Any:
            nonlocal sent
            for fqn, tensor in self._gathered.tensors():
                sent += tensor.nbytes
                yield fqn, tensor

        arguments = NCCLTrainerSendWeightsArgs(group=self._group, packed=True)
        NCCLWeightTransferEngine.trainer_send_weights(counted(), arguments)
        return sent

    def close(self) -> None:
        self._gathered.close()
        self._group = None


def _generator(rank: Rank, held: Held, port: int) -> _Generator:
    assert held.landing is not None
    return _Generator(rank, held, held.landing, port)


class _Generator:
    """vLLM's engine for one rank, which loads into the landing."""

    def __init__(self, rank: Rank, held: Held, landing: BenchLanding, port: int) -> None:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLWeightTransferEngine,
            NCCLWeightTransferInitInfo,
            NCCLWeightTransferUpdateInfo,
        )

        at, num = held.world.generators.index(rank.rank), len(held.world.generators)
        parallel = SimpleNamespace(data_parallel_index=0, world_size=num, rank=at)
        vllm_config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        model: Any = SimpleNamespace(load_weights=landing.load_misc)
        self._engine = NCCLWeightTransferEngine(WeightTransferConfig(), vllm_config, rank.device, model)
        self._engine.init_transfer_engine(NCCLWeightTransferInitInfo("127.0.0.1", port, 1, 1 + num))
        names, metas = list(held.table), list(held.table.values())
        dtypes = [str(meta.dtype).removeprefix("torch.") for meta in metas]
        shapes = [list(meta.shape) for meta in metas]
        self._update = NCCLWeightTransferUpdateInfo(names, dtypes, shapes, packed=True)
        self._num_bytes = sum(meta.num_bytes for meta in metas)
        self.staging_bytes = self._update.packed_buffer_size_bytes * self._update.packed_num_buffers

    def move(self) -> int:
        self._engine.receive_weights(self._update)
        return self._num_bytes

    def close(self) -> None:
        self._engine.shutdown()
