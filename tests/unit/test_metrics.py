"""What a run leaves behind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nemo_rl.metrics import RunRecorder, make_run_folder, pause_line, reward_margin, step_line, summary_table


def row(step: int, refit: bool = True) -> dict[str, Any]:
    values: dict[str, Any] = {"step": step, "reward_mean": step / 10, "loss": 0.5, "gen_kl_error": 0.0, "train_s": 1.0}
    names = ("refit_s", "refit_bulk_bytes", "refit_misc_bytes", "refit_gb_per_s", "refit_transport", "refit_verified")
    return values | dict(zip(names, (0.25, 2_000_000, 0, 0.1, "gloo", True) if refit else [None] * 6, strict=True))


def test_run_folders_and_latest(tmp_path: Path) -> None:
    first, second = (make_run_folder(tmp_path, None, "stem") for _ in range(2))
    assert first != second and (tmp_path / "latest").resolve() == second.resolve()
    named = make_run_folder(tmp_path, "mine", "stem")
    assert named.name == "mine" and (tmp_path / "latest").resolve() == named.resolve()
    with pytest.raises(FileExistsError):
        make_run_folder(tmp_path, "mine", "stem")


@pytest.mark.parametrize("refit", [True, False])
def test_files_of_a_run(tmp_path: Path, refit: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    with RunRecorder(tmp_path, "title", 5, console, bar=False, tensorboard=True) as recorder:
        for step in range(1, 6):
            recorder.record(row(step, refit))
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == step and json.loads(lines[-1]) == row(step, refit)
        recorder.summarize()
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())
    assert "0.100 in the first fifth of the steps, 0.500 in the last: margin +0.400" in screen.getvalue()


def test_console_tells_pauses_and_drift() -> None:
    quiet = row(1) | {"pause_to_resume_s": None, "gen_kl_error": None, "gen_kl_drift": 0.02}
    paused = row(2) | {"pause_to_resume_s": 0.25, "pause_transfer_s": 0.2, "pause_begin_s": 0.05}
    longer = row(3) | {"pause_to_resume_s": 0.35, "pause_transfer_s": 0.2, "pause_begin_s": 0.05, "pause_call_s": 0.1}
    assert "KL drift 2e-02" in step_line(quiet) and "pause" not in step_line(quiet)
    assert step_line(paused).endswith("KL err 0e+00 refit 0.25 s pause 250 ms verified")
    assert pause_line([quiet, paused, longer]) == "pause to resume: 300.0 ms = transfer 200.0 + begin 50.0 + call 50.0"
    assert pause_line([quiet]) is None


def test_margin_of_fifths() -> None:
    assert reward_margin([row(s) for s in range(1, 11)]) == (pytest.approx(0.15), pytest.approx(0.95))
    assert reward_margin([row(3)]) == (pytest.approx(0.3), pytest.approx(0.3))
    with pytest.raises(ValueError, match="without steps"):
        reward_margin([])


def test_table_marks_what_was_not_verified() -> None:
    screen = io.StringIO()
    rows = [row(1), row(2) | {"refit_verified": False}, row(3, refit=False)]
    Console(file=screen, width=80).print(summary_table(rows, "title"))
    lines = [line.split() for line in screen.getvalue().splitlines() if line.strip()[:1].isdigit()]
    assert [line[-1] for line in lines] == ["yes", "no", "-"]
