"""Which parallel layouts can train a model. Imports no Megatron, so that a driver asks before any actor starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_rl import checkpoint
from nemo_rl.checkpoint.headers import read_headers
from nemo_rl.trainer.families import droppable, family_of, required, untrained
from nemo_rl.trainer.pipeline import split_layers
from nemo_rl.trainer.shape import ModelShape, UnsupportedModel


@dataclass(frozen=True, slots=True)
class Parallel:
    """Layout of the trainer ranks. The data-parallel size is what the world size leaves over.

    Attributes:
        pipeline_layers: layers of each chunk in the order in which a token passes them: the first chunk of every stage,
            then the second; None for equal chunks. The first and the last may be 0: embedding or loss stand alone.
        sequence_parallel: on for a dense model by choice; always on for a mixture of experts with tensor > 1.
        context: ranks that share a sequence; they hold the same weights.
        virtual_pipeline: chunks of layers of each pipeline stage.
        first_layers, last_layers: layers of the first and the last stage; the others share the rest equally.
        count_embedding, count_loss: the embedding, or the output layer with the loss, counts as a layer of its stage.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    pipeline_layers: tuple[int, ...] | None = None
    sequence_parallel: bool = False
    context: int = 1
    virtual_pipeline: int = 1
    first_layers: int | None = None
    last_layers: int | None = None
    count_embedding: bool = False
    count_loss: bool = False

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline * self.context)

    def chunks(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each chunk, as `pipeline_layers`. Raises ValueError where they do not come out even."""
        if self.pipeline_layers is not None:
            return self.pipeline_layers
        return split_layers(num_layers, self.pipeline, self.virtual_pipeline, *self._options)

    @property
    def uneven(self) -> bool:
        """Whether stages are anything but equal."""
        return self.pipeline_layers is not None or self._options != (None, None, False, False)

    @property
    def _options(self) -> tuple[int | None, int | None, bool, bool]:
        return self.first_layers, self.last_layers, self.count_embedding, self.count_loss


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


def padded_vocabulary(shape: ModelShape, parallel: Parallel) -> int:
    """Rows of embedding and output layer: the vocabulary rounded up to a multiple of the tensor parallel size."""
    return -(-shape.vocab_size // parallel.tensor) * parallel.tensor


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
    return [*check_layout(shape, parallel), *_check_trainable(shape, parallel)]


def check_files(folder: str | Path, shape: ModelShape, dtype: torch.dtype) -> list[str]:
    """Everything that keeps the files of `folder` from being the weights of `shape`, as `checkpoint.check` says it.

    Draft layers of which the files hold nothing are one violation: transformers counts them in `config.json` and drops
    them when it saves a model.
    """
    table, names = required(shape, dtype), read_headers(folder)[0].keys()
    drafts = tuple(f"model.layers.{shape.num_layers + i}." for i in range(shape.num_draft_layers))
    if not drafts or not names or any(name.startswith(drafts) for name in names):
        return checkpoint.check(folder, table, droppable(shape))
    held = {fqn: meta for fqn, meta in table.items() if not fqn.startswith(drafts)}
    return [
        f"{folder}: config.json says num_nextn_predict_layers={shape.num_draft_layers} but the files hold no tensor of "
        f"those draft layers ({drafts[0]}*), which transformers' save_pretrained leaves out; set "
        f"num_nextn_predict_layers=0 in config.json, or fetch files that hold them",
        *checkpoint.check(folder, held, droppable(shape)),
    ]


def check_layout(shape: ModelShape, parallel: Parallel) -> list[str]:
    """Everything that keeps ranks laid out as `parallel` from holding the model, each with its remedy."""
    return _check_sizes(parallel) or [
        *_check_world(parallel, shape.is_moe),
        *_check_tensor(shape, parallel),
        *_check_pipeline(shape, parallel),
        *(_check_experts(shape, parallel) if shape.is_moe else _check_no_experts(shape, parallel)),
    ]


def _check_trainable(shape: ModelShape, parallel: Parallel) -> list[str]:
    """What ranks could hold but the trainer does not run."""
    bad = [f"{shape.architecture}: {text}" for text in untrained(shape)]
    if parallel.context == 1:
        return bad
    return [
        *bad,
        f"context_parallel_size={parallel.context}: Megatron-Core splits sequences only with Transformer Engine's "
        f"attention, which is not used here; set it to 1",
    ]


def _check_sizes(parallel: Parallel) -> list[str]:
    named = {
        "world_size": parallel.world_size,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "context_parallel_size": parallel.context,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
    }
    return [f"{name}={value} is not positive; set it to 1 or more" for name, value in named.items() if value < 1]


def _check_world(parallel: Parallel, moe: bool) -> list[str]:
    bad = []
    dense = parallel.tensor * parallel.pipeline * parallel.context
    if parallel.world_size % dense:
        names, sizes = "tensor x pipeline", f"{parallel.tensor} x {parallel.pipeline}"
        if parallel.context > 1:
            names, sizes = f"{names} x context", f"{sizes} x {parallel.context}"
        bad.append(
            f"{parallel.world_size} trainer ranks are not a multiple of {names} parallel size = "
            f"{sizes} = {dense}; change the number of trainer ranks or the sizes"
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
    tp, key, hybrid = parallel.tensor, "tensor_model_parallel_size", shape.hybrid
    counts: dict[str, int] = {}
    if hybrid is None or "*" in hybrid.pattern:
        counts["attention heads"] = shape.num_heads
    if not all(shape.sparse_layers) if hybrid is None else "-" in hybrid.pattern:
        counts["columns of the MLP (FFN)"] = shape.ffn_size
    counts["columns of the shared expert"] = shape.shared_ffn_size
    if hybrid is not None:
        counts |= {"heads of a Mamba2 mixer": hybrid.num_heads, "groups of a Mamba2 mixer": hybrid.num_groups}
    if shape.latent is None and not shape.num_heads % tp:
        counts["rows of the fused q/k/v projection"] = shape.qkv_rows
    bad = [_divides(key, tp, count, what) for what, count in counts.items() if count % tp]
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        bad.append(
            f"{key}={tp} neither divides the {shape.num_kv_heads} key/value heads nor is a multiple of them; choose a "
            f"size that is one of the two"
        )
    return bad


def _check_pipeline(shape: ModelShape, parallel: Parallel) -> list[str]:
    stages, virtual, layers = parallel.pipeline, parallel.virtual_pipeline, shape.num_layers
    if not parallel.uneven and (stages > 1 or virtual == 1) and layers % (stages * virtual):
        key = "pipeline_model_parallel_size" if virtual == 1 else "pipeline x virtual pipeline parallel size"
        return [f"{_divides(key, stages * virtual, layers, 'layers')}, or give the layers of each stage"]
    if parallel.pipeline_layers is not None and replace(parallel, pipeline_layers=None).uneven:
        return [f"pipeline_layers={parallel.pipeline_layers} says all of the stages; leave the other options for them"]
    try:
        split = parallel.chunks(layers)
    except ValueError as error:
        return [str(error)]
    return _check_chunks(shape, parallel, split)


def _check_chunks(shape: ModelShape, parallel: Parallel, split: tuple[int, ...]) -> list[str]:
    count = parallel.pipeline * parallel.virtual_pipeline
    if shape.hybrid is not None and (parallel.virtual_pipeline > 1 or len(set(split[1:-1])) > 1):
        return [
            f"Megatron-Core splits {shape.architecture} into stages of one chunk, those between the first and the last "
            f"of equal size; set virtual_pipeline_model_parallel_size=1 and the layers of each stage so"
        ]
    inner = split[1:-1] if parallel.pipeline > 1 else split
    if len(split) == count and sum(split) == shape.num_layers and all(n > 0 for n in inner) and min(split) >= 0:
        return []
    return [
        f"layers by stage {split} are not {count} positive numbers (0 for the first or last alone) that add up to "
        f"{shape.num_layers}; change them or pipeline_model_parallel_size"
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
