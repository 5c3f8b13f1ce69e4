"""Make the tables and pictures of docs/benchmarks.md from the results in docs/benchmarks.

    python scripts/bench_page.py outputs/bench_refit/result.json     # take a result over, and make the page
    python scripts/bench_page.py                                     # make the page from the results that are there

The page's own text stands above the line `<!-- results -->`; what is below it comes from the results alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
MARK = "<!-- results -->\n"
NOTHING = "\nNo result has been taken over yet.\n"
Row = Mapping[str, Any]

log = logging.getLogger("bench_page")


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("result", nargs="?", type=Path)
    p.add_argument("--revision", help="of the code that gave the result")
    p.add_argument("--docs", type=Path, default=DOCS)
    options = p.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    folder = options.docs / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    if options.result is not None:
        result = json.loads(options.result.read_text())
        if options.revision:
            result = {"revision": options.revision, **result}
        (folder / f"{slug(result)}.json").write_text(json.dumps(result, indent=1) + "\n")
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    page = options.docs / "benchmarks.md"
    page.write_text(written(page.read_text(), results))
    for name, result in results.items():
        draw(result, folder / f"{name}.svg")
    log.info("wrote %s with %d results", page, len(results))
    return 0


def slug(result: Mapping[str, Any]) -> str:
    """Name of a result's files: `4x-nvidia-h200`."""
    hardware = re.sub(r"[^a-z0-9]+", "-", result["hardware"].lower()).strip("-")
    return f"{result['num_devices']}x-{hardware}"


def written(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with the parts of all results below the mark. Raises ValueError where the page has no mark."""
    if MARK not in page:
        raise ValueError(f"the page has no line {MARK.strip()}")
    parts = [part(name, result) for name, result in results.items()] or [NOTHING]
    return page[: page.index(MARK)] + MARK + "".join(parts)


def part(name: str, result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    revision = f", revision {result['revision']}" if "revision" in result else ""
    lines = [
        "",
        f"## {result['num_devices']} x {result['hardware']}",
        "",
        f"Measured on {result['date']}{revision}; {versions}. Messages of at most {result['bucket_bytes'] >> 20} MiB, "
        f"{result['num_streams']} streams. All numbers: [{name}.json](benchmarks/{name}.json).",
        "",
        f"![GB/s into each generator, by case and variant](benchmarks/{name}.svg)",
    ]
    lines += ["", *_summary(result["rows"])]
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        lines += ["", f"### {case}", "", *table([row for row in result["rows"] if row["case"] == case])]
    for case, variants in result["not_run"].items():
        lines += ["", f"Not run: {case}: {', '.join(variants)}."]
    return "\n".join(lines) + "\n"


# ---- tables

_PEER, _BROADCAST = "peer no verify", "broadcast no verify"
_OTHERS = ("peer", "nccl no verify", "nccl", "m2n no verify", "golden", "vllm", "checkpoint-engine")


def _summary(rows: Sequence[Row]) -> list[str]:
    """A line for each case: milliseconds, with the share of the ceiling, and how much slower broadcast is than peer."""
    ran = {row["variant"] for row in rows if "transport" in row}
    shown = (_PEER, *(name for name in _OTHERS if name in ran), _BROADCAST)
    head = ("case", *shown, "broadcast / peer")
    lines = [_line(head), _line("---" if i == 0 else "---:" for i in range(len(head)))]
    for case in dict.fromkeys(row["case"] for row in rows):
        timed = {row["variant"]: row for row in rows if row["case"] == case and "transport" in row}
        cells = [_short(timed[name]) if name in timed else "" for name in shown]
        ends = [timed[name]["seconds_median"] for name in (_BROADCAST, _PEER) if name in timed]
        lines.append(_line([case, *cells, f"{ends[0] / ends[1]:.1f}" if len(ends) == 2 else ""]))
    return lines


def _short(row: Row) -> str:
    share = row.get("share_of_ceiling")
    return _ms(row["seconds_median"]) + ("" if share is None else f" ({share:.3f})")


_HEAD = (
    "variant",
    "ms median [min, max]",
    "transfer ms",
    "GB/s into each",
    "share of ceiling",
    "of copy ceiling",
    "staging MiB",
    "kernels, copies",
    "verification ms",
    "predicted ms",
    "bit-exact",
)


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of one case's table: ceilings first, then the variants, then what failed."""
    rows = list(rows)
    lines = [_line(_HEAD), _line("---" if i == 0 else "---:" for i in range(len(_HEAD)))]
    lines += [_line(_cells(row)) for row in rows if "error" not in row]
    lines += _choices(rows)
    for row in (row for row in rows if "error" in row):
        lines += ["", f"`{row['variant']}` gave no result: {' '.join(str(row['error']).split())[:300]}"]
    return lines


def _choices(rows: Sequence[Row]) -> list[str]:
    """What `auto` took, and by how much another transport was faster under the same conditions."""
    lines = []
    timed = [row for row in rows if "transport" in row]
    for row in (row for row in timed if row["variant"].startswith("auto")):
        others = [r for r in timed if r["verified"] == row["verified"] and not r["variant"].startswith("auto")]
        if not others:
            continue
        best = min(others, key=lambda r: r["seconds_median"])
        own = next((r for r in others if r["transport"] == row["transport"]), row)
        more = own["seconds_median"] / best["seconds_median"] - 1
        said = "the fastest" if own is best else f"{more:.1%} slower than {best['transport']}"
        lines += ["", f"`{row['variant']}` took {row['transport']}: {said}."]
    return lines


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    seconds = [_ms(row.get(f"seconds_{which}")) for which in ("median", "min", "max")]
    name = row["variant"] + (f" ({row['transport']})" if row["variant"].startswith("auto") else "")
    cells = [name, f"{seconds[0]} [{seconds[1]}, {seconds[2]}]"]
    cells += [_ms(row.get("transfer_median")), f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else ""]
    cells += [_share(row.get("share_of_ceiling")), _share(row.get("share_of_copy_ceiling"))]
    cells.append(f"{row['staging_bytes'] / 2**20:.1f}" if "staging_bytes" in row else "")
    cells.append(f"{row['kernels']:.0f}, {row['copies']:.0f}" if "kernels" in row else "")
    cells += [_ms(row.get("verification_s")), _ms(row.get("predicted_s"))]
    cells.append({True: "yes", False: "NO", None: ""}[row.get("bit_exact")])
    return cells


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.3f}"


# ---- picture

_COLORS = {"peer": "#2f7d4f", "nccl": "#3465a4", "m2n": "#8f6bb3", "auto": "#c4a000", "broadcast": "#a05a2c"}
_OTHER = "#808080"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """A panel for each case: a bar for each variant, and lines where the ceilings are."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same result gives the same file
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    columns = 2 if len(cases) > 1 else 1
    down = -(-len(cases) // columns)
    figure, panels = pyplot.subplots(down, columns, figsize=(6.2 * columns, 2.5 * down), squeeze=False)
    good = [row for row in result["rows"] if "error" not in row]
    most = max((sum(r["case"] == case and "transport" in r for r in good) for case in cases), default=0)
    for panel, case in zip(panels.flat, cases, strict=False):
        _draw_case(panel, case, [row for row in good if row["case"] == case], most)
    for panel in list(panels.flat)[len(cases) :]:
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_case(panel: Any, case: str, rows: Sequence[Row], most: int) -> None:
    """`most`: bars of the fullest panel, so that bars are as thick in all."""
    bars = [row for row in rows if "transport" in row]
    longest = max((row["gb_per_s"] for row in bars), default=0.0)
    for place, row in enumerate(bars):
        color = _COLORS.get(row["variant"].split()[0], _OTHER)
        light = 0.55 if row["verified"] else 1.0
        panel.barh(place, row["gb_per_s"], color=color, alpha=light, height=0.7)
        inside = row["gb_per_s"] > longest / 5
        side, ink = ("right", "white" if light == 1 else "black") if inside else ("left", "black")
        panel.text(row["gb_per_s"], place, f" {row['gb_per_s']:.0f} ", va="center", ha=side, color=ink, fontsize=8)
    lines: list[str] = []
    for kind, style in (("copy engine", "-"), ("send/recv", "--")):
        rates = [row["gb_per_s"] for row in rows if row["variant"].startswith(f"links: {kind}")]
        if rates:
            panel.axvline(max(rates), color="black", linestyle=style, linewidth=1)
            lines.append(f"{kind} {max(rates):.0f}{' (dashed)' if style == '--' else ''}")
    panel.set_yticks(range(len(bars)), [row["variant"] for row in bars], fontsize=8)
    panel.set_xlim(0, 1.05 * max((row["gb_per_s"] for row in rows if row.get("gb_per_s")), default=1.0))
    panel.set_ylim(max(len(bars), most) - 0.5, -0.5)
    panel.set_title(case, fontsize=9)
    ceilings = f"; ceilings: {', '.join(lines)}" if lines else ""
    panel.set_xlabel(f"GB/s into each generator{ceilings}", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
