"""What a generator is told and what it answers; importing this imports no vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nemo_rl.refit.device import MULTICAST_OFF
from nemo_rl.refit.errors import RefitError

Store = tuple[str, int]
ADAPTER_ID = 1


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A LoRA adapter over a base that stays as it was loaded; refits bring the adapter alone.

    Attributes:
        rank, alpha: PEFT's; the adapter counts `alpha / rank` times.
        target_modules: projections that every layer has adapters for, such as `q_proj`.
        path: PEFT folder with the adapter to start from; without one the base answers until the first refit.

    Raises:
        ValueError: a value is out of its range.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    path: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.target_modules:
            raise ValueError(f"an adapter needs rank >= 1, alpha > 0 and target modules, got {self}")


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """One engine.

    Attributes:
        model_path: Hugging Face folder; its weights are read when `load_format` is `auto`.
        kv_cache_memory_bytes: size of the KV cache on each rank; None for 64 MiB on the CPU, and on a GPU for what
            `gpu_memory_utilization` leaves over.
        gpu_memory_utilization: share of a GPU's memory for weights and KV cache, which must be free at the start.
        load_format: `dummy` starts from random weights; the first refit brings the real ones.
        quantization: vLLM's name of how the engine quantizes what it loads, such as `fp8_per_channel`; None where the
            model's own configuration says how its weights are quantized, or they are not.
        moe_backend: vLLM's name of the kernels of experts, such as `triton`; `auto` leaves the choice to vLLM.
        kv_cache_dtype: `auto` is the precision; `fp8` takes the cache's scales from the weights.
        adapter: a LoRA adapter that answers every request; None where the model itself is refitted.
        seed: of dummy weights and of requests without a seed.
        in_flight: what a refit does to requests that have tokens already. `refuse`: it fails where keys and values of
            old weights are in use; `keep`: they go on over those keys and values; `recompute`: over those of the new
            weights.
        deadline_s: longest wait for one step of the engine, and for a refit between two steps.

    Raises:
        ValueError: a value is out of its range.
    """

    model_path: str
    tensor_parallel_size: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    max_model_len: int = 256
    max_num_seqs: int = 64
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.5
    enforce_eager: bool = True
    moe_backend: str = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    adapter: AdapterConfig | None = None
    seed: int = 0
    in_flight: Literal["refuse", "keep", "recompute"] = "refuse"
    deadline_s: float = 300.0

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16") or self.load_format not in ("auto", "dummy"):
            raise ValueError(f"precision is float32 or bfloat16 and load_format auto or dummy, got {self}")
        cache = 1 if self.kv_cache_memory_bytes is None else self.kv_cache_memory_bytes
        numbers = (self.tensor_parallel_size, self.max_model_len, self.max_num_seqs, cache)
        if min(numbers) < 1 or not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"sizes must be positive and gpu_memory_utilization in (0, 1], got {self}")


@dataclass(frozen=True, slots=True)
class Generated:
    """One completion.

    Attributes:
        token_ids: sampled tokens, the stop token included where one ended the completion.
        logprobs: of each sampled token, under the distribution it was drawn from.
        finished: a stop token ended it; False where `max_new_tokens` cut it.
        versions: of the weights that sampled each token.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker answers: a value or an error. Executors end the call of all workers at a bare exception."""

    value: Any = None
    error: RefitError | None = None


def worker_env(config: GeneratorConfig, device: Literal["cpu", "cuda"] = "cpu") -> dict[str, str]:
    """Environment of a process that will hold a `VllmEngine`; it must stand before vLLM is imported there."""
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in this process
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **MULTICAST_OFF,
        # FlashInfer's sampler and DeepGEMM's kernels are compiled on first use, by CUDA's compiler.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_DEEP_GEMM": "0",
    }
    if device == "cpu":
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if device == "cpu" and config.enforce_eager:
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env
