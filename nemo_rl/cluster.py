"""Ray: start or join a cluster, place one actor per trainer rank and per engine, and never wait without a deadline."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    AuthenticationError,
    RayActorError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nemo_rl.refit.device import MULTICAST_OFF
from nemo_rl.refit.errors import RefitError
from nemo_rl.schema import ClusterConfig
from nemo_rl.topology import Topology

log = logging.getLogger(__name__)
_DEAD = (RayActorError, ActorDiedError, ActorUnavailableError)
_NO_GROUPS: Mapping[str, int] = {}
_GRACE_S = 3.0  # how long peers of a failed actor may still say what they saw
_TOKEN = (
    "clusters that a driver of Ray started, and those with a token on their head, ask for it: start this driver with "
    "RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token (a token that only lies there "
    "is not sent to an address that was given)"
)


class ClusterError(RuntimeError):
    """Actors could not be placed, died, failed or did not answer in time; the message names which and in what phase."""


@dataclass(frozen=True, slots=True)
class Actor:
    """One placed actor. `name` says which ranks it holds, as `trainer 1 (rank 1)`."""

    name: str
    handle: Any


class Cluster:
    """A Ray cluster for one run. A context manager: on the way out all its actors are killed.

    Args:
        device: `cpu` or `cuda`; with `cuda`, each rank holds a GPU, otherwise one CPU slot (a virtual device). A
            device that is shared holds two ranks.

    Raises (on entering):
        ClusterError: the cluster cannot be reached, or lacks the devices of `topology`.
    """

    def __init__(self, config: ClusterConfig, topology: Topology, device: str) -> None:
        self._config, self._topology = config, topology
        self._resource = "GPU" if device == "cuda" else "CPU"
        self._hidden = (
            {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        )  # else Ray says which GPUs are an actor's
        self._group: PlacementGroup | None = None
        self._actors: list[Actor] = []
        self._owner = False

    def __enter__(self) -> Cluster:
        self._owner = not ray.is_initialized()
        try:
            if self._owner:
                self._start()
            self._await_nodes()
            self._reserve()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        address = _resolved(self._config.address)
        answers = None if address is None else _answers(address)
        if answers is False:  # Ray itself asks for minutes
            raise ClusterError(f"Ray was not reached at {address}: {_remedy(answers)}")
        options: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.WARNING, configure_logging=False)
        if address is None:
            devices = self._config.gpus_per_node * self._config.num_nodes
            options |= dict(include_dashboard=False, object_store_memory=self._config.object_store_bytes)
            options["num_cpus"] = devices
        try:
            ray.init(address=address or "local", **options)
        except AuthenticationError as error:
            raise ClusterError(f"Ray refused this driver: {error.message}; {_TOKEN}") from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address is None:
                raise ClusterError(f"Ray did not start: {error}") from error
            raise ClusterError(f"Ray was not reached at {address}: {error}; {_remedy(answers)}") from error

    def _await_nodes(self) -> None:
        """Nodes of a cluster join one after the other: wait until as many as the run asks for are there."""
        if self._config.address is None:
            return
        limit, asked = time.monotonic() + self._config.start_deadline_s, self._config.num_nodes
        while (have := sum(node["Alive"] for node in ray.nodes())) < asked:
            if time.monotonic() > limit:
                raise ClusterError(
                    f"cluster.num_nodes={asked}, but {have} joined the cluster at {self._config.address} within "
                    f"{self._config.start_deadline_s:g} s; start Ray on the others, or lower cluster.num_nodes"
                )
            time.sleep(0.2)

    def _reserve(self) -> None:
        """All devices of the run, or none: one bundle per trainer rank and one per engine, or one for both."""
        own = 0 if self._topology.shared else self._topology.num_trainers
        sizes = [1] * own + [self._topology.generator_size] * self._topology.num_replicas
        have, need = ray.cluster_resources().get(self._resource, 0), sum(sizes)
        if have < need:
            raise ClusterError(
                f"{need} ranks need a {self._resource} each but the cluster has {have:g}; add nodes, or lower "
                "cluster.gpus_per_node and the parallel sizes"
            )
        bundles = [{"CPU": float(n)} | ({"GPU": float(n)} if self._resource == "GPU" else {}) for n in sizes]
        self._group = placement_group(bundles, strategy="PACK")
        if not self._group.wait(self._config.start_deadline_s):
            raise ClusterError(
                f"the cluster has {have:g} {self._resource}s but did not free {need} of them within "
                f"{self._config.start_deadline_s:g} s; end other jobs, or raise cluster.start_deadline_s"
            )

    def place(
        self,
        name: str,
        bundle: int,
        actor_class: type,
        env: Mapping[str, str],
        *args: Any,
        groups: Mapping[str, int] = _NO_GROUPS,
        **kwargs: Any,
    ) -> Actor:
        """Make an actor of a plain class on devices `bundle`: a trainer's rank, or number of trainers + replica.

        Where devices are shared, Ray gives them to trainers, and `env` says to an engine which ones it sees.

        Args:
            groups: threads of each concurrency group that the class's methods name.
        """
        bundle, cpus, gpus = self._share(bundle)
        made = ray.remote(concurrency_groups=dict(groups))(actor_class) if groups else ray.remote(actor_class)
        remote = made.options(
            num_cpus=cpus,
            num_gpus=gpus if self._resource == "GPU" else 0,
            runtime_env={"env_vars": {**env, **MULTICAST_OFF, **self._hidden}},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
            max_restarts=0,
            max_task_retries=0,
        )
        actor = Actor(name, remote.remote(*args, **kwargs))
        self._actors.append(actor)
        return actor

    def _share(self, bundle: int) -> tuple[int, float, int]:
        """(bundle of the placement group, CPUs, GPUs) of the actor on devices `bundle`."""
        count, size = self._topology.num_trainers, self._topology.generator_size
        devices = 1 if bundle < count else size
        if not self._topology.shared:
            return bundle, devices, devices
        return (bundle // size, 0.5, 1) if bundle < count else (bundle - count, 0.5 * size, 0)

    def close(self) -> None:
        """Kill the actors, give the devices back, and stop Ray where this object started it. Idempotent."""
        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._owner and ray.is_initialized():
            ray.shutdown()


def _resolved(address: str | None) -> str | None:
    """`auto` as host:port where Ray has noted one: a cluster that was killed stays noted, and Ray would wait for it."""
    return canonicalize_bootstrap_address(address) or address if address == "auto" else address


def _answers(address: str) -> bool | None:
    """Whether anything does at `address`; None where it is not `host:port`."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return None
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _remedy(answers: bool | None) -> str:
    """What helps where Ray was not reached at an address of which `_answers` says this: Ray's error is always one."""
    match answers:
        case None:
            return f"check that a cluster runs on this machine, or give its address as host:port; {_TOKEN}"
        case False:
            return (
                "nothing answers there; check cluster.address, and that the head runs (`auto` is what Ray noted last)"
            )
        case _:
            return f"something answers there; {_TOKEN}"


def wait_all(calls: Sequence[tuple[Actor, Any]], phase: str, deadline_s: float) -> list[Any]:
    """Results of `(actor, reference)` pairs, in order.

    The first failure ends the wait: peers get a few seconds to say what they saw, and one error tells it all.

    Raises:
        ClusterError: an actor died, raised, or did not answer within `deadline_s`; `__cause__` is the first failure.
    """
    names = {reference: actor.name for actor, reference in calls}
    pending, limit = list(names), time.monotonic() + deadline_s
    failures: dict[str, BaseException] = {}
    while pending and time.monotonic() < limit:
        done, pending = ray.wait(pending, num_returns=1, timeout=max(limit - time.monotonic(), 0.0))
        for reference in done:
            error = _failure(reference)
            if error is not None:
                failures[names[reference]] = error
                limit = min(limit, time.monotonic() + _GRACE_S)
    if failures or pending:
        raise _error(phase, deadline_s, failures, [names[r] for r in pending]) from next(iter(failures.values()), None)
    return [ray.get(reference) for _, reference in calls]


def _failure(reference: Any) -> BaseException | None:
    try:
        ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        return cause if isinstance(cause, BaseException) else error
    except _DEAD as error:
        return error
    return None


def _error(phase: str, deadline_s: float, failures: Mapping[str, BaseException], silent: Sequence[str]) -> ClusterError:
    """Dead actors first: they are why the others fail. What several actors say alike is told once."""
    dead = [name for name, error in failures.items() if isinstance(error, _DEAD)]
    lines, alike = [f"{name} died" for name in dead], []
    # Sessions' own errors go first, as other errors may only quote them.
    for name in sorted(set(failures) - set(dead), key=lambda n: not isinstance(failures[n], RefitError)):
        text = _said(failures[name])
        known = [e.detail for e in failures.values() if isinstance(e, RefitError) and any(e.detail in s for s in lines)]
        if any(detail in text for detail in known):
            alike.append(name)
        else:
            lines.append(f"{name}: {text}")
    if alike:
        lines.append(f"{', '.join(sorted(alike))} said the same")
    if silent:
        waited = "had not answered when the others failed" if failures else f"did not answer within {deadline_s:g} s"
        lines.append(f"{', '.join(silent)} {waited}")
    return ClusterError(f"phase '{phase}' failed: " + "; ".join(lines))


def _said(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, RayTaskError):  # the text is a whole traceback, its last line the error
        return text.splitlines()[-1]
    return text if isinstance(error, RefitError) else f"{type(error).__name__}: {text}"
