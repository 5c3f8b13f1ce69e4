"""Placement, deadlines and failures with small real Ray actors."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from nemo_rl import cluster as cluster_module
from nemo_rl.cluster import Actor, Cluster, ClusterError, wait_all
from nemo_rl.refit.errors import PlanError
from nemo_rl.schema import ClusterConfig
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
    with Cluster(ClusterConfig(gpus_per_node=5, start_deadline_s=60), Topology(2, 1, 2), "cpu") as running:
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


def test_ranks_that_share_a_device(cluster: Cluster) -> None:
    """In a cluster that is full but for one device. Multicast is off and GPUs are hidden, whatever is asked."""
    with Cluster(ClusterConfig(start_deadline_s=60), Topology(1, 1, 1, shared=True), "cpu") as shared:
        env = {"NCCL_NVLS_ENABLE": "1"}
        pair = [shared.place(name, bundle, Worker, env, bundle) for bundle, name in enumerate(("trainer", "generator"))]
        assert wait_all([(a, a.handle.answer.remote()) for a in pair], "answer", 60) == [0, 1]
        said = [(a, a.handle.variable.remote(n)) for a in pair for n in ("NCCL_NVLS_ENABLE", "CUDA_VISIBLE_DEVICES")]
        assert wait_all(said, "variable", 60) == ["0", ""] * 2


@pytest.mark.parametrize(
    ("topology", "shares"),
    [
        (Topology(2, 1, 2), [(0, 1, 1), (1, 1, 1), (2, 2, 2)]),
        (Topology(4, 2, 2, shared=True), [(0, 0.5, 1), (0, 0.5, 1), (1, 0.5, 1), (1, 0.5, 1), (0, 1, 0), (1, 1, 0)]),
    ],
)
def test_shares_of_devices(topology: Topology, shares: list[tuple[int, float, int]]) -> None:
    """No device is given twice, and an engine stands where its trainers do."""
    cluster = Cluster(ClusterConfig(), topology, "cuda")
    assert [cluster._share(i) for i in range(topology.num_trainers + topology.num_replicas)] == shares


def test_too_few_devices_are_refused(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="9 ranks need a CPU each but the cluster has 5"):
        Cluster(ClusterConfig(), Topology(8, 1, 1), "cpu").__enter__()


# ---- joining a cluster that runs


def test_nodes_that_do_not_join_are_counted(cluster: Cluster) -> None:
    config = ClusterConfig(address="auto", num_nodes=2, start_deadline_s=0.3)
    with pytest.raises(ClusterError, match="cluster.num_nodes=2, but 1 joined the cluster at auto within 0.3 s"):
        Cluster(config, Topology(1, 1, 1), "cpu").__enter__()


def test_a_node_that_joins_late_is_waited_for(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([1, 1, 2])
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * next(seen) + [{"Alive": False}])
    Cluster(ClusterConfig(address="auto", num_nodes=2, start_deadline_s=5), Topology(1, 1, 1), "cpu")._await_nodes()
    assert list(seen) == []


def join(address: str) -> str:
    """What a driver is told that cannot join the cluster at `address`."""
    with pytest.raises(ClusterError) as caught:
        Cluster(ClusterConfig(address=address), Topology(1, 1, 1), "cpu").__enter__()
    return str(caught.value)


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)


def test_whether_anything_answers_decides_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, ConnectionError("Failed to connect"))
    connect, asked = socket.create_connection, []
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: (asked.append(a), connect(*a, **k))[1])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        said = join(place)  # without asking Ray, which takes minutes to give up
        assert "nothing answers there" in said and "RAY_AUTH_MODE" not in said and "Failed to connect" not in said
        assert len(asked) == 1, "who does not answer takes seconds each time"
        listener.listen()
        assert "something answers there" in (said := join(place)) and "RAY_AUTH_MODE=token" in said
    monkeypatch.setattr(cluster_module, "canonicalize_bootstrap_address", lambda address: None)
    assert "give its address as host:port" in join("auto")


def test_a_cluster_that_was_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray keeps its address, for `auto`, and asks it for ever."""
    refuse(monkeypatch, AssertionError("Ray is not asked"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        noted = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(cluster_module, "canonicalize_bootstrap_address", lambda address: noted)
        said = join("auto")
    assert f"Ray was not reached at {noted}: nothing answers there" in said and "what Ray noted last" in said


def test_a_driver_without_a_token_is_told_where_to_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, AuthenticationError("no authentication token was found"))
    monkeypatch.setattr(cluster_module, "canonicalize_bootstrap_address", lambda address: None)
    said = join("auto")
    assert "Ray refused this driver: no authentication token was found" in said and "~/.ray/auth_token" in said


JOIN = """
import sys
from nemo_rl.cluster import Cluster
from nemo_rl.schema import ClusterConfig
from nemo_rl.topology import Topology
with Cluster(ClusterConfig(address=sys.argv[1]), Topology(1, 1, 1), "cpu"):
    pass
"""


@pytest.mark.slow  # Ray gives up after 20 s
def test_a_real_cluster_refuses_a_driver_without_its_token(cluster: Cluster, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", JOIN, ray.get_runtime_context().gcs_address]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert "something answers there" in done.stderr and "RAY_AUTH_MODE=token" in done.stderr
    done = subprocess.run(command, env=environ | {"RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=60)
    assert "Ray refused this driver" in done.stderr
