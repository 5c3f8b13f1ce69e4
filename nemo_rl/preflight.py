"""Everything that can be known to be wrong before any actor starts, all at once, each with its remedy."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_rl.config import inherited_environment
from nemo_rl.generator.preflight import check_loader_apart
from nemo_rl.generator.ranks import EngineSpec
from nemo_rl.grpo.data import TASKS, Task
from nemo_rl.grpo.warmup import KINDS, start_model_config
from nemo_rl.refit.base import LONGEST_S, MEASURE_LINKS, MOST_STREAMS
from nemo_rl.refit.device import MULTICAST_OFF
from nemo_rl.refit.transports.grouped import longest_message
from nemo_rl.refit.transports.registry import OF_PARCELS
from nemo_rl.schema import Config
from nemo_rl.topology import Topology, device_of, gpus_here, parallel_of, parallel_sizes, topology_of
from nemo_rl.trainer import families
from nemo_rl.trainer.model import check_files, check_parallel, model_shape, read_config

PRECISIONS = ("float32", "bfloat16")
TRANSPORTS = ("auto", "peer", "nccl", "m2n", "gloo", "golden")
ONE_DEVICE = {"nccl": "cuda", "m2n": "cuda", "gloo": "cpu"}
OVER_HOSTS = {"cpu": "gloo", "cuda": "nccl"}
START_MODEL = "start_model"


def validate(config: Config) -> list[str]:
    """Every violation. The generator's loader, which takes seconds to ask, is only asked where all else is sound."""
    topology, ranks = topology_of(config)
    start_model = list(_start_model(config))
    problems = [
        *ranks,
        *_choices(config),
        *_numbers(config),
        *_batches(config, topology),
        *_lengths(config),
        *start_model,
        *_devices(config),
        *_transport(config),
        *_combinations(config),
        *_asynchronous(config),
    ]
    if start_model or min(parallel_sizes(config).values()) < 1:
        return problems  # there is no model to look at, or no layout
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = model_folder(config, Path(scratch))
            hf_config = read_config(folder)
        except ValueError as error:
            return [*problems, f"policy.model_name={config.policy.model_name}: {error}"]
        problems += _check_layouts(config, hf_config, None if ranks else topology)
        problems += _check_files(config, hf_config)
        return problems or check_loader(config, hf_config, folder)


def model_folder(config: Config, scratch: Path) -> Path:
    """Where the model's configuration stands; that of a start model is written to `scratch`."""
    if config.policy.model_name != START_MODEL:
        return Path(config.policy.model_name)
    start_model_config(config.start_model, config.policy.max_total_sequence_length).save_pretrained(scratch)
    return scratch


def _check_layouts(config: Config, hf_config: Any, topology: Topology | None) -> list[str]:
    """Without a topology, as if there were enough ranks."""
    parallel = parallel_of(config, 0 if topology is None else topology.num_trainers)
    if topology is None:
        sizes = (parallel.tensor, parallel.pipeline, parallel.context, parallel.expert, parallel.expert_tensor)
        parallel = replace(parallel, world_size=math.prod(sizes))
    return [f"policy.megatron_cfg: {p}" for p in check_parallel(hf_config, parallel)]


def _check_files(config: Config, hf_config: Any) -> list[str]:
    """Whether the checkpoint folder holds tokenizer and weights whole."""
    if config.policy.model_name == START_MODEL:
        return []
    folder, key = Path(config.policy.model_name), f"policy.model_name={config.policy.model_name}"
    problems = []
    if not (folder / "tokenizer.json").is_file():
        problems.append(f"{key}: tokenizer.json is missing; save the fast tokenizer beside the model")
    try:
        shape = model_shape(hf_config)
    except ValueError:  # a model that no family covers, which the layouts' check has told
        return problems
    return problems + [f"{key}: {p}" for p in check_files(folder, shape, torch.float32)]


def check_loader(config: Config, hf_config: Any, folder: Path) -> list[str]:
    """Values that the generator's loader needs and the trainers lack; asked in a process of its own."""
    table = families.table(model_shape(hf_config), getattr(torch, config.policy.precision))
    spec, environ = engine_of(config, folder), inherited_environment()
    problems = check_loader_apart(spec, table, environ, config.cluster.start_deadline_s)
    return [f"policy.model_name={config.policy.model_name}, policy.generation.vllm_cfg: {p}" for p in problems]


def engine_of(config: Config, folder: Path) -> EngineSpec:
    """How each generator holds the model of `folder`."""
    vllm = config.policy.generation.vllm_cfg
    return EngineSpec(
        str(folder),
        vllm.tensor_parallel_size,
        precision=vllm.precision,
        quantization=vllm.quantization,
        kv_cache_dtype=vllm.kv_cache_dtype,
    )


def _choices(config: Config) -> Iterator[str]:
    generation = config.policy.generation
    choices = {
        "policy.precision": (config.policy.precision, PRECISIONS),
        "policy.generation.vllm_cfg.precision": (generation.vllm_cfg.precision, PRECISIONS),
        "policy.generation.vllm_cfg.load_format": (generation.vllm_cfg.load_format, ("auto", "dummy")),
        "policy.generation.backend": (generation.backend, ("vllm",)),
        "policy.refit.transport": (config.policy.refit.transport, TRANSPORTS),
        "policy.refit.measure_links": (config.policy.refit.measure_links, MEASURE_LINKS),
        "cluster.device": (config.cluster.device, ("auto", "cpu", "cuda")),
        "data.task": (config.data.task, TASKS),
        "start_model.kind": (config.start_model.kind, KINDS),
        "logger.level": (config.logger.level, ("DEBUG", "INFO", "WARNING", "ERROR")),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            yield f"{key}={value}: unknown; choose {' or '.join(known)}"


def _numbers(config: Config) -> Iterator[str]:
    vllm, cap = config.policy.generation.vllm_cfg, config.loss_fn.truncated_importance_sampling_ratio
    for key, value in _positive(config).items():
        if value <= 0:
            yield f"{key}={value}: must be above 0"
    for key, (value, most) in _at_most(config).items():
        if value > most:
            yield f"{key}={value}: must be at most {most:.9g}"
    for key, (value, least) in _at_least(config).items():
        if value < least:
            yield f"{key}={value}: must be at least {least}"
    if cap is not None and cap <= 0:
        yield f"loss_fn.truncated_importance_sampling_ratio={cap}: must be above 0, or null for no cap"
    if vllm.gpu_memory_utilization > 1:
        yield "policy.generation.vllm_cfg.gpu_memory_utilization: is a share of a GPU's memory; give at most 1"


def _positive(config: Config) -> dict[str, float]:
    """What must be above 0."""
    policy, grpo, cluster = config.policy, config.grpo, config.cluster
    found: dict[str, float] = {
        "policy.train_global_batch_size": policy.train_global_batch_size,
        "policy.train_micro_batch_size": policy.train_micro_batch_size,
        "policy.logprob_batch_size": policy.logprob_batch_size,
        "policy.max_total_sequence_length": policy.max_total_sequence_length,
        "policy.generation.max_new_tokens": policy.generation.max_new_tokens,
        "policy.generation.temperature": policy.generation.temperature,
        "policy.generation.vllm_cfg.max_model_len": policy.generation.vllm_cfg.max_model_len,
        "policy.generation.vllm_cfg.max_num_seqs": policy.generation.vllm_cfg.max_num_seqs,
        "policy.generation.vllm_cfg.gpu_memory_utilization": policy.generation.vllm_cfg.gpu_memory_utilization,
        "policy.megatron_cfg.optimizer.lr": policy.megatron_cfg.optimizer.lr,
        "policy.refit.num_streams": policy.refit.num_streams,
        "policy.refit.deadline_s": policy.refit.deadline_s,
        "grpo.num_prompts_per_step": grpo.num_prompts_per_step,
        "grpo.max_num_steps": grpo.max_num_steps,
        "grpo.step_deadline_s": grpo.step_deadline_s,
        "grpo.max_gen_kl_error": grpo.max_gen_kl_error,
        "cluster.start_deadline_s": cluster.start_deadline_s,
    }
    if policy.generation.vllm_cfg.kv_cache_memory_bytes is not None:
        key = "policy.generation.vllm_cfg.kv_cache_memory_bytes"
        found[key] = policy.generation.vllm_cfg.kv_cache_memory_bytes
    return found


def _at_least(config: Config) -> dict[str, tuple[float, float]]:
    """What must be no less than a bound."""
    policy, grpo, loss, cluster = config.policy, config.grpo, config.loss_fn, config.cluster
    return {
        "policy.refit.bucket_bytes": (policy.refit.bucket_bytes, 1024),
        "policy.megatron_cfg.moe_router_bias_update_rate": (policy.megatron_cfg.moe_router_bias_update_rate, 0),
        "policy.megatron_cfg.optimizer.min_lr": (policy.megatron_cfg.optimizer.min_lr, 0),
        "grpo.num_generations_per_prompt": (grpo.num_generations_per_prompt, 2),
        "grpo.refit_every": (grpo.refit_every, 0),
        "grpo.seed": (grpo.seed, 0),
        "loss_fn.reference_policy_kl_penalty": (loss.reference_policy_kl_penalty, 0),
        "loss_fn.ratio_clip_min": (loss.ratio_clip_min, 0),
        "loss_fn.ratio_clip_max": (loss.ratio_clip_max, 0),
        "cluster.object_store_bytes": (cluster.object_store_bytes, 80 << 20),
    }


def _at_most(config: Config) -> dict[str, tuple[float, float]]:
    """What must be no more than a bound."""
    refit = config.policy.refit
    found: dict[str, tuple[float, float]] = {
        "policy.refit.num_streams": (refit.num_streams, MOST_STREAMS),
        "policy.refit.deadline_s": (refit.deadline_s, LONGEST_S),
    }
    if refit.transport in OF_PARCELS:
        found["policy.refit.bucket_bytes"] = (refit.bucket_bytes, longest_message(shared=False))
    return found


def _batches(config: Config, topology: Topology) -> Iterator[str]:
    policy, grpo, megatron = config.policy, config.grpo, config.policy.megatron_cfg
    samples = grpo.num_prompts_per_step * grpo.num_generations_per_prompt
    whole, micro = policy.train_global_batch_size, policy.train_micro_batch_size
    stages = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size
    stages *= megatron.context_parallel_size
    data = max(topology.num_trainers // max(stages, 1), 1)
    if min(samples, whole, micro) < 1:
        return
    if samples % whole:
        yield (
            f"policy.train_global_batch_size={whole} does not divide the {samples} samples of a step "
            f"(grpo.num_prompts_per_step={grpo.num_prompts_per_step} x grpo.num_generations_per_prompt="
            f"{grpo.num_generations_per_prompt}); choose a divisor of {samples}"
        )
    if whole % data:
        yield (
            f"policy.train_global_batch_size={whole} does not split over {data} data-parallel trainer ranks; choose a "
            f"multiple of {data}"
        )
    elif whole // data % micro:
        yield (
            f"policy.train_micro_batch_size={micro} does not divide the {whole // data} samples of a trainer rank "
            f"(policy.train_global_batch_size={whole} over {data} data-parallel ranks); choose a divisor"
        )


def _lengths(config: Config) -> Iterator[str]:
    data, policy = config.data, config.policy
    try:
        task = Task(data.task, data.min_items, data.max_items, config.grpo.seed)
    except ValueError as error:
        if data.task in TASKS:
            yield str(error)
        return
    needed = task.max_prompt_tokens + policy.generation.max_new_tokens
    limits = {
        "policy.generation.vllm_cfg.max_model_len": policy.generation.vllm_cfg.max_model_len,
        "policy.max_total_sequence_length": policy.max_total_sequence_length,
    }
    for key, value in limits.items():
        if value < needed:
            yield (
                f"{key}={value}: prompts of up to {task.max_prompt_tokens} tokens and policy.generation.max_new_tokens="
                f"{policy.generation.max_new_tokens} need {needed}; raise it or shorten the task"
            )
    if policy.generation.max_new_tokens < task.max_answer_tokens:
        yield (
            f"policy.generation.max_new_tokens={policy.generation.max_new_tokens}: the longest answers have "
            f"{task.max_answer_tokens} tokens with their end; raise it or lower data.max_items"
        )


def _start_model(config: Config) -> Iterator[str]:
    if config.policy.model_name != START_MODEL:
        return
    model = config.start_model
    sizes = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    sizes += ["head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "warmup_batch_size"]
    values = {name: getattr(model, name) for name in sizes}
    small = [name for name, value in values.items() if value < 1]
    yield from (f"start_model.{name}={values[name]}: at least 1 is needed" for name in small)
    if not small and model.num_attention_heads % model.num_key_value_heads:
        yield (
            f"start_model.num_key_value_heads={model.num_key_value_heads} does not divide "
            f"start_model.num_attention_heads={model.num_attention_heads}; choose a divisor"
        )
    if model.num_experts_per_tok > model.num_experts:
        yield (
            f"start_model.num_experts_per_tok={model.num_experts_per_tok} is more than start_model.num_experts="
            f"{model.num_experts}; lower it"
        )
    if not 0 <= model.warmup_reversed <= 1:
        yield f"start_model.warmup_reversed={model.warmup_reversed}: is a share; give a number from 0 to 1"
    if model.warmup_steps < 0 or model.warmup_lr <= 0:
        yield "start_model.warmup_steps must be at least 0 and start_model.warmup_lr above 0"


def _asynchronous(config: Config) -> Iterator[str]:
    """What one step ahead cannot be combined with."""
    ahead, every = config.grpo.async_grpo, config.grpo.refit_every
    key = "grpo.async_grpo"
    if not ahead.enabled:
        return
    if ahead.max_trajectory_age_steps < 1:
        yield f"{key}.max_trajectory_age_steps={ahead.max_trajectory_age_steps}: samples are a step old; give 1 or more"
    elif every > ahead.max_trajectory_age_steps:
        yield (
            f"grpo.refit_every={every}: samples would be {every} steps old, and {key}.max_trajectory_age_steps="
            f"{ahead.max_trajectory_age_steps} refuses them; lower the first or raise the second"
        )
    if not config.loss_fn.use_importance_sampling_correction:
        yield (
            f"loss_fn.use_importance_sampling_correction=false with {key}.enabled=true: samples of older weights need "
            "the correction; set it to true"
        )
    recompute = f"{key}.recompute_kv_cache_after_weight_updates"
    if ahead.recompute_kv_cache_after_weight_updates and not ahead.in_flight_weight_updates:
        yield f"{recompute}=true: nothing is in flight; set {key}.in_flight_weight_updates=true as well"
    cache = config.policy.generation.vllm_cfg.kv_cache_dtype
    if ahead.in_flight_weight_updates and not ahead.recompute_kv_cache_after_weight_updates and cache != "auto":
        yield (
            f"policy.generation.vllm_cfg.kv_cache_dtype={cache}: requests in flight would read their keys and values "
            f"by the scales of other weights; set {recompute}=true"
        )


def _devices(config: Config) -> Iterator[str]:
    if device_of(config) == "cuda" and config.cluster.address is None and not gpus_here():
        yield (
            "cluster.device=cuda: torch finds no GPU on this machine; use one with GPUs after `make setup-gpu`, "
            "give cluster.address, or set cluster.device=cpu"
        )


def _transport(config: Config) -> Iterator[str]:
    """Whether the transport moves what ranks hold, from where they are."""
    policy, cluster, device = config.policy, config.cluster, device_of(config)
    transport = policy.refit.transport if policy.nccl_xfer_refit else "broadcast"
    key, needed = f"policy.refit.transport={transport}", ONE_DEVICE.get(transport, device)
    if needed != device:
        yield f"{key}: moves {needed} tensors, and ranks compute on {device}; choose auto, peer or {OVER_HOSTS[device]}"
    if transport == "peer" and cluster.num_nodes > 1 and cluster.address is not None:
        yield (
            f"{key} with cluster.num_nodes={cluster.num_nodes}: maps memory of ranks on one host; choose auto or "
            f"{OVER_HOSTS[device]}, or cluster.num_nodes=1"
        )
    if policy.generation.colocated.enabled and device == needed == "cuda" and transport not in ("auto", "peer"):
        yield (
            f"policy.generation.colocated.enabled=true with transport '{transport}': NCCL takes one rank a GPU; set "
            f"policy.refit.transport=peer and policy.nccl_xfer_refit=true, or colocated.enabled=false"
        )


def _combinations(config: Config) -> Iterator[str]:
    policy, run_name = config.policy, config.logger.run_name
    for name, value in inherited_environment().items():
        if value != MULTICAST_OFF.get(name, value):
            yield (
                f"{name}={value}: NVLink multicast can take all GPUs of a host out of service; unset it, or set it to "
                f"{MULTICAST_OFF[name]} as every process of a run does"
            )
    if policy.generation.vllm_cfg.load_format == "dummy" and not config.grpo.refit_every:
        yield (
            "policy.generation.vllm_cfg.load_format=dummy with grpo.refit_every=0: generators would answer from random "
            "weights for ever; set load_format=auto"
        )
    if run_name is not None and (Path(config.logger.log_dir) / run_name).exists():
        yield f"logger.run_name={run_name}: {Path(config.logger.log_dir) / run_name} exists; choose another name"
