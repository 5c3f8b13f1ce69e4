"""The page of results says what the results say, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from scripts import bench_page
from scripts.bench.rows import finished

ROOT = Path(__file__).parents[3]
LINK = {"seconds_median": 0.0108, "seconds_min": 0.0107, "seconds_max": 0.0111, "gb_per_s": 396.7}
RESULT: dict[str, Any] = {
    "date": "2001-02-03",
    "hardware": "ACME Q9",
    "num_devices": 4,
    "versions": {"torch": "9.8.7", "nccl": "6.5.4"},
    "bucket_bytes": 64 << 20,
    "num_streams": 2,
    "not_run": {"case B": ["peer", "nccl"]},
    "rows": [
        {"case": "case A", "variant": "links: copy engine put, contiguous", **LINK},
        {
            "case": "case A",
            "variant": "peer",
            "transport": "peer",
            "seconds_median": 0.1234,
            "seconds_min": 0.1111,
            "seconds_max": 0.2222,
            "transfer_median": 0.0999,
            "gb_per_s": 321.5,
            "share_of_ceiling": 0.8104,
            "share_of_copy_ceiling": 0.8104,
            "staging_bytes": 3 << 19,
            "verification_s": 0.0456,
            "verified": True,
            "bit_exact": True,
            "kernels": 12.0,
            "copies": 345.0,
        },
        {"case": "case A", "variant": "nccl", "error": "rank 1:\nbroke"},
    ],
}


def test_a_result_becomes_a_page_and_a_picture(tmp_path: Path) -> None:
    (tmp_path / "benchmarks.md").write_text("Own text.\n" + bench_page.MARK + "old figures 17.5\n")
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert bench_page.main([str(tmp_path / "result.json"), "--docs", str(tmp_path), "--revision", "abc1234"]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.startswith("Own text.\n") and "17.5" not in page
    assert "| peer | 123.4 [111.1, 222.2] | 99.9 | 321.5 | 0.810 | 0.810 | 1.5 | 12, 345 | 45.6 |  | yes |" in page
    assert "| links: copy engine put, contiguous | 10.8 [10.7, 11.1] |  | 396.7 |" in page
    assert "`nccl` gave no result: rank 1: broke" in page and "Not run: case B: peer, nccl." in page
    assert "2001-02-03, revision abc1234; torch 9.8.7, nccl 6.5.4" in page and "4 x ACME Q9" in page
    picture = tmp_path / "benchmarks" / "4x-acme-q9.svg"
    first = picture.read_bytes()
    assert b"<svg" in first and json.loads((tmp_path / "benchmarks" / "4x-acme-q9.json").read_text()) == {
        "revision": "abc1234",
        **RESULT,
    }
    assert bench_page.main(["--docs", str(tmp_path)]) == 0
    assert (tmp_path / "benchmarks.md").read_text() == page and picture.read_bytes() == first


def test_cases_are_summed_up(tmp_path: Path) -> None:
    result = copy.deepcopy(RESULT)
    peer = result["rows"][1]
    result["rows"] += [
        {**peer, "variant": "peer no verify", "seconds_median": 0.1},
        {**peer, "variant": "broadcast no verify", "seconds_median": 0.25, "share_of_ceiling": 0.05},
    ]
    page = bench_page.part("x", result)
    assert "| case | peer no verify | peer | broadcast no verify | broadcast / peer |" in page
    assert "| case A | 100.0 (0.810) | 123.4 (0.810) | 250.0 (0.050) | 2.5 |" in page
    result["rows"].append({**peer, "case": "case D", "variant": "vllm", "seconds_median": 0.5})
    assert "| case D |  |  | 500.0 (0.810) |  |  |" in bench_page.part("x", result)


def test_a_row_that_was_wrong_says_so(tmp_path: Path) -> None:
    wrong = copy.deepcopy(RESULT)
    wrong["rows"][1]["bit_exact"] = False
    assert "| NO |" in bench_page.part("x", wrong) and "| NO |" not in bench_page.part("x", RESULT)


def test_what_auto_took_is_compared_with_the_fastest() -> None:
    result = copy.deepcopy(RESULT)
    peer = result["rows"][1]
    nccl = {**peer, "variant": "nccl", "transport": "nccl", "seconds_median": 0.1}
    result["rows"] = [peer, nccl, {**nccl, "variant": "auto", "seconds_median": 0.101}]
    assert "`auto` took nccl: the fastest." in bench_page.part("x", result)
    result["rows"][2] = {**peer, "variant": "auto"}
    assert "`auto` took peer: 23.4% slower than nccl." in bench_page.part("x", result)
    result["rows"][1]["verified"] = False  # not under the same conditions
    assert "`auto` took peer: the fastest." in bench_page.part("x", result)


def test_a_case_in_which_nothing_ran_has_an_empty_panel(tmp_path: Path) -> None:
    result = copy.deepcopy(RESULT)
    result["rows"].append({"case": "case C", "variant": "peer", "error": "why"})
    bench_page.draw(result, tmp_path / "x.svg")
    assert "### case C" in bench_page.part("x", result) and (tmp_path / "x.svg").exists()


def test_a_page_without_the_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="no line <!-- results -->"):
        bench_page.written("text", {})


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    """No figure stands there that was not measured."""
    docs = ROOT / "docs"
    results = {path.stem: json.loads(path.read_text()) for path in sorted((docs / "benchmarks").glob("*.json"))}
    page = (docs / "benchmarks.md").read_text()
    assert bench_page.written(page, results) == page
    assert all((docs / "benchmarks" / f"{name}.svg").exists() for name in results)
    assert all(bench_page.slug(result) == name for name, result in results.items())


def test_shares_of_the_committed_results_are_those_of_their_own_ceilings() -> None:
    for path in sorted((ROOT / "docs" / "benchmarks").glob("*.json")):
        rows = json.loads(path.read_text())["rows"]
        timed = [row for row in rows if "transport" in row]
        assert finished(rows) == rows and timed, path
        columns = {"seconds_median", "seconds_min", "seconds_max", "gb_per_s", "staging_bytes", "verified", "bit_exact"}
        assert all(columns <= row.keys() for row in timed), path
