"""Run the golden matrix: `python -m tests.golden.run [--level 0] [-k text] [--out folder]`.

Status 0 if every chosen row passed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_rl.generator.preflight import PREFLIGHT_ENV

os.environ.update(PREFLIGHT_ENV)  # before anything imports vLLM

from rich.console import Console  # noqa: E402

from tests.golden.case import Bench, Case  # noqa: E402
from tests.golden.checks import Verdict, judge  # noqa: E402
from tests.golden.engines import run_apart  # noqa: E402
from tests.golden.execute import Outcome, simulate  # noqa: E402
from tests.golden.matrix import MATRIX, Row, load  # noqa: E402
from tests.golden.processes import Pool  # noqa: E402
from tests.golden.report import PASSED, Result, write  # noqa: E402


def main(arguments: Sequence[str]) -> int:
    """Run the rows that the arguments choose, show each as it ends, and write the report."""
    options = _parser().parse_args(arguments)
    rows = [row for row in load(options.matrix) if row.level <= options.level and options.k in row.name]
    if not rows:
        sys.stderr.write(f"no row of {options.matrix} has '{options.k}' in its name at level {options.level}\n")
        return 2
    logging.getLogger("nemo_rl").setLevel(logging.CRITICAL)  # refusals are what some rows are there for
    console, results = Console(stderr=True, soft_wrap=True), []
    with tempfile.TemporaryDirectory() as folder, Pool() as pool:
        bench = Bench(Path(folder))
        for number, row in enumerate(rows, 1):
            with console.status(f"{number} of {len(rows)}: {row.name}"):
                results.append(run_row(bench, pool, row))
            _show(console, number, len(rows), results[-1])
            write(options.out, results)
    good = sum(r.status == PASSED for r in results)
    console.print(f"{good} of {len(results)} rows passed; {options.out / 'report.md'}", markup=False)
    return 0 if good == len(results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="golden", description=__doc__)
    parser.add_argument("--level", type=int, default=1, help="rows up to this level (0: those of make test)")
    parser.add_argument("-k", default="", help="rows with this text in their names")
    parser.add_argument("--out", type=Path, default=Path("outputs/golden"), help="folder of the report")
    parser.add_argument("--matrix", type=Path, default=MATRIX, help="the rows")
    return parser


def run_row(bench: Bench, pool: Pool, row: Row) -> Result:
    """Whatever goes wrong is the row's verdict."""
    started, ranks = time.monotonic(), (row.trainer.num_ranks, sum(g.num_ranks for g in row.generators))
    if row.not_covered:
        return Result(row, (), ranks, 0.0)
    if row.run == "engine":
        return _with_engines(row, ranks, started)
    if row.refused:
        return Result(row, (_refused(bench, pool, row),), ranks, time.monotonic() - started)
    try:
        case = bench.case(row)
        outcome = _run(pool, case)
        verdicts = tuple(judge(case, outcome))
    except Exception as error:
        verdict = Verdict("ran", (f"{type(error).__name__}: {error}",))
        return Result(row, (verdict,), ranks, time.monotonic() - started)
    plan, misc = outcome.plan, dict[str, list[str]]()
    for fqn, reason in plan.misc_reasons.items():
        misc.setdefault(reason, []).append(fqn)
    return Result(row, verdicts, ranks, time.monotonic() - started, plan.bulk_bytes, plan.misc_bytes, misc)


def _with_engines(row: Row, ranks: tuple[int, int], started: float) -> Result:
    try:
        found = run_apart(row)
    except Exception as error:
        verdict = Verdict("ran", (f"{type(error).__name__}: {error}",))
        return Result(row, (verdict,), ranks, time.monotonic() - started)
    spent = time.monotonic() - started
    return Result(row, found.verdicts, ranks, spent, found.bulk_bytes, found.misc_bytes, found.misc)


def _run(pool: Pool, case: Case) -> Outcome:
    return simulate(case) if case.row.run == "simulated" else pool.run(case)


def _refused(bench: Bench, pool: Pool, row: Row) -> Verdict:
    """The row must be refused, in the words that it states."""
    try:
        _run(pool, bench.case(row))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return Verdict("refused", () if row.refused in said else (f"in other words: {said}",), said[:200])
    return Verdict("refused", (f"it ran, and '{row.refused}' was due",))


def _show(console: Console, number: int, count: int, result: Result) -> None:
    style = "green" if result.status == PASSED else "red"
    wrong = "; ".join(f"{v.check}: {v.text}" for v in result.verdicts if not v.ok)
    console.print(
        f"{number}/{count} [{style}]{result.status}[/] {result.row.name} ({result.seconds:.1f} s)", highlight=False
    )
    if wrong or result.row.not_covered:
        console.print(f"    {wrong or result.row.not_covered}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
