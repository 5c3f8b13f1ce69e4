"""What a run of the matrix found, for people (`report.md`) and for programs (`report.json`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.golden.checks import Verdict
from tests.golden.matrix import Row

PASSED, FAILED, NOT_COVERED = "passed", "failed", "not covered"


@dataclass(frozen=True, slots=True)
class Result:
    """Of one row.

    Attributes:
        ranks: trainers and generators.
        bulk_bytes, misc_bytes: of the plan; misc counts each whole tensor once.
        misc: reason -> tensors that travel whole for it.
    """

    row: Row
    verdicts: tuple[Verdict, ...]
    ranks: tuple[int, int]
    seconds: float
    bulk_bytes: int = 0
    misc_bytes: int = 0
    misc: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def status(self) -> str:
        if self.row.not_covered:
            return NOT_COVERED
        return PASSED if self.verdicts and all(v.ok for v in self.verdicts) else FAILED


def write(folder: Path, results: Sequence[Result]) -> None:
    """`report.json` and `report.md` in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps({"rows": [_record(r) for r in results]}, indent=1))
    (folder / "report.md").write_text(_page(results))


def _record(result: Result) -> dict[str, object]:
    row = result.row
    return {
        "row": row.name,
        "family": row.model.name,
        "trainer": asdict(row.trainer),
        "generators": [asdict(g) for g in row.generators],
        "run": row.run,
        "level": row.level,
        "trainer_ranks": result.ranks[0],
        "generator_ranks": result.ranks[1],
        "status": result.status,
        "bulk_bytes": result.bulk_bytes,
        "misc_bytes": result.misc_bytes,
        "misc": {reason: list(fqns) for reason, fqns in result.misc.items()},
        "verdicts": {v.check: {"ok": v.ok, "text": v.text} for v in result.verdicts},
        "not_covered": row.not_covered,
        "note": row.note or row.model.why,
        "seconds": round(result.seconds, 2),
    }


def _page(results: Sequence[Result]) -> str:
    counts = Counter(r.status for r in results)
    families = sorted({r.row.model.name for r in results})
    lines = [
        "# Golden matrix",
        "",
        f"{len(results)} rows of {len(families)} families: "
        + ", ".join(f"{counts[s]} {s}" for s in (PASSED, FAILED, NOT_COVERED))
        + f", in {sum(r.seconds for r in results):.0f} s. Each row refits weights A, B and A again into random bytes.",
        "",
        *_wrong(results),
        *_table(results),
        "",
        *_engines(results),
        *_misc(results),
        *_notes(results),
    ]
    return "\n".join(lines) + "\n"


def _table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| row | ranks | run | bulk bytes | misc bytes | checks | s |",
        "|---|---|---|--:|--:|---|--:|",
    ]
    for r in results:
        marks = " ".join(v.check if v.ok else f"**{v.check} FAILED**" for v in r.verdicts) or r.status
        ranks = f"{r.ranks[0]} -> {r.ranks[1]}"
        lines.append(
            f"| {r.row.name} | {ranks} | {r.row.run} | {r.bulk_bytes} | {r.misc_bytes} | {marks} | {r.seconds:.1f} |"
        )
    return lines


def _wrong(results: Sequence[Result]) -> list[str]:
    bad = [r for r in results if r.status != PASSED]
    lines = ["## Not passed", ""] if bad else []
    for r in bad:
        texts = [f"{v.check}: {v.text}" for v in r.verdicts if not v.ok] or [f"not covered: {r.row.not_covered}"]
        lines.append(f"- {r.row.name}: {'; '.join(texts)}")
    return [*lines, ""] if bad else []


def _engines(results: Sequence[Result]) -> list[str]:
    """How far log-probabilities of real engines are from the weights that they serve."""
    said = {r.row.name: v.text for r in results for v in r.verdicts if v.check == "logprobs"}
    lines = [f"- {name}: log-probabilities are {text}" for name, text in said.items()]
    return ["## Real engines", "", *lines, ""] if said else []


def _misc(results: Sequence[Result]) -> list[str]:
    """Each reason once, with the families and a tensor that it is given for."""
    where: dict[str, tuple[set[str], str]] = {}
    for r in results:
        for reason, fqns in r.misc.items():
            where.setdefault(reason, (set(), fqns[0]))[0].add(r.row.model.name)
    lines = ["## Tensors that travel whole", ""] if where else []
    for reason, (families, fqn) in where.items():
        lines.append(f"- {', '.join(sorted(families))}: {fqn}: {reason}")
    return [*lines, ""] if where else []


def _notes(results: Sequence[Result]) -> list[str]:
    notes = {f"{r.row.model.name}: {r.row.model.why}": None for r in results if r.row.model.why}
    notes |= {f"{r.row.name}: {r.row.note}": None for r in results if r.row.note}
    return ["## Notes", "", *(f"- {note}" for note in notes)] if notes else []
