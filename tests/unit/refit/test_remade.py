"""Sessions that are made again and again in one process, every other one after a failure: nothing is left of them."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.errors import RefitError
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession
from nemo_rl.refit.transports.board import Board

from .forked import Forked
from .simulated import PlainLanding, PlainSource, same_bytes
from .test_gloo import TABLE, WORLD, model, shard

SESSIONS, SETTLED = 6, 2  # sessions of a process, and those after which nothing may come to stay


def left() -> dict[str, int]:
    """What this process has open; the allocator may map or unmap a little at any time."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared maps": sum(" rw-s " in line for line in maps),
        "threads": len(os.listdir("/proc/self/task")),
    }


def ends(rank: int, misc: dict[str, str] | None = None) -> tuple[PlainSource | None, PlainLanding | None]:
    if rank in WORLD.trainers:
        return PlainSource.of(model(0), TABLE, [(f, shard(m, rank, 0)) for f, m in TABLE.items()]), None
    rows = [(f, shard(m, rank - 2, len(m.shape) - 1)) for f, m in TABLE.items()]
    return None, PlainLanding(rows, [i // 2 if i % 3 else -1 for i in range(len(rows))], misc or {})


def run_session(rank: int, store: dist.Store, transport: str, fails: bool) -> bool:
    """Two refits; in the second one trainer 1 fails where it is told to. Whether this rank saw a failure."""
    source, landing = ends(rank)
    options = RefitOptions(transport=transport, bucket_bytes=1024, deadline_s=20, measure_links="never")
    session = RefitSession(rank, WORLD, store, options, source, landing)
    try:
        session.connect()
        session.plan()
        session.refit(0)
        if fails and rank == 1:
            session._src_view = None  # where its bytes are read
        session.refit(1)
    except RefitError:
        return True
    finally:
        session.close()
    return False


@pytest.mark.parametrize("transport", ["peer", "gloo"])
def test_nothing_is_left_of_sessions(transport, tmp_path):
    seen = counted(transport, tmp_path)
    assert all(failed == [bool(n % 2) for n in range(SESSIONS)] for failed, _ in seen.values()), seen
    assert all(counts == [counts[0]] * len(counts) for _, counts in seen.values()), seen


def test_what_stays_is_counted(monkeypatch, tmp_path):
    """The counts see a board that is not given up."""
    kept = []
    monkeypatch.setattr(Board, "close", lambda board: kept.append(board))
    for _, counts in counted("peer", tmp_path).values():
        grown = {name: counts[-1][name] - counts[0][name] for name in counts[0]}
        assert grown["descriptors"] >= len(counts) - 1 <= grown["shared maps"]


def check_landed(landing: PlainLanding) -> None:
    full = model(0)
    for (name, region), held in zip(landing.rows, landing.storage, strict=True):
        got, want = landing.whole.get(name, held), full[name]
        assert same_bytes(got, want if name in landing.whole else want[region.slices_in(Region.whole(want.shape))])


def store_of(port: int) -> dist.Store:
    gc.freeze()  # what the parent has is not looked at
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)


@pytest.mark.parametrize("transport", ["peer", "gloo"])
def test_nothing_is_left_of_plans_that_a_session_made_before(transport, tmp_path):
    """Of one session that plans again and again, between two refits and between the two halves of one."""

    def work(rank: int, port: int) -> None:
        source, landing = ends(rank, misc=dict.fromkeys(list(TABLE)[:2], "computed"))
        options = RefitOptions(transport=transport, bucket_bytes=1024, deadline_s=20, measure_links="never")
        session, counts = RefitSession(rank, WORLD, store_of(port), options, source, landing), []
        session.connect()
        for n in range(SESSIONS):
            session.plan()
            session.prepare(n)
            session.plan()
            session.refit(n)
            if landing is not None:
                check_landed(landing)
            counts.append(left())
        session.close()
        (tmp_path / str(rank)).write_text(json.dumps(counts[SETTLED:]))

    assert set(Forked(range(WORLD.size), work).codes(60).values()) == {0}
    for rank in range(WORLD.size):
        counts = json.loads((tmp_path / str(rank)).read_text())
        grown = {name: counts[-1][name] - counts[0][name] for name in counts[0]}
        assert all(more < len(counts) for more in grown.values()), grown  # gloo closes what it has a little later


def counted(transport: str, folder: Path) -> dict[int, tuple[list[bool], list[dict[str, int]]]]:
    """Rank -> which sessions failed, and what was left after each of the later ones."""

    def work(rank: int, port: int) -> None:
        store, failed, counts = store_of(port), [], []
        for n in range(SESSIONS):
            failed.append(run_session(rank, dist.PrefixStore(str(n), store), transport, fails=bool(n % 2)))
            if n >= SETTLED:
                counts.append(left())
        (folder / str(rank)).write_text(json.dumps([failed, counts]))

    assert set(Forked(range(WORLD.size), work).codes(60).values()) == {0}
    return {rank: tuple(json.loads((folder / str(rank)).read_text())) for rank in range(WORLD.size)}
