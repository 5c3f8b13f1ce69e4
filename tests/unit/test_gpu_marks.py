"""Tests of `tests/gpu` say how many GPUs they need, and are skipped by that number where there are none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
PLANTED = "test_without_a_mark"


def test_no_test_of_a_gpu_passes_without_one(tmp_path: Path) -> None:
    planted, report = tmp_path / "test_planted.py", tmp_path / "report.xml"
    planted.write_text(f"def {PLANTED}():\n    pass\n")
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--rootdir={ROOT}", "-c", "pyproject.toml"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/gpu", str(planted)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    cases = {f"{case.get('classname')}.{case.get('name')}": case for case in ElementTree.parse(report).iter("testcase")}
    files = {path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert {name.split(".")[2] for name in cases if name.startswith("tests.gpu.")} == files
    unskipped = [name for name, case in cases.items() if not re.match(r"needs [1-9]\d* CUDA", _reason(case))]
    assert [name.rpartition(".")[2] for name in unskipped] == [PLANTED]


def _reason(case: ElementTree.Element) -> str:
    skipped = case.find("skipped")
    return "" if skipped is None else str(skipped.get("message"))
