"""The matrix can fail: faults planted in a row that passes, each seen by the check that is there for it, by name.

The rows run in one process of their own, as vLLM keeps state per process; that process is this file as a program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_rl.generator.preflight import PREFLIGHT_ENV
from tests.golden.matrix import Model, Row, load

ROOT = Path(__file__).parents[2]
DOWN = "model.layers.1.mlp.experts.{}.down_proj.weight"
W2 = "model.layers.1.mlp.experts.routed_experts.w2_weight"
NORM = "model.norm.weight"
FOUND: dict[str, tuple[str, str]] = {
    "a wrong byte": ("equal", f"refit 2 (B), generator 1: {NORM}: 1 of 128 bytes differ, the first at 5"),
    "a parameter that stays stale": ("equal", f"refit 2 (B), generator 0: {NORM}: "),
    "a parameter that nothing writes": ("cover", f"{NORM}: 128 of 128 bytes are written by nothing, the first at 0"),
    "a part that nothing writes": ("equal", f"{W2}: "),
    "two experts swapped": ("equal", f"{W2}: "),
    "a row twice": ("cover", f"{W2}: 2048 bytes are copied more than once, the first at 0"),
    "padding where rows write": ("cover", f"{NORM}: 4 bytes are copied and padding"),
    "padding that is left": ("equal", "lm_head.weight: "),
    "a buffer that changes": ("equal", "model.layers.0.self_attn.attn._k_scale: "),
    "a parameter that is missing": ("equal", f"{NORM} is there on one side alone"),
    "weights that never change": ("equal", f"{NORM}: A and B do not differ"),
    "a rank that does not answer": ("equal", "refit 1: ranks [0] of 2 answered"),
    "bytes that moved twice": ("moved", "refit 3: "),
    "a plan that takes too much": ("moved", "bytes are planned"),
    "a refit that was not verified": ("moved", "refit 1: rank 3 did not verify"),
    "a rank that holds too much": ("staging", "20000 bytes of buffers, 16384 allowed"),
    "a tensor without a reason": ("used", "model.layers.9.mlp.gate.weight: does not travel, and no reason is given"),
    "a tensor that is called unused": ("used", f"{NORM}: travels, and is called unused"),
    "a table that is no checkpoint's": ("used", f"{NORM}: not as in a checkpoint of the family"),
    "too much travels whole": ("bulk", "of the bytes are bulk, 99.50% are due"),
}
"""Fault -> the check that must see it, and words of what it says."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    pytest.importorskip("vllm")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__))],
        env={**os.environ, **PREFLIGHT_ENV, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_sound_row_passes(found: dict[str, Any]) -> None:
    assert found["sound"] == {"status": "passed", "wrong": {}}


@pytest.mark.parametrize("fault", list(FOUND))
def test_a_planted_fault_is_seen(found: dict[str, Any], fault: str) -> None:
    check, words = FOUND[fault]
    assert any(words in text for text in found[fault].get(check, [])), found[fault]


def test_rows_that_cannot_run_do_not_pass(found: dict[str, Any]) -> None:
    rows = found["rows"]
    assert rows["no such trainer"]["status"] == "failed"
    assert "ValueError: no such trainer" in rows["no such trainer"]["wrong"]["ran"][0]
    assert rows["not covered"] == {"status": "not covered", "wrong": {}}
    assert "it ran, and 'colocated' was due" in rows["refused, and it runs"]["wrong"]["refused"][0]
    assert "in other words: ValueError" in rows["refused in other words"]["wrong"]["refused"][0]


def test_a_report_tells_rows_apart(found: dict[str, Any]) -> None:
    assert "1 passed, 3 failed, 1 not covered" in found["page"]
    assert "not covered: no kernel" in found["page"] and "no such trainer" in found["page"]


# ---- the file of rows


def written(folder: Path, families: Any, rows: Any) -> Path:
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"families": families, "rows": rows}))
    return path


ONE = {"family": "qwen3", "trainer": {"tp": 2}, "generators": [{"tp": 4}]}


@pytest.mark.parametrize(
    ("families", "rows", "words"),
    [
        ({"qwen3": {}}, [ONE, ONE], "rows stand there twice: qwen3: TP2 -> TP4"),
        ({"qwen3": {}}, [{**ONE, "trainer": {"tq": 2}}], r"unknown keys \['tq'\]"),
        ({"qwen3": {}}, [{**ONE, "family": "qwen9"}], "the family is none of qwen3"),
        ({"qwen9": {}}, [], "qwen9 is none of"),
        ({"qwen3": {"bulk": 0.9}}, [], "needs a reason in `why`"),
        ({"qwen3": {}}, [{**ONE, "run": "somehow"}], "run is one of"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, families: Any, rows: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(written(tmp_path, families, rows))


def test_a_row_is_one_line(tmp_path: Path) -> None:
    (row,) = load(written(tmp_path, {"qwen3": {}}, [ONE]))
    assert row.name == "qwen3: TP2 -> TP4" and row.trainer.num_ranks == 2 and row.level == 1
    assert row.model == Model("qwen3", "qwen3")


# ---- the program


def program() -> dict[str, Any]:
    import tempfile

    from tests.golden.case import Bench
    from tests.golden.processes import Pool
    from tests.golden.report import write
    from tests.golden.run import run_row

    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Pool() as pool:
        bench, path = Bench(Path(folder)), Path(folder) / "matrix.yaml"
        path.write_text(yaml.safe_dump({"families": {"qwen3_moe": {}}, "rows": [SOUND]}))
        (row,) = load(path)
        faulty: dict[str, Row] = {
            "sound": row,
            "no such trainer": replace(row, trainer=replace(row.trainer, ep=3)),
            "not covered": replace(row, not_covered="no kernel"),
            "refused, and it runs": replace(row, refused="colocated"),
            "refused in other words": replace(row, refused="colocated", trainer=replace(row.trainer, ep=3)),
        }
        results = {name: run_row(bench, pool, one) for name, one in faulty.items()}
        write(Path(folder), list(results.values()))
        out["page"] = (Path(folder) / "report.md").read_text()
        rows = {name: {"status": r.status, "wrong": wrong_of(r.verdicts)} for name, r in results.items()}
        case = bench.case(row)
        return out | {"rows": rows, "sound": rows["sound"]} | planted_in_ranks(case) | planted_in_outcomes(case)


SOUND = {"family": "qwen3_moe", "trainer": {"ep": 2}, "generators": [{"tp": 2}]}


def wrong_of(verdicts: Any) -> dict[str, list[str]]:
    return {v.check: list(v.wrong) for v in verdicts if not v.ok}


def judged(case: Any, meddle: Any = None) -> dict[str, list[str]]:
    from tests.golden.checks import cover, judge
    from tests.golden.execute import simulate

    try:
        return wrong_of(judge(case, simulate(case, meddle) if meddle else simulate(case)))
    except Exception as error:
        return {**wrong_of([cover(case)]), "ran": [str(error)]}


def planted_in_ranks(case: Any) -> dict[str, Any]:
    """What a loader's trace, or an engine, may get wrong."""

    def traced(change: Callable[[Any], Any]) -> dict[str, list[str]]:
        targets = [replace(t, trace=change(t.trace)) for t in case.targets]
        return judged(replace(case, targets=tuple(targets)))

    def swapped(trace: Any) -> Any:
        names = {DOWN.format(0): DOWN.format(5), DOWN.format(5): DOWN.format(0)}
        return replace(trace, rows=tuple(replace(r, fqn=names.get(r.fqn, r.fqn)) for r in trace.rows))

    def without(fqn: str) -> Callable[[Any], Any]:
        return lambda trace: replace(trace, rows=tuple(r for r in trace.rows if r.fqn != fqn))

    def twice(trace: Any) -> Any:
        again = next(r for r in trace.rows if r.fqn == DOWN.format(0))
        return replace(trace, rows=(*trace.rows, again))

    def padded(trace: Any) -> Any:
        return replace(trace, padding={**trace.padding, NORM: ((0, 4),)})

    return {
        "a wrong byte": judged(case, at_commit(3, 2, flip)),
        "a parameter that stays stale": judged(case, at_commit(2, 2, stale(case))),
        "a buffer that changes": judged(case, at_commit(2, 1, lambda s: s[K_SCALE].fill_(3))),
        "a parameter that is missing": judged(case, at_commit(2, 3, lambda s: s.pop(NORM))),
        "a parameter that nothing writes": traced(without(NORM)),
        "a part that nothing writes": traced(without(DOWN.format(2))),
        "two experts swapped": traced(swapped),
        "a row twice": traced(twice),
        "padding where rows write": traced(padded),
        "padding that is left": traced(lambda trace: replace(trace, padding={})),
    }


K_SCALE = "model.layers.0.self_attn.attn._k_scale"


def at_commit(rank: int, version: int, change: Callable[[Any], Any]) -> Any:
    """Something writes to the engine of `rank` when the refit is over and verified."""

    def meddle(session: Any, landing: Any) -> None:
        if session.rank != rank:
            return
        commit = landing.commit

        def committed(number: int) -> None:
            commit(number)
            if number == version:
                change(landing.storage)

        landing.commit = committed

    return meddle


def flip(storage: Any) -> None:
    import torch

    storage[NORM].view(torch.uint8)[5] ^= 1


def stale(case: Any) -> Callable[[Any], Any]:
    return lambda storage: storage[NORM].copy_(case.targets[0].wanted["A"][NORM])


def planted_in_outcomes(case: Any) -> dict[str, Any]:
    """What the service's own reports may hide."""
    from nemo_rl.refit.layout import TensorMeta
    from tests.golden.checks import judge
    from tests.golden.execute import simulate

    good = simulate(case)

    def judged(outcome: Any, of: Any = case) -> dict[str, list[str]]:
        return wrong_of(judge(of, outcome))

    def reported(refit: int, rank: int, **changes: Any) -> Any:
        reports = [dict(r) for r in good.reports]
        reports[refit - 1][rank] = replace(reports[refit - 1][rank], **changes)
        return replace(good, reports=tuple(reports))

    alone = tuple({0: held[0]} for held in good.held)
    target = case.targets[0]
    same = replace(case, targets=(replace(target, wanted={n: target.wanted["A"] for n in "AB"}), *case.targets[1:]))
    norm = case.trainer.table[NORM]
    more = replace(
        case.trainer, table={**case.trainer.table, "model.layers.9.mlp.gate.weight": TensorMeta((2,), norm.dtype)}
    )
    heavy = [n for n in good.plan.table if "q_proj" in n]
    return {
        "weights that never change": judged(good, same),
        "a rank that does not answer": judged(replace(good, held=alone)),
        "bytes that moved twice": judged(reported(3, 2, bulk_bytes=2 * good.reports[2][2].bulk_bytes)),
        "a plan that takes too much": judged(replace(good, plan=replace(good.plan, required_bytes=7))),
        "a refit that was not verified": judged(reported(1, 3, verified=False)),
        "a rank that holds too much": judged(reported(1, 2, staging_bytes=20000)),
        "a tensor without a reason": judged(good, replace(case, trainer=more)),
        "a tensor that is called unused": judged(replace(good, plan=replace(good.plan, unused={NORM: "frozen"}))),
        "a table that is no checkpoint's": judged(good, replace(case, differs_from_checkpoint=(NORM,))),
        "too much travels whole": judged(replace(good, plan=replace(good.plan, misc_fqns=tuple(heavy)))),
    }


if __name__ == "__main__":
    said = json.dumps(program())
    sys.stdout.write(said + "\n")
