"""The schema of a run's configuration: every key, its default and what it means. Keys follow NeMo RL where it has one.

`config.py` makes a `Config` of a YAML file, overrides and the environment; `preflight.py` says what cannot work.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Megatron's Adam: `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_eps`.

    The rate falls from `lr` in a straight line to `min_lr` at the last step; equal means constant. Gradients are scaled
    to a norm of at most `clip_grad`.
    """

    lr: float = 1e-4
    min_lr: float = 1e-4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True, slots=True)
class MegatronConfig:
    """Layout of the trainers. Their data-parallel size is what their number of ranks leaves over.

    Attention and dense MLPs are cut over `tensor_model_parallel_size` ranks, sequences over `context_parallel_size`
    and, with `sequence_parallel`, between those cuts over the tensor-parallel ranks. Experts are dealt to
    `expert_model_parallel_size` ranks, and each is cut over `expert_tensor_parallel_size`.

    Layers are spread over `pipeline_model_parallel_size` stages, alike unless `num_layers_in_first_pipeline_stage` or
    `num_layers_in_last_pipeline_stage` say otherwise, the embedding or the loss counts as a layer
    (`account_for_embedding_in_pipeline_split`, `account_for_loss_in_pipeline_split`), or `pipeline_layers` gives the
    layers of each chunk: of the first chunk of every stage, then of the second; the first and the last may be 0. A
    stage has `virtual_pipeline_model_parallel_size` chunks.

    `moe_router_bias_update_rate` is how far a step moves the correction bias of a sigmoid router towards even loads.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    pipeline_layers: tuple[int, ...] | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    moe_router_bias_update_rate: float = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, slots=True)
class InferenceResources:
    """Devices of the generators: `gpus_per_node` on each of `num_nodes` nodes (null for one).

    A null `gpus_per_node` means all that the smallest trainer layout leaves over.
    """

    gpus_per_node: int | None = None
    num_nodes: int | None = None


@dataclass(frozen=True, slots=True)
class ColocatedConfig:
    """`enabled`: each device holds a trainer rank and a generator rank, both with their memory all the time."""

    enabled: bool = False
    resources: InferenceResources = field(default_factory=InferenceResources)


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """One engine, cut over `tensor_parallel_size` ranks, with weights in `precision` (`float32` or `bfloat16`).

    `kv_cache_memory_bytes` is the KV cache of a rank; null for 64 MiB on the CPU, and on a GPU for what weights leave
    of the share `gpu_memory_utilization`, which the engine then measures: nobody else may use the GPU meanwhile.
    `kv_cache_dtype` is its type, as vLLM names it. A request has at most `max_model_len` tokens with its prompt, and a
    step at most `max_num_seqs` requests. On GPUs, `enforce_eager=false` captures CUDA graphs.

    `load_format=dummy` starts engines from random weights; the refit before the first step brings the real ones.
    `moe_backend` names the kernels of experts, as vLLM does: `triton` reads them as they are loaded, others rearrange.
    `quantization` names how engines quantize what trainers send, as vLLM does (`fp8_per_channel`); null leaves it.
    """

    tensor_parallel_size: int = 1
    precision: str = "float32"
    gpu_memory_utilization: float = 0.5
    kv_cache_memory_bytes: int | None = None
    max_model_len: int = 64
    max_num_seqs: int = 256
    enforce_eager: bool = True
    moe_backend: str = "auto"
    load_format: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Samples of at most `max_new_tokens`, drawn at `temperature`. `backend` is vllm."""

    backend: str = "vllm"
    max_new_tokens: int = 16
    temperature: float = 1.0
    colocated: ColocatedConfig = field(default_factory=ColocatedConfig)
    vllm_cfg: VllmConfig = field(default_factory=VllmConfig)


@dataclass(frozen=True, slots=True)
class RefitConfig:
    """Knobs of the session. `transport` is auto, peer, nccl, m2n, gloo or golden; the conventional refit is
    `broadcast`, which `policy.nccl_xfer_refit=false` selects.

    A message has at most `bucket_bytes`, and `num_streams` of them, at most 64, are in flight each way. No phase of a
    refit may take longer than `deadline_s`. `verify` compares digests of every piece after every refit.
    `verify_against_checkpoint` compares what trainers hold before their first step with the files of `model_name`, and
    what generators loaded from them with what the first refit brings. `measure_links` is auto (where `transport=auto`
    has a choice and `cache_dir` holds no measurement of these hosts), always or never; `cache_dir` is on the host of
    the first trainer, empty for none.
    """

    transport: str = "auto"
    bucket_bytes: int = 16 << 20
    num_streams: int = 2
    deadline_s: float = 120.0
    verify: bool = True
    verify_against_checkpoint: bool = False
    measure_links: str = "auto"
    cache_dir: str = "~/.cache/nemo_rl"


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """`model_name` is a checkpoint folder, or `start_model` for the model that the section of that name describes.

    Trainers hold it in `precision` (`float32` or `bfloat16`), for sequences of at most `max_total_sequence_length`
    tokens. An optimizer step takes `train_global_batch_size` samples of all trainers; a trainer's pass takes at most
    `train_micro_batch_size` with gradients and `logprob_batch_size` without. `nccl_xfer_refit` moves weights shard to
    shard; false gathers, broadcasts and loads them.
    """

    model_name: str = "start_model"
    precision: str = "float32"
    train_global_batch_size: int = 256
    train_micro_batch_size: int = 64
    logprob_batch_size: int = 128
    max_total_sequence_length: int = 64
    megatron_cfg: MegatronConfig = field(default_factory=MegatronConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    nccl_xfer_refit: bool = True
    refit: RefitConfig = field(default_factory=RefitConfig)


@dataclass(frozen=True, slots=True)
class AsyncGrpoConfig:
    """With `enabled`, the rollout of the next step while trainers train on this one.

    A sample more than `max_trajectory_age_steps` optimizer steps older than the weights that it would train ends the
    run. `in_flight_weight_updates` lets a refit come between two steps of an engine, whose requests go on with their
    tokens; false waits for the rollout's end first. Requests go on over the keys and values of the weights that made
    them, or over those of the new weights where `recompute_kv_cache_after_weight_updates`.
    """

    enabled: bool = False
    max_trajectory_age_steps: int = 1
    in_flight_weight_updates: bool = False
    recompute_kv_cache_after_weight_updates: bool = False


@dataclass(frozen=True, slots=True)
class GrpoConfig:
    """`max_num_steps` steps, each with `num_generations_per_prompt` samples of each of `num_prompts_per_step` prompts.

    A sample's advantage is its reward less the mean of its prompt's samples, or of the others of them with
    `use_leave_one_out_baseline`, and with `normalize_rewards` in units of their standard deviation. `seed` makes the
    prompts and the draws. `refit_every` counts steps between refits; 0 never refits, so that generators keep the start
    weights. No step of trainers or engines may take longer than `step_deadline_s`.

    `max_gen_kl_error` ends the run where samples of the trainers' own weights differ more from what trainers compute:
    the layouts of both sides then agree on something that the model is not.
    """

    num_prompts_per_step: int = 32
    num_generations_per_prompt: int = 8
    max_num_steps: int = 40
    normalize_rewards: bool = True
    use_leave_one_out_baseline: bool = True
    refit_every: int = 1
    max_gen_kl_error: float = 0.1
    async_grpo: AsyncGrpoConfig = field(default_factory=AsyncGrpoConfig)
    seed: int = 42
    step_deadline_s: float = 300.0


@dataclass(frozen=True, slots=True)
class LossConfig:
    """Clipped policy gradient with a KL penalty.

    Ratios to the policy before the step are clipped to `[1 - ratio_clip_min, 1 + ratio_clip_max]`;
    `reference_policy_kl_penalty` weighs the divergence from the start weights. `token_level_loss` is the mean over all
    tokens, else over samples. `use_importance_sampling_correction` weighs tokens by p_trainer / p_generator, of at most
    `truncated_importance_sampling_ratio`; null for no cap.
    """

    reference_policy_kl_penalty: float = 0.01
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.28
    token_level_loss: bool = True
    use_importance_sampling_correction: bool = True
    truncated_importance_sampling_ratio: float | None = 2.0


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """`num_nodes` nodes with `gpus_per_node` devices each; on a machine without GPUs virtual ones, one for each rank.

    `address` is that of a running Ray cluster (`auto` or host:port); null starts one on this machine, with an object
    store of `object_store_bytes`. `device` is auto (GPUs where torch finds some), cpu or cuda. Nodes, devices, actors
    and the start model are waited for `start_deadline_s` each.
    """

    gpus_per_node: int = 4
    num_nodes: int = 1
    address: str | None = None
    device: str = "auto"
    object_store_bytes: int = 128 << 20
    start_deadline_s: float = 240.0


@dataclass(frozen=True, slots=True)
class DataConfig:
    """A `task` made and checked by a program: `sort` (digits) or `add` (decimal numbers).

    A problem has `min_items` to `max_items` items: digits to sort, or digits of each of two summands.
    """

    task: str = "sort"
    min_items: int = 4
    max_items: int = 8


@dataclass(frozen=True, slots=True)
class StartModelConfig:
    """The model that a run starts from: random weights and a short supervised warm-up, kept under `cache_dir`.

    `kind` is dense or moe. `hidden_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads`,
    `num_key_value_heads`, `head_dim`, `tie_word_embeddings`, and with experts `num_experts`, `num_experts_per_tok` and
    `moe_intermediate_size` are Qwen3's. The warm-up takes `warmup_steps` of `warmup_batch_size` demonstrations at a
    rate that falls from `warmup_lr` to 0; `seed` makes the weights and the demonstrations.

    `warmup_reversed` is the share of demonstrations whose answer stands back to front, as a pretraining corpus shows
    more than one way to answer; which way is rewarded is left for GRPO to find.
    """

    kind: str = "dense"
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    tie_word_embeddings: bool = False
    warmup_steps: int = 300
    warmup_reversed: float = 0.5
    warmup_batch_size: int = 64
    warmup_lr: float = 2e-3
    seed: int = 0
    cache_dir: str = "outputs/models"


@dataclass(frozen=True, slots=True)
class LoggerConfig:
    """A run's files lie in `log_dir`/`run_name`; null names it after its configuration file and the time it started.

    `tensorboard_enabled` writes its scalars for TensorBoard as well, `progress` shows a bar on terminals, and `level`
    (DEBUG to ERROR) is that of `run.log`.
    """

    log_dir: str = "outputs"
    run_name: str | None = None
    tensorboard_enabled: bool = True
    progress: bool = True
    level: str = "INFO"


@dataclass(frozen=True, slots=True)
class Config:
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    loss_fn: LossConfig = field(default_factory=LossConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    start_model: StartModelConfig = field(default_factory=StartModelConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
