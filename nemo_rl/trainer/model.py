"""Which parallel layouts can train a model. Imports no Megatron, so that a driver asks before any actor starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rl.trainer.families import family_of
from nemo_rl.trainer.shape import ModelShape, UnsupportedModel


@dataclass(frozen=True, slots=True)
class Parallel:
    """Layout of the trainer ranks. The data-parallel size is what the world size leaves over.

    Attributes:
        pipeline_layers: layers of each pipeline stage; None for equal stages.
        sequence_parallel: on for a dense model by choice; always on for a mixture of experts with tensor > 1.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    pipeline_layers: tuple[int, ...] | None = None
    sequence_parallel: bool = False

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline)


def read_config(folder: str | Path) -> Any:
    """The Hugging Face configuration of a checkpoint folder. Raises ValueError naming the folder and what is wrong."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; point policy.model_name at a Hugging Face checkpoint folder")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def model_shape(hf_config: Any) -> ModelShape:
    """Raises UnsupportedModel (a ValueError) with everything that no family covers."""
    return family_of(hf_config).read(hf_config)


def check_parallel(hf_config: Any, parallel: Parallel) -> list[str]:
    """Everything that keeps `parallel` from training the model, each with its remedy; empty where nothing does.

    A vocabulary that tensor parallelism does not divide is no violation: the trainer pads it.
    """
    sizes = _check_sizes(parallel)
    if sizes:
        return sizes
    try:
        shape = model_shape(hf_config)
    except UnsupportedModel as error:
        return [*_check_world(parallel, moe=True), *error.violations]
    return [
        *_check_world(parallel, shape.is_moe),
        *_check_tensor(shape, parallel),
        *_check_pipeline(shape, parallel),
        *(_check_experts(shape, parallel) if shape.is_moe else _check_no_experts(shape, parallel)),
    ]


def _check_sizes(parallel: Parallel) -> list[str]:
    named = {
        "world_size": parallel.world_size,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }
    return [f"{name}={value} is not positive; set it to 1 or more" for name, value in named.items() if value < 1]


def _check_world(parallel: Parallel, moe: bool) -> list[str]:
    bad = []
    dense = parallel.tensor * parallel.pipeline
    if parallel.world_size % dense:
        bad.append(
            f"{parallel.world_size} trainer ranks are not a multiple of tensor x pipeline parallel size = "
            f"{parallel.tensor} x {parallel.pipeline} = {dense}; change the number of trainer ranks or the sizes"
        )
    sparse = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if moe and parallel.world_size % sparse:
        bad.append(
            f"{parallel.world_size} trainer ranks are not a multiple of expert x expert-tensor x pipeline parallel "
            f"size = {parallel.expert} x {parallel.expert_tensor} x {parallel.pipeline} = {sparse}; change the number "
            f"of trainer ranks or the sizes"
        )
    return bad


def _check_tensor(shape: ModelShape, parallel: Parallel) -> list[str]:
    tp, bad = parallel.tensor, []
    if shape.num_heads % tp:
        bad.append(_divides("tensor_model_parallel_size", tp, shape.num_heads, "attention heads"))
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        bad.append(
            f"tensor_model_parallel_size={tp} neither divides the {shape.num_kv_heads} key/value heads nor is a "
            f"multiple of them; choose a size that is one of the two"
        )
    dense = not all(shape.sparse_layers)
    if dense and shape.ffn_size % tp:
        bad.append(_divides("tensor_model_parallel_size", tp, shape.ffn_size, "columns of the MLP (FFN)"))
    if shape.shared_ffn_size % tp:
        bad.append(_divides("tensor_model_parallel_size", tp, shape.shared_ffn_size, "columns of the shared expert"))
    if not shape.num_heads % tp and shape.qkv_rows % tp:
        bad.append(_divides("tensor_model_parallel_size", tp, shape.qkv_rows, "rows of the fused q/k/v projection"))
    return bad


def _check_pipeline(shape: ModelShape, parallel: Parallel) -> list[str]:
    stages, layers, split = parallel.pipeline, shape.num_layers, parallel.pipeline_layers
    if split is None:
        if layers % stages == 0:
            return []
        text = _divides("pipeline_model_parallel_size", stages, layers, "layers")
        return [f"{text}, or give the layers of each stage"]
    if len(split) == stages and sum(split) == layers and all(n > 0 for n in split):
        return []
    return [
        f"layers by stage {split} are not {stages} positive numbers that add up to {layers}; "
        f"change them or pipeline_model_parallel_size"
    ]


def _check_experts(shape: ModelShape, parallel: Parallel) -> list[str]:
    bad = []
    if shape.num_experts % parallel.expert:
        bad.append(_divides("expert_model_parallel_size", parallel.expert, shape.num_experts, "experts"))
    if shape.expert_ffn_size % parallel.expert_tensor:
        columns = "columns of an expert (moe_intermediate_size)"
        bad.append(_divides("expert_tensor_parallel_size", parallel.expert_tensor, shape.expert_ffn_size, columns))
    if parallel.expert == 1 and parallel.expert_tensor != parallel.tensor:
        bad.append(
            f"tensor_model_parallel_size={parallel.tensor} with expert_model_parallel_size=1 and "
            f"expert_tensor_parallel_size={parallel.expert_tensor} gives wrong expert gradients in Megatron-Core; set "
            f"expert_model_parallel_size > 1, or expert_tensor_parallel_size={parallel.tensor}"
        )
    return bad


def _check_no_experts(shape: ModelShape, parallel: Parallel) -> list[str]:
    if parallel.expert == 1:
        return []
    return [
        f"expert_model_parallel_size={parallel.expert} but {shape.architecture} with this configuration has no "
        f"experts; set it to 1"
    ]


def _divides(key: str, size: int, count: int, what: str) -> str:
    fits = [n for n in range(1, min(count, 64) + 1) if count % n == 0]
    return f"{key}={size} does not divide the {count} {what}; choose one of {', '.join(map(str, fits))}"
