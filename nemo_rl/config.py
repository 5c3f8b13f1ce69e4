"""The configuration: its schema, and how a YAML file, `key=value` overrides and the environment become one value.

The schema is the tree of frozen dataclasses below; keys follow NeMo RL where it has one. This module is the only
reader of the environment: the variables of `ENVIRONMENT` override the file and the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """The configuration is refused. `violations` lists everything that is wrong with it, each with its remedy."""

    def __init__(self, violations: Sequence[str]) -> None:
        self.violations = tuple(violations)
        count = f"{len(self.violations)} violation" + ("s" if len(self.violations) != 1 else "")
        super().__init__(f"configuration refused, {count}:\n" + "\n".join(f"  - {v}" for v in self.violations))


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Megatron's Adam. `min_lr` is reached at the last step by a straight line; equal to `lr` means constant."""

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

    Pipeline stages are equal unless `num_layers_in_first_pipeline_stage` or `..._last_...` say otherwise, the embedding
    or the loss counts as a layer (`account_for_...`), or `pipeline_layers` gives the layers of each chunk: of the first
    chunk of every stage, then of the second; the first and the last may be 0. A stage has
    `virtual_pipeline_model_parallel_size` chunks. `moe_router_bias_update_rate` is how far a step moves the correction
    bias of a sigmoid router towards even loads.
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
    """Devices of the generators; null means all that the smallest trainer layout leaves over."""

    gpus_per_node: int | None = None
    num_nodes: int | None = None


@dataclass(frozen=True, slots=True)
class ColocatedConfig:
    """`enabled`: each device holds a trainer rank and a generator rank, both with their memory all the time."""

    enabled: bool = False
    resources: InferenceResources = field(default_factory=InferenceResources)


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """One engine. `kv_cache_memory_bytes` is the KV cache of a rank; null for 64 MiB on the CPU, and on a GPU for what
    weights leave of `gpu_memory_utilization`, which the engine then measures: nobody else may use the GPU meanwhile.

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
    backend: str = "vllm"
    max_new_tokens: int = 16
    temperature: float = 1.0
    colocated: ColocatedConfig = field(default_factory=ColocatedConfig)
    vllm_cfg: VllmConfig = field(default_factory=VllmConfig)


@dataclass(frozen=True, slots=True)
class RefitConfig:
    """Knobs of the session. `transport` is auto, peer, nccl, m2n, gloo or golden; the conventional refit is
    `broadcast`, which `policy.nccl_xfer_refit=false` selects. `verify_against_checkpoint` compares what trainers hold
    before their first step with the files of `model_name`, and what generators loaded from them with what the first
    refit brings. `measure_links` is auto (where `transport=auto` has a choice and `cache_dir` holds no measurement of
    these hosts), always or never; `cache_dir` is on the host of the first trainer, empty for none."""

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
    """`model_name` is a checkpoint folder, or `start_model` for the model that the section of that name describes."""

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
    """The rollout of the next step while trainers train on this one.

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
    """`refit_every` counts steps between refits; 0 never refits, so that generators keep the start weights.

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
    """Clipped policy gradient with a KL penalty; a null `truncated_importance_sampling_ratio` is no cap."""

    reference_policy_kl_penalty: float = 0.01
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.28
    token_level_loss: bool = True
    use_importance_sampling_correction: bool = True
    truncated_importance_sampling_ratio: float | None = 2.0


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """On a machine without GPUs, `gpus_per_node` counts virtual devices: one per trainer rank or generator rank.

    `address` is that of a running Ray cluster; null starts one on this machine. `device` is auto, cpu or cuda.
    """

    gpus_per_node: int = 4
    num_nodes: int = 1
    address: str | None = None
    device: str = "auto"
    object_store_bytes: int = 128 << 20
    start_deadline_s: float = 240.0


@dataclass(frozen=True, slots=True)
class DataConfig:
    """A task made and checked by a program: `sort` (digits) or `add` (decimal numbers).

    A problem has `min_items` to `max_items` items: digits to sort, or digits of each of two summands.
    """

    task: str = "sort"
    min_items: int = 4
    max_items: int = 8


@dataclass(frozen=True, slots=True)
class StartModelConfig:
    """The model that a run starts from: random weights and a short supervised warm-up, kept under `cache_dir`.

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
    """`run_name` null names the run after its configuration file and the time it started."""

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


ENVIRONMENT: Mapping[str, str] = {
    "NRL_NCCL_XFER_REFIT": "policy.nccl_xfer_refit",
    "NRL_REFIT_TRANSPORT": "policy.refit.transport",
    "NRL_REFIT_BUCKET_BYTES": "policy.refit.bucket_bytes",
    "NRL_REFIT_NUM_STREAMS": "policy.refit.num_streams",
    "NRL_REFIT_DEADLINE_S": "policy.refit.deadline_s",
    "NRL_REFIT_VERIFY": "policy.refit.verify",
    "NRL_REFIT_MEASURE_LINKS": "policy.refit.measure_links",
    "NRL_REFIT_CACHE_DIR": "policy.refit.cache_dir",
    "NRL_RAY_ADDRESS": "cluster.address",
    "NRL_LOG_DIR": "logger.log_dir",
}
"""Variable -> key it overrides. `NRL_XFERDTENSOR_GOLDEN=1` also sets `policy.refit.transport=golden`."""


def load_config(path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Config:
    """Read `path`, apply `overrides` (`key=value`, Hydra's grammar), then the environment's.

    A file may name another of the same folder under `defaults`; its own keys win.

    Args:
        environ: stands in for the process environment.

    Raises:
        ConfigError: the file cannot be read, or keys are unknown or mistyped; all violations at once.
    """
    raw = _read(Path(path))
    problems = _apply_overrides(raw, overrides)
    for key, value in environment_overrides(os.environ if environ is None else environ).items():
        OmegaConf.update(raw, key, value, force_add=True)
    return _build(raw, problems)


def environment_overrides(environ: Mapping[str, str]) -> dict[str, str]:
    """Keys and values that `NRL_*` variables set; empty variables set nothing."""
    found = {key: environ[name] for name, key in ENVIRONMENT.items() if environ.get(name)}
    if environ.get("NRL_XFERDTENSOR_GOLDEN", "0").lower() not in ("", "0", "false"):
        found["policy.refit.transport"] = "golden"
    return found


def inherited_environment() -> dict[str, str]:
    """A copy of this process's environment, for processes that it starts."""
    return dict(os.environ)


def to_yaml(config: Config) -> str:
    """The resolved configuration; `load_config` reads it back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _read(path: Path) -> DictConfig:
    try:
        raw = OmegaConf.load(path)
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read ({error}); pass --config an existing YAML file"]) from error
    except Exception as error:  # PyYAML's errors share no base with the others
        raise ConfigError([f"{path}: is not YAML ({error})"]) from error
    if not isinstance(raw, DictConfig):
        raise ConfigError([f"{path}: holds a {type(raw).__name__}, not a mapping of sections"])
    base = raw.pop("defaults", None)
    if base is None:
        return raw
    merged = OmegaConf.merge(_read(path.parent / str(base)), raw)
    assert isinstance(merged, DictConfig)
    return merged


def _apply_overrides(raw: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Update `raw` in place; returns a message for each override that is not `key=value`."""
    problems = []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
            if override.is_delete() or override.is_sweep_override():
                problems.append(f"{text!r}: only key=value overrides are understood, one value each")
                continue
            OmegaConf.update(raw, override.key_or_group, override.value(), merge=True, force_add=True)
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(f"{text!r}: cannot be applied ({str(error).splitlines()[0]}); write key=value")
    return problems


def _build(raw: DictConfig, problems: list[str]) -> Config:
    try:
        tree = OmegaConf.to_container(raw, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([*problems, f"an interpolation does not resolve: {error}"]) from error
    assert isinstance(tree, dict)
    config = _section(Config, tree, "", problems)
    if problems:
        raise ConfigError(problems)
    return config


def _section(schema: type, tree: Mapping[Any, Any], prefix: str, problems: list[str]) -> Any:
    """Instance of dataclass `schema` from `tree`; appends to `problems` what does not fit."""
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            problems.append(f"{key}: unknown key; {_suggestion(str(name), prefix, hints)}")
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                values[name] = _section(typing.cast(type, hints[name]), value, f"{key}.", problems)
            else:
                known = ", ".join(f.name for f in dataclasses.fields(typing.cast(type, hints[name])))
                problems.append(f"{key}: is {value!r}, but a section with keys {known} is needed")
        else:
            try:
                values[name] = _convert(key, hints[name], value)
            except ValueError as error:
                problems.append(str(error))
    return schema(**values)


def _convert(key: str, hint: Any, value: Any) -> Any:
    """`value` as OmegaConf converts it to `hint`. Raises ValueError naming the key, the value and the type."""
    optional = type(None) in typing.get_args(hint)
    kind = next(k for k in (typing.get_args(hint) or (hint,)) if k is not type(None))
    if value is None and optional:
        return None
    if typing.get_origin(kind) is tuple:
        return _convert_list(key, typing.get_args(kind)[0], value)
    leaf = OmegaConf.structured(dataclasses.make_dataclass("Leaf", [("value", kind, kind())]))
    try:
        if value is None or isinstance(value, bool) is not (kind is bool) and not isinstance(value, str):
            raise TypeError(f"{type(value).__name__} is never taken for {kind.__name__}")
        if kind is str and not isinstance(value, str):
            raise TypeError("text is needed")
        leaf.value = value
    except (OmegaConfBaseException, TypeError) as error:
        needed = f"{kind.__name__} or null" if optional else kind.__name__
        raise ValueError(f"{key}: {value!r} is not of type {needed}; give a value of that type") from error
    return leaf.value


def _convert_list(key: str, item: type, value: Any) -> tuple[Any, ...]:
    """A list of `item`. Raises ValueError naming the key and what is wrong."""
    if not isinstance(value, list):
        raise ValueError(f"{key}: {value!r} is not a list; give a list of {item.__name__}")
    return tuple(_convert(f"{key}[{i}]", item, entry) for i, entry in enumerate(value))


def _suggestion(name: str, prefix: str, hints: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, hints, n=3, cutoff=0.6)
    if not near:  # the name may belong to another section
        near = [key for key in leaf_keys() if key.rsplit(".", 1)[-1] == name]
        return f"did you mean {' or '.join(near)}?" if near else f"known keys here are {', '.join(hints)}"
    return f"did you mean {' or '.join(prefix + n for n in near)}?"


def leaf_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            keys += leaf_keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
