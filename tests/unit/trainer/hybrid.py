"""Megatron's own Mamba2 hybrid model; torch stands in for the kernels that it needs."""

from __future__ import annotations

import dataclasses
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from nemo_rl.checkpoint import read_into
from nemo_rl.trainer import gpt
from nemo_rl.trainer.cpu import megatron_on_cpu
from nemo_rl.trainer.layers import CausalAttention, RMSNorm
from nemo_rl.trainer.layout import MegatronSource
from nemo_rl.trainer.model import Parallel, model_shape, padded_vocabulary, read_config
from nemo_rl.trainer.shape import Hybrid, ModelShape

_KERNELS = "megatron.core.inference.contexts.attention_context.triton"


def scan(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    decay: torch.Tensor,
    D: torch.Tensor,  # noqa: N803  # the kernel's name
    *,
    headdim: int,
    ngroups: int,
    **_: Any,
) -> torch.Tensor:
    """The Mamba2 recurrence token by token, gated: `projected` `[B, L, z + x + B + C + dt]` -> `[B, L, x]`."""
    heads = dt_bias.numel()
    inner, convolved = heads * headdim, conv_weight.shape[0]
    states = (convolved - inner) // (2 * ngroups)
    z, xbc, dt = projected.split([inner, convolved, heads], -1)
    padded = torch.nn.functional.pad(xbc.transpose(1, 2), (conv_weight.shape[1] - 1, 0))
    xbc = torch.nn.functional.conv1d(padded, conv_weight[:, None], conv_bias, groups=convolved).transpose(1, 2)
    x, b, c = torch.nn.functional.silu(xbc).split([inner, ngroups * states, ngroups * states], -1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (t.unflatten(-1, (ngroups, states)).repeat_interleave(heads // ngroups, 2) for t in (b, c))
    dt = torch.nn.functional.softplus(dt + dt_bias)
    state, out = x.new_zeros(x.shape[0], heads, headdim, states), []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        state = state * torch.exp(step * decay[:, None, None]) + step * x[:, t, :, :, None] * b[:, t, :, None]
        out.append((state * c[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(out, 1).flatten(2) * torch.nn.functional.silu(z)


class GroupNorm(torch.nn.Module):
    """RMS norm of each group of a mixer's output, its weights split over tensor-parallel ranks as Megatron's are."""

    def __init__(self, size: int, eps: float, group_size: int, dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
        self._eps, self._group = eps, group_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, self._group))
        scaled = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self._eps)
        return scaled.flatten(-2) * self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


class WholeLinear(torch.nn.Linear):
    """Transformer Engine's linear layer in the form that every rank holds whole."""

    def __init__(self, inputs: int, outputs: int, *, parallel_mode: str, config: TransformerConfig, **_: Any) -> None:
        assert parallel_mode == "duplicated"
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(inputs), None


def hybrid_logits(rank: int, meet: str, folder: str, parallel: Parallel) -> torch.Tensor:
    """In a child: logits of the checkpoint in `folder`, which the family rule brought into Megatron's model."""
    reference = torch.load(Path(folder) / "reference.pt")
    shape = model_shape(read_config(folder))
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=parallel.world_size)
    with megatron_on_cpu(), torch.no_grad():
        gpt.init_parallel(parallel, shape.is_moe, timedelta(seconds=60), 1)
        model = build_hybrid(shape, parallel, torch.float32)
        read_into(MegatronSource([model], shape, torch.float32).holdings(), folder)
        ids = reference["ids"]
        padded = torch.nn.functional.pad(ids, (0, -ids.shape[1] % parallel.tensor))
        positions = torch.arange(padded.shape[1]).expand_as(padded)
        logits = gather_from_tensor_model_parallel_region(model(padded, positions, None))
    gpt.close_parallel()
    return logits[:, : ids.shape[1]]


def build_hybrid(shape: ModelShape, parallel: Parallel, dtype: torch.dtype) -> torch.nn.Module:
    """This rank's MambaModel."""
    hybrid = shape.hybrid
    assert hybrid is not None
    stub = ModuleType(f"{_KERNELS}.tensor_ops")
    vars(stub).update(dict.fromkeys(("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")))
    sys.modules.setdefault(_KERNELS, ModuleType(_KERNELS))
    sys.modules.setdefault(stub.__name__, stub)
    from megatron.core.models.mamba import MambaModel
    from megatron.core.ssm import mamba_block, mamba_mixer

    mamba_mixer.mamba_split_conv1d_scan_combined = scan  # looked up when the model runs
    stand_ins = (
        mock.patch.multiple(mamba_mixer, HAVE_MAMBA_SSM=True, ExtendedRMSNorm=GroupNorm),
        mock.patch.object(mamba_block, "TENorm", RMSNorm),
        mock.patch.multiple(moe_layer, HAVE_TE=True, TELinear=WholeLinear, create=True),
    )
    config = _config(shape, hybrid, parallel, dtype)
    with stand_ins[0], stand_ins[1], stand_ins[2]:
        return MambaModel(
            config,
            _stack_spec(shape),
            vocab_size=padded_vocabulary(shape, parallel),
            max_sequence_length=shape.max_positions,
            hybrid_override_pattern=hybrid.pattern,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )


def _config(shape: ModelShape, hybrid: Hybrid, parallel: Parallel, dtype: torch.dtype) -> TransformerConfig:
    """The trainer's configuration with what a hybrid adds; uneven stages by Megatron's options for them."""
    uneven = parallel.pipeline_layers
    changes: dict[str, Any] = dict(
        gated_linear_unit=False,
        activation_func=squared_relu,
        is_hybrid_model=True,
        mamba_num_heads=hybrid.num_heads,
        mamba_head_dim=hybrid.head_dim,
        mamba_num_groups=hybrid.num_groups,
        mamba_state_dim=hybrid.state_dim,
        moe_latent_size=hybrid.expert_latent_size or None,
        moe_layer_freq=1,
        num_layers_in_first_pipeline_stage=uneven[0] if uneven else None,
        num_layers_in_last_pipeline_stage=uneven[-1] if uneven else None,
    )
    plain = dataclasses.replace(parallel, pipeline_layers=None)
    even = dataclasses.replace(shape, num_layers=parallel.pipeline)  # the trainer's own check asks for equal stages
    made = gpt.transformer_config(even, plain, dtype)
    given = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.init}
    return TransformerConfig(**{**given, **changes, "num_layers": shape.num_layers})


def _stack_spec(shape: ModelShape) -> ModuleSpec:
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer

    add = get_bias_dropout_add
    mixer = ModuleSpec(
        MambaMixer, submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    )
    attention = ModuleSpec(
        SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=CausalAttention, linear_proj=RowParallelLinear
        ),
    )
    mlp = ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
    experts = get_moe_module_spec(use_te=False, num_experts=shape.num_experts or 1, moe_grouped_gemm=False)
    layers = MambaStackSubmodules(
        mamba_layer=ModuleSpec(MambaLayer, submodules=MambaLayerSubmodules(norm=RMSNorm, mixer=mixer, mamba_bda=add)),
        attention_layer=ModuleSpec(
            TransformerLayer,
            submodules=TransformerLayerSubmodules(input_layernorm=RMSNorm, self_attention=attention, self_attn_bda=add),
        ),
        mlp_layer=ModuleSpec(
            MLPLayer, submodules=TransformerLayerSubmodules(pre_mlp_layernorm=RMSNorm, mlp=mlp, mlp_bda=add)
        ),
        moe_layer=ModuleSpec(
            MoETransformerLayer,
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=RMSNorm, mlp=experts, mlp_bda=add),
        ),
    )
    return ModuleSpec(MambaStack, submodules=layers)
