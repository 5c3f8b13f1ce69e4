"""A `VllmEngine` as a Ray actor; whoever places it gives it `worker_env(config)` as environment."""

from __future__ import annotations

from collections.abc import Sequence

import ray
import torch

from nemo_rl.generator.engine import VllmEngine
from nemo_rl.generator.options import Generated, GeneratorConfig, Store
from nemo_rl.refit.base import RefitOptions, RefitReport, World

CONTROL = "control"


class GeneratorActor:
    """Methods are those of `VllmEngine`; the constructor returns when the engine is ready.

    Methods of the group `CONTROL` run in a thread of their own, beside `generate`.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        self._engine = VllmEngine(config)

    def ready(self) -> tuple[str, ...]:
        """Answers once the engine stands: its shared-memory files, to be removed should the actor be killed."""
        return self._engine.shared_files

    def num_workers(self) -> int:
        return self._engine.num_workers

    def weight_version(self) -> int:
        return self._engine.weight_version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        max_new_tokens: int,
        temperature: float,
        seed: int | Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> list[list[Generated]]:
        return self._engine.generate(prompts, n, max_new_tokens, temperature, seed, stop_token_ids)

    @ray.method(concurrency_group=CONTROL)
    def refit_connect(self, rank_offset: int, world: World, store: Store, options: RefitOptions) -> None:
        self._engine.refit_connect(rank_offset, world, store, options)

    @ray.method(concurrency_group=CONTROL)
    def refit_plan(self) -> str:
        return self._engine.refit_plan()

    @ray.method(concurrency_group=CONTROL)
    def refit_prepare(self, version: int) -> None:
        self._engine.refit_prepare(version)

    @ray.method(concurrency_group=CONTROL)
    def refit(self, version: int) -> list[RefitReport]:
        return self._engine.refit(version)

    @ray.method(concurrency_group=CONTROL)
    def refit_close(self) -> None:
        self._engine.refit_close()

    def read_parameters(self) -> list[dict[str, torch.Tensor]]:
        return self._engine.read_parameters()

    @ray.method(concurrency_group=CONTROL)
    def close(self) -> None:
        self._engine.close()
