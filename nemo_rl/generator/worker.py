"""What a refit calls inside every vLLM worker: vLLM mixes this class into its worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nemo_rl.generator.landing import VllmLanding
from nemo_rl.generator.mend import mend_rotation
from nemo_rl.generator.options import AdapterConfig, Outcome
from nemo_rl.refit.base import Landing, RefitOptions, World
from nemo_rl.refit.errors import PoisonedError, RefitError
from nemo_rl.refit.session import RefitSession
from nemo_rl.refit.start import UnchangedByStart

mend_rotation()  # vLLM imports this module before it builds the model


class RefitWorker:
    """Methods for `collective_rpc`. Those that answer an Outcome do not raise."""

    model_runner: Any
    vllm_config: Any
    model_config: Any
    rank: int
    device: torch.device
    _refit_session: RefitSession | None = None
    _refit_landing: Landing | None = None
    _adapter: AdapterConfig | None = None

    def serve_adapter(self, config: AdapterConfig) -> Any:
        """Give the adapter its place in the engine; what requests must name to get it."""
        from nemo_rl.generator.adapter import adapter_request, serve_adapter

        serve_adapter(self.model_runner.lora_manager, config)
        self._adapter = config
        return adapter_request(config)

    def refit_landing(self) -> Landing:
        """This worker's landing, made on first use; `refit_connect` makes a new one."""
        if self._refit_landing is None:
            self._refit_landing = self._make_landing()
        return self._refit_landing

    def _make_landing(self) -> Landing:
        model = self.model_runner.get_model()
        if self._adapter is None:
            return VllmLanding(model, self.vllm_config, self.model_config)
        from nemo_rl.generator.adapter import AdapterLanding

        loaded = self.vllm_config.load_config.load_format != "dummy"
        frozen = dict.fromkeys(
            (n for n, _ in model.named_parameters() if loaded), "frozen: loaded when the engine started"
        )
        return AdapterLanding(self.model_runner.lora_manager, self._adapter, frozen)

    def refit_connect(
        self, rank_offset: int, world: World, store: tuple[str, int], options: RefitOptions, start_check: bool = False
    ) -> Outcome:
        """Join as rank `rank_offset` + this worker's rank in its engine; an earlier session ends.

        Args:
            start_check: the model is as its loader left it, and version 0 must leave it so.
        """

        def connect() -> None:
            self._close()
            rank, self._refit_landing = rank_offset + self.rank, None
            landing = self.refit_landing()
            if start_check:
                landing = UnchangedByStart(landing, self._live_tensors)
            self._refit_session = RefitSession(rank, world, store, options, landing=landing, device=self.device)
            self._refit_session.connect()

        return self._said(connect, "connect")

    def refit_plan(self) -> Outcome:
        """Digest of the agreed plan."""
        return self._said(lambda: self._session().plan().digest, "plan")

    def refit_prepare(self, version: int) -> Outcome:
        """Seconds by phase."""
        return self._said(lambda: self._session().prepare(version), "agree")

    def refit(self, version: int) -> Outcome:
        """The worker's report. Who steps the engine may be another thread, whose stream knows nothing of this one's."""

        def refit() -> object:
            self._rest()
            report = self._session().refit(version)
            self._rest()
            return report

        return self._said(refit, "refit")

    def _rest(self) -> None:
        """Until the device is done with all that was started on it, on whatever stream."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def refit_close(self) -> Outcome:
        """Idempotent."""
        return self._said(self._close, "close")

    def read_parameters(self) -> dict[str, torch.Tensor]:
        """Copies of the live parameters, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.model_runner.get_model().named_parameters()}

    def _live_tensors(self) -> dict[str, torch.Tensor]:
        model = self.model_runner.get_model()
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def _close(self) -> None:
        if self._refit_session is not None:
            self._refit_session.close()
            self._refit_session = None

    def _session(self) -> RefitSession:
        if self._refit_session is None:
            raise PoisonedError(
                "no session is connected", rank=self.rank, phase="connect", remedy="call refit_connect first"
            )
        return self._refit_session

    def _said(self, call: Callable[[], object], phase: str) -> Outcome:
        try:
            return Outcome(call())
        except RefitError as error:
            return Outcome(error=error)
        except Exception as error:  # told in words, whatever it was: the caller's process must be able to unpickle it
            text, remedy = f"{type(error).__name__}: {error}", "see the worker's log; remake the session"
            return Outcome(error=RefitError(text, rank=self.rank, phase=phase, remedy=remedy))
