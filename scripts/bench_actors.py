"""Time resharding refits against the conventional one: same model, same actors, one run.

Real Megatron trainers and real vLLM generators in Ray actors hold a random model of the asked size; each variant gets a
new session and `--repeat` refits. Prints a table and writes it as JSON.

    python scripts/bench_actors.py                                             # dense, TP2 -> 2 x TP1
    python scripts/bench_actors.py --family moe --trainers ep=2,tp=2 --generators tp=2
    python scripts/bench_actors.py --layers 16 --hidden 768 --variants gloo,broadcast --repeat 9

Variants that end in `no verify` have the digests off: beside the same variant with them on, they say what
verification costs in this run (column "verify": the difference of the medians, and its share of the refit).

Columns: seconds are the slowest rank's, median [min, max] over the repeats without the first; bytes moved are what
all generators received over the wire in one refit; the lower bound counts every destination byte once; staging are
message and broadcast buffers of the worst rank; extra memory is how far a rank's resident memory rose during a refit.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nemo_rl.actors import Actors
from nemo_rl.cluster import Cluster
from nemo_rl.config import load_config
from nemo_rl.refit.base import RefitOptions, RefitReport
from nemo_rl.schema import Config
from nemo_rl.topology import topology_of

BASE = Path(__file__).parents[1] / "examples" / "configs" / "grpo_qwen3_tiny_cpu.yaml"
NO_VERIFY = " no verify"
AXES = {
    "tp": "policy.megatron_cfg.tensor_model_parallel_size",
    "pp": "policy.megatron_cfg.pipeline_model_parallel_size",
    "ep": "policy.megatron_cfg.expert_model_parallel_size",
    "etp": "policy.megatron_cfg.expert_tensor_parallel_size",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One variant's result; times in seconds, sizes in bytes."""

    case: str
    variant: str
    seconds_median: float
    seconds_min: float
    seconds_max: float
    bytes_moved: int
    lower_bound: int
    gb_per_s: float
    staging_bytes: int
    trainer_extra_bytes: int | None
    generator_extra_bytes: int | None
    verified: bool
    phase_s: dict[str, float]
    verify_cost_s: float | None = None


def main() -> int:
    options = _parser().parse_args()
    console = Console(width=max(Console().width, 132))
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        size = _make_model(options, Path(folder))
        config = _config(options, folder)
        case = f"{options.family} {size / 1e6:.0f} MB, {options.trainers} -> {options.generators}"
        console.print(f"{case}: starting actors", style="dim")
        rows = _run(options, config, Path(folder), case, console)
    _show(console, case, rows)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    console.print(f"wrote {out}", style="dim")
    return 0 if all(r.verified for r in rows if not r.variant.endswith(NO_VERIFY)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time refits.", epilog=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--family", choices=("dense", "moe"), default="dense")
    parser.add_argument("--trainers", default="tp=2", help="mesh of the trainers: tp, pp, ep, etp, ranks")
    parser.add_argument("--generators", default="tp=1,replicas=2", help="tp of an engine and number of engines")
    parser.add_argument("--variants", default="gloo,gloo no verify,broadcast,broadcast no verify,golden")
    parser.add_argument("--repeat", type=int, default=6, help="refits a variant; the first is not timed")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--bucket-bytes", type=int, default=4 << 20)
    parser.add_argument("--num-streams", type=int, default=2)
    parser.add_argument("--out", default="outputs/bench/refit.json")
    return parser


def _sizes(text: str) -> dict[str, int]:
    return {name.strip(): int(value) for name, value in (part.split("=") for part in text.split(","))}


def _make_model(options: argparse.Namespace, folder: Path) -> int:
    """Save a random checkpoint; returns its bytes."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    torch.manual_seed(0)
    common: dict[str, Any] = dict(
        vocab_size=8192,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        dtype=options.precision,
    )
    if options.family == "dense":
        config: Any = Qwen3Config(architectures=["Qwen3ForCausalLM"], **common)
    else:
        moe = dict(num_experts=options.experts, num_experts_per_tok=2, moe_intermediate_size=options.hidden // 2)
        config = Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], norm_topk_prob=True, **common, **moe)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.precision))
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def _config(options: argparse.Namespace, folder: str) -> Config:
    trainers, generators = _sizes(options.trainers), _sizes(options.generators)
    dense = trainers.get("tp", 1) * trainers.get("pp", 1)
    ranks = trainers.pop("ranks", max(dense, trainers.get("ep", 1) * trainers.get("etp", 1) * trainers.get("pp", 1)))
    devices = generators.get("tp", 1) * generators.get("replicas", 1)
    overrides = [f"{AXES[name]}={trainers.get(name, 1)}" for name in AXES]
    overrides += [
        f"policy.model_name={folder}",
        f"policy.precision={options.precision}",
        f"policy.generation.vllm_cfg.precision={options.precision}",
        f"policy.generation.vllm_cfg.tensor_parallel_size={generators.get('tp', 1)}",
        "policy.generation.vllm_cfg.load_format=dummy",
        f"policy.generation.colocated.resources.gpus_per_node={devices}",
        f"cluster.gpus_per_node={ranks + devices}",
        "cluster.num_nodes=1",
    ]
    return load_config(BASE, overrides)


def _run(options: argparse.Namespace, config: Config, folder: Path, case: str, console: Console) -> list[Row]:
    topology, problems = topology_of(config)
    if problems:
        sys.exit("\n".join(problems))
    rows = []
    with (
        Cluster(config.cluster, topology, "cpu") as cluster,
        Actors(config, folder, topology, "cpu", cluster) as actors,
    ):
        version = 1
        for variant in (v.strip() for v in options.variants.split(",")):
            refits = RefitOptions(
                transport=variant.split()[0],
                bucket_bytes=options.bucket_bytes,
                num_streams=options.num_streams,
                deadline_s=config.policy.refit.deadline_s,
                verify=not variant.endswith(NO_VERIFY),
                measure_memory=True,
            )
            group = actors.refit_group(refits)
            group.connect()
            reports = []
            for _ in range(options.repeat):
                reports.append(group.reports(version))
                version += 1
            rows.append(_row(case, variant, reports, topology.num_trainers))
            console.print(f"{variant}: {rows[-1].seconds_median * 1e3:.0f} ms", style="dim")
    return _with_verify_cost(rows)


def _row(case: str, variant: str, refits: Sequence[Sequence[RefitReport]], num_trainers: int) -> Row:
    """The first refit warms up and shows the memory; the others are timed."""
    seconds = [max(r.total_s for r in reports) for reports in refits[1:]]
    last = refits[-1]
    moved = sum(r.bulk_bytes + r.misc_bytes for r in last[num_trainers:])
    return Row(
        case=case,
        variant=variant,
        seconds_median=statistics.median(seconds),
        seconds_min=min(seconds),
        seconds_max=max(seconds),
        bytes_moved=moved,
        lower_bound=last[0].required_bytes,
        gb_per_s=moved / statistics.median(seconds) / 1e9,
        staging_bytes=max(r.staging_bytes for r in last),
        trainer_extra_bytes=_worst(refits, slice(0, num_trainers)),
        generator_extra_bytes=_worst(refits, slice(num_trainers, None)),
        phase_s={phase: _slowest(refits[1:], phase) for phase in last[0].phase_s},
        verified=all(r.verified for reports in refits for r in reports[num_trainers:]),
    )


def _slowest(refits: Sequence[Sequence[RefitReport]], phase: str) -> float:
    """Median over refits of the slowest rank's seconds in `phase`."""
    return statistics.median(max(r.phase_s.get(phase, 0.0) for r in reports) for reports in refits)


def _with_verify_cost(rows: Sequence[Row]) -> list[Row]:
    """Each verified row with what it takes longer than its twin without digests."""
    bare = {r.variant.removesuffix(NO_VERIFY): r.seconds_median for r in rows if r.variant.endswith(NO_VERIFY)}
    return [replace(r, verify_cost_s=r.seconds_median - bare[r.variant]) if r.variant in bare else r for r in rows]


def _worst(refits: Sequence[Sequence[RefitReport]], ranks: slice) -> int | None:
    found = [r.extra_rss_bytes for reports in refits for r in reports[ranks]]
    return None if None in found else max(f for f in found if f is not None)


def _show(console: Console, case: str, rows: Sequence[Row]) -> None:
    table = Table(title=f"refit, {case}")
    names = ("variant", "ms", "moved MB", "bound MB", "GB/s", "staging MB", "extra MB trainer/gen.", "verified")
    for name in (*names, "verify"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    table.add_column("x faster than broadcast", justify="right")
    base = {r.variant.removeprefix("broadcast"): r.seconds_median for r in rows if r.variant.startswith("broadcast")}
    for r in rows:
        suffix = NO_VERIFY if r.variant.endswith(NO_VERIFY) else ""
        extra = f"{_megabytes(r.trainer_extra_bytes)}/{_megabytes(r.generator_extra_bytes)}"
        table.add_row(
            r.variant,
            f"{r.seconds_median * 1e3:.0f} [{r.seconds_min * 1e3:.0f}, {r.seconds_max * 1e3:.0f}]",
            f"{r.bytes_moved / 1e6:.1f}",
            f"{r.lower_bound / 1e6:.1f}" if r.lower_bound else "-",
            f"{r.gb_per_s:.2f}",
            f"{r.staging_bytes / 1e6:.1f}",
            extra,
            "yes" if r.verified else "no",
            _cost(r),
            f"{base[suffix] / r.seconds_median:.2f}" if suffix in base else "-",
        )
    console.print(table)


def _cost(row: Row) -> str:
    if row.verify_cost_s is None:
        return "-"
    return f"{row.verify_cost_s * 1e3:.0f} ms ({row.verify_cost_s / row.seconds_median:.0%})"


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f}"


if __name__ == "__main__":
    sys.exit(main())
