"""One vLLM engine as the loop sees it: completions with log-probabilities, and weights that refits replace."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nemo_rl.generator.gate import Gate, Laps, pause_parts
from nemo_rl.generator.options import AdapterConfig, Generated, GeneratorConfig, Outcome, Store
from nemo_rl.generator.shm import made_since, mapped_shared_memory
from nemo_rl.generator.stepping import Growing, Stepper, Weights
from nemo_rl.refit.base import RefitOptions, RefitReport, World
from nemo_rl.refit.errors import PoisonedError, RefitError

log = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 64 << 20
_PROBE_ERROR = 1e-2  # of a log-probability: above what kernels round, below what a misplaced tensor does
WORKER = "nemo_rl.generator.worker.RefitWorker"
_NO_MULTICAST = {"pass_config": {"fuse_allreduce_rms": False}}
"""Else vLLM sums over ranks by FlashInfer's kernels, where that is installed, and they use NVLink multicast."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a refit did beforehand: each worker's phases, the parts of its pause, and seconds until steps had ended."""

    version: int
    phases: Sequence[Mapping[str, float]] = ()
    parts: Mapping[str, float] = field(default_factory=dict)
    settle_s: float = 0.0


class VllmEngine:
    """A vLLM engine and its workers. The process needs `worker_env(config)` as environment.

    It serves version 0, the weights it loaded, until a refit commits another. A refit called from another thread comes
    between two steps of `generate`, which waits until it is over. After a refit failed, until another succeeds over a
    new session, `generate` refuses with the reason.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        before, started = mapped_shared_memory(), time.time()
        self.config, self.weight_version = config, 0
        self._refusal: str | None = None
        self._as_loaded = config.load_format == "auto"  # the weights are those that the engine read itself
        self._start_check = False
        self._prepared = _Prepared(-1)
        self._llm: Any = _make_llm(config)
        self._adapter: Any = None
        if config.adapter is not None:
            (self._adapter, *_) = self._llm.collective_rpc("serve_adapter", args=(config.adapter,))
        self._stepper = Stepper(self._llm, config.max_num_seqs, self._adapter)
        self._gate = Gate(config.deadline_s)
        self._shared_files = tuple(f for f in sorted(mapped_shared_memory() - before) if made_since(f, started))

    @property
    def num_workers(self) -> int:
        """Generator ranks of this engine in a refit's world."""
        return self.config.tensor_parallel_size

    @property
    def shared_files(self) -> tuple[str, ...]:
        """Files under /dev/shm that a killed engine leaves behind; `close` removes them."""
        return self._shared_files

    # ---- generation

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        max_new_tokens: int,
        temperature: float,
        seed: int | Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> list[list[Generated]]:
        """Answer each prompt `n` times, in order.

        Args:
            temperature: 0 takes the likeliest token.
            seed: of each prompt's samples, or one for all; the same seed and weights give the same tokens.

        Raises:
            RuntimeError: a refit is open or failed; the reason.
            ValueError: prompts and seeds do not go together, or a prompt leaves no room for an answer.
        """
        self._check_request(prompts, seed)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
        try:
            return self._generate(prompts, n, max_new_tokens, temperature, seeds, stop_token_ids, self._served)
        except BaseException:
            with self._gate.step():
                if self._llm is not None:
                    self._stepper.drop()
            raise

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        max_new_tokens: int,
        temperature: float,
        seeds: Sequence[int | None],
        stop_token_ids: Sequence[int],
        weights: Weights,
    ) -> list[list[Generated]]:
        """Answers, each touch of the engine inside `weights()`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options: dict[str, Any] = dict(max_tokens=max_new_tokens, temperature=temperature, logprobs=0, ignore_eos=True)
        options |= dict(stop_token_ids=list(stop_token_ids), detokenize=False, output_kind=RequestOutputKind.DELTA)
        params = [[SamplingParams(seed=None if s is None else s + i, **options) for i in range(n)] for s in seeds]
        answers = self._stepper.answer(prompts, params, weights)
        return [[_generated(growing) for growing in samples] for samples in answers]

    @contextmanager
    def _served(self) -> Iterator[int]:
        """The engine for one step, where it serves; the version of its weights."""
        with self._gate.step():
            self._refuse_if_unfit()
            yield self.weight_version

    @contextmanager
    def _held(self) -> Iterator[int]:
        """The engine at rest, whatever it refuses to others."""
        yield self.weight_version

    def _refuse_if_unfit(self) -> None:
        if self._llm is None:
            raise RuntimeError("the engine was closed; make a new one")
        if self._refusal is not None:
            raise RuntimeError(f"the generator refuses to generate: {self._refusal}")

    def _check_request(self, prompts: Sequence[Sequence[int]], seed: int | Sequence[int] | None) -> None:
        if isinstance(seed, Sequence) and len(seed) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(seed)} seeds; give one seed per prompt, or one for all")
        bad = [i for i, p in enumerate(prompts) if not 0 < len(p) < self.config.max_model_len]
        if bad:
            raise ValueError(
                f"prompts {bad[:8]} are empty or reach max_model_len {self.config.max_model_len}; shorten them or "
                "raise max_model_len"
            )

    # ---- refit

    def refit_connect(self, rank_offset: int, world: World, store: Store, options: RefitOptions) -> None:
        """Join `world` with this engine's workers as ranks `rank_offset ..`. Raises RefitError."""
        self._start_check = options.verify_against_checkpoint and self._as_loaded and self.config.adapter is None
        with self._gate.pause():
            self._all("refit_connect", rank_offset, world, store, options, self._start_check)

    def refit_plan(self) -> str:
        """Declare, plan and agree; digest of the plan. Raises RefitError."""
        with self._gate.pause():
            digests = set(self._all("refit_plan"))
        assert len(digests) == 1, "agreed plans have one digest"
        return digests.pop()

    def refit_prepare(self, version: int) -> None:
        """Agree on `version` with all ranks, between two steps. Raises RefitError."""
        with self._at_rest() as settle_s:
            laps = Laps()
            phases = self._all("refit_prepare", version)
            laps.lap("agree")
        self._prepared = _Prepared(version, phases, laps.parts, settle_s)

    def refit(self, version: int) -> list[RefitReport]:
        """Take the trainers' weights as `version`; one report per worker, in rank order.

        A report's phase `settle` is how long steps under way took to end, of which tokens came; `pause_s` begins there.

        Raises:
            RefitError: what the first failing worker said, with the others' words, or that cached keys and values of
                the old weights are kept, or that version 0 computes something else than the weights that the engine
                read itself; the engine refuses to generate.
        """
        waits = self._stepper.num_running > 0
        with self._at_rest() as settle_s:
            laps = Laps()
            reports = self._refit(version, laps)
        if waits:
            self._gate.resumed()
        laps.lap("resume")
        before = self._prepared if self._prepared.version == version else _Prepared(version)
        parts = pause_parts(laps.parts, reports, before.phases, before.parts)
        settle = {"settle": settle_s + before.settle_s}
        return [replace(report, pause_s=parts, phase_s={**report.phase_s, **settle}) for report in reports]

    @contextmanager
    def _at_rest(self) -> Iterator[float]:
        """Between two steps, with nothing scheduled ahead; seconds until the steps under way had ended."""
        started = time.monotonic()
        with self._gate.pause():
            self._stepper.settle(self.weight_version)
            yield time.monotonic() - started

    def _refit(self, version: int, laps: Laps) -> list[RefitReport]:
        answers = self._probe() if self._start_check and version == 0 else None
        self._refusal, self._as_loaded = f"the update to version {version} is not committed", False
        laps.lap("probe")
        reports: list[RefitReport] = self._all("refit", version)
        laps.lap("session")
        self._renew_caches(version)
        if answers is not None:
            self._compare(answers)
        self.weight_version, self._refusal = version, None
        laps.lap("caches")
        return reports

    def _probe(self) -> list[Generated]:
        """Greedy answers to fixed prompts, from what the kernels hold in whatever form."""
        self._llm.reset_prefix_cache()
        count, size = self._llm.llm_engine.model_config.get_vocab_size(), min(16, self.config.max_model_len - 5)
        prompts = [[(7919 * (i + 1) * (at + 1)) % count for at in range(size)] for i in range(4)]
        return [answer for (answer,) in self._generate(prompts, 1, 4, 0.0, [None] * 4, (), self._held)]

    def _compare(self, before: Sequence[Generated]) -> None:
        """Raises RefitError where the probe's answers are not `before`."""
        pairs = list(zip(before, self._probe(), strict=True))
        worst = max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in pairs)
        if any(a.token_ids != b.token_ids for a, b in pairs) or not worst < _PROBE_ERROR:
            self._refusal = (
                f"version 0 answers otherwise than the weights that the engine read itself: log-probabilities of the "
                f"same prompts differ by up to {worst:.3g}"
            )
            remedy = "the layout of one side does not say what its loader does, or trainers start from other weights"
            raise RefitError(self._refusal, rank=0, phase="commit", remedy=remedy)

    def _renew_caches(self, version: int) -> None:
        """No request that starts from here on finds keys and values that other weights computed."""
        if self._stepper.num_running and self.config.in_flight != "refuse":
            self._stepper.renew(version, self.config.in_flight == "recompute")
        else:
            self._drop_caches(version)

    def _drop_caches(self, version: int) -> None:
        """Forget keys and values that other weights computed. Raises RefitError where some are in use."""
        if not self._llm.reset_prefix_cache():
            detail = f"the KV cache still holds blocks that weights of version {self.weight_version} computed"
            self._refusal = f"{detail}, and the weights are version {version}"
            remedy = "end the requests that use them, then refit as a newer version"
            raise RefitError(self._refusal, rank=0, phase="commit", remedy=remedy)

    def refit_close(self) -> None:
        """Give up the workers' sessions; weights and version stay."""
        with self._gate.pause():
            self._all("refit_close")

    def _all(self, method: str, *args: object) -> list[Any]:
        """Call every worker and return their values. Raises the first error, which leaves the engine refusing."""
        if self._llm is None:
            raise RuntimeError("the engine was closed; make a new one")
        try:
            outcomes: list[Outcome] = self._llm.collective_rpc(method, args=args)
        except Exception as error:
            self._refusal = f"workers failed in {method}: {error}"
            raise
        errors = [o.error for o in outcomes if o.error is not None]
        if not errors:
            return [o.value for o in outcomes]
        joined = _join_errors(errors)
        self._refusal = str(joined)
        raise joined

    # ---- tests and end of life

    def read_parameters(self) -> list[dict[str, torch.Tensor]]:
        """Copies of each worker's parameters by vLLM's names, as the kernels hold them."""
        return self._llm.collective_rpc("read_parameters")

    def collective_rpc(self, method: str, *args: object) -> list[Any]:
        """Call a method of the worker extension on every worker."""
        return self._llm.collective_rpc(method, args=args)

    def close(self) -> None:
        """End the workers and remove the shared-memory files that they left; idempotent."""
        with self._gate.pause():
            if self._llm is None:
                return
            llm, self._llm = self._llm, None
            self._stepper.close()
            contexts = socket_contexts(llm)  # the engine forgets them
            llm.llm_engine.engine_core.shutdown()
            for context in contexts:
                context.destroy(linger=0)
        for path in self._shared_files:
            Path(path).unlink(missing_ok=True)


def socket_contexts(llm: Any) -> list[Any]:
    """ZeroMQ's, of the queues between an engine and its worker processes.

    One that Python collects while its sockets are open waits for them without end, if they are collected with it.
    """
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    executor = llm.llm_engine.model_executor
    if not isinstance(executor, MultiprocExecutor):
        return []
    queues = [executor.rpc_broadcast_mq, *executor.response_mqs]
    return [s.context for queue in queues for s in (queue.local_socket, queue.remote_socket) if s is not None]


def _make_llm(config: GeneratorConfig) -> Any:
    from vllm import LLM, envs
    from vllm.platforms import current_platform

    if envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        raise RuntimeError("VLLM_ENABLE_V1_MULTIPROCESSING is on; start the process with worker_env(config)")
    on_cpu = current_platform.is_cpu()
    gpu = {"gpu_memory_utilization": config.gpu_memory_utilization, "compilation_config": _NO_MULTICAST}
    adapter = _adapter_options(config.adapter) if config.adapter is not None else {}
    return LLM(
        model=config.model_path,
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend="uni" if config.tensor_parallel_size == 1 else "mp",
        dtype=config.precision,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        enforce_eager=config.enforce_eager,
        moe_backend=config.moe_backend,
        load_format=config.load_format,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        seed=config.seed,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        worker_extension_cls=WORKER,
        disable_log_stats=True,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes or (_CPU_CACHE_BYTES if on_cpu else None),
        **({} if on_cpu else gpu),
        **adapter,
    )


def _adapter_options(adapter: AdapterConfig) -> dict[str, Any]:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    sizes = sorted(int(rank) for rank in get_args(MaxLoRARanks) if int(rank) >= adapter.rank)
    if not sizes:
        raise ValueError(
            f"vLLM has no room for adapters of rank {adapter.rank}; its ranks are {get_args(MaxLoRARanks)}"
        )
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": sizes[0],
        "lora_target_modules": list(adapter.target_modules),
    }


def _generated(growing: Growing) -> Generated:
    versions = tuple(growing.versions)
    return Generated(tuple(growing.tokens), tuple(growing.logprobs), growing.finish == "stop", versions)


def _join_errors(errors: Sequence[RefitError]) -> RefitError:
    """The first error that is not the echo of an earlier failure; the others' words stand in its detail."""
    first = next((e for e in errors if not isinstance(e, PoisonedError)), errors[0])
    others = [str(e) for e in errors if e is not first and e.detail != first.detail]
    if not others:
        return first
    detail = f"{first.detail}; other workers: {'; '.join(others)}"
    return type(first)(detail, rank=first.rank, phase=first.phase, remedy=first.remedy)
