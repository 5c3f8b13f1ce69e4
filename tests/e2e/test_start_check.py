"""A generator's layout that does not say what its loader does: the engine's own load of the checkpoint tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nemo_rl.generator import landing
from nemo_rl.generator.engine import VllmEngine
from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.errors import RefitError
from nemo_rl.refit.trace import Trace
from tests.e2e.engines import PROMPTS, FileSource, answer, check, equal, observe, raised, run, trained

pytestmark = pytest.mark.timeout(240)
OPTIONS = RefitOptions(deadline_s=30, verify_against_checkpoint=True)
BYTES = "version 0 brings other bytes"
ANSWERS = "version 0 answers otherwise"  # where kernels keep their weights to themselves


def test_what_an_engine_loaded_itself_comes_again_and_changes_nothing(tmp_path: Path) -> None:
    check(run(__file__, tmp_path, ["start moe48 float32 1"]))


# ---- inside that process


def start(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    fresh_a, found = observe(engine), {}
    with trained(engine, FileSource(a), OPTIONS) as refit:
        refit(0)
        found["a sound start is served"] = equal(observe(engine), fresh_a)
    pairs = {
        "gate and up": (".gate_proj.", ".up_proj.", BYTES),
        "two experts": (".experts.0.", ".experts.1.", BYTES),
        "k and v": (".k_proj.", ".v_proj.", ANSWERS),
    }
    for version, (what, (one, two, text)) in enumerate(pairs.items()):
        with mock.patch.object(landing, "trace_twin", mistaken(landing.trace_twin, one, two)):
            found[f"{what} swapped"] = text in refusal(engine, a)
        served = raised(RuntimeError, lambda: engine.generate(PROMPTS, 1, 2, 0.0))
        found[f"{what}: nothing is served"] = "refuses" in served and "version 0" in served
        with trained(engine, FileSource(a), OPTIONS) as refit:
            refit(version + 1)
            found[f"{what}: a sound session recovers"] = equal(observe(engine), fresh_a)
    with mock.patch.object(landing.VllmLanding, "close", replacing(landing.VllmLanding.close)):
        found["storage that is replaced"] = "embed_tokens.weight was replaced while" in refusal(engine, a)
    found["another checkpoint"] = BYTES in refusal(engine, b)
    with trained(engine, FileSource(b), OPTIONS) as refit:
        refit(0)
        found["an engine that took a refit is not compared"] = equal(observe(engine), fresh_b)
    return found


def refusal(engine: VllmEngine, path: str) -> str:
    """Why an engine that is as it loaded refuses version 0."""
    engine._as_loaded, engine.weight_version = True, 0
    with trained(engine, FileSource(path), OPTIONS) as refit:
        return raised(RefitError, lambda: refit(0))


def replacing(close: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """The fault: an engine that gives a parameter other storage in the middle of an update."""

    def closed(self: Any, unit: int) -> None:
        close(self, unit)
        embedding = self._tensor("model.embed_tokens.weight")
        embedding.data = embedding.data.clone()

    return closed


def mistaken(trace: Callable[..., Trace], one: str, two: str) -> Callable[..., Trace]:
    """The fault: of two tensors of one shape, each row takes the other."""

    def other(fqn: str) -> str:
        return fqn.replace(one, two) if one in fqn else fqn.replace(two, one)

    def traced(*args: Any) -> Trace:
        found = trace(*args)
        return replace(found, rows=tuple(replace(row, fqn=other(row.fqn)) for row in found.rows))

    return traced


if __name__ == "__main__":
    answer({"start": start})
