"""All that touches the inside of vLLM: load format and kernel format of a module, and the way from one to the other.

A module's tensors have the load format when the checkpoint loader fills them. Its `quant_method` may then process them
into what kernels read. vLLM's layerwise reload knows the way back, one module at a time; the functions here drive that
machinery for single modules and mend the cases in which it leaves old bytes behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, materialize_layer, restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers, get_layer_tensors
from vllm.utils.torch_utils import is_quantized_kv_cache, set_default_torch_dtype

try:
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
except ImportError:  # vLLM 0.25

    def is_deferred_attention_layer(layer: nn.Module) -> bool:
        from vllm.model_executor.layers.attention import Attention, MLAAttention, MMEncoderAttention

        return isinstance(layer, (Attention, MLAAttention, MMEncoderAttention)) and _has_own_step(layer)


Ran = Callable[[nn.Module], None]


@contextmanager
def inside(vllm_config: Any) -> Iterator[None]:
    """vLLM's code runs under `vllm_config`, without gradients, with the default dtype that models are built with."""
    dtype = set_default_torch_dtype(vllm_config.model_config.dtype)
    with torch.no_grad(), dtype, set_current_vllm_config(vllm_config):
        yield


def own_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the module itself, by attribute name."""
    return get_layer_tensors(layer)


def stays_live(name: str) -> bool:
    """Tensors that a reload never takes off a module; loaders write them in place."""
    return name in SKIP_TENSORS


def has_processing(layer: nn.Module) -> bool:
    """Whether the module's quantization method does anything of its own after loading."""
    method = getattr(layer, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase):
        return False
    return type(method).process_weights_after_loading is not QuantizeMethodBase.process_weights_after_loading


def has_unknown_step(layer: nn.Module) -> bool:
    """Whether the module has a post-load step of its own that is not attention's; nobody says when to repeat it."""
    if isinstance(layer, QuantizeMethodBase):  # some are modules too; their layer's step is theirs
        return False
    return _has_own_step(layer) and not is_deferred_attention_layer(layer)


def _has_own_step(layer: nn.Module) -> bool:
    return callable(getattr(layer, "process_weights_after_loading", None))


def load_format(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Meta tensors that the loader fills, as recorded when the module was built; without those that stay live."""
    params, buffers = layerwise.get_layerwise_info(layer).restore_metadata
    return {**params, **buffers}


def load_device(layer: nn.Module) -> torch.device:
    return layerwise.get_layerwise_info(layer).restore_device


def scale_rules(model: nn.Module) -> dict[str, str]:
    """Scales and zero points of attention that a checkpoint may lack, with the reason.

    A quantized KV cache needs `k_scale` and `v_scale`; for all others vLLM has a constant.
    """
    rules = {}
    for prefix, layer in model.named_modules():
        if not is_deferred_attention_layer(layer) or not has_processing(layer):
            continue
        quantized = is_quantized_kv_cache(layer.kv_cache_dtype)  # type: ignore[arg-type]
        for name in layer._parameters.keys() - ({"k_scale", "v_scale"} if quantized else set()):
            why = "a constant of the engine where no tensor brings it" if quantized else "the KV cache is not quantized"
            rules[f"{prefix}.{name}"] = why
    return rules


def adapter_names(model: nn.Module) -> Any:
    """The mapper from Hugging Face names to those of the model's LoRA layers, or None where they are the same."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    return mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper.get_unstacked_mapper()


def unwrap_loaders(model: nn.Module) -> None:
    """Let a twin's weight loaders fill its parameters themselves.

    Layers that quantize while they load keep what they are given until they are whole, and fill other tensors.
    """
    for layer in model.modules():
        for tensor in own_tensors(layer).values():
            loader = layerwise._get_original_loader(tensor)
            if loader is not layerwise._get_weight_loader(tensor):
                tensor.weight_loader = loader  # type: ignore[attr-defined]
        layerwise.get_layerwise_info(layer).reset()


# ---- one module: load format out, kernel format back


def unprocess(layer: nn.Module) -> None:
    """Put the module's tensors aside and restore their load format on the meta device, ready to load."""
    info = layerwise.get_layerwise_info(layer)
    if info.can_load():
        raise RuntimeError(f"{type(layer).__name__} is already being loaded")
    info.kernel_tensors = get_layer_params_buffers(layer)
    info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
    restore_layer_on_meta(layer, info)
    layerwise.initialize_online_processing(layer)


def stage(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Load-format tensors of the module with storage of their own, filled with zeros; live ones as they are."""
    if is_deferred_attention_layer(layer):
        return _stage_scales(layer)
    unprocess(layer)
    info = layerwise.get_layerwise_info(layer)
    fresh = {name for name, tensor in own_tensors(layer).items() if tensor.is_meta}
    materialize_layer(layer, info)
    with torch.no_grad():
        for name in fresh:
            own_tensors(layer)[name].zero_()
        for name, kernel in info.kernel_tensors[1].items():  # buffers hold constants that no loader brings
            if name in fresh and _same_format(kernel, own_tensors(layer)[name]):
                own_tensors(layer)[name].copy_(kernel)
    return own_tensors(layer)


def _stage_scales(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Scales of an attention layer to be loaded, beside what it keeps; they hold what says that no tensor came."""
    info = layerwise.get_layerwise_info(layer)
    info.kernel_tensors = get_layer_params_buffers(layer)
    info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
    with info.restore_device:
        layer.quant_method.create_weights(layer)
    info.load_numel_total = 0
    return own_tensors(layer)


def restore(layer: nn.Module) -> None:
    """Undo `unprocess` or `stage`: kernel tensors come back with the bytes that they had."""
    info = layerwise.get_layerwise_info(layer)
    if info.can_load() and info.kernel_tensors is not None:
        layerwise._place_kernel_tensors(layer, info)
        info.reset()


def process_staged(layer: nn.Module, ran: Ran) -> None:
    """Process a staged module into its kernel tensors, whose storage stays the same, and free the staging."""
    info = layerwise.get_layerwise_info(layer)
    with hooked([layer], ran):
        if not is_deferred_attention_layer(layer):
            layerwise._layerwise_process(layer, info)
            return
        layer.quant_method.process_weights_after_loading(layer)
    layerwise._copy_and_restore_kernel_tensors(layer, info)
    info.reset()


def reprocess(layer: nn.Module, ran: Ran) -> None:
    """Process a module again whose live tensors have the load format.

    Raises:
        RuntimeError: processing gave a tensor another storage, which captured graphs would not see.
    """
    vars(layer).pop("_already_called_process_weights_after_loading", None)
    with _same_storage(layer), hooked([layer], ran):
        layer.quant_method.process_weights_after_loading(layer)


@contextmanager
def _same_storage(layer: nn.Module) -> Iterator[None]:
    """On exit, tensors that are plain attributes have the storage that they had on entry, with their new values.

    Raises:
        RuntimeError: a parameter or a buffer has another storage, or an attribute another shape or dtype.
    """
    before = {name: tensor.data_ptr() for name, tensor in own_tensors(layer).items()}
    plain = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    yield
    after = {name: tensor.data_ptr() for name, tensor in own_tensors(layer).items()}
    replaced = [name for name in before if after.get(name) != before[name]]
    for name, old in plain.items():
        new = vars(layer).get(name)
        if not isinstance(new, torch.Tensor) or not _same_format(old, new):
            replaced.append(name)
        elif new.data_ptr() != old.data_ptr():
            old.copy_(new)
            setattr(layer, name, old)
    if replaced:
        raise RuntimeError(f"processing of {type(layer).__name__} gave {', '.join(replaced)} another storage")


@contextmanager
def hooked(layers: Iterable[nn.Module], ran: Ran) -> Iterator[None]:
    """Inside, processing of `layers` is complete on every run and reported to `ran`.

    Expert kernels have a second step that vLLM runs only when it builds the kernel, so that a second load would leave
    expert weights in the format between the two. Here it runs whenever vLLM skipped it.
    """
    methods = {id(m): m for m in (getattr(layer, "quant_method", None) for layer in layers) if m is not None}
    for method in methods.values():
        _hook(method, ran)
    try:
        yield
    finally:
        for method in methods.values():
            del method.process_weights_after_loading


def _hook(method: Any, ran: Ran) -> None:
    process = method.process_weights_after_loading

    def run(layer: nn.Module) -> None:
        experts = _experts_of(method)
        calls: list[bool] = []
        if experts is None:
            process(layer)
        else:
            with _spied(experts, calls):
                process(layer)
            if not calls and _experts_of(method) is experts:
                experts.process_weights_after_loading(layer)
        ran(layer)

    method.process_weights_after_loading = run


def _experts_of(method: Any) -> Any:
    kernel = getattr(method, "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    return experts if callable(getattr(experts, "process_weights_after_loading", None)) else None


@contextmanager
def _spied(experts: Any, calls: list[bool]) -> Iterator[None]:
    process = experts.process_weights_after_loading

    def run(layer: nn.Module) -> None:
        calls.append(True)
        process(layer)

    experts.process_weights_after_loading = run
    try:
        yield
    finally:
        del experts.process_weights_after_loading


# ---- evidence


def processing_effect(twin: nn.Module, vllm_config: Any, device: torch.device) -> str | None:
    """Process a storage-less module on random bytes; why its load format is not what kernels read, or None.

    The module gets its meta tensors back. Anything that cannot be told counts as an effect.
    """
    saved = dict(twin._parameters), dict(twin._buffers)
    try:
        with inside(vllm_config), device:
            before = {name: _materialize_random(twin, name) for name in own_tensors(twin)}
            twin.quant_method.process_weights_after_loading(twin)
            return _difference(before, own_tensors(twin))
    except Exception as error:  # foreign code on a module out of its model: any failure means "unknown"
        return f"its processing cannot be tried alone ({type(error).__name__}: {error})"
    finally:
        twin._parameters.clear()
        twin._buffers.clear()
        twin._parameters.update(saved[0])
        twin._buffers.update(saved[1])


def _materialize_random(twin: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(tensor now on the module, copy of its bytes)."""
    meta = own_tensors(twin)[name]
    real = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
    if meta.dtype.is_floating_point:
        real.copy_(torch.randn(meta.shape))
    elif meta.dtype is torch.bool:
        real.random_(0, 2)
    else:
        real.random_(0, 100)
    copy = real.clone()
    real.__class__ = meta.__class__
    real.__dict__ = meta.__dict__.copy()
    (twin._parameters if name in twin._parameters else twin._buffers)[name] = real  # type: ignore[assignment]
    return real, copy


def _difference(before: dict[str, tuple[torch.Tensor, torch.Tensor]], after: dict[str, torch.Tensor]) -> str | None:
    if set(before) != set(after):
        return f"processing turns tensors {sorted(before)} into {sorted(after)}"
    for name, (tensor, copy) in before.items():
        new = after[name]
        if not _same_format(copy, new):
            return f"processing makes {name} {new.dtype} {tuple(new.shape)}, loaded as {copy.dtype} {tuple(copy.shape)}"
        if new.data_ptr() != tensor.data_ptr() or not same_bytes(new, copy):
            return f"processing rearranges {name}"
    return None


def _same_format(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit; NaNs and signed zeros included."""
    one, two = (t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(one, two)


# ---- whole model


def load_whole(
    model: nn.Module, model_config: Any, layers: list[nn.Module], tensors: Iterable[tuple[str, torch.Tensor]], ran: Ran
) -> None:
    """Run the model's own loader over `tensors` for `layers`, processing each as soon as it is whole."""
    with hooked(layers, ran):
        for layer in layers:
            unprocess(layer)
        # A loader keeps what it is given until the module is whole; the sender reuses memory earlier.
        model.load_weights((name, tensor.clone()) for name, tensor in tensors)
        layerwise.finalize_layerwise_processing(model, model_config)


def finish_model(model: nn.Module, model_config: Any, ran: Ran) -> None:
    """Let attention layers derive again what they keep besides their modules' weights; each is reported to `ran`.

    Raises:
        RuntimeError: a derived tensor has another storage, which captured graphs would not see.
    """
    for layer in model.modules():
        if is_deferred_attention_layer(layer):
            with _same_storage(layer):
                layer.process_weights_after_loading(model_config.dtype)
            ran(layer)
