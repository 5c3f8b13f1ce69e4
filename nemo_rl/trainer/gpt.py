"""Megatron-Core's GPT model of a Hugging Face configuration, and its parallel groups."""

from __future__ import annotations

import dataclasses
import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_rl.trainer.cpu import fill_in_missing_names
from nemo_rl.trainer.model import Parallel, padded_vocabulary
from nemo_rl.trainer.shape import ModelShape

log = logging.getLogger(__name__)

fill_in_missing_names()


class RMSNorm(torch.nn.RMSNorm):
    """RMS norm whose gradient Megatron sums over the ranks of sequence parallelism.

    A mixture of experts under tensor parallelism needs sequence parallelism, which Megatron's own wrapper of torch's
    norm refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[assignment]


class CausalAttention(torch.nn.Module):
    """Torch's fused causal attention: no mask and no matrix of scores is kept, also without Transformer Engine."""

    def __init__(self, config: TransformerConfig, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """`query` `[S, B, heads, D]`, `key` and `value` `[S, B, groups, D]` -> `[S, B, heads * D]`."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2)


def init_parallel(parallel: Parallel, moe: bool, timeout: timedelta, seed: int) -> None:
    """Make Megatron's groups over the default process group and seed its generators."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=_virtual(parallel),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor if moe else parallel.tensor,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
        create_gloo_process_groups=False,
    )
    torch.manual_seed(seed)
    # Without CUDA there is no state of CUDA generators to track; nothing here draws random numbers in the forward pass.
    without_tracker = not torch.cuda.is_available()
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=without_tracker, force_reset_rng=True)


def transformer_config(shape: ModelShape, parallel: Parallel, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration. Weights start as zeros: they are always read from a checkpoint."""
    sparse = {}
    if shape.is_moe:
        sparse = dict(
            num_moe_experts=shape.num_experts,
            moe_router_topk=shape.experts_per_token,
            moe_ffn_hidden_size=shape.expert_ffn_size,
            moe_layer_freq=[int(s) for s in shape.sparse_layers],
            moe_shared_expert_intermediate_size=shape.shared_ffn_size or None,
            moe_shared_expert_gate=shape.shared_ffn_size > 0,
            moe_router_pre_softmax=not shape.top_k_renormalized,
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_router_dtype="fp32",
            # gloo has no uneven all-gather, which the alltoall dispatcher needs under expert tensor parallelism.
            moe_token_dispatcher_type="allgather",
        )
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=_virtual(parallel),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor if shape.is_moe else None,
        sequence_parallel=needs_sequence_parallel(shape, parallel),
        pipeline_model_parallel_layout=_stages(parallel),
        batch_p2p_sync=torch.cuda.is_available(),
        # Chunks make both neighbours of a stage send to it at once. Where both are one rank (two stages), Megatron's
        # batched exchange takes one's message for the other's; the overlapped one orders them.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        # Loss functions divide by the tokens of the global batch themselves; gradients are summed, never averaged.
        calculate_per_token_loss=True,
        # These fusions are kernels that need Transformer Engine or Apex.
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # These would compile code at the first step, which takes longer than small models train.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **sparse,
    )


def needs_sequence_parallel(shape: ModelShape, parallel: Parallel) -> bool:
    """Whether activations are split over the sequence: Megatron asks for it with experts under tensor parallelism."""
    return parallel.tensor > 1 and (shape.is_moe or parallel.sequence_parallel)


def build_chunks(config: TransformerConfig, shape: ModelShape, parallel: Parallel) -> list[GPTModel]:
    """This rank's part of the model, a module for each of its chunks of layers, on its device, in training mode.

    Call after `init_parallel`.
    """
    numbers = [None] if parallel.virtual_pipeline == 1 else range(parallel.virtual_pipeline)
    return [_build_chunk(config, shape, parallel, chunk) for chunk in numbers]


def _build_chunk(config: TransformerConfig, shape: ModelShape, parallel: Parallel, chunk: int | None) -> GPTModel:
    model = GPTModel(
        config,
        _block_spec(config, shape, chunk),
        vocab_size=padded_vocabulary(shape, parallel),
        max_sequence_length=shape.max_positions,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        parallel_output=True,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
    )
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return model.train()


def _block_spec(config: TransformerConfig, shape: ModelShape, chunk: int | None) -> TransformerBlockSubmodules:
    """Layers of this chunk: dense or sparse by their number in the whole model."""
    first = get_transformer_layer_offset(config, vp_stage=chunk)
    mine = shape.sparse_layers[first : first + get_num_layers_to_build(config, vp_stage=chunk)]
    kinds = {sparse: _layer_spec(config, sparse) for sparse in set(mine)}
    return TransformerBlockSubmodules(layer_specs=[kinds[sparse] for sparse in mine], layer_norm=RMSNorm)


def _layer_spec(config: TransformerConfig, sparse: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if sparse else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if config.qk_layernorm else {}
    attention = dataclasses.replace(layer.submodules.self_attention.submodules, core_attention=CausalAttention, **norms)
    layer.submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(layer.submodules.self_attention, submodules=attention),
    )
    return layer


def _virtual(parallel: Parallel) -> int | None:
    """Chunks of a stage, where there are several."""
    return parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None


def _stages(parallel: Parallel) -> list[list[str]] | None:
    if parallel.pipeline_layers is None or parallel.pipeline == 1:
        return None
    chunks = [["decoder"] * count for count in parallel.pipeline_layers]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]


def close_parallel() -> None:
    """Give Megatron's groups and the default process group up; idempotent."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
