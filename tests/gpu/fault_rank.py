"""One rank of a refit that meets a planted fault: a process on its own GPU, told what to do by its arguments.

Plays three refits of one session, of which the last one meets the fault (or only that one), and then two of a second
session; writes "ok" as its last line where everything went as it must.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nemo_rl.refit.base import Declaration, RefitOptions, World
from nemo_rl.refit.errors import RefitError
from nemo_rl.refit.layout import Holding, TensorTable
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession
from nemo_rl.refit.transports import parcels
from tests.unit.refit.simulated import PlainLanding, PlainSource, make_table, random_bytes, same_bytes

DEADLINE_S = 6.0
HANGS_S = 50.0  # then a rank says in its log where each of its threads is
COUNT, SHAPE = 24, (1024, 512)
TABLE = make_table({f"layers.{i}.w": (SHAPE, torch.float32) for i in range(COUNT)} | {"norm": ((7,), torch.bfloat16)})
ROWS = [(name, Region.whole(meta.shape)) for name, meta in TABLE.items()]
VICTIM = "layers.3.w"


def model(version: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {name: random_bytes(meta.shape, meta.dtype, generator).to(device) for name, meta in TABLE.items()}


class Landing(PlainLanding):
    """Lands on `device`."""

    device = torch.device("cpu")

    def declare(self, table: TensorTable) -> Declaration:
        declaration = super().declare(table)
        self.move()
        return declaration

    def move(self) -> None:
        """Give all parameters other storage."""
        self.storage = [tensor.to(self.device, copy=True) for tensor in self.storage]

    def wrong(self, full: dict[str, torch.Tensor]) -> list[str]:
        return [f for (f, _), t in zip(self.rows, self.storage, strict=True) if not same_bytes(t, full[f])]


class Rank:
    """What one process is and does."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rank = options, options.rank
        self.device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        self.world = World.of(1, options.generators)
        timeout = timedelta(seconds=60)
        self.store = dist.TCPStore("127.0.0.1", options.port, is_master=False, timeout=timeout, wait_for_workers=False)
        self.source = PlainSource.of(model(0, self.device), TABLE, ROWS) if self.rank == 0 else None
        self.landing = Landing(ROWS, seed=self.rank) if self.rank else None
        if self.landing is not None:
            self.landing.device = self.device

    def run(self) -> None:
        if not self.options.replaces:
            session = self.session("first")
            if not self.options.at_once:
                self.refit(session, 1)
                self.move_storage()
                self.refit(session, 2)
            self.fault(session)
            session.close()
            self.prove_device()
        self.meet()
        session = self.session("second")
        self.refit(session, 4)
        self.refit(session, 5)
        session.close()

    def meet(self) -> None:
        """All ranks come here: those that survived, and who comes for the killed one."""
        self.store.add("meet", 1)
        end = time.monotonic() + 40
        while self.store.add("meet", 0) < self.world.size:
            assert time.monotonic() < end, "ranks did not meet"
            time.sleep(0.01)

    def session(self, name: str) -> RefitSession:
        options = RefitOptions(self.options.transport, 1 << 20, deadline_s=DEADLINE_S)
        store = dist.PrefixStore(name, self.store)
        session = RefitSession(self.rank, self.world, store, options, self.source, self.landing, device=self.device)
        session.connect()
        session.plan()
        return session

    def refit(self, session: RefitSession, version: int, prepared: bool = False) -> None:
        full = model(version, self.device)
        if self.source is not None:
            self.source.load(full)
        if self.landing is not None:
            self.landing.scramble()
            assert len(self.landing.wrong(full)) == len(TABLE), "destinations are random before"
        if prepared:
            session.prepare(version)
        session.refit(version)
        assert self.landing is None or not self.landing.wrong(full), f"version {version} differs"

    def move_storage(self) -> None:
        if self.source is not None:
            self.source.held = [Holding(h.fqn, h.region, h.view.clone()) for h in self.source.held]
        if self.landing is not None:
            self.landing.move()

    def fault(self, session: RefitSession) -> None:
        """The third refit fails on every rank, by name, and no generator serves it."""
        if self.rank == self.options.victim:
            self.plant(session, session._agreed.mover)
        started = time.monotonic()
        try:
            # Who prepared has looked at its source: what changes there from now on is not what trainers held.
            self.refit(session, 3, prepared=self.options.fault == "damaged")
        except RefitError as error:
            took, text = time.monotonic() - started, str(error)
            print(f"after {took:.2f} s: {type(error).__name__}: {text}", flush=True)
            named = f"(rank {self.options.victim})" if self.options.fault == "killed" else f"1 pieces differ: {VICTIM}"
            assert named in text, text
            assert took < DEADLINE_S + 3, f"{took} s for a deadline of {DEADLINE_S} s"
            before = -1 if self.options.at_once else 2
            assert self.landing is None or (self.landing.version == before and self.landing.rejected)
            return
        raise AssertionError("a refit with a planted fault went through")

    def plant(self, session: RefitSession, mover: Any) -> None:
        """Act in the middle of what this rank moves, or of what it waits for; damage what landed as soon as it did."""
        act: Callable[[], object] = die if self.options.fault == "killed" else self.damage
        if self.options.transport == "nccl":
            act_at(mover._lanes, "exchange", 1 if self.options.at_once else 5, act)
        elif self.landing is not None and self.options.fault == "damaged":
            self.damage_on_arrival(mover)
        elif mover._mine and self.options.fault == "damaged":
            self.damage_between(session, mover)
        elif mover._mine:
            act_at(mover._memory, "mark", len(mover._mine) // 2, act)  # before what this rank moves at that place
        else:
            act_at(mover._carrier, "_tell", 1, act)

    def number_of(self, batches: Any, mover: Any) -> int:
        """Which of `batches` moves the victim's bytes."""
        rows = mover._plan.bulk.dst_row
        return next(n for n, b in enumerate(batches) if (rows[b.indices] == list(TABLE).index(VICTIM)).any())

    def damage_between(self, session: RefitSession, mover: Any) -> None:
        """A source, behind its first look and before its bytes move."""
        starts, number = mover._starts[1], self.number_of(mover._mine, mover)
        inner = starts[number]

        def start() -> None:
            session._link.control.idle()
            self.damage()
            inner()

        starts[number] = start

    def damage_on_arrival(self, mover: Any) -> None:
        carrier = mover._carrier
        mine = [b for b in carrier._schedule.batches if b.taker == self.rank]
        step = mine[self.number_of(mine, mover)].step
        inner = carrier._take

        def take(landed: Callable[[int], None]) -> None:
            def damaged(number: int) -> None:
                if number == step:
                    self.damage()
                landed(number)

            inner(damaged)

        carrier._take = take

    def damage(self) -> None:
        """One bit of one parameter, while bytes travel; what was started before has landed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        held = self.source.held if self.source is not None else []
        views = {h.fqn: h.view for h in held}
        if self.landing is not None:
            views = {f: t for (f, _), t in zip(ROWS, self.landing.storage, strict=True)}
        views[VICTIM].view(-1).view(torch.uint8)[1234].bitwise_xor_(8)

    def prove_device(self) -> None:
        """The device still computes and copies."""
        values = torch.arange(1 << 16, device=self.device)
        assert int((values * 2).sum()) == (1 << 16) * ((1 << 16) - 1)
        assert torch.equal(values.cpu().to(self.device), values)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def act_at(target: Any, name: str, count: int, act: Callable[[], object]) -> None:
    """Call `act` before the `count`-th call of a method."""
    inner, calls = getattr(target, name), iter(range(1, 1 << 30))

    def method(*args: Any) -> Any:
        if next(calls) == count:
            act()
        return inner(*args)

    setattr(target, name, method)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("rank", int), ("port", int), ("generators", int), ("victim", int)):
        p.add_argument(f"--{name}", type=kind, required=True)
    p.add_argument("--transport", default="peer")
    p.add_argument("--device", default="cuda")
    p.add_argument("--fault", default="killed", choices=("killed", "damaged"))
    p.add_argument("--at-once", action="store_true", help="the session's first refit meets the fault")
    p.add_argument("--replaces", action="store_true", help="come for a rank that was killed")
    options = p.parse_args()
    faulthandler.dump_traceback_later(HANGS_S)
    if options.transport == "nccl":
        for name in ("PARCEL_BYTES", "PACKED_BYTES", "LEAST_BYTES"):
            setattr(parcels, name, 4 << 20)
    if options.transport == "peer":
        from nemo_rl.refit.transports.mapped import memory_of

        memory = type(memory_of(torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")))
        memory.step_bytes = 4 << 20
    Rank(options).run()
    print("ok", flush=True)


if __name__ == "__main__":
    sys.exit(main())
