"""Megatron's own Mamba2 hybrid model, built for its layout: its kernels are stand-ins that cannot run."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
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

from nemo_rl.trainer import gpt
from nemo_rl.trainer.layers import CausalAttention, RMSNorm
from nemo_rl.trainer.model import Parallel, padded_vocabulary
from nemo_rl.trainer.shape import Hybrid, ModelShape

_KERNELS = "megatron.core.inference.contexts.attention_context.triton"


class GatedNorm(torch.nn.Module):
    """Weights of the mixer's norm, split over tensor-parallel ranks as Megatron's are."""

    def __init__(self, size: int, dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))

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

    stand_ins = (
        mock.patch.multiple(mamba_mixer, HAVE_MAMBA_SSM=True, ExtendedRMSNorm=GatedNorm),
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
