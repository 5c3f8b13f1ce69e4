"""The loop's handles over real actors: Megatron trainers, vLLM generators, and the refit sessions between them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch.distributed import TCPStore

from nemo_rl.cluster import Actor, Cluster, ClusterError, wait_all
from nemo_rl.generator.actor import CONTROL, GeneratorActor
from nemo_rl.generator.options import GeneratorConfig, worker_env
from nemo_rl.grpo.loop import RefitSummary
from nemo_rl.grpo.loss import BatchLoss, LossInputs, LossOptions, Normalizer
from nemo_rl.grpo.rollouts import GenerationRequest
from nemo_rl.grpo.types import Completion, RolloutBatch
from nemo_rl.refit.base import RefitOptions, RefitReport, World
from nemo_rl.schema import Config
from nemo_rl.topology import Topology, device_of, parallel_of
from nemo_rl.trainer.actor import TrainerActor, trainer_env
from nemo_rl.trainer.model import model_shape, read_config
from nemo_rl.trainer.policy import TrainerConfig

log = logging.getLogger(__name__)
_CLOSE_S = 20.0


def trainer_config(config: Config, model_path: Path, topology: Topology) -> TrainerConfig:
    """What the trainers are told."""
    policy, optimizer = config.policy, config.policy.megatron_cfg.optimizer
    return TrainerConfig(
        model_path=str(model_path),
        parallel=parallel_of(config, topology.num_trainers),
        precision=policy.precision,
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        router_bias_update_rate=policy.megatron_cfg.moe_router_bias_update_rate,
        micro_batch_size=policy.train_micro_batch_size,
        logprob_batch_size=policy.logprob_batch_size,
        device=device_of(config),
        seed=config.grpo.seed,
        deadline_s=config.grpo.step_deadline_s,
    )


def generator_config(config: Config, model_path: Path) -> GeneratorConfig:
    """What every generator is told."""
    vllm = config.policy.generation.vllm_cfg
    return GeneratorConfig(
        model_path=str(model_path),
        tensor_parallel_size=vllm.tensor_parallel_size,
        precision=vllm.precision,  # type: ignore[arg-type]  # GeneratorConfig checks it
        max_model_len=vllm.max_model_len,
        max_num_seqs=vllm.max_num_seqs,
        kv_cache_memory_bytes=vllm.kv_cache_memory_bytes,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        enforce_eager=vllm.enforce_eager,
        moe_backend=vllm.moe_backend,
        load_format=vllm.load_format,  # type: ignore[arg-type]
        quantization=vllm.quantization,
        kv_cache_dtype=vllm.kv_cache_dtype,
        seed=config.grpo.seed,
        in_flight=in_flight(config),  # type: ignore[arg-type]
        deadline_s=config.grpo.step_deadline_s,
    )


def in_flight(config: Config) -> str:
    """What a refit does to requests that have tokens (`GeneratorConfig.in_flight`)."""
    asynchronous = config.grpo.async_grpo
    if not (asynchronous.enabled and asynchronous.in_flight_weight_updates):
        return "refuse"
    return "recompute" if asynchronous.recompute_kv_cache_after_weight_updates else "keep"


def refit_options(config: Config) -> RefitOptions:
    """What every refit session is told; `nccl_xfer_refit=false` means the conventional refit, `broadcast`."""
    refit = config.policy.refit
    transport = refit.transport if config.policy.nccl_xfer_refit else "broadcast"
    return RefitOptions(
        transport=transport,
        bucket_bytes=refit.bucket_bytes,
        num_streams=refit.num_streams,
        deadline_s=refit.deadline_s,
        verify=refit.verify,
        verify_against_checkpoint=refit.verify_against_checkpoint,
        measure_links=refit.measure_links,
        cache_dir=refit.cache_dir,
    )


@dataclass(frozen=True, slots=True)
class TrainerGroup:
    """All trainer ranks as one (`nemo_rl.grpo.loop.Trainers`); `calibrates` says that they hold scales of a cache."""

    actors: Sequence[Actor]
    temperature: float
    deadline_s: float
    calibrates: bool = False

    def logprobs(self, batch: RolloutBatch, *, reference: bool) -> torch.Tensor:
        ids = ray.put(batch.input_ids)
        calls = [(a, a.handle.logprobs.remote(ids, self.temperature, reference)) for a in self.actors]
        return wait_all(calls, "reference logprobs" if reference else "logprobs", self.deadline_s)[0]

    def train(self, batch: RolloutBatch, inputs: LossInputs, options: LossOptions, lr: float) -> dict[str, float]:
        ids, loss = ray.put(batch.input_ids), ray.put(BatchLoss(inputs, options, Normalizer.of(inputs.mask)))
        calls = [(a, a.handle.train.remote(ids, loss, lr, self.temperature)) for a in self.actors]
        return dict(wait_all(calls, "train", self.deadline_s)[0])

    def calibrate(self, batch: RolloutBatch) -> None:
        if self.calibrates:
            ids = ray.put(batch.input_ids)
            wait_all([(a, a.handle.calibrate.remote(ids)) for a in self.actors], "calibrate", self.deadline_s)


@dataclass(frozen=True, slots=True)
class GeneratorGroup:
    """All replicas (`nemo_rl.grpo.rollouts.Generators`)."""

    actors: Sequence[Actor]
    stop_token_ids: tuple[int, ...]
    deadline_s: float

    @property
    def num_replicas(self) -> int:
        return len(self.actors)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[list[Completion]]]:
        calls = []
        for actor, request in zip(self.actors, requests, strict=True):
            sampling = request.sampling
            arguments = (request.prompts, sampling.num_samples, sampling.max_new_tokens, sampling.temperature)
            calls.append((actor, actor.handle.generate.remote(*arguments, request.seeds, self.stop_token_ids)))
        answers = wait_all(calls, "generate", self.deadline_s)
        return [[[_completion(c) for c in samples] for samples in answered] for answered in answers]


def _completion(generated: Any) -> Completion:
    return Completion(generated.token_ids, generated.logprobs, generated.finished, generated.versions)


class RefitGroup:
    """The refit sessions of all ranks (`nemo_rl.grpo.loop.Refitter`). Hosts the store over which they meet."""

    def __init__(
        self, trainers: Sequence[Actor], generators: Sequence[Actor], topology: Topology, options: RefitOptions
    ) -> None:
        self._trainers, self._generators, self._topology = trainers, generators, topology
        self._options = options
        self._world = World.of(topology.num_trainers, topology.num_generators)
        self._stores: list[TCPStore] = []  # of earlier sessions too, which may still ask theirs

    @property
    def _limit_s(self) -> float:
        """Longer than any phase of a session, so that sessions, which know more, speak first."""
        return self._options.deadline_s * 2 + 10

    def connect(self) -> str:
        """Connect all ranks, then declare, plan and agree. Returns what the first trainer says of it.

        Every time over a store of its own: an earlier one keeps what sessions wrote, that they failed included.
        """
        host = ray.util.get_node_ip_address()
        self._stores.append(TCPStore(host, 0, is_master=True, wait_for_workers=False))
        arguments = (self._world, (host, self._stores[-1].port), self._options)
        calls = [(a, a.handle.refit_connect.remote(*arguments)) for a in self._trainers]
        for replica, actor in enumerate(self._generators):
            calls.append((actor, actor.handle.refit_connect.remote(self._topology.first_rank(replica), *arguments)))
        wait_all(calls, "refit connect", self._limit_s)
        plans = [(a, a.handle.refit_plan.remote()) for a in (*self._trainers, *self._generators)]
        return str(wait_all(plans, "refit plan", self._limit_s)[0])

    def refit(self, version: int) -> RefitSummary:
        """Raises ClusterError naming ranks and phase; the sessions' RefitError is its cause."""
        started = time.monotonic()
        self._prepare(version)
        reports = self.reports(version)
        return summarize_reports(reports, self._topology.num_trainers, time.monotonic() - started)

    def _prepare(self, version: int) -> None:
        """All that generators need not rest for. Trainers look at their weights while engines go on."""
        calls = [(a, a.handle.refit_prepare.remote(version)) for a in (*self._trainers, *self._generators)]
        wait_all(calls, f"refit of version {version}", self._limit_s)

    def reports(self, version: int) -> list[RefitReport]:
        """Refit, and every rank's report in rank order. Raises as `refit`."""
        calls = [(a, a.handle.refit.remote(version)) for a in (*self._trainers, *self._generators)]
        answers = wait_all(calls, f"refit of version {version}", self._limit_s)
        return [r for answer in answers for r in (answer if isinstance(answer, list) else [answer])]


def summarize_reports(reports: Sequence[RefitReport], num_trainers: int, seconds: float) -> RefitSummary:
    """One summary of all ranks' reports, in rank order. Raises ClusterError where they tell of different refits."""
    first = reports[0]
    if {(r.version, r.transport) for r in reports} != {(first.version, first.transport)}:
        told = [(r.version, r.transport) for r in reports]
        raise ClusterError(f"ranks report different refits (version, transport): {told}")
    received = reports[num_trainers:]
    phases = dict.fromkeys(name for r in reports for name in r.phase_s)
    paused = max(received, key=lambda r: sum(r.pause_s.values()))
    return RefitSummary(
        version=first.version,
        transport=first.transport,
        verified=all(r.verified for r in received),
        seconds=seconds,
        bulk_bytes=sum(r.bulk_bytes for r in received),
        misc_bytes=sum(r.misc_bytes for r in received),
        staging_bytes=max(r.staging_bytes for r in reports),
        phase_s={name: max(r.phase_s.get(name, 0.0) for r in reports) for name in phases},
        predicted_s=first.predicted_s,
        pause_s=dict(paused.pause_s),
    )


class Actors:
    """Every actor of a run, placed and ready. A context manager: engines are closed before they are killed."""

    def __init__(self, config: Config, model_path: Path, topology: Topology, device: str, cluster: Cluster) -> None:
        self._config, self._topology, self._cluster = config, topology, cluster
        self._device = device
        self._trainer_config = trainer_config(config, model_path, topology)
        self._generator_config = generator_config(config, model_path)
        self.trainers: list[Actor] = []
        self.generators: list[Actor] = []
        self._shared_files: list[str] = []

    def __enter__(self) -> Actors:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exit_info: object) -> None:
        self.close()

    def _start(self) -> None:
        """Trainers and generators come up side by side; on devices that they share, generators first.

        An engine measures what a device has left, which nobody else must change meanwhile.
        """
        deadline, topology = self._config.cluster.start_deadline_s, self._topology
        count, size = topology.num_trainers, topology.generator_size
        for rank in range(count):
            name = self._name("trainer", rank, rank, 1)
            self.trainers.append(self._cluster.place(name, rank, TrainerActor, trainer_env()))
        env = worker_env(self._generator_config, self._device)  # type: ignore[arg-type]
        for replica in range(topology.num_replicas):
            name = self._name("generator", replica, topology.first_rank(replica), size)
            sees = self._sees(self.trainers[replica * size : (replica + 1) * size]) if topology.shared else {}
            self.generators.append(
                self._cluster.place(
                    name, count + replica, GeneratorActor, env | sees, self._generator_config, groups={CONTROL: 1}
                )
            )
        ready = [(actor, actor.handle.ready.remote()) for actor in self.generators]
        if topology.shared:
            wait_all(ready, "start", deadline)
        leader = self.trainers[0]
        host, port = wait_all([(leader, leader.handle.address.remote())], "start", deadline)[0]
        calls = [
            (actor, actor.handle.setup.remote(self._trainer_config, rank, f"tcp://{host}:{port}"))
            for rank, actor in enumerate(self.trainers)
        ]
        files = wait_all([*calls, *ready], "start", deadline)[count:]
        self._shared_files = [path for replica in files for path in replica]

    def _sees(self, trainers: Sequence[Actor]) -> dict[str, str]:
        """Environment of an engine on the devices of `trainers`."""
        if self._device == "cpu":
            return {}
        calls = [(actor, actor.handle.devices.remote()) for actor in trainers]
        found = wait_all(calls, "start", self._config.cluster.start_deadline_s)
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpu for gpus in found for gpu in gpus)}

    @staticmethod
    def _name(role: str, index: int, first: int, size: int) -> str:
        return f"{role} {index} (rank {first})" if size == 1 else f"{role} {index} (ranks {first}-{first + size - 1})"

    def groups(self, stop_token_ids: tuple[int, ...]) -> tuple[TrainerGroup, GeneratorGroup, RefitGroup]:
        """The loop's three handles."""
        deadline = self._config.grpo.step_deadline_s
        scales = model_shape(read_config(self._trainer_config.model_path)).cache_scales
        return (
            TrainerGroup(self.trainers, self._config.policy.generation.temperature, deadline, bool(scales)),
            GeneratorGroup(self.generators, stop_token_ids, deadline),
            self.refit_group(refit_options(self._config)),
        )

    def refit_group(self, options: RefitOptions) -> RefitGroup:
        """Refit sessions of all ranks with options of their own; earlier sessions end when it connects."""
        return RefitGroup(self.trainers, self.generators, self._topology, options)

    def close(self) -> None:
        """Let actors close within a deadline; remove what killed engines leave in shared memory."""
        calls = [(a, a.handle.close.remote()) for a in self.generators]
        self.generators, self.trainers = [], []
        try:
            wait_all(calls, "close", _CLOSE_S)
        except ClusterError as error:
            log.info("%s", error)
        for path in self._shared_files:
            Path(path).unlink(missing_ok=True)
