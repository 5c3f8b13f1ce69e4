"""Megatron-Core's GPT model of a Hugging Face configuration, and its parallel groups."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from nemo_rl.trainer.cpu import fill_in_missing_names
from nemo_rl.trainer.layers import CausalAttention, block_spec, draft_spec
from nemo_rl.trainer.model import Parallel, padded_vocabulary
from nemo_rl.trainer.shape import ModelShape

log = logging.getLogger(__name__)

fill_in_missing_names()


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
    kind = TransformerConfig if shape.latent is None else MLATransformerConfig
    return kind(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        # Loss functions divide by the tokens of the global batch themselves; gradients are summed, never averaged.
        calculate_per_token_loss=True,
        **_dense_options(shape),
        **_parallel_options(shape, parallel),
        **_WITHOUT_KERNELS,
        **(_sparse_options(shape) if shape.is_moe else {}),
        **(_latent_options(shape) if shape.latent is not None else {}),
    )


_WITHOUT_KERNELS: Mapping[str, bool] = dict(
    # These fusions are kernels that need Transformer Engine or Apex.
    masked_softmax_fusion=False,
    gradient_accumulation_fusion=False,
    apply_rope_fusion=False,
    persist_layer_norm=False,
    # These would compile code at the first step, which takes longer than small models train.
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
)


def _dense_options(shape: ModelShape) -> dict[str, Any]:
    return dict(
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
    )


def _parallel_options(shape: ModelShape, parallel: Parallel) -> dict[str, Any]:
    return dict(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=_virtual(parallel),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor if shape.is_moe else None,
        sequence_parallel=needs_sequence_parallel(shape, parallel),
        pipeline_model_parallel_layout=_stages(shape, parallel),
        batch_p2p_sync=torch.cuda.is_available(),
        # Chunks make both neighbours of a stage send to it at once. Where both are one rank (two stages), Megatron's
        # batched exchange takes one's message for the other's; the overlapped one orders them.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
    )


def _sparse_options(shape: ModelShape) -> dict[str, Any]:
    options = dict(
        num_moe_experts=shape.num_experts,
        moe_router_topk=shape.experts_per_token,
        moe_ffn_hidden_size=shape.expert_ffn_size,
        moe_layer_freq=[int(s) for s in shape.sparse_layers],
        moe_shared_expert_intermediate_size=shape.shared_ffn_size or None,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_dtype="fp32",
        # gloo has no uneven all-gather, which the alltoall dispatcher needs under expert tensor parallelism.
        moe_token_dispatcher_type="allgather",
    )
    router = shape.router
    if router is None:
        gate = shape.shared_ffn_size > 0
        return options | dict(moe_shared_expert_gate=gate, moe_router_pre_softmax=not shape.top_k_renormalized)
    return options | dict(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=router.num_groups if router.num_groups > 1 else None,
        moe_router_group_topk=router.top_groups if router.num_groups > 1 else None,
        moe_router_topk_scaling_factor=router.scale,
    )


def _latent_options(shape: ModelShape) -> dict[str, Any]:
    latent, yarn = shape.latent, shape.yarn
    assert latent is not None
    options = dict(
        q_lora_rank=latent.query_rank,
        kv_lora_rank=latent.kv_rank,
        qk_head_dim=latent.nope_dim,
        qk_pos_emb_head_dim=latent.rope_dim,
        v_head_dim=latent.value_dim,
        rotary_base=shape.rope_theta,
        mtp_num_layers=shape.num_draft_layers or None,
    )
    if yarn is None:
        return options | dict(rope_type="rope", rotary_scaling_factor=1.0)
    return options | dict(
        rope_type="yarn",
        rotary_scaling_factor=yarn.factor,
        original_max_position_embeddings=yarn.original_max_positions,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
        mscale=yarn.mscale,
        mscale_all_dim=yarn.mscale_all_dim,
    )


def needs_sequence_parallel(shape: ModelShape, parallel: Parallel) -> bool:
    """Whether activations are split over the sequence; experts and latent attention under tensor parallelism ask it."""
    return parallel.tensor > 1 and (shape.is_moe or shape.latent is not None or parallel.sequence_parallel)


def build_chunks(config: TransformerConfig, shape: ModelShape, parallel: Parallel) -> list[GPTModel]:
    """This rank's part of the model, a module for each of its chunks of layers, on its device, in training mode.

    Call after `init_parallel`.
    """
    numbers = [None] if parallel.virtual_pipeline == 1 else range(parallel.virtual_pipeline)
    chunks = [_build_chunk(config, shape, parallel, chunk) for chunk in numbers]
    if shape.num_draft_layers:
        _freeze_draft(chunks[-1])
    return chunks


def _freeze_draft(model: GPTModel) -> None:
    """Hold draft layers without running them: their loss needs labels, which reinforcement learning does not have."""
    model.config.mtp_num_layers = None  # on every stage: the first one would share gradients with the draft layers
    if not model.mtp_process:
        return
    model.mtp.requires_grad_(False)
    if not model.pre_process:
        del model.embedding  # the draft layers' copy, which would no longer follow the first stage's
    model.mtp_process = False


def _build_chunk(config: TransformerConfig, shape: ModelShape, parallel: Parallel, chunk: int | None) -> GPTModel:
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk)
    model = GPTModel(
        config,
        block_spec(config, shape, chunk),
        vocab_size=padded_vocabulary(shape, parallel),
        max_sequence_length=shape.max_positions,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        parallel_output=True,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=last,
        mtp_block_spec=draft_spec(config, shape) if last and shape.num_draft_layers else None,
        vp_stage=chunk,
    )
    for attention in attentions([model]):
        attention.hold_cache_scales(shape.cache_scales)
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return model.train()


def attentions(chunks: Sequence[torch.nn.Module]) -> list[CausalAttention]:
    """Every attention of this rank's layers, in order."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, CausalAttention)]


def _virtual(parallel: Parallel) -> int | None:
    """Chunks of a stage, where there are several."""
    return parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None


def _stages(shape: ModelShape, parallel: Parallel) -> list[list[str]] | None:
    """What each chunk holds, where stages are not equal."""
    if not parallel.uneven or parallel.pipeline == 1:
        return None
    chunks = [["decoder"] * count for count in parallel.chunks(shape.num_layers)]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], *["mtp"] * shape.num_draft_layers, "loss"]]


def close_parallel() -> None:
    """Give Megatron's groups and the default process group up; idempotent."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
