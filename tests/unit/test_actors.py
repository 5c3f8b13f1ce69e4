"""What the loop's handles make of answers and of the configuration, without actors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import TCPStore

from nemo_rl import actors
from nemo_rl.actors import RefitGroup, in_flight, summarize_reports
from nemo_rl.cluster import ClusterError
from nemo_rl.refit.base import RefitOptions, RefitReport
from nemo_rl.schema import AsyncGrpoConfig, Config, GrpoConfig


def report(version: int = 4, transport: str = "peer", verified: bool = True, **pause: float) -> RefitReport:
    phases = {"transfer": 0.1, "verify": sum(pause.values())}
    return RefitReport(version, transport, verified, 1.0, phases, 100, 10, 5, pause_s=pause)


def test_a_summary_tells_the_longest_pause_whole() -> None:
    """Not the longest of each part, which would add up to a pause that no engine had."""
    engines = [report(transfer=0.3, begin=0.1), report(transfer=0.2, begin=0.25), report(transfer=0.3, begin=0.05)]
    summary = summarize_reports([report(), *engines], 1, 2.0)
    assert summary.pause_s == {"transfer": 0.2, "begin": 0.25} and summary.paused_s == pytest.approx(0.45)
    assert (summary.bulk_bytes, summary.misc_bytes, summary.staging_bytes, summary.seconds) == (300, 30, 5, 2.0)
    assert summary.phase_s == {"transfer": 0.1, "verify": pytest.approx(0.45)} and summary.verified
    assert not summarize_reports([report(), report(verified=False)], 1, 1.0).verified


def test_reports_of_different_refits_are_refused() -> None:
    for other in (report(version=3), report(transport="gloo")):
        with pytest.raises(ClusterError, match="ranks report different refits"):
            summarize_reports([report(), other], 1, 1.0)


def test_sessions_that_are_made_again_find_nothing_of_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[TCPStore] = []
    handle = SimpleNamespace(
        refit_connect=SimpleNamespace(remote=lambda *said: stores.append(TCPStore(*said[-2], is_master=False))),
        refit_plan=SimpleNamespace(remote=lambda: None),
    )
    monkeypatch.setattr(actors, "wait_all", lambda calls, *_: ["plan"])
    monkeypatch.setattr(actors.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    ends: Any = [SimpleNamespace(handle=handle)]
    topology: Any = SimpleNamespace(num_trainers=1, num_generators=1, first_rank=lambda replica: 1)
    group = RefitGroup(ends, ends, topology, RefitOptions())
    group.connect()
    stores[0].set("abort", "a rank failed")
    assert stores[1].check(["abort"])
    group.connect()
    assert stores[1].check(["abort"]) and not stores[2].check(["abort"]) and not stores[3].check(["abort"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (AsyncGrpoConfig(False, 1, True, True), "refuse"),
        (AsyncGrpoConfig(True, 1, False, False), "refuse"),
        (AsyncGrpoConfig(True, 1, True, False), "keep"),
        (AsyncGrpoConfig(True, 1, True, True), "recompute"),
    ],
)
def test_what_engines_do_with_requests_in_flight(settings: AsyncGrpoConfig, expected: str) -> None:
    assert in_flight(Config(grpo=GrpoConfig(async_grpo=settings))) == expected
