"""From a model's configuration and two layouts to a plan: simulated trainer, traced generator, the planner itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from nemo_rl.generator.ranks import EngineSpec
from nemo_rl.generator.simulated import SimulatedGenerator, simulate_apart
from nemo_rl.planview.model import Place, PlanView, view_plan
from nemo_rl.planview.predict import Links
from nemo_rl.refit.base import Declaration, World
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.regular import Axes, describe_layouts
from nemo_rl.trainer import simulated as trainer_side
from nemo_rl.trainer.model import Parallel, model_shape, read_config


@dataclass(frozen=True, slots=True)
class Engines:
    """Generators of one kind: `replicas` engines as `spec` says."""

    spec: EngineSpec
    replicas: int = 1

    def sizes(self) -> dict[str, int]:
        """The mesh of all their ranks, slowest axis first."""
        return {"replica": self.replicas, "dp": self.spec.dp, "pp": self.spec.pp, "tp": self.spec.tp}

    def coordinates(self) -> list[dict[str, int]]:
        """Of every rank."""
        sizes = self.sizes()
        return [dict(zip(sizes, at, strict=True)) for at in itertools.product(*map(range, sizes.values()))]

    def describe(self) -> str:
        e = self.spec
        sizes = {"TP": e.tp, "PP": e.pp, "DP": e.dp, "EP": e.tp * e.dp if e.expert_parallel else 1}
        return _sizes(sizes) + (f", {self.replicas} replicas" if self.replicas > 1 else "")


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What to plan.

    Attributes:
        title: of the model.
        folder: with the model's `config.json`; no weights are read.
        parallel: of the trainers, who hold weights in `dtype`.
        fleet: the generators, kind by kind.
        gpus_per_node: ranks of a host; each side starts on a host of its own where it does not fit beside the other.
        all_misc: why every tensor travels whole (the conventional refit), or None.
    """

    title: str
    folder: Path
    parallel: Parallel
    fleet: tuple[Engines, ...]
    dtype: torch.dtype = torch.bfloat16
    bucket_bytes: int = 16 << 20
    num_streams: int = 2
    gpus_per_node: int = 8
    links: Links = field(default_factory=Links)
    all_misc: str | None = None
    notes: tuple[str, ...] = ()


def build(request: PlanRequest, environ: Mapping[str, str]) -> PlanView:
    """Plan and look at the plan.

    Args:
        environ: of the process that traces vLLM's loaders.

    Raises:
        ValueError: the model is unknown, a layout cannot hold it, or the two sides do not join (a `Refusal`).
    """
    shape = model_shape(read_config(request.folder))
    trainer = trainer_side.simulate(shape, request.parallel, request.dtype)
    made = [simulate_apart(engines.spec, trainer.table, environ) for engines in request.fleet]
    sources = trainer.layouts()
    size = len(sources)
    kinds = [_replicated(generator, engines.replicas) for generator, engines in zip(made, request.fleet, strict=True)]
    declarations = {size + rank: d for rank, d in enumerate(itertools.chain.from_iterable(kinds))}
    world = World.of(size, len(declarations))
    plan = plan_refit(
        world,
        sources,
        declarations,
        trainer.table,
        bucket_bytes=request.bucket_bytes,
        all_misc=request.all_misc,
    )
    nodes = _nodes(size, len(declarations), request.gpus_per_node)
    taken = {rank: d.layout for rank, d in declarations.items()}
    return view_plan(
        plan,
        _title(request),
        _places([_trainer_at(r, request.parallel) for r in world.trainers], nodes, sources),
        _places(_generators_at(request.fleet), nodes[size:], taken),
        request.links,
        num_streams=request.num_streams,
        layouts={
            "trainer": describe_layouts(sources, _trainer_meshes(request.parallel)),
            **{
                f"generators ({engines.describe()})": describe_layouts(
                    {rank: d.layout for rank, d in enumerate(declared)}, _generator_meshes(engines)
                )
                for engines, declared in zip(request.fleet, kinds, strict=True)
            },
        },
        notes=(*(generator.how for generator in made), *request.notes),
    )


def _replicated(generator: SimulatedGenerator, replicas: int) -> list[Declaration]:
    return [d for _ in range(replicas) for _, d in sorted(generator.declarations.items())]


def _title(request: PlanRequest) -> str:
    p = request.parallel
    trainer = _sizes({"TP": p.tensor, "PP": p.pipeline, "CP": p.context, "EP": p.expert, "DP": p.data})
    return f"{request.title}: {trainer} -> {' + '.join(engines.describe() for engines in request.fleet)}"


def _sizes(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 rank"


def _nodes(trainers: int, generators: int, per_node: int) -> list[int]:
    """Host of every rank: in runs of `per_node`, generators on the trainers' host only where all fit one."""
    first = 0 if trainers + generators <= per_node else -(-trainers // per_node)
    return [r // per_node for r in range(trainers)] + [first + r // per_node for r in range(generators)]


def _places(at: Sequence[Mapping[str, int]], nodes: Sequence[int], layouts: Mapping[int, Layout]) -> list[Place]:
    held = [layouts[rank].num_bytes for rank in sorted(layouts)]
    return [Place(a, node, n) for a, node, n in zip(at, nodes, held, strict=False)]


def _trainer_at(rank: int, parallel: Parallel) -> dict[str, int]:
    c = trainer_side.Coordinate.of(rank, parallel)
    at = {"pp": c.pipeline, "dp": c.data, "cp": c.context, "tp": c.tensor}
    sizes = {"pp": parallel.pipeline, "dp": parallel.data, "cp": parallel.context, "tp": parallel.tensor}
    if parallel.expert > 1:
        at, sizes = at | {"ep": c.expert}, sizes | {"ep": parallel.expert}
    return {axis: i for axis, i in at.items() if sizes[axis] > 1}


def _trainer_meshes(parallel: Parallel) -> list[Axes]:
    """Megatron's two ways to number its ranks, slowest axis first."""
    experts = parallel.expert_tensor * parallel.expert
    spread = parallel.world_size // (experts * parallel.pipeline)
    return [
        {"pp": parallel.pipeline, "dp": parallel.data, "cp": parallel.context, "tp": parallel.tensor},
        {"pp": parallel.pipeline, "edp": spread, "ep": parallel.expert, "etp": parallel.expert_tensor},
    ]


def _generator_meshes(engines: Engines) -> list[Axes]:
    dense, e = engines.sizes(), engines.spec
    if not e.expert_parallel or e.pp > 1:
        return [dense]
    return [dense, {"replica": engines.replicas, "ep": e.dp * e.tp}]


def _generators_at(fleet: Sequence[Engines]) -> list[dict[str, int]]:
    """Coordinates of every generator rank, on the axes that tell any two ranks apart."""
    at = [{"kind": kind, **place} for kind, engines in enumerate(fleet) for place in engines.coordinates()]
    shown = [axis for axis in at[0] if len({place[axis] for place in at}) > 1]
    return [{axis: place[axis] for axis in shown} for place in at]


# ---- what people write


def parse_sizes(text: str, known: Mapping[str, str]) -> dict[str, str]:
    """`tp=2,pp=2` as a mapping. Raises ValueError naming what is not `key=value` with a known key."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in known or not value:
            raise ValueError(f"{part!r} in {text!r}: write key=value with {', '.join(known)}")
        found[key] = value
    return found


TRAINER_KEYS: Mapping[str, str] = {
    "tp": "tensor parallel size",
    "pp": "pipeline stages",
    "ep": "expert parallel size",
    "etp": "expert tensor parallel size (default: tp, or 1 where ep > 1)",
    "cp": "context parallel size",
    "dp": "data parallel size (default: the least that ep and etp need)",
    "vpp": "virtual pipeline chunks a stage",
    "layers": "layers of each chunk, such as 4:4:3 (default: as even as they come)",
}
GENERATOR_KEYS: Mapping[str, str] = {
    "tp": "tensor parallel size",
    "pp": "pipeline stages",
    "dp": "data parallel size: as many engines, or with ep=1 one engine of dp x tp ranks",
    "ep": "1 for expert parallelism over dp x tp",
    "redundant": "redundant experts (EPLB)",
    "replicas": "engines beside dp",
    "quantization": "as vLLM's option of that name",
    "kv": "as vLLM's kv_cache_dtype",
}


def parse_trainer(text: str, num_layers: int, *, moe: bool) -> Parallel:
    """The trainers that `TRAINER_KEYS` describe. Raises ValueError where a value is no positive number."""
    given = parse_sizes(text, TRAINER_KEYS)
    layers = given.pop("layers", None)
    n = _numbers(given, text)
    tp, pp, cp, ep = (n.get(key, 1) for key in ("tp", "pp", "cp", "ep"))
    etp = n.get("etp", tp if ep == 1 else 1)
    dp = n.get("dp", math.lcm(tp * cp, ep * etp) // (tp * cp) if moe else 1)
    vpp = n.get("vpp", 1)
    chunks = None if layers is None else tuple(_number(x, text) for x in layers.split(":"))
    if chunks is None and num_layers % (pp * vpp):
        chunks = _even(num_layers, pp * vpp)
    return Parallel(
        world_size=pp * tp * cp * dp,
        tensor=tp,
        pipeline=pp,
        expert=ep,
        expert_tensor=etp if moe else 1,
        pipeline_layers=chunks,
        sequence_parallel=moe and tp > 1,
        context=cp,
        virtual_pipeline=vpp,
    )


def _even(num_layers: int, parts: int) -> tuple[int, ...]:
    """Layers of each part, one more on the first ones."""
    least, more = divmod(num_layers, parts)
    return tuple(least + (i < more) for i in range(parts))


def parse_generator(text: str, engine: EngineSpec) -> Engines:
    """Engines like `engine` with the sizes that `GENERATOR_KEYS` describe. Raises as `parse_trainer`."""
    given = parse_sizes(text, GENERATOR_KEYS)
    quantization, cache = given.pop("quantization", engine.quantization), given.pop("kv", engine.kv_cache_dtype)
    n = _numbers(given, text)
    spread = bool(n.get("ep", 0))
    spec = replace(
        engine,
        tp=n.get("tp", 1),
        pp=n.get("pp", 1),
        expert_parallel=spread,
        dp=n.get("dp", 1) if spread else 1,
        redundant_experts=n.get("redundant", 0),
        quantization=quantization,
        kv_cache_dtype=cache,
    )
    return Engines(spec, n.get("replicas", 1) * (1 if spread else n.get("dp", 1)))


def _numbers(given: Mapping[str, str], text: str) -> dict[str, int]:
    return {key: _number(value, text) for key, value in given.items()}


def _number(value: str, text: str) -> int:
    if not value.isdigit():
        raise ValueError(f"{value!r} in {text!r}: give a whole number, at least 0")
    return int(value)
