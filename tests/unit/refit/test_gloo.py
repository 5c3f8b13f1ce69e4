"""Real processes, over gloo and over mapped memory: equality in three refits; a killed trainer is named in time."""

from __future__ import annotations

import json
import os
import pickle
import signal
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.cost import Links
from nemo_rl.refit.errors import RefitError
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession
from nemo_rl.refit.transports import parcels, registry

from .forked import Forked
from .simulated import PlainLanding, PlainSource, make_table, random_bytes, same_bytes

WORLD = World.of(2, 2)
TABLE = make_table(
    {f"layers.{i}.{n}": ((24, 16), torch.bfloat16) for i in range(4) for n in ("up", "down")}
    | {"embed": ((50, 16), torch.float32), "norm": ((16,), torch.float32)}
)


def model(version):
    generator = torch.Generator().manual_seed(version)
    return {f: random_bytes(m.shape, m.dtype, generator) for f, m in TABLE.items()}


def shard(meta, rank, axis):
    if len(meta.shape) == 1:
        return Region.whole(meta.shape)
    half = meta.shape[axis] // 2
    offsets, sizes = [0, 0], list(meta.shape)
    offsets[axis], sizes[axis] = rank * half, half
    return Region(tuple(offsets), tuple(sizes))


def alive(pid):
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def kills_trainer_1(session, inner):
    """Its memory is mapped and all ranks have begun; it dies before a byte is read."""

    def run(*args):
        pid, _ = session._agreed.mover._windows.ends[1, "source"]
        os.kill(pid, signal.SIGKILL)
        while alive(pid):
            time.sleep(0.01)
        return inner(*args)

    return run


def dies_at(target, name, count):
    """Before the `count`-th call of a method."""
    inner, calls = getattr(target, name), iter(range(1, 1 << 30))

    def method(*args):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args)

    setattr(target, name, method)


def rank_main(rank, port, transport, versions, die, known):
    if transport == "nccl":  # its schedule of parcels, over gloo
        registry.TRANSPORTS["nccl"] = replace(registry.TRANSPORTS["nccl"], unsupported=lambda *_: None)
        parcels.PACKED_BYTES, parcels.LEAST_IN_PLACE = 1024, 128
    source = landing = None
    if rank in WORLD.trainers:
        source = PlainSource.of(model(0), TABLE, [(f, shard(m, rank, 0)) for f, m in TABLE.items()])
    else:
        rows = [(f, shard(m, rank - 2, len(m.shape) - 1)) for f, m in TABLE.items()]
        landing = PlainLanding(rows, [i // 2 if i % 3 else -1 for i in range(len(rows))])
    options = RefitOptions(**{"transport": transport, "bucket_bytes": 1024, "deadline_s": 20} | known)
    session = RefitSession(rank, WORLD, ("127.0.0.1", port), options, source, landing)
    try:
        session.connect()
        session.plan()
        for version in versions:
            full = model(version)
            if source:
                source.load(full)
            if landing:
                landing.scramble()
            if die == "sending" and rank == 1 and version == versions[-1]:
                dies_at(
                    *(
                        (session._agreed.mover._lanes, "exchange", 2)
                        if transport == "nccl"
                        else (session, "_src_view", 1)
                    )
                )
            if die == "being read" and rank == 2 and version == versions[-1]:
                session._agreed.mover.run = kills_trainer_1(session, session._agreed.mover.run)
            report = session.refit(version)
            if landing:
                held = landing.whole if transport == "broadcast" else dict(zip(TABLE, landing.storage, strict=True))
                for f, region in landing.rows:
                    part = full[f][region.slices_in(Region.whole(TABLE[f].shape))]
                    got = (
                        held[f][region.slices_in(Region.whole(TABLE[f].shape))] if transport == "broadcast" else held[f]
                    )
                    assert same_bytes(got, part), f
        said = (report.verified,) if not known else (report.transport, dict(report.predictions), report.total_s)
        return [*said, landing.version if landing else None]
    except RefitError as error:
        return [str(error), (landing.version, landing.rejected) if landing else None]
    finally:
        session.close()


def run(transport, versions, die="", known=None):
    """Rank -> what it says in the end; a rank that was killed says nothing."""
    with tempfile.TemporaryDirectory() as folder:

        def work(rank, port):
            try:
                said = rank_main(rank, port, transport, versions, die, known or {})
                (Path(folder) / str(rank)).write_bytes(pickle.dumps(said))
            except Exception:
                traceback.print_exc()
                raise

        Forked(range(WORLD.size), work).codes(120)
        return {int(path.name): pickle.loads(path.read_bytes()) for path in Path(folder).iterdir()}


@pytest.mark.parametrize("transport", ["gloo", "nccl", "peer", "golden", "broadcast"])
def test_three_refits_between_processes(transport):
    out = run(transport, (0, 1, 2))
    assert out == {0: [True, None], 1: [True, None], 2: [True, 2], 3: [True, 2]}


@pytest.mark.parametrize(("transport", "die"), [("gloo", "sending"), ("nccl", "sending"), ("peer", "being read")])
def test_a_killed_trainer_is_named_and_nothing_is_committed(transport, die):
    started = time.monotonic()
    out = run(transport, (0, 1), die)
    assert set(out) == {0, 2, 3} and time.monotonic() - started < 90
    assert any("trainer 1 (rank 1)" in out[r][0] and "transfer" in out[r][0] for r in (2, 3)), out
    for r in (2, 3):
        version, rejected = out[r][1]
        assert version == 0 and rejected, "version 1 is not committed and the generator refuses to serve"


def test_links_are_measured_and_all_ranks_take_the_fastest_transport(tmp_path):
    """What this machine's links give decides, and is kept for the next session."""
    out = run("auto", (0, 1), known={"measure_links": "auto", "cache_dir": str(tmp_path), "bucket_bytes": 1 << 16})
    (said,) = {(transport, tuple(sorted(told.items()))) for transport, told, *_ in out.values()}
    assert [out[r][3] for r in range(4)] == [None, None, 1, 1]
    told = dict(said[1])
    assert set(told) == {"peer", "gloo"} and said[0] == min(told, key=told.get)
    assert 0.02 < max(took for _, _, took, _ in out.values()) / told[said[0]] < 50, "a slow machine may be busy"
    (path,) = tmp_path.iterdir()
    links = Links.from_json(json.loads(path.read_text())["links"])
    for rates in links.rates.values():
        assert 1e5 < rates.short_bytes_per_s <= rates.run_bytes_per_s < 1e12 and 0 < rates.start_s < 10
    assert links.rates["gloo"].message_s >= 0 == links.rates["peer"].message_s
