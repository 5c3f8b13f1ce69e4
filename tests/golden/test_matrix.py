"""The rows of level 0, run in a process of their own, as vLLM keeps state per process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.golden.families import FAMILIES
from tests.golden.matrix import load

ROOT = Path(__file__).parents[2]
LIMIT_S = 800
ROWS = load()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("vllm")
    out = tmp_path_factory.mktemp("golden")
    command = [sys.executable, "-W", "ignore", "-m", "tests.golden.run", "--level", "0", "--out", str(out)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert (out / "report.json").exists(), done.stderr[-3000:]
    return {row["row"]: row for row in json.loads((out / "report.json").read_text())["rows"]}


@pytest.mark.timeout(LIMIT_S + 30)
@pytest.mark.parametrize("name", [row.name for row in ROWS if row.level == 0])
def test_row(report: dict[str, Any], name: str) -> None:
    found = report[name]
    assert found["status"] == "passed", found["not_covered"] or found["verdicts"]


def test_every_family_has_rows_of_several_layouts() -> None:
    layouts = {name: {(r.trainer, r.generators) for r in ROWS if r.model.of == name} for name in FAMILIES}
    assert [name for name, found in layouts.items() if len(found) < 2] == []
