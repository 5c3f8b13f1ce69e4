"""Requests of one vLLM engine, grown step by step, so that other weights can come between two steps."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

Weights = Callable[[], AbstractContextManager[int]]
"""Holds the engine; yields the version of its weights meanwhile."""


@dataclass(slots=True)
class Growing:
    """One sample while it grows.

    Attributes:
        tokens, logprobs, versions: of each sampled token: its id, its log-probability under the distribution that it
            was drawn from, and the version of the weights that drew it.
        finish: why it ended; None while it grows.
    """

    prompt: list[int]
    params: Any
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str | None = None


class Stepper:
    """The requests of an engine whose core lives in this process. One thread at a time.

    A request is salted with the version that it was added under. The salt is part of a cached block's key: what
    requests of other versions computed is never found.

    Args:
        room: requests that the engine runs at once. The others wait here, so that only few, however many were asked
            for, must start anew when weights come.
    """

    def __init__(self, llm: Any, room: int, lora_request: Any = None) -> None:
        self._engine: Any = llm.llm_engine
        self._room, self._lora_request = room, lora_request
        self._numbers = itertools.count()
        self._growing: dict[str, Growing] = {}

    @property
    def num_running(self) -> int:
        """Requests that were added and have not ended."""
        return len(self._growing)

    def answer(
        self, prompts: Sequence[Sequence[int]], params: Sequence[Sequence[Any]], weights: Weights
    ) -> list[list[Growing]]:
        """Samples of each prompt, one for each of its `params`, which are vLLM's of kind DELTA with `n=1`.

        Raises:
            RuntimeError: the engine lost requests or gave one up; those that have not ended are still there.
        """
        asked = [[Growing(list(prompt), one) for one in some] for prompt, some in zip(prompts, params, strict=True)]
        waiting = deque(growing for samples in asked for growing in samples)
        while waiting or self._growing:
            with weights() as version:
                while waiting and self.num_running < self._room:
                    self._add(waiting.popleft(), version)
                if self._growing:  # a refit that came first may have taken in the last tokens
                    self.step(version)
        return asked

    def _add(self, growing: Growing, version: int) -> None:
        from vllm.inputs.engine import tokens_input

        name = str(next(self._numbers))
        asked = tokens_input(growing.prompt, cache_salt=f"weights {version}")
        self._engine.add_request(name, asked, growing.params, lora_request=self._lora_request)
        self._growing[name] = growing

    def step(self, version: int) -> None:
        """One step of the engine, whose weights are `version`.

        Raises:
            RuntimeError: the engine has nothing to do although requests have not ended, or gave one up.
        """
        if not self._engine.has_unfinished_requests():
            raise RuntimeError(f"the engine lost {self.num_running} requests: it has none that is unfinished")
        self._note(self._engine.step(), version)

    def settle(self, version: int) -> None:
        """Take in what the engine scheduled ahead under `version`, and schedule nothing more."""
        from vllm.v1.core.sched.interface import PauseState

        core = self._engine.engine_core.engine_core
        if not core.batch_queue:
            return
        core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        try:
            while core.batch_queue:
                self._note(self._engine.step(), version)
        finally:
            core.scheduler.set_pause_state(PauseState.UNPAUSED)

    def renew(self, version: int, recompute: bool) -> None:
        """The weights are `version` from here on; nothing is scheduled ahead.

        Requests without a token start anew under `version`. The others go on with their tokens: with the keys and
        values that earlier weights computed, or with those of `version` where `recompute`.
        """
        if recompute:
            self._engine.reset_prefix_cache(reset_running_requests=True)
        fresh = [name for name, growing in self._growing.items() if not growing.tokens]
        self._engine.abort_request(fresh)
        for name in fresh:
            self._add(self._growing.pop(name), version)

    def drop(self) -> None:
        """End all requests without an answer."""
        self._engine.abort_request(list(self._growing))
        self._growing.clear()

    def close(self) -> None:
        """Let go of the engine."""
        self._engine = None

    def _note(self, outputs: Sequence[Any], version: int) -> None:
        for output in outputs:
            growing, (part,) = self._growing[output.request_id], output.outputs
            for token, step in zip(part.token_ids, part.logprobs if part.token_ids else (), strict=True):
                growing.tokens.append(int(token))
                growing.logprobs.append(float(step[token].logprob))
                growing.versions.append(version)
            if output.finished:
                growing.finish = part.finish_reason
                del self._growing[output.request_id]
                if growing.finish not in ("stop", "length"):
                    raise RuntimeError(f"the engine ended a request as '{growing.finish}'; see its log")
