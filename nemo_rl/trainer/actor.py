"""What a Ray actor around a trainer rank offers; the cluster makes it an actor, with `trainer_env()` as environment."""

from __future__ import annotations

import logging
import socket

import ray
import torch

from nemo_rl.refit.base import RefitOptions, RefitReport, World
from nemo_rl.refit.device import MULTICAST_OFF
from nemo_rl.refit.session import RefitSession
from nemo_rl.trainer.policy import LossFn, MegatronPolicy, Metrics, TrainerConfig


def trainer_env() -> dict[str, str]:
    """Environment of a trainer's process, to be set before it imports torch."""
    return {
        "OMP_NUM_THREADS": "1",
        # Compiling the few functions that Megatron marks takes longer than small models train on a CPU.
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        # Megatron warns of every optional kernel that it does not find.
        "PYTHONWARNINGS": "ignore::UserWarning,ignore::FutureWarning,ignore::DeprecationWarning",
        # Sequence parallelism overlaps communication with one queue of kernels.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **MULTICAST_OFF,
    }


class Heard(logging.Handler):
    """What the refit says of itself, for a driver to log: an actor's own log is on its node, where nobody looks.

    Attributes:
        lines: since it was made, until it is closed.
    """

    _SAYS = logging.getLogger("nemo_rl.refit")

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self._SAYS.addHandler(self)
        self._level = self._SAYS.level
        self._SAYS.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def close(self) -> None:
        self._SAYS.removeHandler(self)
        self._SAYS.setLevel(self._level)
        super().close()


class TrainerActor:
    """One trainer rank. The trainer ranks make the same calls in the same order."""

    def __init__(self) -> None:
        self._policy: MegatronPolicy | None = None
        self._session: RefitSession | None = None
        self._heard: Heard | None = None

    def address(self) -> tuple[str, int]:
        """This node's address and a port of it that is free, where the trainers can meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def devices(self) -> list[str]:
        """The GPUs that Ray gave to this actor, as `CUDA_VISIBLE_DEVICES` names them on this node."""
        return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])

    def setup(self, config: TrainerConfig, rank: int, init_method: str) -> None:
        """Build the model and read its weights. Raises as `MegatronPolicy` does."""
        self._policy = MegatronPolicy(config, rank, init_method)

    def logprobs(self, input_ids: torch.Tensor, temperature: float, reference: bool) -> torch.Tensor | None:
        """As `MegatronPolicy.logprobs` or `reference_logprobs`; rank 0 answers, the others None."""
        ask = self._ready.reference_logprobs if reference else self._ready.logprobs
        found = ask(input_ids, temperature=temperature)
        return found if self._ready.rank == 0 else None

    def train(self, input_ids: torch.Tensor, loss_fn: LossFn, lr: float, temperature: float) -> Metrics:
        """As `MegatronPolicy.train_step`."""
        return self._ready.train_step(input_ids, loss_fn, lr=lr, temperature=temperature)

    def calibrate(self, input_ids: torch.Tensor) -> None:
        """As `MegatronPolicy.calibrate`."""
        self._ready.calibrate(input_ids)

    def refit_connect(self, world: World, store: tuple[str, int], options: RefitOptions) -> None:
        """Join a refit world as its trainer of this rank; an earlier session is closed."""
        self.refit_close()
        policy = self._ready
        rank, self._heard = world.trainers[policy.rank], Heard()
        self._session = RefitSession(rank, world, store, options, source=policy.source(), device=policy.device)
        self._session.connect()

    def refit_plan(self) -> str:
        """Declare, plan and agree. Weights that are not the checkpoint's may refuse it.

        Returns what was said since `refit_connect`: on the first trainer the plan, the transport, what was predicted
        for it and the others, and which ones are not possible.
        """
        session = self._connected
        problems = self._ready.weight_problems() if session.options.verify_against_checkpoint else ()
        session.plan(problems)
        return "\n".join(self._hush())

    def _hush(self) -> list[str]:
        """Listen no more; what was heard."""
        heard, self._heard = self._heard, None
        if heard is None:
            return []
        heard.close()
        return heard.lines

    def refit_prepare(self, version: int) -> None:
        """What a refit does before it needs generators at rest. Raises RefitError."""
        self._connected.prepare(version, self._ready.num_steps)

    def refit(self, version: int) -> RefitReport:
        """Move the weights as `version`. Raises RefitError."""
        return self._connected.refit(version, self._ready.num_steps)

    def refit_close(self) -> None:
        """Leave the refit world; idempotent."""
        self._hush()
        if self._session is not None:
            self._session.close()
            self._session = None

    def export(self, folder: str) -> None:
        """As `MegatronPolicy.export`."""
        self._ready.export(folder)

    def close(self) -> None:
        """Leave the refit world and the trainers' groups."""
        self.refit_close()
        if self._policy is not None:
            self._policy.close()
            self._policy = None

    @property
    def _ready(self) -> MegatronPolicy:
        if self._policy is None:
            raise RuntimeError("this trainer has no model; call setup() first")
        return self._policy

    @property
    def _connected(self) -> RefitSession:
        if self._session is None:
            raise RuntimeError(f"trainer rank {self._ready.rank} has no refit session; call refit_connect() first")
        return self._session
