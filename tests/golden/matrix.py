"""The rows of `matrix.yaml`, as values: which family is trained how, generated from how, and how the row is run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nemo_rl.trainer.model import Parallel
from tests.golden.families import CONFIGS

MATRIX = Path(__file__).with_name("matrix.yaml")
RUNS = ("simulated", "gloo", "peer", "engine")
_BULK = 0.995
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Model:
    """A family as the matrix uses it.

    Attributes:
        of: its name in `families.py`.
        config: keys of its `config.json` to change.
        bulk: least share of its bytes that must travel as bulk; below 0.995 `why` says the reason.
        trainer: `stacked` or `adapters`: how trainers give their tensors out, where not as they are.
        why: what is to be said of it in the report.
    """

    name: str
    of: str
    config: Mapping[str, Any] = field(default_factory=dict)
    bulk: float = _BULK
    trainer: str = ""
    why: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Its `config.json`."""
        return {**CONFIGS[self.of], **self.config}


@dataclass(frozen=True, slots=True)
class Trainer:
    """Layout of the trainers, in sizes as Megatron counts them: experts lie over the ranks of tp x cp x dp.

    There are as few ranks as hold the layout: dp grows where experts need more ranks than tp x cp x dp.

    Attributes:
        kind: `megatron` or `fsdp`; of the latter `dp` counts shards, `dim` is what they cut, `replicas` copies of all.
        layers: of each pipeline chunk, first chunks of all stages first.
        embedding, loss: counts as a layer of its stage.
    """

    kind: str = "megatron"
    ep: int = 1
    etp: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    layers: tuple[int, ...] | None = None
    first: int | None = None
    last: int | None = None
    embedding: bool = False
    loss: bool = False
    dim: int = 0
    replicas: int = 1

    @property
    def num_ranks(self) -> int:
        if self.kind == "fsdp":
            return self.dp * self.replicas
        return self.pp * math.lcm(self.tp * self.cp * self.dp, self.ep * self.etp)

    @property
    def parallel(self) -> Parallel:
        """In Megatron's terms."""
        return Parallel(
            self.num_ranks,
            tensor=self.tp,
            pipeline=self.pp,
            expert=self.ep,
            expert_tensor=self.etp,
            context=self.cp,
            virtual_pipeline=self.vpp,
            pipeline_layers=self.layers,
            first_layers=self.first,
            last_layers=self.last,
            count_embedding=self.embedding,
            count_loss=self.loss,
        )


@dataclass(frozen=True, slots=True)
class Generator:
    """Engines of one kind; `replicas` of them, `stages` with as many layers each. The rest is as in `EngineSpec`."""

    tp: int = 1
    pp: int = 1
    stages: tuple[int, ...] = ()
    dp: int = 1
    ep: bool = False
    redundant: int = 0
    placement: str = "linear"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    draft: bool = False
    replicas: int = 1

    @property
    def num_ranks(self) -> int:
        return self.replicas * self.dp * self.pp * self.tp


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        level: 0 is part of `make test`.
        run: `simulated` (threads), `gloo` or `peer` (processes, by transport), or `engine` (real engines).
        staged: bytes land in fresh load-format tensors, a module at a time, as in an engine that repacks.
        colocated: the first generators are the trainers' own ranks.
        refused: words of the refusal that this row must end in.
        not_covered: why the row is not run; it counts as not passed.
        bound: of an engine row: the largest error of a log-probability, against float32.
    """

    model: Model
    trainer: Trainer
    generators: tuple[Generator, ...]
    level: int = 1
    run: str = "simulated"
    staged: bool = False
    colocated: bool = False
    refused: str = ""
    not_covered: str = ""
    bound: float = 0.0
    note: str = ""

    @property
    def name(self) -> str:
        extra = " colocated" * self.colocated + " staged" * self.staged + f" {self.run}" * (self.run != "simulated")
        return f"{self.model.name}: {_sizes(self.trainer)} -> {' + '.join(map(_sizes, self.generators))}{extra}"


def load(path: Path = MATRIX) -> list[Row]:
    """Every row, in the file's order.

    Raises:
        ValueError: a key is unknown, a family is, a share below the rule has no reason, or two rows are the same.
    """
    said = yaml.safe_load(path.read_text())
    models = {name: _model(name, given or {}) for name, given in said["families"].items()}
    rows = [_row(models, given) for given in said["rows"]]
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path.name}: rows stand there twice: {'; '.join(twice)}")
    return rows


def _model(name: str, given: Mapping[str, Any]) -> Model:
    model = _made(Model, {"name": name, "of": name, **given})
    if model.of not in CONFIGS:
        raise ValueError(f"family {name}: {model.of} is none of {', '.join(CONFIGS)}")
    if model.bulk < _BULK and not model.why:
        raise ValueError(f"family {name}: a bulk share of {model.bulk} below {_BULK} needs a reason in `why`")
    return model


def _row(models: Mapping[str, Model], given: Mapping[str, Any]) -> Row:
    rest = {k: v for k, v in given.items() if k not in ("family", "trainer", "generators")}
    if given["family"] not in models:
        raise ValueError(f"{given}: the family is none of {', '.join(models)}")
    layers = given["trainer"].get("layers")
    trainer = _made(Trainer, {**given["trainer"], "layers": tuple(layers) if layers else None})
    generators = tuple(_made(Generator, {**g, "stages": tuple(g.get("stages", ()))}) for g in given["generators"])
    row = _made(Row, {"model": models[given["family"]], "trainer": trainer, "generators": generators, **rest})
    if row.run not in RUNS or trainer.kind not in ("megatron", "fsdp"):
        raise ValueError(f"{given}: run is one of {RUNS}, a trainer's kind megatron or fsdp")
    return row


def _made(kind: type[T], given: Mapping[str, Any]) -> T:
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if given.keys() - known:
        raise ValueError(f"{dict(given)}: unknown keys {sorted(given.keys() - known)}; known: {sorted(known)}")
    return kind(**given)


def _sizes(layout: Trainer | Generator) -> str:
    """`TP2xPP2xDP2`: every size that is not its default."""
    parts = []
    for f in fields(layout):
        value = getattr(layout, f.name)
        if value == f.default:
            continue
        if isinstance(value, bool):
            parts.append(f.name.upper())
        elif isinstance(value, int):
            parts.append(f"{f.name.upper()}{value}" if len(f.name) <= 3 else f"{f.name}={value}")
        elif isinstance(value, tuple):
            parts.append(f"{f.name}={'-'.join(map(str, value))}")
        else:
            parts.append(str(value))
    return "x".join(parts) or "1"
