"""One Megatron trainer rank: log-probabilities, optimizer steps, and what it holds. Knows neither Ray nor RL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from nemo_rl import checkpoint
from nemo_rl.checkpoint.headers import read_headers
from nemo_rl.refit.layout import Holding
from nemo_rl.trainer import families, gpt
from nemo_rl.trainer.cpu import megatron_on_cpu
from nemo_rl.trainer.layout import MegatronSource
from nemo_rl.trainer.model import Parallel, check_files, check_parallel, model_shape, read_config
from nemo_rl.trainer.step import MicroBatch, micro_batches, padded_rows, token_logprobs

Metrics = dict[str, float]

LossFn = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, Metrics]]
"""`(logprobs [n, L] of rows start .. stop - 1 of the batch, start, stop) -> (this part's loss, its metrics)`.

Parts add up to the loss and the metrics of the whole batch: a loss function divides by the tokens (or samples) of the
whole batch, not of its part. Column t of `logprobs` belongs to token t; column 0 is 0.
"""

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """What a trainer rank is told; equal on all ranks.

    Attributes:
        model_path: a Hugging Face checkpoint folder.
        precision: of the weights, `float32` or `bfloat16` (then with float32 main weights in the optimizer).
        router_bias_update_rate: how far a step moves the correction bias of a sigmoid router towards even loads.
        micro_batch_size, logprob_batch_size: most rows of one pass with and without gradients.
        device: `cpu`, `cuda`, or `auto` for what there is.
        keep_reference: keep a copy of the start weights for `reference_logprobs`.
        deadline_s: longest that any collective between trainers may take.
    """

    model_path: str
    parallel: Parallel
    precision: str = "float32"
    lr: float = 1e-4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    router_bias_update_rate: float = 0.0
    micro_batch_size: int = 64
    logprob_batch_size: int = 128
    device: str = "auto"
    seed: int = 42
    keep_reference: bool = True
    deadline_s: float = 300.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"policy.precision={self.precision}: unknown; choose {' or '.join(PRECISIONS)}")


class MegatronPolicy:
    """A rank of the trainers. All ranks call the same methods, in the same order, with equal arguments.

    Args:
        config: of all ranks.
        rank: of this one, in `0 .. config.parallel.world_size - 1`.
        init_method: where ranks meet, `tcp://host:port`.

    Raises:
        ValueError: on every rank, before any of them waits for another: the layout cannot train the model, or the
            checkpoint is not the model's; all violations at once.
    """

    def __init__(self, config: TrainerConfig, rank: int, init_method: str) -> None:
        self.config, self.rank, self.num_steps = config, rank, 0
        self._dtype = PRECISIONS[config.precision]
        hf_config = read_config(config.model_path)
        problems = check_parallel(hf_config, config.parallel)
        if not problems:
            self._shape = model_shape(hf_config)
            problems = check_files(config.model_path, self._shape, self._dtype)
        if problems:
            raise ValueError(f"trainers cannot load {config.model_path}:\n" + "\n".join(f"  - {p}" for p in problems))
        self.device = self._choose_device()
        timeout = timedelta(seconds=config.deadline_s)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=init_method, rank=rank, world_size=config.parallel.world_size, timeout=timeout
        )
        with megatron_on_cpu():
            gpt.init_parallel(config.parallel, self._shape.is_moe, timeout, config.seed)
            self._build()
        self._reference = [self._put_aside(p) for p in self._weights()] if config.keep_reference else None

    def _choose_device(self) -> torch.device:
        """The GPU of this rank where there are any; a process that sees several takes them by rank.

        Raises:
            ValueError: the configuration names another kind of device than torch finds.
        """
        found = "cuda" if torch.cuda.is_available() else "cpu"
        if self.config.device not in ("auto", found):
            raise ValueError(
                f"trainer rank {self.rank}: cluster.device={self.config.device}, but this process computes on {found}; "
                f"hide the GPUs from it (CUDA_VISIBLE_DEVICES=) or install a CUDA build of torch"
            )
        if found == "cpu":
            return torch.device("cpu")
        torch.cuda.set_device(self.rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())

    def _build(self) -> None:
        """Model, DDP, optimizer; then the weights, so that neither wrapper holds older ones."""
        config = gpt.transformer_config(self._shape, self.config.parallel, self._dtype)
        config.finalize_model_grads_func = _sum_gradients
        config.moe_router_bias_update_rate = self.config.router_bias_update_rate
        self._sequence_multiple = self.config.parallel.tensor if config.sequence_parallel else 1
        self._chunks = gpt.build_chunks(config, self._shape, self.config.parallel)
        wrapped = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in self._chunks]
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self._ddp = [DistributedDataParallel(config, options, chunk) for chunk in wrapped]
        self._optimizer = get_megatron_optimizer(self._optimizer_config(), self._ddp, use_gloo_process_groups=False)
        config.grad_scale_func = self._optimizer.scale_loss
        self._source = MegatronSource(self._chunks, self._shape, self._dtype)
        checkpoint.read_into(self._read_holdings(), self.config.model_path)
        self._optimizer.reload_model_params()

    def _read_holdings(self) -> list[Holding]:
        """What comes from the checkpoint: all but scales of a cache, where it has none."""
        files, _ = read_headers(self.config.model_path)
        return [h for h in self._source.holdings() if h.fqn in files or not families.calibrated(h.fqn)]

    def _optimizer_config(self) -> OptimizerConfig:
        config = self.config
        return OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=self._dtype == torch.bfloat16,
            params_dtype=self._dtype,
        )

    # ---- log-probabilities

    def logprobs(self, input_ids: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
        """Log-probability of every token given those before it, by the current weights.

        Args:
            input_ids: int64 `[N, L]`, padded to the right; any N and L.
            temperature: divides the logits.

        Returns:
            float32 `[N, L]` on the CPU of every rank; column t belongs to token t, column 0 is 0. Columns of padding
            hold the log-probability of the padding token.
        """
        config = self.config
        batches = self._micro_batches(input_ids.shape[0], config.logprob_batch_size)
        whole = torch.zeros(input_ids.shape, dtype=torch.float32, device=self.device)

        def keep(rows: MicroBatch, logprobs: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                whole[rows.start : rows.stop] = logprobs[: rows.stop - rows.start]
            return logprobs.new_zeros(()), {}

        with megatron_on_cpu(), torch.no_grad():
            self._run(input_ids, batches, keep, temperature, forward_only=True)
            dist.all_reduce(whole)  # every row was filled by one rank: of its pipeline's last stage
        return whole.cpu()

    def calibrate(self, input_ids: torch.Tensor) -> None:
        """Set the scales of the FP8 KV cache so that what attention sees of `input_ids` `[N, L]` just fits.

        Padding, which is token 0, counts.

        Raises:
            ValueError: this policy holds no scales.
        """
        if not self._shape.cache_scales:
            raise ValueError(
                f"{self.config.model_path}/config.json names no kv_cache_scheme: there are no scales to set"
            )
        layers = gpt.attentions(self._chunks)
        for attention in layers:
            attention.watch()
        self.logprobs(input_ids)
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        for attention in layers:
            attention.calibrate(group)

    def reference_logprobs(self, input_ids: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
        """As `logprobs`, by the weights that this policy started with."""
        with self._reference_weights():
            return self.logprobs(input_ids, temperature=temperature)

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """Swap the start weights in; the current ones come back bit for bit, in the same storage."""
        if self._reference is None:
            raise ValueError("reference log-probabilities need keep_reference=True")
        current = [p.detach().clone() for p in self._weights()]
        try:
            self._fill(self._reference)
            yield
        finally:
            self._fill(current)

    def _put_aside(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy on the host, in memory that a GPU reads at full speed where there is one."""
        copy = torch.empty_like(weight, device="cpu", pin_memory=self.device.type == "cuda")
        return copy.copy_(weight.detach())

    def _weights(self) -> list[torch.Tensor]:
        """Everything that a checkpoint holds: parameters, and the routers' bias, which is a buffer."""
        states = (chunk.state_dict(keep_vars=True).values() for chunk in self._chunks)
        return [value for state in states for value in state if isinstance(value, torch.Tensor)]

    @torch.no_grad()
    def _fill(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self._weights(), values, strict=True):
            weight.copy_(value)

    # ---- optimizer steps

    def train_step(
        self, input_ids: torch.Tensor, loss_fn: LossFn, *, lr: float | None = None, temperature: float = 1.0
    ) -> Metrics:
        """One optimizer step on the whole batch: split over data-parallel ranks, then into micro-batches.

        Args:
            input_ids: int64 `[N, L]`, padded to the right; any N and L.
            loss_fn: see `LossFn`; its gradients are summed over all parts.
            lr: of this step; None for the configured one.

        Returns:
            On every rank: `loss` and the loss function's metrics, summed over the batch; `grad_norm` before clipping.

        Raises:
            RuntimeError: on every rank, before any weight changes: a gradient is not finite.
        """
        batches = self._micro_batches(input_ids.shape[0], self.config.micro_batch_size)
        parts: list[Metrics] = []

        def part(rows: MicroBatch, logprobs: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
            if rows.stop == rows.start:
                return logprobs.sum() * 0.0, {}
            loss, metrics = loss_fn(logprobs[: rows.stop - rows.start], rows.start, rows.stop)
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                parts.append({**metrics, "loss": float(loss.detach())})
            return loss, {}

        self._set_rates(self.config.lr if lr is None else lr)
        with megatron_on_cpu():
            for chunk in self._ddp:
                chunk.zero_grad_buffer()
            self._optimizer.zero_grad()
            self._run(input_ids, batches, part, temperature, forward_only=False)
            self._check_gradients()
            updated, grad_norm, _ = self._optimizer.step()
        if not updated:
            raise RuntimeError(f"trainer rank {self.rank}: Megatron's optimizer skipped the step (norm {grad_norm})")
        self.num_steps += 1
        return {**self._sum_over_ranks(parts), "grad_norm": float(grad_norm or 0.0)}

    def supervised_step(
        self, input_ids: torch.Tensor, mask: torch.Tensor, *, lr: float | None = None, temperature: float = 1.0
    ) -> Metrics:
        """One optimizer step on the mean cross-entropy of the tokens where `mask` `[N, L]` is 1."""
        count = max(float(mask[:, 1:].sum()), 1.0)

        def loss_fn(logprobs: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, Metrics]:
            return -(logprobs * mask[start:stop].to(logprobs.device)).sum() / count, {}

        return self.train_step(input_ids, loss_fn, lr=lr, temperature=temperature)

    def _set_rates(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]

    def _check_gradients(self) -> None:
        finite = torch.ones((), device=self.device)
        for buffer in (b for chunk in self._ddp for b in (*chunk.buffers, *chunk.expert_parallel_buffers)):
            finite *= torch.isfinite(buffer.grad_data).all()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not bool(finite):
            raise RuntimeError(
                f"trainer rank {self.rank}: a gradient is not finite, no weight was changed; "
                f"lower the learning rate or look for log-probabilities that are -inf"
            )

    def _sum_over_ranks(self, parts: list[Metrics]) -> Metrics:
        """Sums over micro-batches and ranks, the same on all ranks; only last stages have parts."""
        everyone: list[list[Metrics]] = [[] for _ in range(self.config.parallel.world_size)]
        dist.all_gather_object(everyone, parts)
        total: Metrics = {}
        for metrics in (m for said in everyone for m in said):
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + float(value)
        return total

    # ---- Megatron's schedule

    def _micro_batches(self, num_rows: int, limit: int) -> list[MicroBatch]:
        parallel = self.config.parallel
        # Stages with several chunks pass micro-batches on in groups of as many as there are stages.
        group = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        return micro_batches(num_rows, parallel.data, parallel_state.get_data_parallel_rank(), limit, group)

    def _run(
        self,
        input_ids: torch.Tensor,
        batches: list[MicroBatch],
        loss: Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, Metrics]],
        temperature: float,
        *,
        forward_only: bool,
    ) -> None:
        """Run forward (and backward) over micro-batches; `loss` is called on pipelines' last stages."""

        def finish(
            rows: MicroBatch, ids: torch.Tensor, logits: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
            logprobs = token_logprobs(logits, ids, temperature, self._shape.vocab_size)
            value, metrics = loss(rows, logprobs[:, : input_ids.shape[1]])
            return value, torch.zeros((), dtype=torch.int, device=self.device), metrics

        def step(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
            rows = next(data)
            ids = padded_rows(input_ids, rows, self._sequence_multiple).to(self.device)
            positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids).contiguous()
            return model(ids, positions, None), partial(finish, rows, ids)

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in self._ddp],
            model=self._ddp,
            num_microbatches=len(batches),
            seq_length=-(-input_ids.shape[1] // self._sequence_multiple) * self._sequence_multiple,
            micro_batch_size=batches[0].size,
            forward_only=forward_only,
        )

    # ---- what it holds

    def source(self) -> MegatronSource:
        """This rank's side of a refit."""
        return self._source

    def weight_problems(self) -> list[str]:
        """Boxes of this rank that are not the checkpoint's; nothing once a step was made."""
        return [] if self.num_steps else checkpoint.differences(self._read_holdings(), self.config.model_path)

    def export(self, folder: str) -> None:
        """Write the whole model as a Hugging Face checkpoint, with the configuration and tokenizer it came with.

        Raises:
            OSError: on every rank, where rank 0 could not write.
        """
        checkpoint.write(self._source.holdings(), self._source.table(), folder, beside=self.config.model_path)

    def close(self) -> None:
        """Leave the process groups; idempotent."""
        gpt.close_parallel()


def _sum_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Megatron's reduction of gradients, without its division by tokens: loss functions divide already."""
    finalize_model_grads(model, None, **options)
