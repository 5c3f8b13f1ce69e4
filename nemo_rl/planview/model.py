"""The numbers of a plan that people look at: bytes by rank and link, misc and unused with reasons, time and memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nemo_rl.planview.predict import Links, Prediction, predict
from nemo_rl.refit.plan import RefitPlan

FORMAT = "nemo-rl plan 1"


@dataclass(frozen=True, slots=True)
class RankView:
    """One rank.

    Attributes:
        name: `trainer 3` or `generator 3`.
        at: mesh axis -> this rank's coordinate.
        node: host.
        held_bytes: weights that it holds (trainer) or that must arrive (generator), bulk alone.
        wire_bytes: of bulk, sent (trainer) or received (generator) over a link.
    """

    name: str
    at: Mapping[str, int]
    node: int
    held_bytes: int
    wire_bytes: int

    def describe(self) -> str:
        return f"{self.name} ({', '.join(f'{axis} {i}' for axis, i in self.at.items())})" if self.at else self.name


@dataclass(frozen=True, slots=True)
class Reason:
    """Tensors that share a reason: to travel whole, or not at all."""

    reason: str
    count: int
    num_bytes: int
    first: str


@dataclass(frozen=True, eq=False, slots=True)
class PlanView:
    """A plan as people see it.

    Attributes:
        title: model and layouts.
        digest: of the plan.
        trainers, generators: ranks, in order.
        matrix: int64, bulk bytes from trainer (row) to generator (column), those within a rank included.
        layouts: how regular tensors lie, a line for each kind, by side.
        notes: what the viewer assumed or found worth saying.
    """

    title: str
    digest: str
    trainers: tuple[RankView, ...]
    generators: tuple[RankView, ...]
    matrix: np.ndarray
    num_tensors: int
    num_copies: int
    num_messages: int
    num_rounds: int
    bulk_bytes: int
    required_bytes: int
    misc_bytes: int
    num_misc_buffers: int
    misc: tuple[Reason, ...]
    unused: tuple[Reason, ...]
    prediction: Prediction
    layouts: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def bulk_share(self) -> float:
        """Of the distinct bytes that generators take, those that travel shard to shard; 1 where nothing travels."""
        total = self.required_bytes + self.misc_bytes * len(self.generators)
        return self.required_bytes / total if total else 1.0

    def to_json(self) -> str:
        """One object; `from_json` reads it back to an equal view. The matrix is sparse: [row, column, bytes]."""
        tree = {f.name: getattr(self, f.name) for f in fields(self)}
        rows, columns = np.nonzero(self.matrix)
        tree["matrix"] = [[int(r), int(c), int(self.matrix[r, c])] for r, c in zip(rows, columns, strict=True)]
        for name in ("trainers", "generators", "misc", "unused"):
            tree[name] = [asdict(item) for item in tree[name]]
        tree["prediction"] = asdict(self.prediction)
        tree["layouts"] = {side: list(lines) for side, lines in self.layouts.items()}
        return json.dumps({"format": FORMAT, **tree}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> PlanView:
        """Raises ValueError where the text is no saved plan."""
        try:
            tree = json.loads(text)
            if tree.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**_typed(tree))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"not a plan that `nemo-rl plan --json` saved ({type(error).__name__}: {error}); save it anew"
            ) from error


def _typed(tree: dict[str, Any]) -> dict[str, Any]:
    for name in ("trainers", "generators"):
        tree[name] = tuple(RankView(**item) for item in tree[name])
    for name in ("misc", "unused"):
        tree[name] = tuple(Reason(**item) for item in tree[name])
    matrix = np.zeros((len(tree["trainers"]), len(tree["generators"])), np.int64)
    for row, column, num_bytes in tree["matrix"]:
        matrix[row, column] = num_bytes
    layouts = {side: tuple(lines) for side, lines in tree["layouts"].items()}
    prediction = Prediction.from_tree(tree["prediction"])
    return {**tree, "matrix": matrix, "prediction": prediction, "layouts": layouts, "notes": tuple(tree["notes"])}


def load_view(path: Path) -> PlanView:
    """A saved plan. Raises ValueError naming the file."""
    try:
        return PlanView.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands: its mesh coordinates, its host, and the bytes of weights that it holds."""

    at: Mapping[str, int]
    node: int
    held_bytes: int


def view_plan(
    plan: RefitPlan,
    title: str,
    trainers: Sequence[Place],
    generators: Sequence[Place],
    links: Links,
    *,
    num_streams: int = 2,
    layouts: Mapping[str, Sequence[str]] | None = None,
    notes: Sequence[str] = (),
) -> PlanView:
    """The numbers of `plan`; places go by trainer and generator rank."""
    matrix = _matrix(plan)
    nodes = np.zeros(plan.world.size, np.int64)
    nodes[list(plan.world.trainers)] = [p.node for p in trainers]
    nodes[list(plan.world.generators)] = [p.node for p in generators]
    wire = np.where(np.equal.outer(plan.world.trainers, plan.world.generators), 0, matrix)
    return PlanView(
        title=title,
        digest=plan.digest,
        trainers=tuple(
            RankView(f"trainer {i}", dict(p.at), p.node, p.held_bytes, int(wire[i].sum()))
            for i, p in enumerate(trainers)
        ),
        generators=tuple(
            RankView(f"generator {i}", dict(p.at), p.node, p.held_bytes, int(wire[:, i].sum()))
            for i, p in enumerate(generators)
        ),
        matrix=matrix,
        num_tensors=len(plan.table),
        num_copies=len(plan.bulk),
        num_messages=len(plan.bulk.messages),
        num_rounds=plan.bulk.num_rounds,
        bulk_bytes=plan.bulk_bytes,
        required_bytes=plan.required_bytes,
        misc_bytes=plan.misc_bytes,
        num_misc_buffers=len(plan.misc_buffers),
        misc=_reasons(plan.misc_reasons, plan),
        unused=_reasons(plan.unused, plan),
        prediction=predict(plan, nodes, links, num_streams),
        layouts={side: tuple(lines) for side, lines in (layouts or {}).items()},
        notes=tuple(notes),
    )


def _matrix(plan: RefitPlan) -> np.ndarray:
    row, column = np.full(plan.world.size, -1), np.full(plan.world.size, -1)
    row[list(plan.world.trainers)] = np.arange(len(plan.world.trainers))
    column[list(plan.world.generators)] = np.arange(len(plan.world.generators))
    out = np.zeros((len(plan.world.trainers), len(plan.world.generators)), np.int64)
    messages = plan.bulk.messages
    np.add.at(out, (row[messages[:, 1]], column[messages[:, 2]]), messages[:, 5])
    return out


def _reasons(reasons: Mapping[str, str], plan: RefitPlan) -> tuple[Reason, ...]:
    """By reason, most bytes first."""
    groups: dict[str, list[str]] = {}
    for fqn, reason in reasons.items():
        groups.setdefault(reason, []).append(fqn)
    sized = [
        Reason(reason, len(fqns), sum(plan.table[f].num_bytes for f in fqns if f in plan.table), fqns[0])
        for reason, fqns in groups.items()
    ]
    return tuple(sorted(sized, key=lambda r: (-r.num_bytes, r.reason)))
