"""Rows of a result: what ranks say of their refits, put together, and compared with the ceilings of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nemo_rl.refit.base import RefitReport, World
from scripts.bench.cases import LINKS, NO_VERIFY, Case

COPY_LINKS = ("copy engine put, contiguous", "copy engine get, contiguous")
MESSAGE_LINKS = ("send/recv grouped, at once", "send/recv grouped, in phases")


@dataclass(frozen=True, slots=True)
class Said:
    """What one rank saw of a variant. Times in seconds, a number for each timed refit.

    Attributes:
        ready_s: from nothing to the agreed plan.
        peak_bytes: how far torch's allocations rose in a refit.
        memory_bytes: how much less memory the device had free behind the last refit than before the session.
        profile: kernels and copies of one refit, and their seconds.
    """

    seconds: list[float]
    phases: dict[str, list[float]]
    wrong: list[str]
    num_bytes: int
    staging_bytes: int
    verified: bool
    ready_s: float
    peak_bytes: int
    memory_bytes: int
    profile: dict[str, float] = field(default_factory=dict)
    transport: str = ""
    predictions: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        reports: Sequence[RefitReport],
        wrong: list[str],
        ready_s: float,
        peak_bytes: int,
        memory_bytes: int,
        profile: dict[str, float],
    ) -> Said:
        """The first refit warms up."""
        timed = reports[1:]
        return cls(
            [r.total_s for r in timed],
            {phase: [r.phase_s.get(phase, 0.0) for r in timed] for phase in timed[0].phase_s},
            wrong[:5],
            reports[-1].bulk_bytes + reports[-1].misc_bytes,
            max(r.staging_bytes for r in reports),
            all(r.verified for r in reports),
            ready_s,
            peak_bytes,
            memory_bytes,
            profile,
            reports[-1].transport,
            dict(reports[-1].predictions),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def row_of(case: Case, variant: str, world: World, said: Sequence[Said]) -> dict[str, Any]:
    """One variant's row; seconds are the slowest rank's of each refit."""
    slowest = [max(each) for each in zip(*(s.seconds for s in said), strict=True)]
    transfer = [max(each) for each in zip(*(s.phases.get("transfer", s.seconds) for s in said), strict=True)]
    into = destination_bytes(case)
    median = statistics.median(slowest)
    return {
        "case": case.name,
        "variant": variant,
        "transport": said[0].transport,
        "seconds_median": median,
        "seconds_min": min(slowest),
        "seconds_max": max(slowest),
        "repeats": len(slowest),
        "transfer_median": statistics.median(transfer),
        "bytes_into_each": into,
        "bytes_received": max(said[r].num_bytes for r in world.generators),
        "gb_per_s": into / median / 1e9,
        "staging_bytes": max(s.staging_bytes for s in said),
        "peak_bytes": max(s.peak_bytes for s in said),
        "memory_bytes": max(s.memory_bytes for s in said),
        "ready_s": max(s.ready_s for s in said),
        "verified": all(s.verified for s in said),
        "bit_exact": not any(s.wrong for s in said),
        "wrong": sorted({name for s in said for name in s.wrong})[:5],
        "phase_s": {p: _median([s.phases[p] for s in said]) for p in said[0].phases},
        "predictions": said[0].predictions,
        **{key: max(s.profile[key] for s in said) for key in said[0].profile},
    }


def _median(seconds: Sequence[Sequence[float]]) -> float:
    """Over refits, of the slowest rank's."""
    return statistics.median(map(max, zip(*seconds, strict=True)))


def destination_bytes(case: Case) -> int:
    """Bytes of one generator rank's parameters."""
    import torch

    from scripts.bench.model import Store, generator_rows

    store = Store(torch.device("meta"))
    generator_rows(case.shape, case.engines, 0, store)
    return store.num_bytes


def probe_row(case: Case, variant: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What links gave, without a session."""
    return {"case": case.name, **measured, "variant": f"{variant}: {measured['variant']}"}


def error_row(case: Case, variant: str, text: str) -> dict[str, Any]:
    return {"case": case.name, "variant": variant, "error": text[:2000]}


# ---- after the run


def finished(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with shares of their case's ceilings, and what verification costs."""
    found = [dict(row) for row in rows]
    for row in found:
        row |= _shares(row, [other for other in found if other["case"] == row["case"]])
    return found


def _shares(row: Mapping[str, Any], of_case: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if "error" in row or is_probe(row):
        return {}
    copy, message = _best(of_case, COPY_LINKS), _best(of_case, MESSAGE_LINKS)
    own = message if row["transport"] in ("nccl", "m2n") else copy
    found: dict[str, Any] = {}
    if own:
        found["share_of_ceiling"] = row["gb_per_s"] / own
        found["ceiling_gb_per_s"] = own
    if copy:
        found["share_of_copy_ceiling"] = row["gb_per_s"] / copy
    twin = next((r for r in of_case if r["variant"] == row["variant"] + NO_VERIFY and "error" not in r), None)
    predicted = row["predictions"] or _predicted(row, of_case)
    if row["transport"] in predicted:
        found["predicted_s"] = predicted[row["transport"]]
    if twin is not None:
        found["verification_s"] = row["seconds_median"] - twin["seconds_median"]
    return found


def _predicted(row: Mapping[str, Any], of_case: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
    """What `auto` predicted for this case, with or without digests as in `row`."""
    name = "auto" if row["verified"] else "auto" + NO_VERIFY
    found = (r["predictions"] for r in of_case if r["variant"] == name and "error" not in r)
    return next(found, {})


def is_probe(row: Mapping[str, Any]) -> bool:
    """Whether a row says what links gave, and no refit."""
    return ": " in row["variant"]


def _best(of_case: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float:
    wanted = {f"{LINKS}: {name}" for name in names}
    return max((r["gb_per_s"] for r in of_case if r["variant"] in wanted and "error" not in r), default=0.0)
