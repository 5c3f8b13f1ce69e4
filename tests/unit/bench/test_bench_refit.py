"""The benchmark as a program, on the CPU, and what its driver does with variants that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_refit
from scripts.bench.cases import CASES, LINKS, SMALL
from scripts.bench.machine import only

ROOT = Path(__file__).parents[3]
TINY = ("--small", "--trainers", "1", "--generators", "1", "--layers", "1", "--repeat", "1")


def bench(out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    command = [sys.executable, "scripts/bench_refit.py", "--device", "cpu", "--out", str(out), *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environ)
    assert (out / "result.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return done.returncode, json.loads((out / "result.json").read_text())["rows"], done.stdout


def test_variants_of_one_run_and_one_that_fails(tmp_path: Path) -> None:
    """A row each; the one that cannot run says why and stops no other. What has a row is not run again."""
    variants = "peer,nccl,broadcast no verify,gloo"
    code, rows, _ = bench(tmp_path, *TINY, "--variants", f"links,{variants}")
    by_variant = {row["variant"]: row for row in rows}
    assert code == 1 and [v for v in by_variant if not v.startswith(LINKS)] == variants.split(",")
    assert "nccl moves cuda tensors" in by_variant["nccl"]["error"]
    assert by_variant["links: send/recv grouped, at once"]["gb_per_s"] > 0
    for name in ("peer", "broadcast no verify", "gloo"):
        row = by_variant[name]
        assert row["bit_exact"] and row["verified"] == (name in ("peer", "gloo")) and row["seconds_median"] > 0
    options = bench_refit.parser().parse_args(
        ["--device", "cpu", *TINY, "--variants", "peer,golden", "--out", str(tmp_path), "--resume"]
    )
    again = bench_refit.Run(options, bench_refit.chosen(options))
    assert list(again.todo().values()) == [["golden"]] and again.rows() == [
        {key: row[key] for key in kept} for row, kept in zip(rows, again.rows(), strict=True)
    ]
    options.resume = False
    assert list(bench_refit.Run(options, again.cases).todo().values()) == [["peer", "golden"]]


@pytest.fixture
def run(tmp_path: Path) -> bench_refit.Run:
    options = bench_refit.parser().parse_args(
        ["--device", "cpu", "--small", "--variants", "links,peer,gloo", "--variant-limit", "5", "--out", str(tmp_path)]
    )
    return bench_refit.Run(options, bench_refit.chosen(options))


def current(run: bench_refit.Run, variant: str, ago: float = 0.0) -> None:
    said = {"case": SMALL[0].name, "variant": variant, "started": time.time() - ago}
    (run.out / "current.json").write_text(json.dumps(said))


def test_the_variant_that_hung_is_blamed_and_left_out(run: bench_refit.Run) -> None:
    assert run.todo()[SMALL[0].name] == ["links", "peer", "gloo"]
    assert run.stuck([]) == ""
    current(run, "peer", ago=1)
    assert run.stuck([]) == ""
    current(run, "peer", ago=6)
    assert run.stuck([]) == "it took more than 5 s"
    run.blame("it took more than 5 s")
    assert run.todo()[SMALL[0].name] == ["links", "gloo"] and run.stuck([]) == ""
    (row,) = run.rows()
    assert row["variant"] == "peer" and row["error"] == "it took more than 5 s"
    run.blame("again")  # nothing runs: nothing to blame
    assert len(run.rows()) == 1


def test_a_rank_that_ends_ends_the_attempt(run: bench_refit.Run) -> None:
    with subprocess.Popen([sys.executable, "-c", "import os; os._exit(9)"]) as gone:
        gone.wait()
        assert run.stuck([gone]) == "rank 0 ended with 9"
    run.end = time.monotonic() - 1
    assert "were over" in run.stuck([])


def test_what_runs_when_the_time_is_over_is_not_blamed(run: bench_refit.Run, monkeypatch: Any) -> None:
    """It has no row, and a run that resumes this one takes it up."""
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(run, "start", lambda *_: subprocess.Popen(sleeping))
    current(run, "peer")
    run.end = time.monotonic() - 1
    run.attempt(run.cases)
    assert run.rows() == [] and not run.current() and "peer" in run.todo()[SMALL[0].name]


def test_processes_that_die_are_started_anew_for_what_is_left(run: bench_refit.Run, monkeypatch: Any) -> None:
    """The first attempt dies in `peer`; the second runs the rest of the case and the other case."""
    asked: list[dict[str, list[str]]] = []

    def attempt(cases: Any) -> None:
        asked.append({case.name: run.todo()[case.name] for case in cases})
        if len(asked) == 1:
            current(run, "peer")
            run.blame("rank 1 ended with -11")
            return
        for name, variants in asked[-1].items():
            with open(run.out / "rows.jsonl", "a") as file:
                for variant in variants:
                    file.write(json.dumps({"case": name, "variant": variant, "error": "planted"}) + "\n")

    monkeypatch.setattr(run, "attempt", attempt)
    assert run.run() == 1
    assert asked[1] == {SMALL[0].name: ["links", "gloo"], SMALL[1].name: ["links", "peer", "gloo"]} and len(asked) == 2


def test_versions_of_all_starts_are_told() -> None:
    said = bench_refit.joined([{"nccl": "1", "torch": "2"}, {"nccl": "3", "torch": "2", "vllm": "4"}])
    assert said == {"nccl": "1 and 3", "torch": "2", "vllm": "4"}


def test_a_rank_sees_one_of_the_devices_that_the_driver_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [only(0), only(1)] == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [only(0), only(1)] == ["0", "1"]


# ---- which cases


def names(arguments: list[str]) -> list[str]:
    return [case.name for case in bench_refit.chosen(bench_refit.parser().parse_args(arguments))]


def test_cases_are_chosen_by_name_and_fit_the_machine() -> None:
    assert names(["--device", "cpu"]) == [case.name for case in SMALL]
    assert names(["--device", "cpu", "--cases", "30B PP3 -> 1"]) == ["30B PP3 -> 1"]
    assert len(names(["--device", "cpu", "--cases", "0.6B"])) == 2
    (case,) = bench_refit.chosen(
        bench_refit.parser().parse_args(
            ["--device", "cpu", "--cases", "30B EP2 -> TP2", "--skip", "m2n no verify, auto"]
        )
    )
    assert "peer" in case.variants and not {"m2n no verify", "auto"} & set(case.variants)
    with pytest.raises(SystemExit, match="no case of that name"):
        names(["--device", "cpu", "--cases", "none"])
    four, two = bench_refit.fitting(CASES, 4, False), bench_refit.fitting(CASES, 2, False)
    assert four and not any(case.stand_in for case in four)
    assert two and all(case.stand_in and case.num_devices == 2 for case in two)
    assert bench_refit.fitting(CASES, 4, True) == list(CASES)


def test_a_case_of_ones_own() -> None:
    arguments = ["--device", "cpu", "--trainers", "tp=2,ep=2", "--generators", "tp=2,replicas=2", "--layers", "3"]
    (case,) = bench_refit.chosen(bench_refit.parser().parse_args(arguments))
    assert (case.trainers.world_size, case.trainers.tensor, case.trainers.expert) == (2, 2, 2)
    assert case.engines.num_ranks == 4 and case.num_ranks == 6 and case.shape.num_layers == 3
    (case,) = bench_refit.chosen(bench_refit.parser().parse_args(["--device", "cpu", "--trainers", "2"]))
    assert case.trainers.expert == 2 and case.engines.tp == 2
    with pytest.raises(SystemExit, match="num_experts|expert"):
        bench_refit.chosen(bench_refit.parser().parse_args(["--device", "cpu", "--trainers", "ep=3"]))


def test_names_of_cases_can_be_asked_for() -> None:
    every = CASES + SMALL
    assert len({case.name for case in every}) == len(every)
    assert not any("," in case.name for case in every)


def test_ranks_that_share_gpus_are_placed_side_by_side() -> None:
    case = next(case for case in CASES if case.shared)
    assert [case.device_of(rank) for rank in range(case.num_ranks)] == [0, 0, 1, 1] and case.num_devices == 2
    assert bench_refit.placement_of(case) == 2 and bench_refit.placement_of(SMALL[0]) == 0
