"""Time refits by every transport, side by side, without engines: plain processes hold real models' weights.

Each rank is a process, with one GPU of its own where there are GPUs, as Ray's actors are. Trainers hold what Megatron
holds and generators what vLLM holds (`scripts/bench/model.py`), for every case of a table (`scripts/bench/cases.py`).
Destinations get random bytes before each refit, and what arrives is compared on the device, element by element, with
values that generators make themselves. The ceilings are measured by the same processes beside the transports.

    python scripts/bench_refit.py                                         # GPUs: all cases; otherwise small ones
    python scripts/bench_refit.py --list
    python scripts/bench_refit.py --cases "30B EP2 -> TP2" --variants "links,peer no verify,peer"
    python scripts/bench_refit.py --trainers tp=2,etp=1,ep=2 --generators tp=2 --model Qwen3-30B-A3B --layers 8
    python scripts/bench_refit.py --device cpu --small --variants gloo,peer

Variants are transports of a session, with ` no verify` behind them for one without digests; `links`, the ceilings;
what links give to other copies and messages (`ways`, `nccl links`, `all nccl links`); and ways of others (`vllm`,
`checkpoint-engine`). A variant that fails or hangs becomes a row that says so, the
others run. `rows.jsonl` in the output folder grows as rows come, and `--resume` goes on behind them. Seconds are the
slowest rank's, median [min, max] over the repeats without the first. `scripts/bench_page.py` makes the page of
docs/benchmarks.md from the result.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from nemo_rl.refit.device import MULTICAST_OFF  # noqa: E402
from nemo_rl.trainer.model import Parallel, check_layout  # noqa: E402
from scripts.bench.cases import CASES, LINKS, MODELS, NO_VERIFY, SMALL, Case, Engines  # noqa: E402
from scripts.bench.machine import only  # noqa: E402
from scripts.bench.rank import Rank  # noqa: E402
from scripts.bench.rows import error_row, finished, is_probe  # noqa: E402

log = logging.getLogger("bench")
AXES = {"tp": "tensor", "pp": "pipeline", "ep": "expert", "etp": "expert_tensor"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    p.add_argument("--cases", help="names, or parts of names, separated by commas; all that fit the machine")
    p.add_argument("--list", action="store_true", help="say the cases and end")
    p.add_argument("--small", action="store_true", help="cases of tiny models, for a try")
    p.add_argument("--model", choices=MODELS, default="Qwen3-30B-A3B", help="of a case of your own")
    p.add_argument("--trainers", help="a case of your own: tp, pp, ep, etp, ranks; or the number of ranks with ep")
    p.add_argument(
        "--generators", help="a case of your own: tp, replicas, present (ranks of them); or the number of ranks with tp"
    )
    p.add_argument("--shared", action="store_true", help="all trainers on one GPU, all generators on another")
    p.add_argument("--one-buffer", action="store_true", help="a trainer's parameters in one allocation")
    p.add_argument("--layers", type=int, help="of every model, instead of all")
    p.add_argument("--variants", help="instead of those of the table")
    p.add_argument("--skip", default="", help="variants to leave out")
    p.add_argument("--repeat", type=int, help="timed refits, instead of those of the table")
    p.add_argument("--bucket-mb", type=int, default=64)
    p.add_argument("--num-streams", type=int, default=2)
    p.add_argument("--profile", action="store_true", help="count kernels and copies in every case")
    p.add_argument("--deadline", type=float, default=30, help="seconds of any phase")
    p.add_argument("--variant-limit", type=float, default=60, help="seconds of any variant; then all is started anew")
    p.add_argument("--limit", type=float, default=600, help="seconds of the whole run; what is left is not run")
    p.add_argument("--out", default="outputs/bench_refit")
    p.add_argument("--resume", action="store_true", help="keep the rows that are there and run the others")
    p.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    p.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return p


def main() -> int:
    options = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d %(name)s %(message)s", stream=sys.stdout)
    options.device = options.device or ("cuda" if torch.cuda.device_count() else "cpu")
    cases = chosen(options)
    if options.list:
        log.info("%s", "\n".join(f"{case.name}: {', '.join(case.variants)}" for case in cases))
        return 0
    if options.rank is not None:
        wanted = json.loads((Path(options.out) / "todo.json").read_text())
        return Rank(options, [(case, wanted[case.name]) for case in cases if wanted.get(case.name)]).run()
    return Run(options, cases).run()


# ---- which cases


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for. Exits with the reason where there are none."""
    if options.trainers or options.generators:
        cases = [own_case(options)]
    else:
        cases = list(SMALL if options.small or (options.device == "cpu" and not options.cases) else CASES)
    if options.cases:
        parts = [part.strip() for part in options.cases.split(",")]
        exact = [case for case in CASES + SMALL if case.name in parts]
        cases = exact or [case for case in CASES + SMALL if any(part in case.name for part in parts)]
    if options.device == "cuda" and options.rank is None:
        cases = fitting(cases, torch.cuda.device_count(), bool(options.cases))
    cases = [with_options(case, options) for case in cases]
    if not cases:
        sys.exit("no case of that name fits this machine; see --list")
    for case in cases:
        if problems := check_layout(case.shape, case.trainers):
            sys.exit(f"{case.name}: {'; '.join(problems)}")
    return cases


def fitting(cases: Sequence[Case], num_devices: int, asked: bool) -> list[Case]:
    """Cases that so many GPUs can run; those that stand in for others only where others cannot, or where asked for."""
    found = [case for case in cases if case.num_devices <= num_devices]
    whole = [case for case in found if not case.stand_in]
    return found if asked or not whole else whole


def own_case(options: argparse.Namespace) -> Case:
    trainers, generators = sizes(options.trainers or "2", "ep"), sizes(options.generators or "2", "tp")
    dense = trainers.get("tp", 1) * trainers.get("pp", 1)
    sparse = trainers.get("ep", 1) * trainers.get("etp", 1) * trainers.get("pp", 1)
    axes: dict[str, Any] = {AXES[name]: size for name, size in trainers.items() if name in AXES}
    parallel = Parallel(trainers.get("ranks", max(dense, sparse)), **axes)
    model = options.model
    if options.small:
        model = "small MoE" if MODELS[model].is_moe else "small dense"
    engines = Engines(generators.get("tp", 1), generators.get("replicas", 1), generators.get("present"))
    name = f"{model} {options.trainers or 'ep=2'} -> {options.generators or 'tp=2'}"
    variants = (LINKS, "peer" + NO_VERIFY, "peer", "nccl" + NO_VERIFY, "broadcast" + NO_VERIFY)
    return Case(name, model, parallel, engines, variants)


def sizes(text: str, axis: str) -> dict[str, int]:
    """`tp=2,ep=2` as numbers; a number alone is that of `axis`."""
    if text.isdigit():
        return {axis: int(text)}
    return {name.strip(): int(value) for name, value in (part.split("=") for part in text.split(","))}


def with_options(case: Case, options: argparse.Namespace) -> Case:
    change: dict[str, Any] = {
        "one_buffer": case.one_buffer or options.one_buffer,
        "shared": case.shared or options.shared,
        "profile": case.profile or options.profile,
    }
    variants = tuple(v.strip() for v in options.variants.split(",")) if options.variants else case.variants
    change["variants"] = tuple(v for v in variants if v not in [s.strip() for s in options.skip.split(",")])
    if options.repeat:
        change["repeat"] = options.repeat
    if options.layers:
        layers = min(options.layers, MODELS[case.model].num_layers)
        change |= {"layers": layers, "name": f"{case.name}, {layers} layers"}
    return replace(case, **change)


# ---- the driver


def placement_of(case: Case) -> int:
    """Cases of one number can be run by the same processes: the number of trainers where ranks share GPUs, or 0."""
    return case.trainers.world_size if case.shared else 0


class Run:
    """Starts the ranks, and starts them anew behind a variant that ended or held them."""

    def __init__(self, options: argparse.Namespace, cases: Sequence[Case]) -> None:
        self.options, self.cases, self.out = options, cases, Path(options.out)
        self.end = time.monotonic() + options.limit
        self.out.mkdir(parents=True, exist_ok=True)
        for name in ("current.json", *(() if options.resume else ("rows.jsonl", "facts.jsonl"))):
            (self.out / name).unlink(missing_ok=True)

    def run(self) -> int:
        """0 where every row came, exact to the bit; 1 otherwise."""
        for placement in dict.fromkeys(placement_of(case) for case in self.cases):
            cases = [case for case in self.cases if placement_of(case) == placement]
            before = None
            while (todo := self.todo(cases)) and todo != before and time.monotonic() < self.end:
                self.attempt([case for case in cases if case.name in todo])
                before = todo
        rows = finished(self.rows())
        left = self.todo()
        self.write(rows, left)
        for line in table(rows):
            log.info("%s", line)
        log.info("all numbers: %s", self.out / "result.json")
        if left:
            log.info("not run: %s", left)
        good = all("error" not in r and (is_probe(r) or r["bit_exact"]) for r in rows)
        return 0 if good and not left else 1

    def rows(self) -> list[dict[str, Any]]:
        path = self.out / "rows.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def facts(self) -> list[dict[str, Any]]:
        """What each start of the ranks said of the machine."""
        path = self.out / "facts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def todo(self, cases: Sequence[Case] | None = None) -> dict[str, list[str]]:
        """Case -> variants without a row, of all cases or of some."""
        done = {(row["case"], row["variant"].split(":")[0]) for row in self.rows()}
        wanted = self.cases if cases is None else cases
        found = {case.name: [v for v in case.variants if (case.name, v) not in done] for case in wanted}
        return {name: variants for name, variants in found.items() if variants}

    def attempt(self, cases: Sequence[Case]) -> None:
        """One start of all ranks. A variant that takes too long, or ends a rank, gets a row that says so."""
        todo = self.todo()
        (self.out / "todo.json").write_text(json.dumps({case.name: todo[case.name] for case in cases}))
        largest = max(cases, key=lambda case: case.num_ranks)
        timeout = timedelta(seconds=60)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)
        ranks = [self.start(rank, largest.device_of(rank), store.port) for rank in range(largest.num_ranks)]
        why = ""
        while not why and any(r.poll() is None for r in ranks):
            time.sleep(0.1)
            why = self.stuck(ranks)
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        codes = [rank.wait() for rank in ranks]
        if time.monotonic() > self.end:
            (self.out / "current.json").unlink(missing_ok=True)  # what was running is not to blame, and not run
        elif why or any(code not in (0, 1) for code in codes) or self.todo(cases):
            self.blame(why or f"ranks ended with {codes}")

    def start(self, rank: int, device: int, port: int) -> subprocess.Popen[bytes]:
        environ = dict(os.environ, PYTHONUNBUFFERED="1", TORCH_NCCL_ASYNC_ERROR_HANDLING="0", **MULTICAST_OFF)
        if self.options.device == "cuda":
            environ["CUDA_VISIBLE_DEVICES"] = only(device)
        else:
            environ.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, __file__, *sys.argv[1:], "--device", self.options.device]
        with open(self.out / f"rank{rank}.log", "ab") as file:
            more = ["--rank", str(rank), "--port", str(port)]
            return subprocess.Popen([*command, *more], env=environ, stdout=file, stderr=subprocess.STDOUT)

    def stuck(self, ranks: Sequence[subprocess.Popen[bytes]]) -> str:
        """Why to end this attempt; nothing while it goes on."""
        if time.monotonic() > self.end:
            return f"the run's {self.options.limit:g} s were over"
        ended = [n for n, rank in enumerate(ranks) if rank.poll() not in (None, 0, 1)]
        if ended:
            return f"rank {ended[0]} ended with {ranks[ended[0]].returncode}"
        current = self.current()
        if current and time.time() - current["started"] > self.options.variant_limit:
            return f"it took more than {self.options.variant_limit:g} s"
        return ""

    def current(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.out / "current.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def blame(self, why: str) -> None:
        """A row for the variant that was running, if it has none; without one, nothing was run that could be blamed."""
        current, tail = self.current(), self.tail()
        log.info("%s during %s\n%s", why, current or "the start", tail)
        todo = self.todo()
        if not current or current["variant"] not in todo.get(current["case"], []):
            return
        (self.out / "current.json").unlink()
        case = next(case for case in self.cases if case.name == current["case"])
        with open(self.out / "rows.jsonl", "a") as file:
            file.write(json.dumps(error_row(case, current["variant"], why)) + "\n")

    def tail(self) -> str:
        logs = sorted(self.out.glob("rank*.log"))
        return "\n".join(f"{path.name}: " + " | ".join(path.read_text().splitlines()[-6:]) for path in logs)

    def write(self, rows: Sequence[Mapping[str, Any]], left: Mapping[str, Sequence[str]]) -> None:
        said = self.facts()
        num = max(case.num_devices for case in self.cases)
        result = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "hardware": said[0]["hardware"] if said else "",
            "num_devices": num,
            "versions": joined([each["versions"] for each in said]),
            "bucket_bytes": self.options.bucket_mb << 20,
            "num_streams": self.options.num_streams,
            "not_run": dict(left),
            "rows": list(rows),
        }
        (self.out / "result.json").write_text(json.dumps(result, indent=1))


def joined(versions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Of all starts: where they differ, every one."""
    names = dict.fromkeys(name for each in versions for name in each)
    return {name: " and ".join(dict.fromkeys(each[name] for each in versions if name in each)) for name in names}


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of text, one a row."""
    return [f"{row['case']:34} {row['variant']:34} {_numbers(row)}" for row in rows]


def _numbers(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"FAILED {str(row['error'])[:300]}"
    if is_probe(row):
        return ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("case", "variant"))
    median, low, high = (row[f"seconds_{which}"] * 1e3 for which in ("median", "min", "max"))
    text = f"{median:8.1f} [{low:.1f}, {high:.1f}] ms {row['gb_per_s']:6.1f} GB/s"
    staging, peak, memory = (row[f"{which}_bytes"] >> 20 for which in ("staging", "peak", "memory"))
    text += f" transfer {row['transfer_median'] * 1e3:.1f} ms, "
    if "share_of_ceiling" in row:  # links were measured in the same run
        text += f"share {row['share_of_ceiling']:.3f}, peak {peak} MiB, memory {memory} MiB, "
    text += f"staging {staging} MiB,{'' if row['verified'] else ' not'} verified, "
    return text + ("bit-exact" if row["bit_exact"] else f"WRONG {row['wrong']}")


if __name__ == "__main__":
    sys.exit(main())
