"""Which modules of a live model keep the format that the loader fills, found by looking and by trying."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nemo_rl.generator import compat


@dataclass(frozen=True, slots=True)
class Formats:
    """Every module with tensors or processing of its own, by name.

    Attributes:
        staged: module -> why its kernel format is not its load format; in the model's order.
        in_place: modules with processing whose live tensors have the load format; in the model's order.
        must_be_misc: module -> why it can be loaded by the engine's own loader alone.
        problems: what must refuse a plan.
    """

    staged: dict[str, str] = field(default_factory=dict)
    in_place: list[str] = field(default_factory=list)
    must_be_misc: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def classify(model: nn.Module, twin: nn.Module, vllm_config: Any) -> Formats:
    """Compare `model` with its storage-less twin, and try processing on the twin's modules where they look equal."""
    out, tried = Formats(), dict[tuple[object, ...], str | None]()
    twins = dict(twin.named_modules())
    for name, layer in model.named_modules():
        if name not in twins or type(twins[name]) is not type(layer):
            out.problems.append(f"{name}: the live module and its storage-less twin are not of one class")
            continue
        if compat.has_unknown_step(layer):
            out.problems.append(
                f"{name or 'the model'}: {type(layer).__name__} has a post-load step that may not repeat"
            )
        _classify(out, name, layer, twins[name], vllm_config, tried)
    out.problems.extend(_shared_storage(model, twin))
    return out


def _classify(
    out: Formats, name: str, layer: nn.Module, twin: nn.Module, vllm_config: Any, tried: dict[tuple[object, ...], Any]
) -> None:
    differs = _differences(layer, twin)
    processed = compat.has_processing(layer)
    if differs and not processed:
        out.problems.append(f"{name}: live tensors differ from the load format ({differs}) and no processing says why")
    elif differs:
        out.staged[name] = differs
        reason = _cannot_stage(layer, twin)
        if reason:
            out.must_be_misc[name] = reason
    elif processed:
        key = _signature(layer)
        if key not in tried:
            tried[key] = compat.processing_effect(twin, vllm_config, compat.load_device(layer))
        if tried[key] is None:
            out.in_place.append(name)
        else:
            out.staged[name] = tried[key]


def _differences(layer: nn.Module, twin: nn.Module) -> str:
    """What of the live parameters has not the load format; empty where all have it.

    What an attention layer has beside its load format it derives, after every load, from the weights of others.
    """
    live, load = dict(layer._parameters), dict(twin._parameters)
    if compat.is_deferred_attention_layer(layer):
        live = {name: tensor for name, tensor in live.items() if name in load}
    texts = []
    for name in sorted(live.keys() | load.keys()):
        a, b = live.get(name), load.get(name)
        if (a is None) != (b is None):
            texts.append(f"{name} exists only {'live' if b is None else 'when loading'}")
        elif a is not None and b is not None and (a.shape, a.stride(), a.dtype) != (b.shape, b.stride(), b.dtype):
            texts.append(f"{name} is {tuple(a.shape)} {a.dtype}, loaded as {tuple(b.shape)} {b.dtype}")
    return "; ".join(texts)


def _cannot_stage(layer: nn.Module, twin: nn.Module) -> str | None:
    """Why units cannot hold the module's load format, or None."""
    load = compat.load_format(layer)
    for name, meta in twin._parameters.items():
        if meta is None:
            continue
        held = layer._parameters.get(name) if compat.stays_live(name) else load.get(name)
        if held is None or (held.shape, held.stride(), held.dtype) != (meta.shape, meta.stride(), meta.dtype):
            return f"{name} of the module cannot be brought back to its load format"
    return None


def _signature(layer: nn.Module) -> tuple[object, ...]:
    """Modules with equal signatures are processed alike."""
    tensors: Mapping[str, torch.Tensor] = compat.own_tensors(layer)
    shapes = tuple((n, tuple(t.shape), t.stride(), t.dtype) for n, t in sorted(tensors.items()))
    method: Any = layer.quant_method  # type: ignore[union-attr]
    return type(layer), type(method), shapes


def _shared_storage(model: nn.Module, twin: nn.Module) -> list[str]:
    """Live parameters that share a storage although the loader fills them apart."""
    apart = {name for name, _ in twin.named_parameters()}
    holders: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if tensor.numel():
            holders.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    groups = ([n for n in names if n in apart] for names in holders.values())
    remedy = "start the engine with load_format dummy"
    return [
        f"{' and '.join(group)} share one storage although the loader fills each; {remedy}"
        for group in groups
        if len(group) > 1
    ]
