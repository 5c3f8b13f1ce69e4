"""Time refits between GPUs of one host without engines: plain processes, Qwen3-30B-A3B tensors, every transport.

Each rank is a process that sees one GPU, as Ray's actors do. Trainers hold experts in parallel, generators shards of
every tensor; destinations get random bytes before each refit, and what arrives is compared with values that the
generators make themselves.

    python scripts/bench_gpu.py                                      # 2 trainers -> 2 generators, the whole model
    python scripts/bench_gpu.py --trainers 1 --generators 1 --layers 8 --variants links,peer
    python scripts/bench_gpu.py --device cpu --layers 1 --small --variants peer,gloo

Variants: `links` (what the links give to contiguous and to strided copies: the ceilings), `nccl links` (what grouped
send/recv gives; `all nccl links` for every message size), and any transport of a session, with ` no verify` behind it
for one without digests. `auto` measures the links once, and variants after it have predictions. Columns: seconds of the
slowest rank, median [min, max] over the repeats without the first; `transfer` is the phase in which bulk bytes move.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

# Read when NCCL loads; multicast can put a host's GPUs out of service.
SAFE = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
os.environ.update(SAFE)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from nemo_rl.refit.base import RefitOptions, RefitReport, World  # noqa: E402
from nemo_rl.refit.session import RefitSession  # noqa: E402
from scripts.bench_links import measure_links  # noqa: E402
from scripts.bench_model import BenchLanding, BenchSource, Shape, generator_rows, trainer_rows  # noqa: E402
from scripts.bench_nccl_links import measure_nccl_links  # noqa: E402

log = logging.getLogger("bench_gpu")
NO_VERIFY = " no verify"
LINKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "links": measure_links,
    "nccl links": measure_nccl_links,
    "all nccl links": partial(measure_nccl_links, full=True),
}
SMALL = Shape(layers=1, hidden=64, experts=4, expert_hidden=32, heads=4, kv_heads=2, head_dim=16, vocab=128)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trainers", type=int, default=2)
    p.add_argument("--generators", type=int, default=2)
    p.add_argument("--replicas", type=int, default=1, help="engines that the generators are, each with the whole model")
    p.add_argument("--split", type=int, help="ranks of a side in the model's split, of which the first ones run")
    p.add_argument("--layers", type=int, default=48)
    p.add_argument("--small", action="store_true", help="tiny tensors, for a try")
    p.add_argument("--in-one-buffer", action="store_true", help="a trainer's experts of a layer, not a tensor each")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--variants", default="links,auto no verify,peer no verify,peer,nccl no verify,broadcast no verify")
    p.add_argument("--repeat", type=int, default=6)
    p.add_argument("--bucket-mb", type=int, default=64)
    p.add_argument("--deadline", type=float, default=60, help="seconds of any phase")
    p.add_argument("--limit", type=float, default=240, help="seconds of the whole run; what is left is killed")
    p.add_argument("--out", default="outputs/bench_gpu")
    p.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    p.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return p


def main() -> int:
    options = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d %(name)s %(message)s", stream=sys.stdout)
    if options.rank is not None:
        return Rank(options).run()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    size = options.trainers + options.generators
    ranks = [_start(options, r, store.port, out) for r in range(size)]
    end = time.monotonic() + options.limit
    while time.monotonic() < end and any(r.poll() is None for r in ranks):
        time.sleep(0.2)
    late = [n for n, r in enumerate(ranks) if r.poll() is None]
    for n in late:
        ranks[n].kill()
    codes = [r.wait() for r in ranks]
    rows = (
        [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
        if (out / "rows.jsonl").exists()
        else []
    )
    for row in rows:
        log.info("%s", json.dumps(row))
    log.info("exit codes %s%s", codes, f"; ranks {late} were killed after {options.limit:g} s" if late else "")
    if any(codes):
        for n in range(size):
            log.info("rank %d ended so:\n%s", n, "\n".join((out / f"rank{n}.log").read_text().splitlines()[-12:]))
    return int(any(codes))


def _start(options: argparse.Namespace, rank: int, port: int, out: Path) -> subprocess.Popen[bytes]:
    environ = dict(os.environ, PYTHONUNBUFFERED="1", TORCH_NCCL_ASYNC_ERROR_HANDLING="0", **SAFE)
    if options.device == "cuda":
        environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    command = [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), "--port", str(port)]
    with open(out / f"rank{rank}.log", "wb") as file:
        return subprocess.Popen(command, env=environ, stdout=file, stderr=subprocess.STDOUT)


class Rank:
    """One process of the run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rank = options, options.rank
        self.world = World.of(options.trainers, options.generators)
        self.device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        if options.device == "cuda":
            torch.cuda.set_device(self.device)
        timeout = timedelta(seconds=60)
        self.store = dist.TCPStore("127.0.0.1", options.port, is_master=False, timeout=timeout, wait_for_workers=False)
        self.version = 0

    def run(self) -> int:
        variants = self.options.variants.split(",")
        failed = 0
        source = landing = None
        for number, variant in enumerate(variants):
            self.meet(f"variant {number}")
            log.info("variant %s", variant)
            try:
                if variant in LINKS:
                    for row in LINKS[variant](self.rank, self.world, self.store, self.device, self.meet):
                        self.report(row)
                    continue
                if source is None and landing is None:
                    source, landing = self.load()
                self.session(variant, source, landing)
            except Exception:
                failed = 1
                log.error("variant %s failed:\n%s", variant, traceback.format_exc())
        self.meet("end")
        return failed

    def load(self) -> tuple[BenchSource | None, BenchLanding | None]:
        shape = SMALL if self.options.small else Shape(layers=self.options.layers)
        trainers, table = self.options.trainers, shape.held_by(self.options.trainers, self.split(self.options.trainers))
        if self.rank in self.world.trainers:
            one = self.options.in_one_buffer
            rows = list(trainer_rows(shape, self.rank, self.split(trainers), self.device, one))
            return BenchSource(table, rows), None
        size = self.options.generators // self.options.replicas
        rows = list(generator_rows(shape, (self.rank - trainers) % size, self.split(size), self.device))
        return None, BenchLanding([row for row in rows if row[0] in table])

    def split(self, count: int) -> int:
        """Ranks of a side in the model's split, of which the first `count` run."""
        return int(self.options.split or count)

    def session(self, variant: str, source: BenchSource | None, landing: BenchLanding | None) -> None:
        """A new session, refits of alternating weights, and one row."""
        name, verify = variant.removesuffix(NO_VERIFY), not variant.endswith(NO_VERIFY)
        store = dist.PrefixStore(f"session/{variant}/{self.version}", self.store)
        bucket, deadline = self.options.bucket_mb << 20, self.options.deadline
        options = RefitOptions(name, bucket, 2, deadline, verify, measure_links="auto", cache_dir=self.options.out)
        session = RefitSession(self.rank, self.world, store, options, source, landing, device=self.device)
        reports: list[RefitReport] = []
        wrong = 0
        try:
            started = time.monotonic()
            session.connect()
            plan = session.plan()
            log.info("connected and planned in %.2f s\n%s", time.monotonic() - started, plan.describe())
            for number in range(self.options.repeat + 1):
                self.version += 1
                if number < 2 and source is not None:
                    source.load(number)
                if landing is not None:
                    landing.scramble()
                self.meet(f"{variant} refit {self.version}")
                reports.append(session.refit(self.version))
                log.info("refit %d: %s", number, reports[-1])
                if landing is not None and number in (0, 1, self.options.repeat):
                    wrong += landing.wrong(min(number, 1))
        finally:
            session.close()
        self.report(self.summary(variant, reports, wrong))

    def summary(self, variant: str, reports: Sequence[RefitReport], wrong: int) -> dict[str, Any] | None:
        """Rank 0's row of what all ranks say."""
        phases = {p: [r.phase_s.get(p, 0.0) for r in reports[1:]] for p in reports[0].phase_s}
        mine: dict[str, Any] = {
            "seconds": [r.total_s for r in reports[1:]],
            "phases": phases,
            "wrong": wrong,
            "transport": reports[-1].transport,
            "predictions": dict(reports[-1].predictions),
            "bytes": reports[-1].bulk_bytes + reports[-1].misc_bytes,
            "staging": max(r.staging_bytes for r in reports),
            "verified": all(r.verified for r in reports),
        }
        self.store.set(f"{variant}/{self.rank}", json.dumps(mine))
        if self.rank:
            return None
        said = [json.loads(self.store.get(f"{variant}/{r}")) for r in range(self.world.size)]
        slowest = [max(s["seconds"][i] for s in said) for i in range(len(mine["seconds"]))]
        transfer = [max(s["phases"]["transfer"][i] for s in said) for i in range(len(slowest))]
        each = said[self.world.generators[0]]["bytes"]
        return {
            "case": f"EP{self.split(self.options.trainers)} -> {self.options.replicas} x "
            f"TP{self.split(self.options.generators // self.options.replicas)}, {self.options.layers} layers"
            + (f", {self.world.size} ranks of it" if self.options.split else "")
            + (", experts in one buffer" if self.options.in_one_buffer else ""),
            "variant": variant,
            "seconds_median": statistics.median(slowest),
            "seconds_min": min(slowest),
            "seconds_max": max(slowest),
            "transfer_median": statistics.median(transfer),
            "transfer_min": min(transfer),
            "transport": mine["transport"],
            "predicted_s": reports[-1].predicted_s,
            "predictions": mine["predictions"],
            "bytes_into_each": each,
            "gb_per_s": each / statistics.median(slowest) / 1e9,
            "transfer_gb_per_s": each / statistics.median(transfer) / 1e9,
            "staging_bytes": max(s["staging"] for s in said),
            "verified": all(s["verified"] for s in said),
            "bit_exact": not any(s["wrong"] for s in said),
            "phase_s": {p: max(statistics.median(s["phases"][p]) for s in said) for p in phases},
        }

    def report(self, row: dict[str, Any] | None) -> None:
        if row is not None and self.rank == 0:
            log.info("%s", json.dumps(row))
            with open(Path(self.options.out) / "rows.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def meet(self, name: str) -> None:
        """All ranks come here. Raises TimeoutError after the deadline."""
        self.store.add(f"meet/{name}", 1)
        end = time.monotonic() + 2 * self.options.deadline
        while self.store.add(f"meet/{name}", 0) < self.world.size:
            if time.monotonic() > end:
                raise TimeoutError(f"ranks did not meet at {name}")


if __name__ == "__main__":
    sys.exit(main())
