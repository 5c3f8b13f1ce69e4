"""Rows with real engines: simulated trainers in threads, vLLM that generates, and fresh engines to compare with.

As a program, `python -m tests.golden.engines FAMILY TRAINER GENERATORS BOUND` (JSON) runs one row in a process with the
environment of an engine, and prints what it found as one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_rl.generator.engine import VllmEngine
from nemo_rl.generator.options import GeneratorConfig, worker_env
from nemo_rl.refit.base import RefitOptions, RefitReport, World
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.session import RefitSession
from nemo_rl.trainer.exports import adapters_alone
from nemo_rl.trainer.fsdp import simulate_fsdp
from nemo_rl.trainer.model import model_shape, read_config
from nemo_rl.trainer.simulated import SimulatedTrainer, simulate
from tests.e2e import blocks
from tests.e2e import engines as real
from tests.e2e import test_generator_adapter as adapter
from tests.e2e import test_generator_formats as formats
from tests.golden.case import SEEDS
from tests.golden.checks import Verdict
from tests.golden.execute import ORDER, together
from tests.golden.matrix import Generator, Row, Trainer
from tests.golden.ranks import RankSource

OPTIONS = RefitOptions(bucket_bytes=16384, deadline_s=120)
_LIMIT_S = 560
_FAR = 5


@dataclass(frozen=True, slots=True)
class Engine:
    """How a family is run: a tiny model of `tests/e2e`, and the precision of trainer and engine."""

    kind: real.Kind
    precision: str = "float32"


_LATENT = formats.KINDS["latent"]
LATENT = replace(_LATENT, options={**_LATENT.options, "num_nextn_predict_layers": 0})
"""Transformers saves no draft layers, whatever the configuration counts."""
ENGINES = {
    "qwen3": Engine(real.KINDS["dense"]),
    "qwen3_tied": Engine(real.KINDS["tied"]),
    "qwen2_bias": Engine(real.KINDS["bias"]),
    "qwen3_moe": Engine(real.KINDS["moe"]),
    "deepseek_v3": Engine(LATENT),
    "fp8_kv_scales": Engine(formats.KINDS["calibrated"], "bfloat16"),
    "block_fp8": Engine(formats.KINDS["blocks"], "bfloat16"),
    "qwen2_to_fp8": Engine(formats.KINDS["online"], "bfloat16"),
    "lora": Engine(adapter.kind_of(None)),
}


@dataclass(frozen=True, eq=False)
class Ready:
    """A model made ready for a row.

    Attributes:
        path: what the engines are started from.
        fresh: weights' name -> the model that a fresh engine loads to have those weights: folder and kind.
        values: weights' name -> checkpoint that transformers computes the same with.
        observe, garble: what is looked at in an engine, and what makes its weights random.
    """

    path: str
    engine: Engine
    trainer: SimulatedTrainer
    weights: dict[str, real.Tensors]
    fresh: dict[str, tuple[str, real.Kind]]
    values: dict[str, str]
    observe: Callable[[VllmEngine], Any]
    garble: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a row with engines found; bytes and misc as in a plan."""

    verdicts: tuple[Verdict, ...]
    bulk_bytes: int
    misc_bytes: int
    misc: dict[str, list[str]]


def run_apart(row: Row) -> Answer:
    """Run the row in a process of its own.

    Raises:
        ValueError: no engine is known for the family.
        RuntimeError: the process failed; its last words.
    """
    if row.model.name not in ENGINES:
        raise ValueError(f"{row.model.name}: no engine is known for it; known: {', '.join(ENGINES)}")
    request = [row.model.name, asdict(row.trainer), [asdict(g) for g in row.generators], row.bound]
    environ = {**os.environ, **worker_env(GeneratorConfig("any")), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.golden.engines", json.dumps(request)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_LIMIT_S)
    if done.returncode:
        tail = " | ".join(line for line in done.stderr.splitlines()[-12:] if line.strip())
        raise RuntimeError(f"the engines' process ended with {done.returncode}: {tail[-800:]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    verdicts = tuple(Verdict(v["check"], tuple(v["wrong"]), v["seen"]) for v in said.pop("verdicts"))
    return Answer(verdicts, **said)


# ---- inside its process


def run(folder: Path, family: str, layout: Trainer, generators: Sequence[Generator], bound: float) -> Answer:
    """Refit A, B and A into engines that start with other weights; compare each time with fresh ones."""
    make = ready_adapters if family == "lora" else ready_model
    ready = make(folder, ENGINES[family], layout)
    fresh = [
        {
            n: real.with_engine(path, kind, ready.engine.precision, g.tp, ready.observe)
            for n, (path, kind) in ready.fresh.items()
        }
        for g in generators
    ]
    sources = [RankSource(ready.trainer.table, rows, ready.trainer.unused) for rows in ready.trainer.rows]
    wrong, reports = [], []
    with ExitStack() as stack:
        serving = [stack.enter_context(started(ready, g)) for g in generators]
        plan, refit = stack.enter_context(world(sources, serving))
        for version, name in enumerate(ORDER, 1):
            for source in sources:
                source.step(ready.weights[name])
            for engine in serving:
                engine.collective_rpc(ready.garble)  # type: ignore[arg-type]
            reports.append(refit(version))
            seen = [ready.observe(engine) for engine in serving]
            wrong += [
                f"refit {version} ({name}), engine {i}: not as an engine that loaded {name}"
                for i, (got, want) in enumerate(zip(seen, fresh, strict=True))
                if not real.equal(got, want[name])
            ]
    wrong += [f"engine {i}: A and B answer alike" for i, w in enumerate(fresh) if not real.differ(w["A"], w["B"])]
    verdicts = (
        checkpoint_verdict(ready.trainer, ready.weights["A"]),
        Verdict("equal", tuple(wrong), f"{len(generators)} engines after {len(ORDER)} refits, answers and parameters"),
        moved_verdict(plan, reports),
        logprob_verdict(seen, ready.values, bound),
    )
    misc: dict[str, list[str]] = {}
    for fqn, reason in plan.misc_reasons.items():
        misc.setdefault(reason, []).append(fqn)
    return Answer(verdicts, plan.bulk_bytes, plan.misc_bytes, misc)


def ready_model(folder: Path, engine: Engine, layout: Trainer) -> Ready:
    """Two checkpoints. Trainers hold them by Megatron's rule, or shards of their tensors as FSDP cuts them."""
    kind, precision = engine.kind, engine.precision
    paths = {n: real.make_checkpoint(folder / n, kind, seed, precision) for n, seed in SEEDS.items()}
    weights = {name: load_file(f"{path}/model.safetensors") for name, path in paths.items()}
    if layout.kind == "fsdp":
        table = real.table_of(weights["A"])
        trainer = simulate_fsdp(table, layout.num_ranks, dim=layout.dim, replicas=layout.replicas)
    else:
        trainer = trained_model(paths["A"], layout, precision)
    fresh = {name: (path, kind) for name, path in paths.items()}
    dummy = replace(engine, kind=replace(kind, engine={**kind.engine, "load_format": "dummy"}))
    return Ready(paths["A"], dummy, trainer, weights, fresh, paths, real.observe, garble_model)


def ready_adapters(folder: Path, engine: Engine, layout: Trainer) -> Ready:
    """Two adapters of one base, which counts for the log-probabilities with each of them merged."""
    base = real.make_checkpoint(folder / "base", engine.kind, 1, engine.precision)
    paths = {name: adapter.write_adapter(folder / name, base, seed) for name, seed in SEEDS.items()}
    trainer = adapters_alone(trained_model(base, layout, engine.precision), adapter.RANK, adapter.SIZES)
    weights = {name: load_file(f"{path}/{adapter.FILE}") for name, (path, _) in paths.items()}
    fresh = {name: (base, adapter.kind_of(path)) for name, (path, _) in paths.items()}
    merged = {name: folder_of_merged for name, (_, folder_of_merged) in paths.items()}
    return Ready(base, engine, trainer, weights, fresh, merged, adapter.seen_by, adapter.garble)


def trained_model(path: str, layout: Trainer, precision: str) -> SimulatedTrainer:
    return simulate(model_shape(read_config(path)), layout.parallel, getattr(torch, precision))


@contextmanager
def started(ready: Ready, generator: Generator) -> Iterator[VllmEngine]:
    """An engine whose weights are not those that refits bring."""
    small = {"max_model_len": 192, "max_num_seqs": 4, "kv_cache_memory_bytes": 8 << 20, **ready.engine.kind.engine}
    engine = VllmEngine(GeneratorConfig(ready.path, generator.tp, ready.engine.precision, **small))  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def world(
    sources: Sequence[RankSource], engines: Sequence[VllmEngine]
) -> Iterator[tuple[RefitPlan, Callable[[int], list[RefitReport]]]]:
    """All trainers, in threads, and engines; the plan, and `refit(version)` with every rank's report."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = World.of(len(sources), sum(e.num_workers for e in engines))
    address = ("127.0.0.1", store.port)
    sessions = [RefitSession(r, ranks, address, OPTIONS, source) for r, source in enumerate(sources)]
    starts = [len(sources) + sum(e.num_workers for e in engines[:i]) for i in range(len(engines))]
    joins = [partial(e.refit_connect, start, ranks, address, OPTIONS) for e, start in zip(engines, starts, strict=True)]
    together([*(s.connect for s in sessions), *joins])
    plan = together([*(s.plan for s in sessions), *(e.refit_plan for e in engines)])[0]

    def refit(version: int) -> list[RefitReport]:
        said = together([*(partial(s.refit, version) for s in sessions), *(partial(e.refit, version) for e in engines)])
        return [*said[: len(sessions)], *(report for reports in said[len(sessions) :] for report in reports)]

    yield plan, refit
    for session in sessions:
        session.close()
    for engine in engines:
        engine.refit_close()


def garble_model(worker: Any) -> None:
    """In a worker: random values in what kernels read."""
    real.garble_kernels(worker.model_runner.get_model())


# ---- verdicts


def checkpoint_verdict(trainer: SimulatedTrainer, tensors: real.Tensors) -> Verdict:
    table = real.table_of(tensors)
    wrong = [f for f in sorted(table.keys() | trainer.table.keys()) if table.get(f) != trainer.table.get(f)]
    return Verdict("used", tuple(f"{f}: not as in the checkpoint" for f in wrong), f"{len(table)} tensors")


def moved_verdict(plan: RefitPlan, refits: Sequence[Sequence[RefitReport]]) -> Verdict:
    wrong = []
    for number, reports in enumerate(refits, 1):
        total = sum(r.bulk_bytes for r in reports)
        if total != 2 * plan.required_bytes:
            wrong.append(f"refit {number}: {total} bytes sent and received, {plan.required_bytes} required each way")
        wrong += [f"refit {number}: rank {r} did not verify" for r, report in enumerate(reports) if not report.verified]
    return Verdict("moved", tuple(wrong), f"{plan.required_bytes} bytes")


def logprob_verdict(seen: Sequence[Any], paths: dict[str, str], bound: float) -> Verdict:
    """Engines serve A: their log-probabilities against A's values in float32, and against stale ones."""
    errors = [(real.logprob_error(one, paths["A"]), real.logprob_error(one, paths["B"])) for one in seen]
    wrong = [
        f"engine {i}: log-probabilities are {error:.2g} off, {bound:g} allowed; {stale:.2g} from stale weights"
        for i, (error, stale) in enumerate(errors)
        if not error < min(bound, stale / _FAR)
    ]
    text = ", ".join(f"{error:.2g} off ({stale:.2g} from stale weights)" for error, stale in errors)
    return Verdict("logprobs", tuple(wrong), f"{text}, bound {bound:g}")


def main(arguments: Sequence[str]) -> None:
    """Print the answer, and leave without waiting for vLLM's threads."""
    family, trainer, generators, bound = json.loads(arguments[0])
    layers = trainer["layers"]
    layout = Trainer(**{**trainer, "layers": tuple(layers) if layers else None})
    blocks.install()
    with tempfile.TemporaryDirectory() as folder:
        answer = run(Path(folder), family, layout, [Generator(**g) for g in generators], bound)
    sys.stdout.write(json.dumps(asdict(answer)) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
