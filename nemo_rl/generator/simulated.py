"""What every rank of a vLLM engine takes, without an engine: the counterpart of `nemo_rl.trainer.simulated`.

Each rank's own loader is traced on a storage-less twin. A model that repeats its layers is traced whole on one
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
        declarations: by rank of the engine.
        how: what was traced, in a sentence.
    """

    declarations: Mapping[int, Declaration]
    how: str


def simulate(spec: EngineSpec, table: TensorTable) -> SimulatedGenerator:
    """All ranks of an engine, traced in this process, which must have no default process group and `PREFLIGHT_ENV`."""
    return _declared(table, *trace_ranks(spec, table))


def trace_ranks(spec: EngineSpec, table: TensorTable) -> tuple[dict[int, RankTrace], str]:
    """Rank -> what it takes, and how that was found out."""
    last = spec.num_ranks - 1
    folded = _fold(spec, table) if last else None
    whole = RankTrace.of(trace_rank(spec, last, table), table)
    short = {} if folded is None else _trace_short(spec, folded, table, whole)
    if folded is not None and short:
        kept, total = folded.config["num_hidden_layers"], _config(spec)["num_hidden_layers"]
        return {**short, last: whole}, (
            f"traced rank {last} whole, and {len(short)} ranks on the first {kept} of {total} layers, which repeat; on "
            f"rank {last} both agree"
        )
    rest = {rank: RankTrace.of(trace_rank(spec, rank, table), table) for rank in range(last)}
    return {**rest, last: whole}, f"traced {spec.num_ranks} ranks whole"


def _trace_short(spec: EngineSpec, folded: Fold, table: TensorTable, whole: RankTrace) -> dict[int, RankTrace]:
    """Every rank's trace of the short model, unfolded; nothing where that of the last rank is not `whole`."""
    index = {fqn: i for i, fqn in enumerate(table)}
    copies = tuple(np.array([index[c] for c in folded.copies[fqn]], np.int64) for fqn in folded.table)
    made: dict[int, RankTrace] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(folded.config))
        short = dataclasses.replace(spec, model_path=folder)
        for rank in reversed(range(spec.num_ranks)):
            found = RankTrace.of(trace_rank(short, rank, folded.table), folded.table)
            misc = {c: reason for fqn, reason in found.misc.items() for c in folded.copies[fqn]}
            made[rank] = RankTrace(found.rows.unfolded(copies), misc, found.problems)
            if rank == spec.num_ranks - 1 and not made[rank].same(whole):
                return {}
    return made


def _config(spec: EngineSpec) -> dict[str, object]:
    text = (Path(spec.model_path) / "config.json").read_text(encoding="utf-8")
    found: dict[str, object] = json.loads(text)
    return found


def _fold(spec: EngineSpec, table: TensorTable) -> Fold | None:
    """None where ranks hold different layers, or draft heads stand behind the last one."""
    return None if spec.pp > 1 or spec.draft else fold(_config(spec), table)


def _declared(table: TensorTable, made: Mapping[int, RankTrace], how: str) -> SimulatedGenerator:
    names = list(table)
    return SimulatedGenerator({rank: traced.declaration(table, names) for rank, traced in sorted(made.items())}, how)


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
        return _declared(table, *_read(answer))


def _read(path: Path) -> tuple[dict[int, RankTrace], str]:
    made = {}
    with np.load(path, allow_pickle=False) as arrays:
        head = json.loads(str(arrays["head"]))
        for rank, (misc, problems) in head["ranks"].items():
            rows = Rows(*(arrays[f"{rank}.{name}"] for name in ("tensor", "offsets", "sizes")))
            made[int(rank)] = RankTrace(rows, misc, tuple(problems))
    return made, head["how"]


def _write(path: Path, made: Mapping[int, RankTrace], how: str) -> None:
    head = {"how": how, "ranks": {rank: [dict(t.misc), list(t.problems)] for rank, t in made.items()}}
    arrays = {
        f"{rank}.{field.name}": getattr(traced.rows, field.name)
        for rank, traced in made.items()
        for field in dataclasses.fields(Rows)
    }
    np.savez(path, head=np.array(json.dumps(head)), **arrays)


def main(arguments: Sequence[str]) -> int:
    """Read the request, trace, write the answer."""
    request = json.loads(Path(arguments[0]).read_text())
    table = {fqn: TensorMeta(tuple(shape), getattr(torch, dtype)) for fqn, shape, dtype in request["table"]}
    made, how = trace_ranks(EngineSpec(**request["spec"]), table)
    _write(Path(arguments[1]), made, how)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
