"""What every rank of a vLLM engine takes, without an engine: the counterpart of `nemo_rl.trainer.simulated`.

Each distinct rank's own loader is traced on a storage-less twin. A model that repeats its layers is traced whole on one
rank, and on its first layers of each kind on the others; the whole trace must equal the unfolded one, or all ranks are
traced whole.

As a program, `python -m nemo_rl.generator.simulated REQUEST ANSWER` does the same in a process of its own, which needs
`PREFLIGHT_ENV` in its environment: vLLM keeps state per process.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nemo_rl.generator.fold import Fold, Rows, fold
from nemo_rl.generator.preflight import PREFLIGHT_ENV
from nemo_rl.generator.ranks import EngineSpec
from nemo_rl.generator.twin import trace_rank
from nemo_rl.refit.base import Declaration
from nemo_rl.refit.layout import Layout, TensorMeta, TensorTable
from nemo_rl.refit.trace import Trace

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RankTrace:
    """What one rank takes: rows by index into the table, tensors that travel whole, what must refuse a plan."""

    rows: Rows
    misc: Mapping[str, str]
    problems: tuple[str, ...]

    @classmethod
    def of(cls, trace: Trace, table: TensorTable) -> RankTrace:
        index = {fqn: i for i, fqn in enumerate(table)}
        layout = Layout.from_regions([(row.fqn, row.region) for row in trace.rows], table)
        ids = np.array([index[name] for name in layout.names], np.int64)
        ndim = max((len(meta.shape) for meta in table.values()), default=0)
        pad = ((0, 0), (0, ndim - layout.offsets.shape[1]))
        offsets, sizes = np.pad(layout.offsets, pad), np.pad(layout.sizes, pad, constant_values=1)
        tensor = ids[layout.tensor] if len(layout) else np.zeros(0, np.int64)
        return cls(Rows.sorted(tensor, offsets, sizes), dict(trace.misc), tuple(trace.problems))

    def same(self, other: RankTrace) -> bool:
        return self.rows.equals(other.rows) and (self.misc, self.problems) == (other.misc, other.problems)

    def declaration(self, table: TensorTable, names: Sequence[str]) -> Declaration:
        """`names`: of the table, in its order."""
        used, tensor = np.unique(self.rows.tensor, return_inverse=True)
        taken = tuple(names[i] for i in used.tolist())
        ndim = max((len(table[name].shape) for name in taken), default=0)
        unit = np.full(len(tensor), -1, np.int32)
        columns = (tensor.reshape(-1).astype(np.int32), self.rows.offsets[:, :ndim], self.rows.sizes[:, :ndim], unit)
        return Declaration(
            Layout(taken, tuple(table[name] for name in taken), *columns), dict(self.misc), self.problems
        )


@dataclass(frozen=True, eq=False)
class SimulatedGenerator:
    """Every rank of one engine.

    Attributes:
        declarations: by rank of the engine; ranks that take the same share the value.
        how: what was traced, in a sentence.
    """

    declarations: Mapping[int, Declaration]
    how: str


def role_of(spec: EngineSpec, rank: int) -> int:
    """The first rank of the engine that takes what `rank` takes: replicas differ in nothing but experts."""
    return rank if spec.expert_parallel else rank % (spec.pp * spec.tp)


def simulate(spec: EngineSpec, table: TensorTable) -> SimulatedGenerator:
    """All ranks of an engine, traced in this process, which must have no default process group and `PREFLIGHT_ENV`."""
    return _declared(spec, table, *trace_roles(spec, table))


def trace_roles(spec: EngineSpec, table: TensorTable) -> tuple[dict[int, RankTrace], str]:
    """Role -> what it takes, and how that was found out."""
    roles = sorted({role_of(spec, rank) for rank in range(spec.num_ranks)})
    folded = _fold(spec, table) if len(roles) > 1 else None
    last = RankTrace.of(trace_rank(spec, roles[-1], table), table)
    made, how = {roles[-1]: last}, f"traced {len(roles)} ranks whole"
    if folded is not None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(folded.config))
            short = dataclasses.replace(spec, model_path=folder)
            if _unfolded(short, roles[-1], folded, table).same(last):
                made |= {role: _unfolded(short, role, folded, table) for role in roles[:-1]}
                kept, total = folded.config["num_hidden_layers"], _config(spec)["num_hidden_layers"]
                how = (
                    f"traced rank {roles[-1]} whole, and {len(roles)} ranks on the first {kept} of {total} layers, "
                    f"which repeat; on rank {roles[-1]} both agree"
                )
    rest = [role for role in roles if role not in made]
    return made | {role: RankTrace.of(trace_rank(spec, role, table), table) for role in rest}, how


def _config(spec: EngineSpec) -> dict[str, object]:
    text = (Path(spec.model_path) / "config.json").read_text(encoding="utf-8")
    found: dict[str, object] = json.loads(text)
    return found


def _fold(spec: EngineSpec, table: TensorTable) -> Fold | None:
    """None where ranks hold different layers, or draft heads stand behind the last one."""
    return None if spec.pp > 1 or spec.draft else fold(_config(spec), table)


def _unfolded(short: EngineSpec, role: int, folded: Fold, table: TensorTable) -> RankTrace:
    traced = RankTrace.of(trace_rank(short, role, folded.table), folded.table)
    index = {fqn: i for i, fqn in enumerate(table)}
    copies = tuple(np.array([index[c] for c in folded.copies[fqn]], np.int64) for fqn in folded.table)
    misc = {c: reason for fqn, reason in traced.misc.items() for c in folded.copies[fqn]}
    return RankTrace(traced.rows.unfolded(copies), misc, traced.problems)


def _declared(spec: EngineSpec, table: TensorTable, made: Mapping[int, RankTrace], how: str) -> SimulatedGenerator:
    names = list(table)
    by_role = {role: traced.declaration(table, names) for role, traced in made.items()}
    return SimulatedGenerator({rank: by_role[role_of(spec, rank)] for rank in range(spec.num_ranks)}, how)


# ---- in a process of its own


def simulate_apart(
    spec: EngineSpec, table: TensorTable, environ: Mapping[str, str], timeout_s: float = 600.0
) -> SimulatedGenerator:
    """As `simulate`, in a process of its own.

    Args:
        environ: of the new process, to which `PREFLIGHT_ENV` is added.

    Raises:
        ValueError: vLLM refuses the model or the layout; its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.npz"
        rows = [[fqn, list(meta.shape), str(meta.dtype).removeprefix("torch.")] for fqn, meta in table.items()]
        request.write_text(json.dumps({"spec": dataclasses.asdict(spec), "table": rows}))
        command = [sys.executable, "-m", "nemo_rl.generator.simulated", str(request), str(answer)]
        try:
            done = subprocess.run(
                command, env={**environ, **PREFLIGHT_ENV}, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"tracing vLLM's loader took more than {timeout_s:g} s; give it more time") from None
        if done.returncode:
            tail = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise ValueError(f"vLLM's loader could not be traced (status {done.returncode}): {tail}")
        return _declared(spec, table, *_read(answer))


def _read(path: Path) -> tuple[dict[int, RankTrace], str]:
    made = {}
    with np.load(path, allow_pickle=False) as arrays:
        head = json.loads(str(arrays["head"]))
        for role, (misc, problems) in head["roles"].items():
            rows = Rows(*(arrays[f"{role}.{name}"] for name in ("tensor", "offsets", "sizes")))
            made[int(role)] = RankTrace(rows, misc, tuple(problems))
    return made, head["how"]


def _write(path: Path, made: Mapping[int, RankTrace], how: str) -> None:
    head = {"how": how, "roles": {role: [dict(t.misc), list(t.problems)] for role, t in made.items()}}
    arrays = {
        f"{role}.{field.name}": getattr(traced.rows, field.name)
        for role, traced in made.items()
        for field in dataclasses.fields(Rows)
    }
    np.savez(path, head=np.array(json.dumps(head)), **arrays)


def main(arguments: Sequence[str]) -> int:
    """Read the request, trace, write the answer."""
    request = json.loads(Path(arguments[0]).read_text())
    table = {fqn: TensorMeta(tuple(shape), getattr(torch, dtype)) for fqn, shape, dtype in request["table"]}
    made, how = trace_roles(EngineSpec(**request["spec"]), table)
    _write(Path(arguments[1]), made, how)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
