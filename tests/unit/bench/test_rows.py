"""What rows say of the numbers that ranks say."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_rl.refit.base import World
from nemo_rl.trainer.model import Parallel
from scripts.bench.cases import NO_VERIFY, SMALL, Case, Engines
from scripts.bench.ceilings import _phases
from scripts.bench.rows import Said, destination_bytes, error_row, finished, probe_row, row_of

CASE = Case("c", "small MoE", Parallel(2, expert=2), Engines(2), ("peer",))


def said(seconds: list[float], **more: Any) -> Said:
    known: dict[str, Any] = {
        "seconds": seconds,
        "phases": {"transfer": [s / 2 for s in seconds]},
        "wrong": [],
        "num_bytes": 10,
        "staging_bytes": 1,
        "verified": True,
        "ready_s": 1.0,
        "peak_bytes": 2,
        "memory_bytes": 3,
        "transport": "peer",
    }
    return Said(**{**known, **more})


def row(*ranks: Said, variant: str = "peer") -> dict[str, Any]:
    return row_of(CASE, variant, World.of(2, 2), ranks)


def test_a_refit_takes_as_long_as_its_slowest_rank() -> None:
    found = row(said([1, 5, 3]), said([2, 1, 1]), said([1, 1, 9]), said([1, 1, 1]))
    assert (found["seconds_median"], found["seconds_min"], found["seconds_max"]) == (5, 2, 9)
    assert found["phase_s"] == {"transfer": 2.5} and found["transfer_median"] == 2.5 and found["repeats"] == 3
    assert found["gb_per_s"] == destination_bytes(CASE) / 5 / 1e9


def test_one_wrong_rank_makes_the_row_wrong() -> None:
    good = said([1])
    assert row(good, good, good, good)["bit_exact"]
    found = row(good, good, good, said([1], wrong=["w"], verified=False, staging_bytes=7, peak_bytes=9))
    assert not found["bit_exact"] and found["wrong"] == ["w"] and not found["verified"]
    assert found["staging_bytes"] == 7 and found["peak_bytes"] == 9


def test_shares_are_of_the_ceiling_of_the_same_case_and_kind() -> None:
    def link(case: str, name: str, rate: float) -> dict[str, Any]:
        return {**probe_row(CASE, "links", {"variant": name, "gb_per_s": rate, "seconds_median": 1.0}), "case": case}

    def refit(variant: str, transport: str, rate: float, seconds: float) -> dict[str, Any]:
        return {
            **row(*[said([1], transport=transport)] * 4, variant=variant),
            "gb_per_s": rate,
            "seconds_median": seconds,
        }

    unverified = {**refit("auto" + NO_VERIFY, "peer", 380.0, 2.0), "verified": False}
    rows = finished(
        [
            link("other", "copy engine put, contiguous", 1000.0),
            link("c", "copy engine put, contiguous", 390.0),
            link("c", "copy engine get, contiguous", 400.0),
            link("c", "send/recv grouped, at once", 340.0),
            link("c", "send/recv grouped, in phases", 320.0),
            link("c", "broadcast to all", 999.0),
            {**refit("peer" + NO_VERIFY, "peer", 380.0, 2.0), "verified": False},
            refit("peer", "peer", 300.0, 2.5),
            refit("nccl", "nccl", 170.0, 4.0),
            refit("broadcast", "broadcast", 100.0, 6.0),
            {**refit("auto", "peer", 300.0, 2.5), "predictions": {"peer": 2.25, "nccl": 3.5}},
            {**unverified, "predictions": {"peer": 1.5, "nccl": 3.0}},
            error_row(CASE, "m2n", "why"),
        ]
    )
    by_variant = {r["variant"]: r for r in rows}
    assert by_variant["peer no verify"]["share_of_ceiling"] == pytest.approx(0.95)
    assert by_variant["peer"]["share_of_ceiling"] == pytest.approx(0.75)
    assert by_variant["peer"]["verification_s"] == pytest.approx(0.5)
    assert by_variant["nccl"]["share_of_ceiling"] == pytest.approx(0.5)
    assert by_variant["nccl"]["share_of_copy_ceiling"] == pytest.approx(0.425)
    assert by_variant["broadcast"]["share_of_ceiling"] == pytest.approx(0.25)
    assert by_variant["peer"]["predicted_s"] == 2.25 and by_variant["peer no verify"]["predicted_s"] == 1.5
    assert by_variant["nccl"]["predicted_s"] == 3.5 and "predicted_s" not in by_variant["broadcast"]
    assert "verification_s" not in by_variant["nccl"] and by_variant["m2n"]["error"] == "why"


def test_a_case_without_ceilings_has_no_shares() -> None:
    (found,) = finished([row(said([1]), said([1]), said([1]), said([1]))])
    assert "share_of_ceiling" not in found and "share_of_copy_ceiling" not in found


def test_bytes_of_a_generator() -> None:
    """Counted by hand for one rank of TP2: half of everything but norms and the router."""
    shape = SMALL[0].shape
    h, q, kv, f = 64, 128, 64, 48
    layer = 2 * h + 2 * 16 + 6 * h + (q + 2 * kv) * h // 2 + h * q // 2 + 6 * 3 * f * h // 2
    assert destination_bytes(SMALL[0]) == 2 * (shape.num_layers * layer + 2 * 384 * h // 2 + h)


@pytest.mark.parametrize(("movers", "others"), [(1, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (4, 4)])
def test_phases_are_matchings_that_together_are_all_pairs(movers: int, others: int) -> None:
    phases = _phases(movers, others)
    assert all(len(set(phase.values())) == len(phase) for phase in phases)
    pairs = [pair for phase in phases for pair in phase.items()]
    assert sorted(pairs) == [(m, o) for m in range(movers) for o in range(others)]
    assert len(phases) == max(movers, others)
