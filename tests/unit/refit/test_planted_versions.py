"""Sources that change, ranks that lag, hooks that do not run, and a checker that fails: no version is committed."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.digest import Ledger
from nemo_rl.refit.errors import AgreementError, RefitError, VerificationError
from nemo_rl.refit.transports.inproc import InprocChannel
from nemo_rl.refit.verify import Verifier

from .planted import FAST, Sends, caught, model, rows_of, two_by_two
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any, same_bytes


def test_a_tied_weight_updated_on_one_side():
    """First and last stage of a pipeline hold the embedding; only one of them took the step."""
    table = make_table({"embed": ((8, 4), torch.float32), "norm": ((4,), torch.float32)})
    full = model(table)
    sources = [PlainSource.of(full, table, rows_of(table)) for _ in range(2)]
    landing = PlainLanding(rows_of(table))
    sim = SimulatedWorld(sources, [landing], FAST)
    raise_any(sim.start())
    raise_any(sim.refit(1))
    sources[1].held[0].view.view(torch.int32)[3, 1] ^= 1
    texts = ("embed [0:8, 0:4]", "trainer 0 (rank 0) holds", "its replica trainer 1 (rank 1)")
    caught(sim.refit(2), [landing], VerificationError, *texts, before=1)


def test_a_tied_weight_held_twice_by_one_rank():
    table = make_table({"embed": ((8, 4), torch.float32)})
    full = model(table)
    source = PlainSource.of(full, table, rows_of(table) * 2)
    landing = PlainLanding(rows_of(table))
    sim = SimulatedWorld([source], [landing], FAST)
    raise_any(sim.start())
    raise_any(sim.refit(1))
    source.held[1].view.view(torch.int32)[3, 1] ^= 1
    caught(sim.refit(2), [landing], VerificationError, "embed [0:8, 0:4]", "its replica trainer 0", before=1)


@pytest.mark.parametrize(("sent", "changed"), [(1, "w0"), (1, "w3"), (4, "w2")])
def test_a_source_that_changes_during_the_refit(sent, changed):
    """An optimizer step that races the refit: over what was sent, what is still to be sent, behind the last message."""
    count = []

    class Racing(InprocChannel):
        def send(self, buffer, dst, tag):
            pending = super().send(buffer, dst, tag)
            count.append(tag)
            if len(count) == sent * 2:  # both generators take all that trainer 0 has
                next(h for h in sources[0].held if h.fqn == changed).view.view(torch.int32).add_(1)
            return pending

    options = RefitOptions(deadline_s=20, bucket_bytes=1024)
    table = make_table({f"w{i}": ((16, 32), torch.float32) for i in range(4)})
    wrap = lambda rank, t: Racing(t._hub, rank) if rank == 0 else t  # noqa: E731
    sim, sources, landings, _ = two_by_two(wrap, options, table=table)
    raise_any(sim.start())
    results = sim.refit(1)
    assert len(count) == 8
    texts = (f"{changed} [0:8, 0:32]", "trainer 0 (rank 0) held digest", "when the refit began")
    caught(results, landings, VerificationError, *texts)


def test_a_trainer_that_missed_a_step():
    """A pipeline stage that lags: no other rank holds what it holds, only its count tells."""
    sim, _, landings, _ = two_by_two()
    raise_any(sim.start())
    raise_any(sim.all(lambda s: s.refit(1, {0: 4, 1: 4}.get(s.rank))))
    results = sim.all(lambda s: s.refit(2, {0: 5, 1: 4}.get(s.rank)))
    assert all("trainer 1 (rank 1) has optimizer steps 4, trainer 0 (rank 0) has 5" in str(r) for r in results.values())
    assert all(isinstance(r, AgreementError) for r in results.values())
    assert all(landing.version == 1 and landing.serve() for landing in landings), "untouched, they serve on"


# ---- versions, hooks and the checker


def test_a_version_after_a_newer_one():
    sim, _, landings, full = two_by_two()
    raise_any(sim.start())
    raise_any(sim.refit(5))
    results = sim.refit(4)
    assert all(
        isinstance(r, AgreementError) and "version 4 was asked for after version 5" in str(r) for r in results.values()
    )
    assert all(
        landing.version == 5 and same_bytes(landing.serve()[0], full["w0"][: len(landing.serve()[0])])
        for landing in landings
    )


def test_ranks_that_ask_for_different_versions():
    sim, _, landings, _ = two_by_two()
    raise_any(sim.start())
    results = sim.all(lambda s: s.refit(2 if s.rank == 3 else 1))
    assert all(
        isinstance(r, AgreementError) and "generator 1 (rank 3) has version 2" in str(r) for r in results.values()
    )
    assert all(landing.version == -1 for landing in landings)


def test_nothing_is_sent_before_every_engine_is_closed():
    closed, early = [], []

    class Slow(PlainLanding):
        def begin(self, version):
            time.sleep(0.2)
            super().begin(version)
            closed.append(version)

    def note(buffer, dst, tag):
        early.append(len(closed) < 2)
        return buffer

    sim, _, _, _ = two_by_two(lambda rank, t: Sends(t, note), landing=Slow)
    raise_any(sim.start())
    raise_any(sim.refit(1))
    assert early and not any(early)


def test_a_finalize_hook_that_did_not_run():
    """The engine counts what it processed; a unit whose processing was left out is named."""

    class Repacking(PlainLanding):
        def declare(self, table):
            self.processed = set()
            return super().declare(table)

        def close(self, unit):
            super().close(unit)
            if unit != 1:  # the fault
                self.processed.add(unit)

        def finish(self):
            super().finish()
            missing = set(self.unit) - self.processed
            if missing:
                raise RuntimeError(f"processing of units {sorted(missing)} did not run")

    table = make_table({f"w{i}": ((8, 8), torch.float32) for i in range(3)})
    landing = Repacking(rows_of(table), [0, 1, 2])
    sim = SimulatedWorld([PlainSource.of(model(table), table, rows_of(table))], [landing], FAST)
    raise_any(sim.start())
    caught(sim.refit(1), [landing], RefitError, "processing of units [1] did not run")


def test_a_prefix_cache_that_is_kept():
    """Caches are dropped in `commit`; an engine that cannot drop them does not serve the new weights beside them."""

    class Cached(PlainLanding):
        def commit(self, version):
            raise RuntimeError("the KV cache still holds blocks of the version before")

    sim, _, landings, _ = two_by_two(landing=Cached)
    raise_any(sim.start())
    caught(sim.refit(1), landings, RefitError, "the KV cache still holds blocks")


@pytest.mark.parametrize("side", ["verify", "pipeline", "misc"])
def test_a_checker_that_fails(side, monkeypatch):
    """Digests that cannot be taken: of the source, of what lands in place, of whole tensors."""

    class Broken(Ledger):
        def take(self, number, view, region):
            raise RuntimeError("planted")

    sim, _, landings, _ = two_by_two(misc=("w0",))
    raise_any(sim.start())
    monkeypatch.setattr(f"nemo_rl.refit.{side}.Ledger", Broken)
    caught(sim.refit(1), landings, RefitError, "planted")


@pytest.mark.parametrize("side", ["pipeline", "misc"])
def test_a_checker_that_skips(side, monkeypatch):
    """Also where the digest is 0, as that of zeros."""

    class Lazy(Ledger):
        def take(self, number, view, region):
            return None

    sim, sources, landings, _ = two_by_two(misc=("w0",))
    raise_any(sim.start())
    for holding in (h for source in sources for h in source.held):
        holding.view.zero_()
    monkeypatch.setattr(f"nemo_rl.refit.{side}.Ledger", Lazy)
    texts = {"pipeline": ("w1 [0:4, 0:8]", "has none"), "misc": ("w0 [0:4, 0:8]", "has none")}[side]
    caught(sim.refit(1), landings, VerificationError, *texts)


def test_replicas_that_are_not_told_of(monkeypatch):
    """A trainer that sends no digests of what it shares with another."""
    table = make_table({"embed": ((8, 4), torch.float32)})
    landing = PlainLanding(rows_of(table))
    sim = SimulatedWorld([PlainSource.of(model(table), table, rows_of(table)) for _ in range(2)], [landing], FAST)
    raise_any(sim.start())
    verifier = sim.sessions[0]._agreed.verifier
    verifier._told = replace(verifier._told, number=verifier._told.number[:0], peer=verifier._told.peer[:0])
    del verifier._addressed
    statements = verifier.statements
    verifier.statements = lambda held: {1: bytes(24), **statements(held)}
    caught(sim.refit(1), [landing], VerificationError, "trainer 0 (rank 0) sent 0 digests for 1 shared boxes")


@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, -8), None])
def test_digests_that_arrive_damaged(cut, monkeypatch):
    """A trainer's statement that is truncated, or that has fewer digests than it sent copies."""
    sim, _, landings, _ = two_by_two()
    raise_any(sim.start())
    statements = Verifier.statements

    def damaged(verifier, held):
        said = statements(verifier, held)
        return {peer: data[cut] if cut is not None else bytes(24) for peer, data in said.items()}

    monkeypatch.setattr(Verifier, "statements", damaged)
    caught(sim.refit(1), landings, VerificationError, "decode" if cut is not None else "sent 0 digests for 4 copies")
