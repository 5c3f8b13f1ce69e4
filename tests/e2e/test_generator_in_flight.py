"""Weights that come between two steps of requests in flight: versions of tokens, kept and recomputed caches."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nemo_rl.generator.engine import VllmEngine
from nemo_rl.generator.options import Generated
from nemo_rl.refit.base import RefitOptions, RefitReport
from nemo_rl.refit.errors import RefitError
from tests.e2e.engines import FileSource, Kind, answer, check, land, plain, raised, run, trained

LENGTH = 96
ASKED = [[3, 17, 99, 5, 42, 7], [250, 1, 2, 3, 4, 5, 6, 7, 8, 9], [77], [8, 9, 10], [11, 12], [200, 100, 50]]
MODES = ("keep", "recompute", "refuse")


def test_weights_that_come_between_two_steps(tmp_path: Path) -> None:
    check(run(__file__, tmp_path, [f"{mode} dense-{mode} float32 1" for mode in MODES]))


# ---- scenarios, in the process of an engine


def generate_beside(engine: VllmEngine, call: Any) -> tuple[list[Generated], Any, str]:
    """Answers to `ASKED`, `call()` made once tokens of the first requests are there, and what generating raised."""
    said: dict[str, Any] = {"answers": [], "error": ""}

    def generate() -> None:
        try:
            said["answers"] = [a for (a,) in engine.generate(ASKED, 1, LENGTH, 1.0, seed=list(range(len(ASKED))))]
        except RuntimeError as error:
            said["error"] = str(error)

    thread = threading.Thread(target=generate)
    thread.start()
    while not any(len(g.tokens) >= 8 for g in list(engine._stepper._growing.values())):
        time.sleep(0.001)
    outcome = call()
    thread.join(60)
    assert not thread.is_alive()
    return said["answers"], outcome, said["error"]


def errors(path: str, answers: Sequence[Generated], version: int) -> list[float]:
    """How far log-probabilities of tokens of `version` are from transformers' with checkpoint `path`, by answer."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(plain(path), dtype=torch.float32).eval()
    worst = []
    for prompt, answered in zip(ASKED, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answered.token_ids]])).logits[0, len(prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(answered.token_ids)[:, None])[:, 0]
        mine = torch.tensor([v == version for v in answered.versions])
        worst.append(float((want - torch.tensor(answered.logprobs))[mine].abs().max()) if mine.any() else 0.0)
    return worst


def in_flight(engine: VllmEngine, a: str, b: str) -> dict[str, bool]:
    """A refit from `a` to `b` while requests grow."""
    alone = [x for (x,) in engine.generate(ASKED, 1, LENGTH, 1.0, seed=list(range(len(ASKED))))]
    with trained(engine, FileSource(b), RefitOptions(deadline_s=30)) as refit:
        answers, (report, *_), error = generate_beside(engine, lambda: refit(1))
    found = came_upon(engine, a, b, answers, error)
    counts = [x.versions.count(0) for x in answers]
    found["tokens of the first version are those of a run without a refit"] = all(
        x.token_ids[:old] == y.token_ids[:old] and x.logprobs[:old] == y.logprobs[:old]
        for x, y, old in zip(answers, alone, counts, strict=True)
    )
    found["what follows differs"] = all(x.token_ids != y.token_ids for x, y in zip(answers, alone, strict=True))
    found["parts of the pause add up"] = parts_are_whole(report.pause_s)
    found["the pause begins behind the steps under way"] = report.phase_s["settle"] > 0
    return found


def landed_in_flight(engine: VllmEngine, a: str, b: str) -> dict[str, bool]:
    """As `in_flight`, for engines on a device that a trainer of this process does not reach: bytes land directly."""

    def session(method: str, *args: Any) -> list[RefitReport]:
        assert method == "refit"
        started = time.monotonic()
        engine.collective_rpc(land, b, args[0], "units")
        seconds = time.monotonic() - started
        return [RefitReport(args[0], "none", False, seconds, {"transfer": seconds}, 0, 0, 0)] * engine.num_workers

    with mock.patch.object(engine, "_all", session):
        answers, _, error = generate_beside(engine, lambda: engine.refit(1))
    ahead = engine._llm.llm_engine.engine_core.engine_core.batch_queue is not None
    return {f"batches scheduled ahead: {ahead}": True, **came_upon(engine, a, b, answers, error)}


def came_upon(engine: VllmEngine, a: str, b: str, answers: Sequence[Generated], error: str) -> dict[str, bool]:
    """Four requests run at once and two wait; log-probabilities are those of the weights of each token's version."""
    recompute = engine.config.in_flight == "recompute"
    near, far = (1e-4, 1e-3) if engine.config.precision == "float32" else (0.5, 1.0)
    found = {"no error": not error and all(len(x.token_ids) == LENGTH for x in answers)}
    counts = [(x.versions.count(0), x.versions.count(1)) for x in answers]
    found[f"versions only grow: {counts}"] = all(list(x.versions) == sorted(x.versions) for x in answers)
    found["four are mixed"] = all(old >= 8 and new >= 1 for old, new in counts[:4])
    found["what waited is of the second version alone"] = counts[4:] == [(0, LENGTH)] * 2
    first, second = errors(a, answers, 0), errors(b, answers, 1)
    found[f"first version {first}"] = max(first) < near
    found[f"requests that began under the second version {second}"] = max(second[4:]) < near
    mixed = max(second[:4]) < near if recompute else min(second[:4]) > far
    found[f"second version over {'its own' if recompute else 'old'} keys and values {second}"] = mixed
    return found


def parts_are_whole(parts: dict[str, float]) -> bool:
    named = {"agree", "begin", "transfer", "verify", "commit", "call", "caches", "resume"}
    return named <= set(parts) and all(s >= 0 for s in parts.values()) and 0 < sum(parts.values()) < 5


def refused(engine: VllmEngine, a: str, b: str) -> dict[str, bool]:
    """Without leave to go on over old keys and values, a refit in flight fails, and requests end with the reason."""
    with trained(engine, FileSource(b), RefitOptions(deadline_s=30)) as refit:
        answers, said, error = generate_beside(engine, lambda: raised(RefitError, lambda: refit(1)))
    return {
        f"refit: {said}": "the KV cache still holds blocks that weights of version 0 computed" in said,
        f"generate: {error}": "the generator refuses to generate" in error and not answers,
        "nothing is left": engine._stepper.num_running == 0,
    }


if __name__ == "__main__":
    kinds = {f"dense-{mode}": Kind("Qwen3", engine={"in_flight": mode}) for mode in MODES}
    landed = {f"landed-{mode}": landed_in_flight for mode in MODES[:2]}
    answer({"keep": in_flight, "recompute": in_flight, "refuse": refused, **landed}, kinds, fresh=False)
