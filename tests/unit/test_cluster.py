"""Placement, deadlines and failures with small real Ray actors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from nemo_rl.cluster import Actor, Cluster, ClusterError, wait_all
from nemo_rl.config import ClusterConfig
from nemo_rl.refit.errors import PlanError
from nemo_rl.topology import Topology


class Worker:
    """Answers, waits, raises or dies on demand."""

    def __init__(self, value: int) -> None:
        self.value = value

    def answer(self) -> int:
        return self.value

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self) -> None:
        raise ValueError(f"worker {self.value} refuses")

    def refuse(self) -> None:
        raise PlanError("nothing meets", rank=self.value, phase="plan", remedy="make it meet")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ClusterConfig(gpus_per_node=4, start_deadline_s=60), Topology(2, 1, 2), "cpu") as running:
        yield running


@pytest.fixture(scope="module")
def actors(cluster: Cluster) -> list[Actor]:
    return [
        cluster.place(f"trainer {i} (rank {i})", i, Worker, {"OMP_NUM_THREADS": "1", "X": str(i)}, i) for i in (0, 1)
    ]


def test_answers_come_in_order(actors: list[Actor]) -> None:
    assert wait_all([(a, a.handle.answer.remote()) for a in actors], "answer", 60) == [0, 1]
    assert wait_all([(a, a.handle.variable.remote("X")) for a in actors], "variable", 60) == ["0", "1"]


def test_a_late_actor_is_named(actors: list[Actor]) -> None:
    calls = [(actors[0], actors[0].handle.answer.remote()), (actors[1], actors[1].handle.wait.remote(2))]
    with pytest.raises(ClusterError, match=r"phase 'nap' failed: trainer 1 \(rank 1\) did not answer within 0.5 s"):
        wait_all(calls, "nap", 0.5)


def test_an_error_is_told_with_its_actor(actors: list[Actor]) -> None:
    with pytest.raises(ClusterError, match=r"trainer 1 \(rank 1\): ValueError: worker 1 refuses") as caught:
        wait_all(
            [(a, a.handle.fail.remote() if i else a.handle.answer.remote()) for i, a in enumerate(actors)], "x", 60
        )
    assert isinstance(caught.value.__cause__, ValueError)


def test_what_all_say_is_told_once(actors: list[Actor]) -> None:
    with pytest.raises(ClusterError, match="refit failed on rank . in phase 'plan': nothing meets") as caught:
        wait_all([(a, a.handle.refuse.remote()) for a in actors], "refit plan", 60)
    assert str(caught.value).count("nothing meets") == 1 and "said the same" in str(caught.value)
    assert isinstance(caught.value.__cause__, PlanError)


def test_a_dead_actor_ends_the_wait_of_all(cluster: Cluster, actors: list[Actor]) -> None:
    doomed = cluster.place("generator 0 (rank 2)", 2, Worker, {}, 7)
    wait_all([(doomed, doomed.handle.answer.remote())], "start", 60)
    started = time.monotonic()
    calls = [(actors[0], actors[0].handle.wait.remote(20)), (doomed, doomed.handle.die.remote())]
    with pytest.raises(ClusterError, match=r"generator 0 \(rank 2\) died; trainer 0 \(rank 0\) had not answered"):
        wait_all(calls, "refit", 60)
    assert time.monotonic() - started < 15


def test_too_few_devices_are_refused(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="9 ranks need a CPU each but the cluster has 4"):
        Cluster(ClusterConfig(), Topology(8, 1, 1), "cpu").__enter__()
