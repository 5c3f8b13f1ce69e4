"""One process of a benchmark: it stays up over all cases, and holds a case's model while its variants run."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_rl.refit.base import RefitOptions, RefitReport, World
from nemo_rl.refit.layout import TensorTable
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.session import RefitSession
from nemo_rl.trainer import families
from scripts.bench import ceilings
from scripts.bench.cases import LINKS, NO_VERIFY, Case
from scripts.bench.machine import machine
from scripts.bench.model import DTYPE, BenchLanding, BenchSource, Store, generator_rows, trainer_bytes, trainer_rows
from scripts.bench.rows import Said, error_row, probe_row, row_of

log = logging.getLogger("bench")

_SOON_S = 3e-3  # until all ranks have read when to start


class Meeting:
    """The ranks of one variant: they come together, tell each other facts, and stop when one of them failed.

    Args:
        store: of this variant alone.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, deadline_s: float) -> None:
        self.store, self.rank, self.size, self._deadline_s = store, rank, size, deadline_s
        self._count = 0

    def meet(self, name: str = "") -> None:
        """Raises TimeoutError after the deadline, RuntimeError with another rank's failure."""
        self._count += 1
        key, end = f"meet/{self._count}", time.monotonic() + self._deadline_s
        self.store.add(key, 1)
        turns = 0
        while self.store.add(key, 0) < self.size:
            turns += 1
            if turns % 64 == 0 and self.store.check(["failed"]):
                raise RuntimeError(f"another rank failed: {self.store.get('failed').decode()}")
            if time.monotonic() > end:
                raise TimeoutError(f"rank {self.rank} waited {self._deadline_s:g} s for the others at {name}")

    def start(self, name: str) -> None:
        """As `meet`, and ranks leave at one moment of their host's clock, not as the store's answers reach them."""
        self.meet(name)
        key = f"start/{self._count}"
        if self.rank == 0:
            self.store.set(key, repr(time.monotonic() + _SOON_S))
        moment = float(self.store.get(key))
        while time.monotonic() < moment:
            pass

    def say(self, name: str, what: Any) -> list[Any]:
        """What all ranks say, in their order."""
        key = f"say/{self._count}"
        self.store.set(f"{key}/{self.rank}", json.dumps(what))
        self.meet(name)
        return [json.loads(self.store.get(f"{key}/{rank}")) for rank in range(self.size)]

    def fail(self, text: str) -> None:
        if not self.store.check(["failed"]):
            self.store.set("failed", f"rank {self.rank}: {text}")


@dataclass(eq=False)
class Held:
    """What this rank holds of a case's model, and the plans that were made of it."""

    case: Case
    world: World
    source: BenchSource | None
    landing: BenchLanding | None
    table: TensorTable
    plans: dict[tuple[Any, ...], Any]
    weights: int = 0
    version: int = 0

    def planner(self, *args: Any, **kwargs: Any) -> Any:
        """`plan_refit`, once for variants that ask for the same plan."""
        key = kwargs.get("bucket_bytes"), kwargs.get("all_misc")
        if key not in self.plans:
            self.plans[key] = plan_refit(*args, **kwargs)
        return self.plans[key]

    def agree(self, meeting: Meeting) -> None:
        """Go on behind the newest of all ranks: a variant that failed may have left them apart."""
        said = meeting.say("numbers", [self.weights, self.version])
        self.weights, self.version = (max(numbers) for numbers in zip(*said, strict=True))

    def renew(self) -> None:
        """Other weights in the trainer."""
        self.weights += 1
        if self.source is not None:
            self.source.load(self.weights)

    def wrong(self) -> list[str]:
        return [] if self.landing is None else self.landing.wrong(self.weights)


class Rank:
    """Runs the variants of `todo` in order, with all other ranks.

    Args:
        todo: (case, variants that are still to be run).
    """

    def __init__(self, options: argparse.Namespace, todo: Sequence[tuple[Case, Sequence[str]]]) -> None:
        self.options, self.rank, self.todo = options, options.rank, todo
        self.device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        timeout = timedelta(seconds=60)
        self.store = dist.TCPStore("127.0.0.1", options.port, is_master=False, timeout=timeout, wait_for_workers=False)
        self.out = Path(options.out)
        self.groups: dict[int, Any] = {}  # of the ceilings

    def run(self) -> int:
        """0, or 1 where a variant failed."""
        failed = False
        if self.rank == 0:
            with open(self.out / "facts.jsonl", "a") as file:
                file.write(json.dumps(machine(self.device)) + "\n")
        for case, variants in self.todo:
            if self.rank < case.num_ranks:
                failed |= not self._case(case, variants)
        if self.device.type == "cuda":
            for group in self.groups.values():
                group.abort()
        return int(failed)

    def _case(self, case: Case, variants: Sequence[str]) -> bool:
        world = World.of(case.trainers.world_size, case.engines.num_ranks)
        held, good = None, True
        for variant in variants:
            meeting = self._meeting(f"{case.name}/{variant}", world.size)
            with self._reported(case, variant, meeting) as outcome:
                meeting.meet("start")
                if variant == LINKS:
                    self._links(case, world, meeting)
                elif variant in PROBES:
                    self._probe(case, world, variant, meeting)
                else:
                    held = held or self._load(case, world)
                    self._variant(held, variant, meeting)
            good &= outcome.good
        held = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return good

    @contextmanager
    def _reported(self, case: Case, variant: str, meeting: Meeting) -> Iterator[_Outcome]:
        """What fails inside becomes a row; the next variant starts afresh."""
        log.info("case %s, variant %s", case.name, variant)
        if self.rank == 0:
            said = {"case": case.name, "variant": variant, "started": time.time()}
            (self.out / "current.json").write_text(json.dumps(said))
        outcome, started = _Outcome(), time.monotonic()
        try:
            yield outcome
        except Exception as error:
            outcome.good = False
            log.error("%s, %s failed:\n%s", case.name, variant, traceback.format_exc())
            meeting.fail(f"{type(error).__name__}: {error}")
            self.write(error_row(case, variant, meeting.store.get("failed").decode()))
        log.info("case %s, variant %s took %.1f s", case.name, variant, time.monotonic() - started)

    def _meeting(self, name: str, size: int) -> Meeting:
        return Meeting(dist.PrefixStore(name, self.store), self.rank, size, 2 * self.options.deadline)

    def _links(self, case: Case, world: World, meeting: Meeting) -> None:
        num_bytes = ceilings.BYTES if self.device.type == "cuda" else 1 << 20
        store = dist.PrefixStore("links", meeting.store)
        say, messages = meeting.say, not case.shared
        line = ceilings.Line(self.rank, world, self.device, store, meeting.meet, say, num_bytes, messages, self.groups)
        for row in ceilings.measure(line):
            self.write(probe_row(case, LINKS, row))

    def _probe(self, case: Case, world: World, variant: str, meeting: Meeting) -> None:
        module, function, more = PROBES[variant]
        measure = getattr(importlib.import_module(module), function)
        store = dist.PrefixStore("probe", meeting.store)
        for row in measure(self.rank, world, store, self.device, meeting.meet, **more):
            self.write(probe_row(case, variant, row))

    def _load(self, case: Case, world: World) -> Held:
        """Allocate this rank's part of the model and fill it."""
        started, shape = time.monotonic(), case.shape
        table = families.table(shape, DTYPE)
        source = landing = None
        if self.rank in world.trainers:
            room = trainer_bytes(shape, case.trainers, self.rank) if case.one_buffer else 0
            source = BenchSource(table, trainer_rows(shape, case.trainers, self.rank, Store(self.device, room)))
        else:
            store = Store(self.device)
            rows = generator_rows(shape, case.engines, self.rank - len(world.trainers), store)
            landing = BenchLanding(table, rows, store)
        held = Held(case, world, source, landing, table, {})
        held.renew()
        wrong = held.wrong()
        log.info("%s: held after %.2f s; %d tensors not there yet", case.name, time.monotonic() - started, len(wrong))
        return held

    # ---- one variant

    def _variant(self, held: Held, variant: str, meeting: Meeting) -> None:
        """The row comes before what the variant opened is closed, which may hang too."""
        held.agree(meeting)
        run = importlib.import_module(OTHERS[variant]).run if variant in OTHERS else Rank._session
        with ExitStack() as opened:
            said: Said = run(self, held, variant, meeting, opened)
            rows = [Said(**each) for each in meeting.say("summary", said.as_dict())]
            if self.rank == 0:
                self.write(row_of(held.case, variant, held.world, rows))

    def _session(self, held: Held, variant: str, meeting: Meeting, opened: ExitStack) -> Said:
        """A session of its own, its refits, and what this rank saw of them."""
        name, verify = variant.removesuffix(NO_VERIFY), not variant.endswith(NO_VERIFY)
        asked = self.options
        options = RefitOptions(
            name,
            asked.bucket_mb << 20,
            asked.num_streams,
            asked.deadline,
            verify,
            measure_links="auto",  # once in this world; the other variants read what was measured
            cache_dir=str(self.out.absolute()),
        )
        store = dist.PrefixStore("session", meeting.store)
        before = self.free_memory(give_back=True)
        session = RefitSession(
            self.rank,
            held.world,
            store,
            options,
            held.source,
            held.landing,
            device=self.device,
            planner=held.planner,
        )
        opened.callback(session.close)
        started = time.monotonic()
        session.connect()
        session.plan()
        ready_s = time.monotonic() - started
        log.info("connected and planned in %.2f s", ready_s)
        reports, wrong, peak = self.refits(held, variant, meeting, session.refit)
        memory = before - self.free_memory()
        profile = self._profiled(held, meeting, session) if held.case.profile else {}
        return Said.of(reports, wrong, ready_s, peak, memory, profile)

    def refits(
        self, held: Held, variant: str, meeting: Meeting, refit: Callable[[int], RefitReport]
    ) -> tuple[list[RefitReport], list[str], int]:
        """Reports, names of tensors that were wrong, and how far torch's allocations rose in a refit.

        Weights change before the first and the second refit, destinations hold random bytes before each, and what the
        first, the second and the last brought is checked.
        """
        reports: list[RefitReport] = []
        wrong: list[str] = []
        peak, last = 0, held.case.repeats(variant)
        for number in range(last + 1):
            held.version += 1
            if number < 2:
                held.renew()
            if held.landing is not None:
                held.landing.scramble()
            start = self._reset_peak()
            meeting.start(f"refit {number}")
            reports.append(refit(held.version))
            peak = max(peak, self._peak() - start)
            log.info("refit %d: %s", number, reports[-1])
            if number in (0, 1, last):
                wrong += held.wrong()
        return reports, wrong, peak

    def _profiled(self, held: Held, meeting: Meeting, session: RefitSession) -> dict[str, float]:
        """Kernels and copies of one more refit, and their seconds; nothing where no profiler is."""
        if self.device.type != "cuda":
            return {}
        from torch.profiler import ProfilerActivity, profile

        held.version += 1
        meeting.meet("profile")
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            session.refit(held.version)
            torch.cuda.synchronize()
        found = {"kernels": 0.0, "kernel_s": 0.0, "copies": 0.0, "copy_s": 0.0}
        for event in recorded.profiler.kineto_results.events():  # `recorded.events()` takes long over 400,000
            if event.device_type() == torch.autograd.DeviceType.CUDA:
                kind = "cop" if event.name().startswith("Memcpy") else "kernel"
                found["copies" if kind == "cop" else "kernels"] += 1
                found["copy_s" if kind == "cop" else "kernel_s"] += event.duration_ns() / 1e9
        return found

    def free_memory(self, give_back: bool = False) -> int:
        """Of the device; 0 on a CPU.

        Args:
            give_back: what torch keeps for later is freed first.
        """
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        if give_back:
            torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def _reset_peak(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        return int(torch.cuda.memory_allocated(self.device))

    def _peak(self) -> int:
        return 0 if self.device.type != "cuda" else int(torch.cuda.max_memory_allocated(self.device))

    def write(self, row: dict[str, Any] | None) -> None:
        if row is not None and self.rank == 0:
            log.info("%s", json.dumps(row))
            with open(self.out / "rows.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")


@dataclass(slots=True)
class _Outcome:
    good: bool = True


PROBES: dict[str, tuple[str, str, dict[str, bool]]] = {
    "ways": ("scripts.bench_links", "measure_links", {}),
    "nccl links": ("scripts.bench_nccl_links", "measure_nccl_links", {}),
    "all nccl links": ("scripts.bench_nccl_links", "measure_nccl_links", {"full": True}),
}
"""What links give to other forms of copies and messages: name -> module, function and its options."""

OTHERS = {"vllm": "scripts.bench.vllm_transfer", "checkpoint-engine": "scripts.bench.checkpoint_engine"}
"""Ways of others: name -> module whose `run` runs `Rank.refits` with a refit of its own."""
