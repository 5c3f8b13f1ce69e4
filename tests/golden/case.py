"""What rows share: models, trainers, two sets of weights, and what the engine's own loader makes of them.

Everything is cached by (model, engine, rank): one process serves many rows. It needs `PREFLIGHT_ENV` in its environment
and no default process group.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nemo_rl.generator.ranks import EngineSpec
from nemo_rl.generator.twin import load_rank, trace_rank
from nemo_rl.refit.layout import TensorTable
from nemo_rl.refit.trace import Trace
from nemo_rl.trainer.exports import adapters_alone, stacked_experts
from nemo_rl.trainer.fsdp import simulate_fsdp
from nemo_rl.trainer.model import Parallel, model_shape, read_config
from nemo_rl.trainer.simulated import SimulatedTrainer, simulate
from tests.golden import adapters
from tests.golden.families import checkpoint_table, random_tensors
from tests.golden.matrix import Generator, Model, Row, Trainer
from tests.golden.ranks import Tensors, clone

SEEDS = {"A": 1, "B": 2}
"""Two sets of weights; a row refits A, B and A again."""


FORMS: Mapping[str, Callable[[SimulatedTrainer], SimulatedTrainer]] = {
    "stacked": stacked_experts,
    "adapters": lambda trainer: adapters_alone(trainer, adapters.RANK, adapters.TARGETS),
}
"""How trainers give their tensors out, where not as they are."""


@dataclass(frozen=True, eq=False)
class Target:
    """One generator rank: what its loader takes, and what it makes of the weights.

    Attributes:
        wanted: weights' name -> every parameter and persistent buffer after the engine's own load of all of them.
    """

    spec: EngineSpec
    role: int
    trace: Trace
    wanted: Mapping[str, Tensors]


@dataclass(frozen=True, eq=False)
class Case:
    """A row made ready: trainers, weights, and one target for each generator rank."""

    row: Row
    trainer: SimulatedTrainer
    weights: Mapping[str, Tensors]
    targets: tuple[Target, ...]
    differs_from_checkpoint: tuple[str, ...]


@dataclass
class Bench:
    """Makes cases, and keeps what they have in common. `folder` takes the configurations of models."""

    folder: Path
    _weights: dict[tuple[str, str, bool], Tensors] = field(default_factory=dict)
    _traces: dict[tuple[EngineSpec, int], Trace] = field(default_factory=dict)
    _wanted: dict[tuple[EngineSpec, int, str, bool], Tensors] = field(default_factory=dict)

    def case(self, row: Row) -> Case:
        """Raises ValueError where no trainer or engine has the layout, and whatever a loader raises."""
        trainer = self.trainer(row.model, row.trainer)
        table = trainer.table
        places = [place for g in row.generators for place in self._places(row.model, g)]
        traces = [self._trace(spec, role, row, table) for spec, role in places]
        bits = not any(trace.misc for trace in traces)  # loaders compute with misc tensors: no NaN in them
        weights = {name: self._values(row.model, table, name, bits) for name in SEEDS}
        targets = tuple(
            Target(spec, role, trace, {n: self._load(spec, role, row, n, bits, weights[n]) for n in SEEDS})
            for (spec, role), trace in zip(places, traces, strict=True)
        )
        return Case(row, trainer, weights, targets, self._unlike(row.model, table))

    def trainer(self, model: Model, layout: Trainer) -> SimulatedTrainer:
        """Every rank of the trainers."""
        if layout.kind == "fsdp":
            return simulate_fsdp(self._table(model), layout.num_ranks, dim=layout.dim, replicas=layout.replicas)
        return self._formed(model, layout.parallel)

    def _table(self, model: Model) -> TensorTable:
        """Of a checkpoint; FSDP needs no rule of Megatron's."""
        return self._formed(model, Parallel(1)).table if _unusual(model) else checkpoint_table(model.of)

    def _formed(self, model: Model, parallel: Parallel) -> SimulatedTrainer:
        if model.trainer and model.trainer not in FORMS:
            raise ValueError(f"{model.name}: trainer {model.trainer} is none of {', '.join(FORMS)}")
        trainer = simulate(model_shape(read_config(self.path(model))), parallel, torch.bfloat16)
        return FORMS[model.trainer](trainer) if model.trainer else trainer

    def path(self, model: Model) -> Path:
        """The folder with the model's configuration."""
        folder = self.folder / model.name
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(model.settings))
        return folder

    def _places(self, model: Model, generator: Generator) -> list[tuple[EngineSpec, int]]:
        """(engine, role) of every rank: replicas and data-parallel ranks without expert parallelism share a role."""
        g = generator
        spec = EngineSpec(
            str(self.path(model)),
            tp=g.tp,
            pp=g.pp,
            stage_layers=g.stages,
            dp=g.dp if g.ep else 1,
            expert_parallel=g.ep,
            redundant_experts=g.redundant,
            placement=g.placement,  # type: ignore[arg-type]
            kv_cache_dtype=g.kv_cache_dtype,
            quantization=g.quantization,
            draft=g.draft,
        )
        return [(spec, rank % spec.num_ranks) for rank in range(g.num_ranks)]

    def _trace(self, spec: EngineSpec, role: int, row: Row, table: TensorTable) -> Trace:
        if (spec, role) not in self._traces:
            look = adapters.trace if row.model.trainer == "adapters" else trace_rank
            self._traces[spec, role] = look(spec, role, table)
        return self._traces[spec, role]

    def _values(self, model: Model, table: TensorTable, name: str, bits: bool) -> Tensors:
        key = (model.name, name, bits)
        if key not in self._weights:
            make = any_bits if bits else random_tensors
            self._weights[key] = make(table, SEEDS[name])
        return self._weights[key]

    def _load(self, spec: EngineSpec, role: int, row: Row, name: str, bits: bool, values: Tensors) -> Tensors:
        key = (spec, role, name, bits)
        if key not in self._wanted:
            load = adapters.load if row.model.trainer == "adapters" else load_rank
            own = ((fqn, value.clone()) for fqn, value in values.items())  # some loaders write into what they are given
            self._wanted[key] = clone(load(spec, role, own))
        return self._wanted[key]

    def _unlike(self, model: Model, table: TensorTable) -> tuple[str, ...]:
        """Tensors that trainers give out and a checkpoint of the family does not hold so, or the other way round."""
        if _unusual(model):
            return ()
        wanted = checkpoint_table(model.of)
        return tuple(sorted(f for f in wanted.keys() | table.keys() if wanted.get(f) != table.get(f)))


def _unusual(model: Model) -> bool:
    """Its tensors are not those of the family's checkpoint: other sizes, or adapters alone."""
    return bool(model.config) or model.trainer == "adapters"


_ONE_AT_A_TIME = threading.Lock()


def load_whole(spec: EngineSpec, role: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
    """The engine's loader on some tensors, for ranks that are threads: vLLM's state is the process's."""
    with _ONE_AT_A_TIME:
        return load_rank(spec, role, tensors)


def any_bits(table: TensorTable, seed: int) -> Tensors:
    """Random bit patterns, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for fqn, meta in table.items():
        raw = torch.randint(0, 256, (meta.num_bytes,), dtype=torch.uint8, generator=generator)
        values[fqn] = raw.view(meta.dtype).view(meta.shape)
    return values
